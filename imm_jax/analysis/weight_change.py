"""Measures how far a model's layers have moved between two checkpoint folders (the paper's eq. 4).

Axes: L layers.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from imm_jax.errors import UserError, join_items
from imm_jax.merging.on_disk import CheckpointSource
from imm_jax.model.checkpoint_folder import read_entries
from imm_jax.model.config import PROJECTIONS, read_config
from imm_jax.model.families import FAMILIES

_MATRIX = re.compile(rf"(?:.*\.)?layers\.(\d+)\.(?:self_attn|mlp)\.({'|'.join(PROJECTIONS)})\.weight")


class LayerChange(NamedTuple):
  """Holds a weight change (eq. 4): `total`, float64 [L], is the sum over `modules`, name (`q_proj`) -> float64 [L]."""

  total: np.ndarray
  modules: dict[str, np.ndarray]

  @property
  def share(self) -> np.ndarray:
    """Returns each layer's share of the total change [L], which sums to 1; zeros if nothing has changed."""
    total = self.total.sum()
    return self.total / total if total else np.zeros_like(self.total)

  def to_json(self) -> dict[str, Any]:
    """Returns `layers`, `share` and `modules` in the form of analysis.json."""
    return {"layers": self.total.tolist(), "share": self.share.tolist(),
            "modules": {name: change.tolist() for name, change in self.modules.items()}}


def check_same_model(before: Path, after: Path) -> None:
  """Checks that two checkpoints are of the same model, reading only config.json and the headers of their files.

  Raises:
    UserError: for a folder that is no checkpoint, layers that disagree with its config.json, or different numbers of
      layers or shapes.
  """
  old, new = (_read_shapes(folder) for folder in (before, after))
  if len(old) != len(new):
    raise UserError(f"{after}: has {len(new) // len(PROJECTIONS)} layers, {before} {len(old) // len(PROJECTIONS)}; "
                    "expected two checkpoints of one model")
  for name, shape in old.items():
    if new[name] != shape:
      raise UserError(f"{after}: {name} has shape {new[name]}, in {before} {shape}; expected two checkpoints of one "
                      "model")


def _read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
  """Reads the shapes of the matrices of every layer, by names such as `layers.0.q_proj`."""
  layers, shapes = read_config(folder).num_layers, {}
  for name, entry in read_entries(folder).items():
    if match := _MATRIX.fullmatch(name):
      if not jnp.issubdtype(entry.dtype, jnp.floating):
        raise UserError(f"{folder}: {name} has dtype {entry.dtype}; expected weights in BF16, F16 or F32")
      shapes["layers.{}.{}".format(*match.groups())] = entry.shape
  expected = {f"layers.{layer}.{module}" for layer in range(layers) for module in PROJECTIONS}
  if problems := [f"missing {name}" for name in expected - shapes.keys()] + [
      f"unknown {name}" for name in shapes.keys() - expected]:
    raise UserError(f"{folder}: weights do not fit config.json with its {layers} layers: "
                    f"{join_items(sorted(problems))}")
  return shapes


def weight_change(before: Path, after: Path) -> LayerChange:
  """Sums the Frobenius norms of W - W' over the q, k, v, o, gate, up and down weights of each layer (eq. 4).

  Both checkpoints are read once, in blocks of half a million entries, so that memory does not grow with the model; they
  may differ in dtype and vocabulary. Differences and their squares are float64.

  Args:
    before: an HF checkpoint folder.
    after: another one with the same layers.

  Raises:
    UserError: for a folder that is no checkpoint, different numbers of layers or shapes, a layer that lacks one of
      these weights, or weights that are not finite.
  """
  matrices = lambda name: _MATRIX.fullmatch(name) is not None
  with CheckpointSource({"before": before, "after": after}, keep=matrices) as source:
    layer_and_module = {name: _MATRIX.fullmatch(name).groups() for name in source.names}
    layers = 1 + max((int(layer) for layer, _ in layer_and_module.values()), default=-1)
    missing = {(str(n), module) for n in range(layers) for module in PROJECTIONS} - set(layer_and_module.values())
    if missing or not layers:
      layer, module = min(missing, default=("0", "q_proj"))
      raise UserError(f"{before}: layer {layer} has no {module}.weight; expected a checkpoint of one of the "
                      f"families {', '.join(FAMILIES)}")
    modules = {module: np.zeros(layers) for module in PROJECTIONS}
    for name, squares in source.reduce(_squared_distance, np.add):
      layer, module = layer_and_module[name]
      modules[module][int(layer)] = np.sqrt(squares)
  total = sum(modules.values())
  if not np.isfinite(total).all():
    raise UserError(f"{before}, {after}: layer {int(np.argmin(np.isfinite(total)))} has weights that are not finite, "
                    "or differences too large for float64")
  return LayerChange(total, modules)


def _squared_distance(tensors: Sequence[jax.Array]) -> jax.Array:
  before, after = (t.astype(jnp.float64) for t in tensors)
  return jnp.sum(jnp.square(after - before))


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
  """Computes Spearman's rank correlation of as many values, from -1 to 1; ties share their mean rank.

  Between layer importance and weight change it quantifies the mismatch that the paper shows by plots (section 3.2):
  near 1 if SFT moves the important layers, near or below 0 if it moves the others.

  Returns:
    The correlation; None if it is not defined, for fewer than two values or if all of one sequence are equal.

  >>> spearman([1, 2, 3], [10, 20, 15]), spearman([1, 2, 2], [3, 1, 1]), spearman([1, 2], [5, 5])
  (0.5, -1.0, None)
  """
  x, y = (_mean_ranks(np.asarray(values, np.float64)) - (1 + len(a)) / 2 for values in (a, b))
  norm = float(np.sqrt((x @ x) * (y @ y)))
  return round(float(x @ y) / norm, 12) if norm else None


def _mean_ranks(values: np.ndarray) -> np.ndarray:
  _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
  last = np.cumsum(counts)
  return (last - (counts - 1) / 2)[inverse]
