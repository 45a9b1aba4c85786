"""Whether a server runs the weights that it should.

A server can hold others without an error: after a reload whose prefix cache was kept, of a checkpoint with tied
embeddings on vLLM's CPU backend, or from a folder that lacks a tensor or has a file too many. So it continues a few of
the prompts greedily and says each token's log-probability, and the decoder of this package, on the checkpoint that is
meant, says what it gives the same tokens.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from imm_jax.errors import UserError
from imm_jax.model import hf, sharding
from imm_jax.model.cached import LayerCache, Prefix
from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import Params, bind
from imm_jax.sampling.native import decode, queue
from imm_jax.sampling.vllm.client import NEUTRAL, Generated, Server, ServerError

PROMPTS, TOKENS = 4, 16
_PAD = 64  # prompts' length to a multiple of this: few shapes are compiled
# The mean difference of log-probabilities (nats) that rounding explains; a single token's may be ten times as large.
# Two programs add in another order and round at other places. bfloat16 has 8 significant bits: what passes from layer
# to layer is rounded to 1/256 of it, and so may the logits be. But what greedy search takes is mostly sure,
# whose log-probability hardly moves: of 240 answers of the embedded model in bfloat16, on vLLM's CPU backend, four
# differ by 0.003 on average at most, and a single token by 0.05. Ten times that leaves room for deeper models. float16
# has 11 bits, float32 24. Weights that differ by less than this sample alike.
TOLERANCES = {"bfloat16": 0.03, "float16": 0.01, "float32": 1e-3}
_SINGLE = 10
# Weights that a server ran before are those it still runs where they explain so much more of what it says.
_NEARER = 0.5


class Agreement(NamedTuple):
  """How far a server and the decoder differ, in nats.

  Attributes:
    mean: of the absolute differences of all tokens' log-probabilities.
    largest: of them; also by how much the likeliest token beats the one that the server took.
    where: (prompt, token) of the largest.
  """

  mean: float
  largest: float
  where: tuple[int, int]

  def within(self, tolerance: float) -> bool:
    """Whether rounding explains it; what is no number is not explained."""
    return self.mean <= tolerance and self.largest <= _SINGLE * tolerance


def check(servers: Sequence[Server], folder: Path, prompts: Sequence[list[int]], *, dtype: str, new_tokens: int,
          tolerance: float = 0.0, mesh: Mesh | None = None, earlier: Mapping[Server, Path] | None = None,
          ) -> dict[Server, Agreement | ServerError]:
  """Checks that servers run the weights in a folder.

  Args:
    servers: that were started or have reloaded.
    folder: an HF checkpoint.
    prompts: token ids; best are those that will be asked, whose beginnings a server may have kept.
    dtype: of weights and activations, here and there.
    new_tokens: at most so many are compared, of each prompt.
    tolerance: in place of the one in TOLERANCES, where it is not 0.
    mesh: where the decoder runs; None is the CPU, for a GPU may be full of the server.
    earlier: for servers of which it is known, the checkpoint that they ran before. A round changes a model by little,
      in bfloat16 by no more than rounding may: then the server must not be much nearer to the old one.

  Returns:
    How far each differs, or why it did not answer.

  Raises:
    UserError: when a server differs by more than rounding does, or is nearer to the earlier weights; with the numbers.
  """
  tokens = min(TOKENS, new_tokens)
  allowed = tolerance or TOLERANCES[dtype]
  score = _Scorer(folder, dtype, mesh).score
  result: dict[Server, Agreement | ServerError] = {}
  said: dict[Server, list[Generated]] = {}
  for server in servers:
    try:
      greedy = [server.complete(prompt, n=1, max_tokens=tokens, logprobs=True, temperature=0.0, **NEUTRAL)[0]
                for prompt in prompts]
    except ServerError as e:
      result[server] = e
      continue
    said[server] = greedy
    logprobs, best = score(prompts, [g.tokens for g in greedy])
    result[server] = found = agreement(greedy, logprobs, best)
    if not found.within(allowed):
      row, t = found.where
      raise UserError(
          f"{server}: does not run the weights of {folder}. Over {len(prompts)} greedy answers of {tokens} tokens its "
          f"log-probabilities differ from the native decoder's by {found.mean:.3g} on average and {found.largest:.3g} "
          f"at most (prompt {row}, token {t}: id {greedy[row].tokens[t]} has {greedy[row].logprobs[t]:.4f} there, "
          f"{logprobs[row, t]:.4f} here, where the likeliest has {best[row, t]:.4f}); rounding to {dtype} explains "
          f"{allowed:g} and {_SINGLE * allowed:g} (config.sampler.vllm.tolerance). Have it start again on this folder")
  del score  # one model is in memory at a time
  old = {server: path for server, path in (earlier or {}).items() if server in said and path.is_dir()}
  for path in dict.fromkeys(old.values()):
    score = _Scorer(path, dtype, mesh).score
    for server in (s for s in said if old.get(s) == path):
      before = agreement(said[server], *score(prompts, [g.tokens for g in said[server]]))
      if before.mean < _NEARER * result[server].mean:
        raise UserError(f"{server}: still runs the weights of {path}. From those its log-probabilities differ by "
                        f"{before.mean:.3g} on average, from {folder}'s by {result[server].mean:.3g}. Have it start "
                        "again on this folder")
    del score
  return result


def agreement(greedy: Sequence[Generated], logprobs: np.ndarray, best: np.ndarray) -> Agreement:
  """Compares what a server said with the decoder's log-probabilities of the same tokens and of the likeliest [B, N]."""
  difference = np.abs(np.array([g.logprobs for g in greedy]) - logprobs)
  worst = np.maximum(difference, best - logprobs)
  return Agreement(float(difference.mean()), float(worst.max()), tuple(
      int(i) for i in np.unravel_index(np.argmax(worst), worst.shape)))


