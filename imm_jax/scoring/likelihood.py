"""Log-probabilities of given tokens in packed rows: the sharded forward pass of training.

Axes: B rows of a forward pass, T positions, S positions that are scored, E tokens that are scored, D model,
V vocabulary, C scored positions whose logits exist at once.
"""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from imm_jax.errors import UserError
from imm_jax.model import attention, hf, sharding
from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import Params
from imm_jax.runtime import progress
from imm_jax.scoring.packing import Rows, pack
from imm_jax.scoring.requests import Request
from imm_jax.training import fsdp
from imm_jax.training.loss import token_scores
from imm_jax.training.step import count_device_rows, hidden_states

# Tokens per row, unless a text is longer, and per forward pass of a device: enough for fast matrix products.
ROW, TOKENS = 512, 4096
# Number of positions whose logits exist at once on a device.
LOGITS = 512
# Shapes are rounded up, so that few are compiled.
_STEP = 64


class Score(NamedTuple):
  """Holds the score of a request.

  Attributes:
    logprob: sum of the log-probabilities of the scored tokens, in nats.
    greedy: whether each of them is the most likely in its place.
    tokens: their number.
  """

  logprob: float
  greedy: bool
  tokens: int


class Scorer:
  """Scores requests with a model's parameters."""

  def __init__(self, config: ModelConfig, params: Params, *, mesh: Mesh, compute_dtype: jnp.dtype | str,
               tokens: int = TOKENS):
    """Keeps a reference to the parameters, which have stacked layers.

    Args:
      config: model config.
      params: parameters of any dtype, sharded over `mesh` by `sharding.param_sharding`, as `hf.load` returns them.
      mesh: rows are split over its axes `data` and `fsdp`, products over `tensor`.
      compute_dtype: dtype of activations.
      tokens: tokens per forward pass of a device, at least one row.
    """
    self.config, self._params, self._mesh = config, params, mesh
    self._dtype, self._tokens = jnp.dtype(compute_dtype), tokens

  @classmethod
  def load(cls, folder: str | Path, *, mesh: Mesh, compute_dtype: jnp.dtype | str, tokens: int = TOKENS) -> "Scorer":
    """Loads a checkpoint folder, with its weights in the compute dtype."""
    config, params = hf.load(folder, dtype=jnp.dtype(compute_dtype),
                             place=functools.partial(sharding.param_sharding, mesh))
    return cls(config, params, mesh=mesh, compute_dtype=compute_dtype, tokens=tokens)

  def score(self, requests: Sequence[Request], *, label: str = "score", quiet: bool = False) -> list[Score]:
    """Scores requests; every process gets all scores, in order.

    Args:
      requests: see `requests`; the same in every process.
      label: text of the progress bar.
      quiet: whether to hide the progress bar.

    Raises:
      UserError: for a request longer than the model's context.
      ValueError: for a request that scores its first token, or no token.
    """
    if not requests:
      return []
    if not all(0 < r.start < len(r.tokens) for r in requests):
      raise ValueError("a request scores some of its tokens, and not the first")
    longest, limit = max(len(r.tokens) - 1 for r in requests), self.config.max_positions
    if limit and longest > limit:
      raise UserError(f"a text of {longest + 1} tokens is longer than the {limit} positions of the model")
    length = ROW if longest <= ROW else 128 * math.ceil(longest / 128)
    packed = pack(requests, length=length)
    parts = sharding.num_batch_shards(self._mesh)
    max_rows = parts * max(1, self._tokens // length)
    steps = math.ceil(len(packed.owners) / max_rows)
    batch = parts * math.ceil(len(packed.owners) / (parts * steps))  # evenly, because empty rows cost as much as others
    backend = attention.choose_backend("auto", self.config, dtype=self._dtype, length=length, rows=batch,
                                       mesh=self._mesh)
    program = _program(self.config, self._mesh, self._dtype, "xla" if backend == "splash" else backend)
    logprobs, counts = np.zeros(len(requests)), np.zeros(len(requests), int)
    greedy = np.ones(len(requests), bool)

    def accumulate(begin: int, outputs: tuple[jax.Array, jax.Array]) -> None:
      for owners, row, best in zip(packed.owners[begin:begin + batch], *map(np.asarray, outputs), strict=False):
        np.add.at(logprobs, owners, row[:len(owners)].astype(np.float64))
        np.logical_and.at(greedy, owners, best[:len(owners)])
        np.add.at(counts, owners, 1)
        bar.update(len(set(owners)))

    with progress.make_bar(len(requests), label, "text", quiet=quiet) as bar:
      pending = None
      for begin in range(0, len(packed.owners), batch):
        outputs = begin, program(self._params, _put_rows(packed, begin, batch, self._mesh))
        if pending:  # the host dispatches one batch ahead
          accumulate(*pending)
        pending = outputs
      accumulate(*pending)
    return [Score(float(p), bool(g), int(n)) for p, g, n in zip(logprobs, greedy, counts, strict=True)]


def _put_rows(rows: Rows, begin: int, count: int, mesh: Mesh) -> dict[str, jax.Array]:
  """Puts rows `begin` to `begin + count` on the devices, padded to `count` rows and a few different widths."""
  row_sharding = NamedSharding(mesh, sharding.BATCH)
  arrays = {}
  for name in ("tokens", "positions", "until", "places", "indices", "targets"):
    part = getattr(rows, name)[begin:begin + count]
    width = part.shape[1]
    if name == "places":
      width = _STEP * math.ceil(width / _STEP)  # fine steps: each position costs a row of logits
    elif name in ("indices", "targets"):
      width = _STEP << max(0, math.ceil(math.log2(width / _STEP)))
    padded = np.zeros((count, width), np.int32)
    padded[:len(part), :part.shape[1]] = part
    if name == "until":
      padded[len(part):] = np.arange(width)  # padding attends to itself
    arrays[name] = jax.make_array_from_callback(padded.shape, row_sharding, lambda index, padded=padded: padded[index])
  return arrays


@functools.lru_cache(maxsize=8)  # reused for every model and task of a run
def _program(config: ModelConfig, mesh: Mesh, dtype: jnp.dtype, backend: str,
             ) -> Callable[[Params, dict[str, jax.Array]], tuple[jax.Array, jax.Array]]:
  """Compiles (params, rows) -> (log-probabilities [B, E], whether each token is the most likely one [B, E])."""
  options = {"mesh": mesh, "gather": fsdp.constrained(mesh, dtype)} if mesh.size > 1 else {}

  def run(params: Params, rows: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    attend = attention.branching(rows["until"], backend=backend, mesh=mesh)
    x, head = hidden_states(config, params, rows["tokens"], rows["positions"], attend=attend, compute_dtype=dtype,
                            **options)
    x = jnp.take_along_axis(x, rows["places"][..., None], axis=1)
    chunk = max(1, LOGITS // count_device_rows(x.shape[0], options.get("mesh")))
    return token_scores(x, head, rows["indices"], rows["targets"], chunk)

  return jax.jit(run, out_shardings=NamedSharding(mesh, P()))
