"""Figures by layer: importance (the paper's figures 3, 10 and 11) and weight change (figures 4, 9 and 12).

Each takes what analysis.json holds, by name, and gives a matplotlib figure; `writer.save` writes one.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

# Okabe-Ito: told apart by colour-blind readers; markers and hatches differ as well, for print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
_MARKERS = "o^sDvPX*"
_HATCHES = ("", "//", "\\\\", "..", "xx", "--", "++")
# Importance by its order.
_SUMS = {1: "sum of |g W|", 2: "sum of |g W - 1/2 sum of (g_j W)^2|"}
_WIDTH = 32


def importance(found: Mapping[str, Mapping[str, Any]]) -> "Figure":
  """Layer importance on one or several tasks and corpora, side by side: a panel each, by module.

  Args:
    found: name -> {"order": 1 or 2, "layers": [L], "modules": {"q_proj": [L], ...}}.
  """
  from matplotlib.figure import Figure  # late: most of what imports this draws nothing

  figure = Figure(figsize=(4.6 * len(found), 3.6), layout="constrained")
  for axes, (name, scores) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
    bottom = np.zeros(len(scores["layers"]))
    for i, (module, values) in enumerate(scores["modules"].items()):
      axes.bar(range(len(values)), values, bottom=bottom, color=_COLOURS[i], hatch=_HATCHES[i], edgecolor="white",
               linewidth=0, label=module)
      bottom += values
    _describe(axes, f"importance on {short(name)}", _SUMS[scores["order"]])
  _legend(figure, figure.axes[0])
  return figure


def weight_change(found: Mapping[str, Mapping[str, Any]]) -> "Figure":
  """How far layers have moved in one or several changes: by layer, as shares of all layers, and by module.

  Args:
    found: name -> {"layers": [L], "share": [L], "modules": {"q_proj": [L], ...}}.
  """
  from matplotlib.figure import Figure

  figure = Figure(figsize=(13.8, 3.6), layout="constrained")
  by_layer, share, by_module = figure.subplots(1, 3)
  for i, (name, change) in enumerate(found.items()):
    style = {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[i % len(_MARKERS)]}
    by_layer.plot(change["layers"], label=short(name), **style)
    share.plot(100 * np.asarray(change["share"]), **style)
    by_module.plot([sum(values) for values in change["modules"].values()], linestyle="", **style)
    by_module.set_xticks(range(len(change["modules"])), [module.removesuffix("_proj") for module in change["modules"]])
  _describe(by_layer, "weight change by layer", "change (sum of Frobenius norms)")
  _describe(share, "each layer's share", "% of all layers' change")
  share.axhline(100 / max(len(change["layers"]) for change in found.values()), color="#555555", linestyle=":")
  _describe(by_module, "weight change by module", "change, summed over layers", x="")
  _legend(figure, by_layer)
  return figure


def short(name: str) -> str:
  """The end of a name that is long, such as a path.

  >>> short("runs/tiny"), short("/home/somebody/runs/tiny/round_0/sft")
  ('runs/tiny', '...ebody/runs/tiny/round_0/sft')
  """
  return name if len(name) <= _WIDTH else f"...{name[3 - _WIDTH:]}"


def _describe(axes: "Axes", title: str, y: str, x: str = "layer") -> None:
  from matplotlib.ticker import MaxNLocator

  axes.set(title=title, xlabel=x, ylabel=y)
  axes.set_ylim(0, axes.get_ylim()[1] * 1.05)
  axes.grid(alpha=0.3)
  axes.set_axisbelow(True)
  if x:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _legend(figure: "Figure", axes: "Axes") -> None:
  """One for all panels, beside them."""
  figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
