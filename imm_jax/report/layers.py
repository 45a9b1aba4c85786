"""Figures by layer: importance (the paper's figures 3, 10 and 11) and weight change (figures 4, 9 and 12).

Each takes what analysis.json holds, by name, and gives a matplotlib figure; `writer.save` writes one.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from imm_jax.report.figures import arrange, hatch, series, short

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

# Importance by its order.
_SUMS = {1: "sum of |g W|", 2: "sum of |g W - 1/2 sum of (g_j W)^2|"}


def importance(found: Mapping[str, Mapping[str, Any]]) -> "Figure":
  """Layer importance on one or several tasks and corpora, side by side: a panel each, by module.

  Args:
    found: name -> {"order": 1 or 2, "layers": [L], "modules": {"q_proj": [L], ...}}.
  """
  from matplotlib.figure import Figure  # late: most of what imports this draws nothing

  figure, handles = Figure(), {}
  for axes, (name, scores) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
    bottom = np.zeros(len(scores["layers"]))
    for i, (module, values) in enumerate(scores["modules"].items()):
      handles[module] = axes.bar(range(len(values)), values, bottom=bottom, color=series(i)[0], hatch=hatch(i),
                                 edgecolor="white", linewidth=0)
      bottom += values
    _describe(axes, f"importance on\n{short(name)}", _SUMS[scores["order"]], layers=len(bottom))
  arrange(figure, list(handles.items()), title_lines=2)
  return figure


def weight_change(found: Mapping[str, Mapping[str, Any]]) -> "Figure":
  """How far layers have moved in one or several changes: by layer, as shares of all layers, and by module.

  Args:
    found: name -> {"layers": [L], "share": [L], "modules": {"q_proj": [L], ...}}.
  """
  from matplotlib.figure import Figure

  figure, legend = Figure(), []
  by_layer, share, by_module = figure.subplots(1, 3)
  for i, (name, change) in enumerate(found.items()):
    style = dict(zip(("color", "marker"), series(i), strict=True))
    line, = by_layer.plot(change["layers"], **style)
    legend.append((short(name), line))
    share.plot(100 * np.asarray(change["share"]), **style)
    by_module.plot([sum(values) for values in change["modules"].values()], linestyle="", **style)
    by_module.set_xticks(range(len(change["modules"])), [module.removesuffix("_proj") for module in change["modules"]])
  layers = max(len(change["layers"]) for change in found.values())
  _describe(by_layer, "weight change by layer", "change (sum of Frobenius norms)", layers=layers)
  _describe(share, "each layer's share", "% of all layers' change", layers=layers)
  share.axhline(100 / layers, color="#555555", linestyle=":")
  _describe(by_module, "weight change by module", "change, summed over layers")
  by_module.margins(x=0.1)
  arrange(figure, legend)
  return figure


def _describe(axes: "Axes", title: str, y: str, *, layers: int = 0) -> None:
  """Names the axes; the x axis is one of so many layers, if any."""
  from matplotlib.ticker import MaxNLocator

  axes.set(ylabel=y, ylim=(0, 1.1 * axes.dataLim.y1 or 1))
  # Not above the exponent of the y axis, where matplotlib moves it and it would be cut; names may hold dollar signs.
  axes.set_title(title, fontsize=11, y=1, parse_math=False)
  axes.ticklabel_format(axis="y", scilimits=(-2, 4))  # wider labels would reach into the next panel
  axes.grid(alpha=0.3)
  axes.set_axisbelow(True)
  if layers:
    axes.set(xlabel="layer", xlim=(-0.6, layers - 0.4))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
