"""Writes a report: the page, its figures and its tables, all in one folder."""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from imm_jax.report.markup import Plot, Section, Table, csv_of

if TYPE_CHECKING:
  from matplotlib.figure import Figure


class Plots:
  """Draws plots, and remembers those whose data have not changed since."""

  def __init__(self) -> None:
    self._drawn: dict[str, tuple[str, list[str]]] = {}

  def svg(self, sections: Sequence[Section], *, draw: bool = True) -> dict[str, list[str]]:
    """SVG of each piece of every plot, by name; without `draw` as they were last drawn, if they were."""
    found = {}
    for plot in _plots(sections):
      key = repr(plot.data)
      if draw and self._drawn.get(plot.name, ("",))[0] != key:
        self._drawn[plot.name] = key, [svg(plot.draw(piece)) for piece in plot.data]
      if plot.name in self._drawn and (len(self._drawn[plot.name][1]) == len(plot.data)):
        found[plot.name] = self._drawn[plot.name][1]
    return found


def write(out: Path, html: str, sections: Sequence[Section]) -> None:
  """Writes index.html, a CSV for each table, and SVG and PNG for each plot, into a new folder."""
  out.mkdir(parents=True)
  write_page(out / "index.html", html)
  for plot in _plots(sections):
    save(plot.draw(*plot.data), out, plot.name)
  for part in sections:
    for piece in part.parts:
      if isinstance(piece, Table):
        (out / f"{piece.name}.csv").write_text(csv_of(piece), encoding="utf-8", errors="backslashreplace")


def write_page(path: Path, html: str) -> None:
  """Writes the page; half a surrogate pair in a name or a config is written out."""
  path.write_text(html, encoding="utf-8", errors="backslashreplace")


def _plots(sections: Sequence[Section]) -> Iterable[Plot]:
  return (piece for part in sections for piece in part.parts if isinstance(piece, Plot))


def save(figure: "Figure", folder: Path, name: str) -> None:
  """Writes NAME.png and NAME.svg into a folder; the same figure gives the same bytes."""
  figure.savefig(folder / f"{name}.png", dpi=150, metadata={"Software": None})
  (folder / f"{name}.svg").write_text(svg(figure), encoding="utf-8")


def svg(figure: "Figure") -> str:
  """The figure as an <svg> element; the same figure gives the same text."""
  import matplotlib  # late: a command that draws nothing does not wait for it

  image = io.StringIO()
  with matplotlib.rc_context({"svg.hashsalt": "imm_jax", "svg.fonttype": "none"}):
    figure.savefig(image, format="svg", metadata={"Date": None, "Creator": None})
  text = image.getvalue()
  return text[text.index("<svg"):]
