"""AdaMerging: coefficients of task vectors, one for each model and layer, learned by gradient.

    python examples/adamerging.py

Two networks were tuned from one base, each on half of the classes. Without any label, on inputs of both, the entropy of
the merged network's predictions is made small (arXiv:2310.02575): `merging.task_arithmetic` takes traced weights.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from imm_jax import merging

Params = TypeVar("Params")
CLASSES, WIDTH, LAYERS, HALVES = 8, 32, 2, (range(0, 4), range(4, 8))
centres = jax.random.normal(jax.random.key(0), (CLASSES, WIDTH))


def sample(key: jax.Array, classes: range, count: int = 512) -> tuple[jax.Array, jax.Array]:
  labels = jax.random.randint(key, (count,), classes.start, classes.stop)
  return centres[labels] + 1.2 * jax.random.normal(jax.random.fold_in(key, 1), (count, WIDTH)), labels


def logits(params: dict[str, Any], x: jax.Array) -> jax.Array:
  for layer in params["layers"]:
    x = x + jax.nn.relu(x @ layer["w"])
  return x @ params["head"]


def fit(params: Params, loss: Callable[[Params, jax.Array], jax.Array], steps: int, rate: float) -> Params:
  optimizer = optax.adam(rate)
  state, gradient = optimizer.init(params), jax.jit(jax.grad(loss))
  for step in range(steps):
    updates, state = optimizer.update(gradient(params, jax.random.key(step)), state)
    params = optax.apply_updates(params, updates)
  return params


def supervised(classes: range) -> Callable[[dict[str, Any], jax.Array], jax.Array]:
  def loss(params: dict[str, Any], key: jax.Array) -> jax.Array:
    x, labels = sample(key, classes)
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), labels).mean()
  return loss


def main() -> None:
  keys = jax.random.split(jax.random.key(1), LAYERS + 1)
  base = {"layers": [{"w": 0.05 * jax.random.normal(k, (WIDTH, WIDTH))} for k in keys[:LAYERS]],
          "head": 0.05 * jax.random.normal(keys[-1], (WIDTH, CLASSES))}
  tuned = [fit(base, supervised(half), 100, 1e-2) for half in HALVES]
  merge = lambda weights: merging.task_arithmetic(base, tuned, weights=weights)

  def entropy(weights: jax.Array, key: jax.Array) -> jax.Array:
    x = jnp.concatenate([sample(jax.random.fold_in(key, i), half)[0] for i, half in enumerate(HALVES)])
    chances = jax.nn.log_softmax(logits(merge(weights), x))
    return -(jnp.exp(chances) * chances).sum(-1).mean()

  x, labels = sample(jax.random.key(99), range(CLASSES), 4096)
  accuracy = lambda params: float((logits(params, x).argmax(-1) == labels).mean())
  start = jnp.full((len(tuned), LAYERS), 0.3)
  learned = fit(start, entropy, 100, 2e-2)
  print(f"each alone {accuracy(tuned[0]):.3f}, {accuracy(tuned[1]):.3f}; weights of 0.3 {accuracy(merge(start)):.3f}; "
        f"learned {accuracy(merge(learned)):.3f}, weights by model and layer {learned.round(2).tolist()}")


if __name__ == "__main__":
  main()
