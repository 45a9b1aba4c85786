"""What the tests that try every registered method give to each; a new method is a line in OPTIONS."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from imm_jax import merging
from imm_jax.merging import registry

KEY = jax.random.key(2)
NAMES = ("layers.0.w", "layers.1.w")
# Options of each method, for two models and two layers.
OPTIONS: dict[str, dict[str, Any]] = {
    "linear": {"weights": [0.7, 0.4]}, "task_arithmetic": {"weights": [0.7, -0.4], "scale": 0.8},
    "lines": {"weights": [0.7, -0.4]}, "ties": {"weights": [0.7, 0.4], "densities": 0.6},
    "breadcrumbs": {"weights": [0.7, 0.4], "densities": 0.6, "gammas": 0.1},
    "breadcrumbs_ties": {"weights": [0.7, 0.4], "densities": 0.6, "gammas": 0.1},
    "dare_linear": {"weights": [0.7, 0.4], "densities": 0.6}, "dare_ties": {"weights": [0.7, 0.4], "densities": 0.6},
    "della": {"weights": [0.7, 0.4], "densities": 0.6}, "della_linear": {"weights": [0.7, 0.4], "densities": 0.6},
    "imm": {"base_weight": 0.4, "drop_rate": 0.3}, "dare": {"drop_rate": 0.4},
    "iimm": {"base_weight": 0.4, "drop_rate": 0.3, "importance": [1.0, 2.0]},
    "slerp": {"t": 0.3}, "nuslerp": {"weights": [0.7, 0.4]}, "multislerp": {"weights": [0.7, 0.4]},
    "karcher": {"max_iter": 2},
    "model_stock": {}, "wise_ft": {"alpha": 0.3}, "nearswap": {"t": 0.3}, "sce": {"select_topk": 0.6},
    "ram": {"threshold": 0.05}, "ramplus_tl": {"threshold": 0.05}, "arcee_fusion": {}, "passthrough": {"scales": 0.7},
    "fisher": {"weights": [0.7, 0.4]}}
# Trees whose threshold lies near no entry.
_SEEDS = {"arcee_fusion": 3}


def tree(seed: int) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(seed)
  return {name: rng.normal(size=(4, 5)).astype(np.float32) for name in NAMES}


def count_models(method: str) -> int:
  """Returns the number of models that a method is tried with: two, or as near to it as it takes."""
  low, high = registry.METHODS[method].bounds
  return max(low, min(2, high or 2))


def list_inputs(method: str) -> list[str]:
  """Lists the labels of a method's inputs, without an optional base; models are `models[0]`, ..."""
  several = range(count_models(method))
  return [label for name in registry.METHODS[method].inputs if name != "base?"
          for label in ([f"{name}[{i}]" for i in several] if name in ("models", "fishers") else [name])]


def arguments(method: str) -> list[dict[str, np.ndarray]]:
  """Returns a tree for each of a method's inputs."""
  trees = [tree(_SEEDS.get(method, 0) + i) for i in range(len(list_inputs(method)))]
  return [{n: np.abs(x) for n, x in t.items()} if label.startswith("fishers") else t
          for label, t in zip(list_inputs(method), trees, strict=True)]


def call(method: str, trees: list, *, given_options: Mapping[str, Any] | None = None, **options: Any) -> Any:
  """Calls a method's function with a tree for each of its inputs, and with OPTIONS or others in their place."""
  given: dict[str, Any] = {}
  for label, one in zip(list_inputs(method), trees, strict=True):
    name, is_list, _ = label.partition("[")
    given[name] = [*given.get(name, []), one] if is_list else one
  draws = {"key": KEY} if registry.METHODS[method].draws else {}
  known = OPTIONS[method] if given_options is None else given_options
  return getattr(merging, method)(**given, **{**known, **draws, **options})
