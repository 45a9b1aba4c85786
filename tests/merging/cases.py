"""Small models and options of every merging method, for the tests of merges in memory."""


import jax
import numpy as np

from imm_jax import merging

KEY = jax.random.key(5)
LAYERS = 3
# One element, odd and even rows, one axis; the layers of a model and what stands outside them.
SHAPES = {"model.embed_tokens.weight": (9, 6), "model.norm.weight": (6,), "scale": (1,),
          **{f"model.layers.{i}.{name}": shape for i in range(LAYERS)
             for name, shape in {"mlp.up_proj.weight": (7, 5), "self_attn.q_proj.bias": (8,)}.items()}}


def models(count: int, dtype: type = np.float32) -> list[dict[str, np.ndarray]]:
  """A base and what was tuned from it; some entries are zero, some deltas are equal in magnitude."""
  rng = np.random.default_rng(0)
  base = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
  result = [base]
  for _ in range(count - 1):
    tuned = {name: base[name] + 0.1 * rng.normal(size=shape) for name, shape in SHAPES.items()}
    tuned["model.embed_tokens.weight"][0] = base["model.embed_tokens.weight"][0]
    result.append(tuned)
  return [{name: x.astype(dtype) for name, x in model.items()} for model in result]


BASE, A, B, C = models(4)
WEIGHTS, DENSITIES = [0.7, -0.3, 0.5], [0.5, 0.4, 0.9]
# Method -> (options, all models in order), run by `call`.
CASES = {
    "linear": {"weights": WEIGHTS}, "task_arithmetic": {"weights": WEIGHTS, "scale": 0.8},
    "ties": {"weights": [0.7, 0.3, 0.5], "densities": DENSITIES},
    "breadcrumbs": {"weights": WEIGHTS, "densities": DENSITIES, "gammas": 0.2},
    "dare_linear": {"weights": WEIGHTS, "densities": DENSITIES, "key": KEY},
    "dare_ties": {"weights": [0.7, 0.3, 0.5], "densities": DENSITIES, "key": KEY},
    "della": {"weights": WEIGHTS, "densities": 0.5, "epsilons": 0.2, "key": KEY},
    "model_stock": {}, "slerp": {"t": 0.3},
    "imm": {"base_weight": 0.4, "drop_rate": 0.3, "key": KEY},
    "iimm": {"base_weight": 0.4, "drop_rate": 0.3, "key": KEY, "importance": [1.0, 2.0, 0.5]}}


def call(method: str, trees, **options):
  """Runs a method on (base, a, b, c), or on as many of them as it takes."""
  function, options = getattr(merging, method), {**CASES[method], **options}
  if method == "linear":
    return function(trees[1:], **options)
  if method in ("imm", "iimm"):
    return function(*trees[:3], **options)
  return function(trees[0], trees[1] if method == "slerp" else trees[1:], **options)


def f64(tree):
  return {name: x.astype(np.float64) for name, x in tree.items()}
