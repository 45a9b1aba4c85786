"""Draws the curves of a run and of a comparison with matplotlib.

The colors are those of M. Okabe and K. Ito, which color-blind readers can distinguish; markers differ too, for print.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from imm_jax.statistics.accuracy import Accuracy

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

# Kind of model -> color, marker, name.
MODELS = {"base": ("#000000", "s", "base model"), "sft": ("#D55E00", "o", "after SFT"),
          "ema": ("#009E73", "P", "average over SFT"), "merged": ("#0072B2", "^", "after merging")}
METHODS = {"imm": ("#0072B2", "^"), "iimm": ("#56B4E9", "v"), "star": ("#D55E00", "o"),
           "data_mixture": ("#E69F00", "D"), "data_accumulation": ("#009E73", "P"), "real": ("#CC79A7", "X"),
           "wise_ft": ("#E69F00", "s"), "lines": ("#56B4E9", "s"), "rest_em": ("#D55E00", "s"),
           "l2_sp": ("#000000", "s"), "kl": ("#009E73", "s"), "ema": ("#CC79A7", "s"), "lora": ("#000000", "h")}
_OTHER = ("#666666", "*")
_INTERVENTIONS = {"gradient_decay": "<", "gradient_clipping": ">", "weight_masking": "d"}
# Colors and markers of curves that do not belong to a method.
SERIES = (("#0072B2", "^"), ("#D55E00", "o"), ("#009E73", "s"), ("#CC79A7", "X"), ("#E69F00", "D"), ("#000000", "P"),
          ("#56B4E9", "v"), ("#F0E442", "*"))
_HATCHES = ("", "//", "..", "\\\\", "xx", "--", "++", "oo")
_LINES = ("-", "--", ":", "-.")
_WIDTH, _HEIGHT, _ROW = 4.4, 3.3, 0.195  # inches of a panel, and of a row of its legend
_MAX_NAME = 32


class Curve(NamedTuple):
  """Describes a curve: its points, and the bounds of their intervals if known."""

  label: str
  color: str
  marker: str
  dash: str
  x: tuple[float, ...]
  y: tuple[float, ...]
  low: tuple[float, ...] = ()
  high: tuple[float, ...] = ()


class Panel(NamedTuple):
  """Describes curves in one pair of axes.

  `span` fixes the limits of the y axis, `named` shows a legend even for a single curve, and `counts` marks x as whole
  numbers, such as rounds.
  """

  title: str
  x: str
  y: str
  lines: tuple[Curve, ...]
  level: float | None = None
  shares: bool = False
  log2: bool = False
  span: tuple[float, float] | None = None
  named: bool = False
  counts: bool = True


class Bars(NamedTuple):
  """Describes stacked horizontal bars: their names, and name of part -> its length in every bar."""

  x: str
  names: tuple[str, ...]
  parts: dict[str, tuple[float, ...]]


def draw(*panels: Panel) -> "Figure":
  """Draws panels side by side, with one legend below them."""
  from matplotlib.figure import Figure  # imported here because it is slow, and many commands draw nothing

  figure = Figure()
  handles = {}
  for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
    handles |= _draw_panel(axes, panel)
  arrange(figure, list(handles.items()) if len(handles) > 1 or panels[0].named else ())
  return figure


def arrange(figure: "Figure", legend: Sequence[tuple[str, Any]], *, title_lines: int = 1) -> None:
  """Arranges the panels of a row and one legend below them, without a layout engine, which would draw twice.

  Args:
    figure: a figure with subplots side by side.
    legend: label and artist of each entry; empty for no legend.
    title_lines: number of lines of the tallest title.
  """
  width, rows = _WIDTH * len(figure.axes) + 0.3, 0
  if legend:
    labels, handles = zip(*legend, strict=True)
    columns = min(len(labels), max(1, int(width / (0.5 + 0.07 * max(map(len, labels))))))
    rows = -(-len(labels) // columns)
    shown = figure.legend(handles, labels, loc="lower center", ncols=columns, frameon=False, fontsize=9)
    for text in shown.get_texts():
      text.set_parse_math(False)  # names may contain dollar signs
  height = _HEIGHT + _ROW * (rows + title_lines - 1) + 0.1
  figure.set_size_inches(width, height)
  figure.subplots_adjust(left=0.72 / width, right=1 - 0.12 / width, top=1 - (0.14 + _ROW * title_lines) / height,
                         bottom=(0.6 + _ROW * rows) / height, wspace=0.26)


def _draw_panel(axes: "Axes", panel: Panel) -> dict[str, object]:
  from matplotlib.ticker import MaxNLocator

  handles = {}
  # Offset points at the same x, so that their intervals do not hide each other.
  spread = 0.0 if panel.log2 else min(0.06, 0.3 / max(1, len(panel.lines)))
  for i, line in enumerate(panel.lines):
    error = [[y - a for y, a in zip(line.y, line.low, strict=True)],
             [b - y for y, b in zip(line.y, line.high, strict=True)]] if line.low else None
    x = [x + spread * (i - (len(panel.lines) - 1) / 2) for x in line.x] if line.low else line.x
    handles[line.label] = axes.errorbar(x, line.y, yerr=error, color=line.color, marker=line.marker,
                                        linestyle=line.dash, capsize=3, markersize=5, linewidth=1.4)
  if panel.level is not None:
    axes.axhline(panel.level, color="#000000", linestyle=":", linewidth=1)
  axes.set(xlabel=panel.x, ylabel=panel.y)
  axes.set_title(panel.title, fontsize=11, parse_math=False)  # names may contain dollar signs
  if panel.shares:
    top = _choose_top(panel)
    axes.set_ylim(-0.02 * top, 1.02 * top)
  elif panel.span:
    axes.set_ylim(*panel.span)
  if panel.log2:
    ticks = sorted({x for line in panel.lines for x in line.x})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
  elif panel.counts:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    places = [x for line in panel.lines for x in line.x]
    if max(places) - min(places) < 1:  # otherwise matplotlib places ticks between integers
      axes.set_xlim(min(places) - 0.6, max(places) + 0.6)
  axes.grid(alpha=0.3)
  return handles


def _choose_top(panel: Panel) -> float:
  """Chooses the largest share of an axis that begins at 0: 1, or where all shares are small the next tenth."""
  highest = max((y for line in panel.lines for y in (line.high or line.y)), default=1.0)
  return 1.0 if highest > 0.5 else max(0.1, math.ceil(10 * highest) / 10)


def accuracy_line(label: str, style: tuple[str, str], x: Sequence[float], y: Sequence[Accuracy], dash: str = "-",
                  ) -> Curve:
  """Makes a curve of accuracies with their intervals."""
  return Curve(label, *style, dash, tuple(x), tuple(a.value for a in y), tuple(a.low for a in y),
               tuple(a.high for a in y))


def draw_bars(data: Bars) -> "Figure":
  """Draws stacked horizontal bars."""
  from matplotlib.figure import Figure

  columns, margin = 3, 0.2 + 0.075 * max(map(len, data.names))
  width, height = margin + 0.8 * _WIDTH, 0.62 + _ROW * -(-len(data.parts) // columns) + 0.28 * len(data.names)
  figure = Figure(figsize=(width, height))
  axes = figure.subplots()
  left = [0.0] * len(data.names)
  for i, (part, values) in enumerate(data.parts.items()):
    axes.barh(range(len(data.names)), values, left=left, color=get_series_style(i)[0], hatch=get_hatch(i),
              edgecolor="white", linewidth=0, height=0.7, label=part)
    left = [a + b for a, b in zip(left, values, strict=True)]
  axes.set_yticks(range(len(data.names)), data.names, fontsize=9, parse_math=False)
  axes.invert_yaxis()
  axes.set_xlabel(data.x)
  axes.grid(axis="x", alpha=0.3)
  axes.set_axisbelow(True)
  figure.legend(*axes.get_legend_handles_labels(), loc="upper center", ncols=columns, frameon=False, fontsize=9)
  figure.subplots_adjust(left=margin / width, right=1 - 0.2 / width, bottom=0.5 / height,
                         top=1 - (0.12 + _ROW * -(-len(data.parts) // columns)) / height)
  return figure


def get_method_style(method: str, intervention: str = "none", i: int = 0) -> tuple[str, str]:
  """Returns color and marker of a method's i-th curve; interventions in SFT have other markers of the same color.

  The marker changes too once all line styles are used.
  """
  color, marker = METHODS.get(method, _OTHER)
  return color, next_marker(_INTERVENTIONS.get(intervention, marker), i // len(_LINES))


def next_marker(marker: str, i: int) -> str:
  """Returns the i-th marker of the cycle of markers that begins with this one.

  >>> next_marker("o", 0), next_marker("o", 1)
  ('o', '^')
  """
  markers = [marker, *(other for _, other in SERIES if other != marker)]
  return markers[i % len(markers)]


def get_series_style(i: int) -> tuple[str, str]:
  """Returns color and marker of the i-th curve; when the colors repeat, the markers change."""
  return SERIES[i % len(SERIES)][0], SERIES[(i + i // len(SERIES)) % len(SERIES)][1]


def get_hatch(i: int) -> str:
  """Returns the i-th hatch pattern of bars, for print."""
  return _HATCHES[i % len(_HATCHES)]


def get_dash(i: int) -> str:
  """Returns the i-th line style."""
  return _LINES[i % len(_LINES)]


def shorten(name: str) -> str:
  """Shortens a long name, such as a path, to its end.

  >>> shorten("runs/tiny"), shorten("/home/somebody/runs/tiny/round_0/sft")
  ('runs/tiny', '...ebody/runs/tiny/round_0/sft')
  """
  return name if len(name) <= _MAX_NAME else f"...{name[3 - _MAX_NAME:]}"


def round_line(values: Mapping[int, float], label: str, style: tuple[str, str], dash: str = "-") -> Curve:
  """Makes a curve of one number for each round."""
  return Curve(label, *style, dash, tuple(values), tuple(values.values()))
