"""Plots importance (the paper's figures 3, 10 and 11) and weight change (figures 4, 9 and 12) by layer.

The functions take parts of analysis.json by name and return matplotlib figures; `writer.save` writes one.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from imm_jax.report.figures import arrange, get_hatch, get_series_style, shorten

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

# Order of importance -> label.
_SUMS = {1: "sum of |g W|", 2: "sum of |g W - 1/2 sum of (g_j W)^2|"}


def plot_importance(results: Mapping[str, Mapping[str, Any]]) -> "Figure":
  """Plots layer importance on one or several tasks and corpora, a panel each, by module.

  Args:
    results: name -> {"order": 1 or 2, "layers": [L], "modules": {"q_proj": [L], ...}}.
  """
  from matplotlib.figure import Figure  # imported here because most importers of this module draw nothing

  figure, handles = Figure(), {}
  for axes, (name, scores) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True):
    bottom = np.zeros(len(scores["layers"]))
    for i, (module, values) in enumerate(scores["modules"].items()):
      handles[module] = axes.bar(range(len(values)), values, bottom=bottom, color=get_series_style(i)[0],
                                 hatch=get_hatch(i), edgecolor="white", linewidth=0)
      bottom += values
    _label_axes(axes, f"importance on\n{shorten(name)}", _SUMS[scores["order"]], layers=len(bottom))
  arrange(figure, list(handles.items()), title_lines=2)
  return figure


def plot_weight_change(results: Mapping[str, Mapping[str, Any]]) -> "Figure":
  """Plots one or several weight changes by layer, as shares of all layers, and by module.

  Args:
    results: name -> {"layers": [L], "share": [L], "modules": {"q_proj": [L], ...}}.
  """
  from matplotlib.figure import Figure

  figure, legend = Figure(), []
  by_layer, share, by_module = figure.subplots(1, 3)
  for i, (name, change) in enumerate(results.items()):
    style = dict(zip(("color", "marker"), get_series_style(i), strict=True))
    line, = by_layer.plot(change["layers"], **style)
    legend.append((shorten(name), line))
    share.plot(100 * np.asarray(change["share"]), **style)
    by_module.plot([sum(values) for values in change["modules"].values()], linestyle="", **style)
    by_module.set_xticks(range(len(change["modules"])), [module.removesuffix("_proj") for module in change["modules"]])
  layers = max(len(change["layers"]) for change in results.values())
  _label_axes(by_layer, "weight change by layer", "change (sum of Frobenius norms)", layers=layers)
  _label_axes(share, "each layer's share", "% of all layers' change", layers=layers)
  share.axhline(100 / layers, color="#555555", linestyle=":")
  _label_axes(by_module, "weight change by module", "change, summed over layers")
  by_module.margins(x=0.1)
  arrange(figure, legend)
  return figure


def _label_axes(axes: "Axes", title: str, y: str, *, layers: int = 0) -> None:
  """Labels the axes; with `layers` the x axis is that of layers."""
  from matplotlib.ticker import MaxNLocator

  axes.set(ylabel=y, ylim=(0, 1.1 * axes.dataLim.y1 or 1))
  # A fixed y keeps matplotlib from moving the title above the y axis' exponent, where it would be clipped.
  axes.set_title(title, fontsize=11, y=1, parse_math=False)
  axes.ticklabel_format(axis="y", scilimits=(-2, 4))  # wider labels would reach into the next panel
  axes.grid(alpha=0.3)
  axes.set_axisbelow(True)
  if layers:
    axes.set(xlabel="layer", xlim=(-0.6, layers - 0.4))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
