"""Writes the page, figures and tables of a report into a folder."""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from imm_jax.report.markup import Plot, Section, Table, to_csv

if TYPE_CHECKING:
  from matplotlib.figure import Figure


class Plots:
  """Draws plots, and caches those whose data do not change."""

  def __init__(self) -> None:
    self._drawn: dict[str, tuple[str, list[str]]] = {}

  def svg(self, sections: Sequence[Section], *, draw: bool = True) -> dict[str, list[str]]:
    """Returns name -> SVG of each piece of every plot; without `draw` only from the cache."""
    svgs = {}
    for plot in _iterate_plots(sections):
      key = repr(plot.data)
      if draw and self._drawn.get(plot.name, ("",))[0] != key:
        self._drawn[plot.name] = key, [to_svg(plot.draw(piece)) for piece in plot.data]
      if plot.name in self._drawn and (len(self._drawn[plot.name][1]) == len(plot.data)):
        svgs[plot.name] = self._drawn[plot.name][1]
    return svgs


def write(out: Path, html: str, sections: Sequence[Section]) -> None:
  """Writes index.html, a CSV of each table, and SVG and PNG of each plot into a new folder."""
  out.mkdir(parents=True)
  write_page(out / "index.html", html)
  for plot in _iterate_plots(sections):
    save(plot.draw(*plot.data), out, plot.name)
  for part in sections:
    for piece in part.parts:
      if isinstance(piece, Table):
        (out / f"{piece.name}.csv").write_text(to_csv(piece), encoding="utf-8", errors="backslashreplace")


def write_page(path: Path, html: str) -> None:
  """Writes the page, escaping lone surrogates in names or configs."""
  path.write_text(html, encoding="utf-8", errors="backslashreplace")


def _iterate_plots(sections: Sequence[Section]) -> Iterable[Plot]:
  return (piece for part in sections for piece in part.parts if isinstance(piece, Plot))


def save(figure: "Figure", folder: Path, name: str) -> None:
  """Writes NAME.png and NAME.svg into a folder, with the same bytes for the same figure."""
  figure.savefig(folder / f"{name}.png", dpi=150, metadata={"Software": None})
  (folder / f"{name}.svg").write_text(to_svg(figure), encoding="utf-8")


def to_svg(figure: "Figure") -> str:
  """Converts a figure to an <svg> element, with the same text for the same figure."""
  import matplotlib  # imported here because it is slow, and many commands draw nothing

  image = io.StringIO()
  with matplotlib.rc_context({"svg.hashsalt": "imm_jax", "svg.fonttype": "none"}):
    figure.savefig(image, format="svg", metadata={"Date": None, "Creator": None})
  text = image.getvalue()
  return text[text.index("<svg"):]
