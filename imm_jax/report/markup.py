"""Renders the page's parts: tables, plots, and the page itself with its security policy."""

import base64
import csv
import hashlib
import html
import importlib.resources
import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from imm_jax.statistics.accuracy import Accuracy

if TYPE_CHECKING:
  from matplotlib.figure import Figure

  Cell = "str | int | float | Accuracy | Difference | Link | None"

# Tables with more rows are folded.
_LONG = 16
# Number of intervals in a row above which they stand below their values.
_MANY = 5

# Identifies pages written by this package.
GENERATOR = '<meta name="generator" content="imm_jax">'


class Link(NamedTuple):
  """Holds a hyperlink; a CSV has only its text."""

  text: str
  href: str


class Difference(NamedTuple):
  """Holds a difference between two models with its 95 % interval; significant ones are marked by a star."""

  value: float
  n: int
  low: float
  high: float
  significant: bool


class Table(NamedTuple):
  """Holds a table; an `Accuracy` or a `Difference` is shown with its interval and takes four columns in the CSV."""

  name: str
  caption: str
  head: Sequence[str]
  rows: Sequence[Sequence["Cell"]]


class Plot(NamedTuple):
  """Describes a plot that is drawn on demand, deterministically from its data.

  The page has an image of each piece of the data, `draw(piece)`, which stack on narrow screens; the files have a single
  image of all, `draw(*data)`.
  """

  name: str
  alt: str
  draw: Callable[..., "Figure"]
  data: tuple[Any, ...]


class Markup(str):
  """Holds HTML that needs no escaping."""


class Section(NamedTuple):
  """Holds a heading and the parts below it; strings are paragraphs of plain text."""

  id: str
  title: str
  parts: Sequence[Table | Plot | Markup | str]


def to_csv(table: Table) -> str:
  """Formats a table as CSV with a header.

  >>> to_csv(Table("t", "", ["model", "a"], [["base", Accuracy(0.5, 4, 0.15, 0.85)], ["sft", None]]))
  'model,a,a low,a high,a n\\nbase,0.5,0.15,0.85,4\\nsft,,,,\\n'
  """
  wide = [any(isinstance(row[i], Accuracy | Difference) for row in table.rows) for i in range(len(table.head))]
  out = io.StringIO()
  writer = csv.writer(out, lineterminator="\n")
  writer.writerow([name for head, is_wide in zip(table.head, wide, strict=True)
                   for name in ((head, f"{head} low", f"{head} high", f"{head} n") if is_wide else (head,))])
  for row in table.rows:
    writer.writerow([value for cell, is_wide in zip(row, wide, strict=True) for value in _csv_values(cell, is_wide)])
  return out.getvalue()


def _csv_values(cell: "Cell", is_wide: bool) -> tuple[Any, ...]:
  if isinstance(cell, Accuracy | Difference):
    return cell.value, cell.low, cell.high, cell.n
  if isinstance(cell, Link):
    cell = cell.text
  return (cell, "", "", "") if is_wide else (cell,)


def _render_table(table: Table) -> str:
  caption = f"{html.escape(table.caption)} {_download_link(f'{table.name}.csv', 'text/csv', to_csv(table))}"
  head = "".join(f'<th scope="col">{html.escape(h).replace("_", "_<wbr>")}</th>' for h in table.head)
  rows = "".join('<tr><th scope="row">' + "</th><td>".join(map(_render_cell, row[:2]))
                 + "".join(f"</td><td>{_render_cell(cell)}" for cell in row[2:]) + "</td></tr>" for row in table.rows)
  intervals = sum(isinstance(cell, Accuracy | Difference) for row in table.rows[:1] for cell in row)
  wide = ' class="wide"' * (intervals > _MANY)
  scroll = (f'<div class="scroll" role="region" aria-label="{html.escape(table.caption)}" tabindex="0"><table{wide}>'
            f'<caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>')
  if len(table.rows) <= _LONG:
    return scroll
  return f"<details><summary>{html.escape(table.caption)}: {len(table.rows)} rows</summary>{scroll}</details>"


def _render_cell(cell: "Cell") -> str:
  if cell is None:
    return ""
  if isinstance(cell, Accuracy):
    return f"{cell.value:.3f} <small>[{cell.low:.3f}, {cell.high:.3f}]</small>"
  if isinstance(cell, Difference):
    value = f"<b>{cell.value:+.3f}*</b>" if cell.significant else f"{cell.value:+.3f}"
    return f"{value} <small>[{cell.low:+.3f}, {cell.high:+.3f}]</small>"
  if isinstance(cell, Link):
    return f'<a href="{html.escape(cell.href)}">{html.escape(cell.text)}</a>'
  if isinstance(cell, int):
    return f"{cell:,}"
  if isinstance(cell, float):
    return f"{cell:,.0f}" if abs(cell) >= 100 else f"{cell:#.3g}"
  return html.escape(str(cell))


def _download_link(name: str, kind: str, content: str) -> str:
  data = base64.b64encode(content.encode(errors="backslashreplace")).decode()
  return f'<a download="{html.escape(name)}" href="data:{kind};base64,{data}">CSV</a>'


def render_section(part: Section, svgs: Mapping[str, Sequence[str]]) -> str:
  """Renders a section as HTML; `drawn` has the SVG of plots by name, except for those that are drawn later."""
  pieces = []
  for piece in part.parts:
    if isinstance(piece, Table):
      pieces.append(_render_table(piece))
    elif isinstance(piece, Plot):
      pieces.append(_render_plot(piece, svgs.get(piece.name, ())))
    else:
      pieces.append(piece if isinstance(piece, Markup) else f"<p>{html.escape(piece)}</p>")
  return f'<section id="{part.id}"><h2>{html.escape(part.title)}</h2>{"".join(pieces)}</section>'


def _render_plot(plot: Plot, pictures: Sequence[str]) -> str:
  if not pictures:
    return "<p>The figure is drawn later: during a run, figures take a small share of its time.</p>"
  images = "".join(f'<img alt="{html.escape(plot.alt)}" src="data:image/svg+xml;base64,'
                   f'{base64.b64encode(svg.encode()).decode()}">' for svg in pictures)
  return f'<div class="plots">{images}</div>'


def render_page(title: str, top: str, sections: Sequence[str], links: Sequence[tuple[str, str]], *, bottom: str = "",
                reload_s: int = 0) -> str:
  """Renders a whole page; its content security policy allows only its own style and script.

  Args:
    title: title in plain text.
    top: HTML above the sections.
    sections: HTML of each section.
    links: (id, title) of each section.
    bottom: HTML below the sections.
    reload_s: seconds after which the page checks for a newer version; 0 for never.
  """
  folder = importlib.resources.files("imm_jax.report")
  style, script = ((folder / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
  policy = (f"default-src 'none'; img-src data:; style-src '{_csp_hash(style)}'; script-src '{_csp_hash(script)}'; "
            "base-uri 'none'; form-action 'none'")
  nav = "".join(f'<a href="#{name}">{html.escape(text)}</a>' for name, text in links)
  return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">{GENERATOR}<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">
<title>{html.escape(title)}</title><style>{style}</style></head>
<body data-reload="{reload_s}"><header>{top}<nav aria-label="Sections">{nav}</nav></header>
<main>
{"".join(sections)}
</main>
{bottom}<script>{script}</script></body></html>
"""


def _csp_hash(text: str) -> str:
  return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
