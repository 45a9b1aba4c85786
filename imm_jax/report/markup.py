"""The page's parts: tables, plots, the shell with its security policy."""

import base64
import csv
import hashlib
import html
import importlib.resources
import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from imm_jax.evaluation import Accuracy

if TYPE_CHECKING:
  from matplotlib.figure import Figure

  Cell = "str | int | float | Accuracy | Difference | Link | None"

# Rows of a table that is folded.
_LONG = 16

# By which a page is known to be one of this package.
GENERATOR = '<meta name="generator" content="imm_jax">'


class Link(NamedTuple):
  """Text that leads somewhere; a CSV has the text."""

  text: str
  href: str


class Difference(NamedTuple):
  """A difference between two models with its 95 % interval; a star marks one that is real."""

  value: float
  n: int
  low: float
  high: float
  real: bool


class Table(NamedTuple):
  """Rows of cells under a head; an `Accuracy` or a `Difference` is shown with its interval, and takes four columns of
  the CSV."""

  name: str
  caption: str
  head: Sequence[str]
  rows: Sequence[Sequence["Cell"]]


class Plot(NamedTuple):
  """A figure that is drawn when it is needed; equal data give an equal figure.

  The page has a picture of each piece of the data, `draw(piece)`, so that a phone has them one below the other; the
  files have one of all, `draw(*data)`.
  """

  name: str
  alt: str
  draw: Callable[..., "Figure"]
  data: tuple[Any, ...]


class Markup(str):
  """HTML that needs no more escaping."""


class Section(NamedTuple):
  """A heading and what stands below it; strings are paragraphs of plain text."""

  id: str
  title: str
  parts: Sequence[Table | Plot | Markup | str]


def csv_of(table: Table) -> str:
  """A table as CSV, with a line of names.

  >>> csv_of(Table("t", "", ["model", "a"], [["base", Accuracy(0.5, 4, 0.15, 0.85)], ["sft", None]]))
  'model,a,a low,a high,a n\\nbase,0.5,0.15,0.85,4\\nsft,,,,\\n'
  """
  wide = [any(isinstance(row[i], Accuracy | Difference) for row in table.rows) for i in range(len(table.head))]
  out = io.StringIO()
  writer = csv.writer(out, lineterminator="\n")
  writer.writerow([name for head, four in zip(table.head, wide, strict=True)
                   for name in ((head, f"{head} low", f"{head} high", f"{head} n") if four else (head,))])
  for row in table.rows:
    writer.writerow([value for cell, four in zip(row, wide, strict=True) for value in _values(cell, four)])
  return out.getvalue()


def _values(cell: "Cell", four: bool) -> tuple[Any, ...]:
  if isinstance(cell, Accuracy | Difference):
    return cell.value, cell.low, cell.high, cell.n
  if isinstance(cell, Link):
    cell = cell.text
  return (cell, "", "", "") if four else (cell,)


def _table(table: Table) -> str:
  caption = f"{html.escape(table.caption)} {_download(f'{table.name}.csv', 'text/csv', csv_of(table))}"
  head = "".join(f'<th scope="col">{html.escape(h)}</th>' for h in table.head)
  rows = "".join('<tr><th scope="row">' + "</th><td>".join(map(_cell, row[:2]))
                 + "".join(f"</td><td>{_cell(cell)}" for cell in row[2:]) + "</td></tr>" for row in table.rows)
  scroll = (f'<div class="scroll" role="region" aria-label="{html.escape(table.caption)}" tabindex="0"><table>'
            f'<caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>')
  if len(table.rows) <= _LONG:
    return scroll
  return f"<details><summary>{html.escape(table.caption)}: {len(table.rows)} rows</summary>{scroll}</details>"


def _cell(cell: "Cell") -> str:
  if cell is None:
    return ""
  if isinstance(cell, Accuracy):
    return f"{cell.value:.3f} <small>[{cell.low:.3f}, {cell.high:.3f}]</small>"
  if isinstance(cell, Difference):
    value = f"<b>{cell.value:+.3f}*</b>" if cell.real else f"{cell.value:+.3f}"
    return f"{value} <small>[{cell.low:+.3f}, {cell.high:+.3f}]</small>"
  if isinstance(cell, Link):
    return f'<a href="{html.escape(cell.href)}">{html.escape(cell.text)}</a>'
  if isinstance(cell, int):
    return f"{cell:,}"
  if isinstance(cell, float):
    return f"{cell:,.0f}" if abs(cell) >= 100 else f"{cell:.3g}"
  return html.escape(str(cell))


def _download(name: str, kind: str, content: str) -> str:
  data = base64.b64encode(content.encode(errors="backslashreplace")).decode()
  return f'<a download="{html.escape(name)}" href="data:{kind};base64,{data}">CSV</a>'


def section(part: Section, drawn: Mapping[str, Sequence[str]]) -> str:
  """HTML of a section; `drawn` holds the plots' SVG by name, but for those that are drawn later."""
  found = []
  for piece in part.parts:
    if isinstance(piece, Table):
      found.append(_table(piece))
    elif isinstance(piece, Plot):
      found.append(_image(piece, drawn.get(piece.name, ())))
    else:
      found.append(piece if isinstance(piece, Markup) else f"<p>{html.escape(piece)}</p>")
  return f'<section id="{part.id}"><h2>{html.escape(part.title)}</h2>{"".join(found)}</section>'


def _image(plot: Plot, pictures: Sequence[str]) -> str:
  if not pictures:
    return "<p>The figure is drawn later: while a run goes on, figures take a small share of its time.</p>"
  images = "".join(f'<img alt="{html.escape(plot.alt)}" src="data:image/svg+xml;base64,'
                   f'{base64.b64encode(svg.encode()).decode()}">' for svg in pictures)
  return f'<div class="plots">{images}</div>'


def page(title: str, top: str, sections: Sequence[str], links: Sequence[tuple[str, str]], *, bottom: str = "",
         reload_s: int = 0) -> str:
  """The whole page; its policy lets nothing in but its own style and script.

  Args:
    title: plain text.
    top: HTML above the sections.
    sections: HTML of each.
    links: (id, title) of each.
    bottom: HTML below the sections.
    reload_s: seconds after which the page looks for a newer one; 0 for never.
  """
  folder = importlib.resources.files("imm_jax.report")
  style, script = ((folder / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
  policy = (f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
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


def _hash(text: str) -> str:
  return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