class _Scorer:
  """The native decoder over a checkpoint, following tokens that are given."""

  def __init__(self, folder: Path, dtype: str, mesh: Mesh | None):
    config = hf.read_config(folder)
    if mesh is None:
      self._whole = SingleDeviceSharding(_cpu())
      place = lambda path, shape: self._whole
    else:
      decoding = sharding.decoding_mesh(mesh, config.num_kv_heads)
      self._whole = NamedSharding(decoding, PartitionSpec())
      place = functools.partial(sharding.param_sharding, decoding)
    self._static = decode.Static(config, jnp.dtype(dtype), (), 1.0, True)
    _, self._params = hf.load(folder, dtype=self._static.dtype, place=place, stacked=False)

  def score(self, prompts: Sequence[list[int]], tokens: Sequence[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of tokens [B, N] after prompts, and of the likeliest in each place."""
    # As many rows for fewer prompts: what is compiled fits all.
    rows = np.arange(max(PROMPTS, len(prompts))) % len(prompts)
    longest = max(map(len, prompts))
    pack = queue.packed([[prompts[row]] for row in rows], queue.Shape(len(rows), -(-longest // _PAD) * _PAD, len(rows)))
    prefix = jax.device_put(decode.no_prefix(_PAD, self._static), self._whole)
    followed = np.array(tokens, np.int32)[rows]
    logits, caches = decode.prefill(self._params, prefix, pack.tokens, pack.positions, pack.segment_ids, pack.last,
                                    static=self._static)
    caches = decode.grow({"caches": caches}, pack.tokens.shape[1] + TOKENS)["caches"]
    scores = [_scores(logits, followed[:, 0])]
    for t in range(1, followed.shape[1]):
      logits, caches = _step(self._params, prefix, followed[:, t - 1], pack.lengths + t - 1, caches,
                             config=self._static.config, dtype=self._static.dtype)
      scores.append(_scores(logits, followed[:, t]))
    logprobs, best = np.stack(jax.device_get(scores), axis=-1)[:, :len(prompts)]
    return logprobs, best


@functools.partial(jax.jit, static_argnames=("config", "dtype"), donate_argnames="caches")
def _step(params: Params, prefix: Prefix, tokens: jax.Array, used: jax.Array, caches: list[LayerCache], *,
          config: ModelConfig, dtype: jnp.dtype) -> tuple[jax.Array, list[LayerCache]]:
  return bind(config, params, scan=False).decode(tokens, used=used, caches=caches, prefix=prefix, compute_dtype=dtype)


@jax.jit
def _scores(logits: jax.Array, tokens: jax.Array) -> jax.Array:
  """Log-probabilities of tokens [B] and of the likeliest: [2, B]."""
  logprobs = jax.nn.log_softmax(logits)
  return jnp.stack([jnp.take_along_axis(logprobs, tokens[:, None], axis=1)[:, 0], jnp.max(logprobs, axis=1)])


def _cpu() -> jax.Device:
  """The CPU, else (with JAX_PLATFORMS=cuda) what there is."""
  try:
    return jax.local_devices(backend="cpu")[0]
  except RuntimeError:
    return jax.local_devices()[0]
