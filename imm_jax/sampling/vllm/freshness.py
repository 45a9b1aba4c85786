"""Checks that a server runs the expected weights.

A server can silently have others: after a reload that kept the prefix cache, of a checkpoint with tied embeddings on
vLLM's CPU backend, or from a folder with a missing tensor or an extra file. So each replica of the server continues a
few prompts greedily, and its log-probabilities are compared with those that this package's decoder gives the same
tokens under the expected checkpoint.
"""

import functools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from imm_jax.errors import UserError, print_once
from imm_jax.model import hf, sharding
from imm_jax.model.cached import LayerCache, Prefix
from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import Params, bind
from imm_jax.runtime import hardware
from imm_jax.sampling.native import decode, queue
from imm_jax.sampling.vllm.client import NEUTRAL, Generated, Server, ServerError

PROMPTS, TOKENS = 4, 16
_PAD = 64  # prompts are padded to a multiple of this, so that few shapes are compiled
# The mean difference of log-probabilities (nats) that rounding can explain; that of a single token may be ten times as
# large. Two programs sum in different orders and round in different places. bfloat16 has 8 significant bits, so that
# activations and possibly logits are rounded to 1/256. But greedy tokens mostly have high probabilities, which hardly
# change: in 240 answers of the embedded model in bfloat16 on vLLM's CPU backend, four answers differ by 0.003 at most
# on average, and a single token by 0.05. Ten times that leaves room for deeper models. float16 has 11 bits, float32 24.
# Weights that differ by less than this sample alike.
TOLERANCES = {"bfloat16": 0.03, "float16": 0.01, "float32": 1e-3}
_TOKEN_FACTOR = 10
# A server still runs its earlier weights if their mean difference is less than this share of that of the new ones.
_NEARER_SHARE = 0.5


class Agreement(NamedTuple):
  """Measures how far a server and the decoder differ, in nats.

  Attributes:
    mean: mean absolute difference of all tokens' log-probabilities.
    largest: largest difference; includes by how much the most likely token beats the one that the server chose.
    where: (prompt, token) of the largest.
  """

  mean: float
  largest: float
  where: tuple[int, int]

  def within(self, tolerance: float) -> bool:
    """Returns whether the differences are within the tolerance; false for NaN."""
    return self.mean <= tolerance and self.largest <= _TOKEN_FACTOR * tolerance


def check_weights(servers: Sequence[Server], folder: Path, prompts: Sequence[list[int]], *, dtype: str, new_tokens: int,
                  tolerance: float = 0.0, mesh: Mesh | None = None, earlier: Mapping[Server, Path] | None = None,
                  ) -> dict[Server, list[Agreement] | ServerError]:
  """Checks that servers, and all data-parallel replicas of each, run the weights in a folder.

  Args:
    servers: servers that were started or have reloaded.
    folder: HF checkpoint folder.
    prompts: token ids, preferably of prompts that will be sampled, whose prefixes a server may have cached.
    dtype: dtype of weights and activations, here and in the servers.
    new_tokens: maximum number of tokens to compare per prompt.
    tolerance: replaces that of `TOLERANCES` unless 0.
    mesh: where the decoder runs; None is the CPU, because the server may fill the GPU.
    earlier: checkpoints that servers ran before, where known. A round may change a model so little that rounding in
      bfloat16 hides it; the server must not be much nearer to the earlier weights.

  Returns:
    The agreement of each server's replicas, or the error if one did not respond.

  Raises:
    UserError: when a replica differs by more than the tolerance, or is nearer to its server's earlier weights.
  """
  tokens = min(TOKENS, new_tokens)
  limit = tolerance or TOLERANCES[dtype]
  score = _Scorer(folder, dtype, mesh, prompts).score
  result: dict[Server, list[Agreement] | ServerError] = {}
  answers: dict[Server, list[list[Generated]]] = {}
  for server in servers:
    try:
      answers[server] = _ask_replicas(server, prompts, tokens)
    except ServerError as e:
      result[server] = e
      continue
    result[server] = []
    for replica, greedy in enumerate(answers[server]):
      logprobs, best = score(greedy)
      agreement = measure_agreement(greedy, logprobs, best)
      result[server].append(agreement)
      if agreement.within(limit):
        continue
      row, t = agreement.where
      raise UserError(
          f"{_name(server, replica, len(answers[server]))}: does not run the weights of {folder}. Over {len(prompts)} "
          f"greedy answers of {tokens} tokens its log-probabilities differ from the native decoder's by "
          f"{agreement.mean:.3g} on average and {agreement.largest:.3g} at most (prompt {row}, token {t}: id "
          f"{greedy[row].tokens[t]} has {greedy[row].logprobs[t]:.4f} there, {logprobs[row, t]:.4f} here, where the "
          f"likeliest has {best[row, t]:.4f}); rounding to {dtype} explains {limit:g} and {_TOKEN_FACTOR * limit:g} "
          "(config.sampler.vllm.tolerance). Have it start again on this folder")
  del score  # keeps only one model in memory at a time
  _check_not_earlier(answers, result, folder, prompts, earlier or {}, dtype=dtype, mesh=mesh)
  return result


def _check_not_earlier(answers: Mapping[Server, list[list[Generated]]],
                       agreements: Mapping[Server, list[Agreement] | ServerError], folder: Path,
                       prompts: Sequence[list[int]], earlier: Mapping[Server, Path], *, dtype: str, mesh: Mesh | None,
                       ) -> None:
  """Raises UserError if a server's answers agree far better with its earlier weights than with those of the folder."""
  old = {server: path for server, path in earlier.items() if server in answers and path.is_dir()}
  for path in dict.fromkeys(old.values()):
    score = _Scorer(path, dtype, mesh, prompts).score
    for server in (s for s in answers if old.get(s) == path):
      for replica, (greedy, agreement) in enumerate(zip(answers[server], agreements[server], strict=True)):
        old_agreement = measure_agreement(greedy, *score(greedy))
        if old_agreement.mean < _NEARER_SHARE * agreement.mean:
          raise UserError(f"{_name(server, replica, len(answers[server]))}: still runs the weights of {path}. From "
                          f"those its log-probabilities differ by {old_agreement.mean:.3g} on average, from those of "
                          f"{folder} by {agreement.mean:.3g}. Have it start again on this folder")
    del score


def _ask_replicas(server: Server, prompts: Sequence[list[int]], tokens: int) -> list[list[Generated]]:
  """Has each replica of a server continue all prompts greedily, at the same time as the others."""
  ask = lambda replica: [server.complete(prompt, n=1, max_tokens=tokens, logprobs=True, replica=replica,
                                         temperature=0.0, **NEUTRAL)[0] for prompt in prompts]
  count = server.count_replicas(prompts[0])
  if count is None:
    print_once(f"warning: server {server} does not say how many data-parallel replicas it has; if there are several, "
               f"the weights of at most {len(prompts)} of them are checked")
    return [ask(None)]
  with ThreadPoolExecutor(count) as pool:
    return list(pool.map(ask, range(count)))


def _name(server: Server, replica: int, count: int) -> str:
  return f"{server}, replica {replica} of {count}" if count > 1 else str(server)


def measure_agreement(greedy: Sequence[Generated], logprobs: np.ndarray, best: np.ndarray) -> Agreement:
  """Compares a server's answers with the decoder's log-probabilities of their tokens and of the best ones [B, N]."""
  difference = np.abs(np.array([g.logprobs for g in greedy]) - logprobs)
  worst = np.maximum(difference, best - logprobs)
  return Agreement(float(difference.mean()), float(worst.max()), tuple(
      int(i) for i in np.unravel_index(np.argmax(worst), worst.shape)))


class _Scorer:
  """Scores given answers to prompts with the native decoder and a checkpoint."""

  def __init__(self, folder: Path, dtype: str, mesh: Mesh | None, prompts: Sequence[list[int]]):
    self._prompts = prompts
    self._scores: dict[tuple[tuple[int, ...], ...], tuple[np.ndarray, np.ndarray]] = {}  # replicas mostly agree
    config = hf.read_config(folder)
    if mesh is None:
      self._replicated = SingleDeviceSharding(hardware.cpu_device())
      place = lambda path, shape: self._replicated
    else:
      decoding = sharding.decoding_mesh(mesh, config.num_kv_heads)
      self._replicated = NamedSharding(decoding, PartitionSpec())
      place = functools.partial(sharding.param_sharding, decoding)
    self._static = decode.Static(config, jnp.dtype(dtype), (), 1.0, True)
    _, self._params = hf.load(folder, dtype=self._static.dtype, place=place, stacked=False)

  def score(self, greedy: Sequence[Generated]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the log-probabilities of the answers' tokens [B, N], and those of the most likely tokens instead."""
    tokens = tuple(tuple(g.tokens) for g in greedy)
    if tokens not in self._scores:
      self._scores[tokens] = self._score(tokens)
    return self._scores[tokens]

  def _score(self, tokens: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    prompts = self._prompts
    # Fewer prompts are repeated to the same number of rows, to reuse the compiled program.
    rows = np.arange(max(PROMPTS, len(prompts))) % len(prompts)
    longest = max(map(len, prompts))
    shape = queue.Shape(len(rows), -(-longest // _PAD) * _PAD, len(rows))
    pack = queue.pack_prompts([[prompts[row]] for row in rows], shape)
    prefix = jax.device_put(decode.no_prefix(_PAD, self._static), self._replicated)
    token_ids = np.array(tokens, np.int32)[rows]
    logits, caches = decode.prefill(self._params, prefix, pack.tokens, pack.positions, pack.segment_ids, pack.last,
                                    static=self._static)
    caches = decode.grow({"caches": caches}, pack.tokens.shape[1] + TOKENS)["caches"]
    scores = [_scores(logits, token_ids[:, 0])]
    for t in range(1, token_ids.shape[1]):
      logits, caches = _step(self._params, prefix, token_ids[:, t - 1], pack.lengths + t - 1, caches,
                             config=self._static.config, dtype=self._static.dtype)
      scores.append(_scores(logits, token_ids[:, t]))
    logprobs, best = np.stack(jax.device_get(scores), axis=-1)[:, :len(prompts)]
    return logprobs, best


@functools.partial(jax.jit, static_argnames=("config", "dtype"), donate_argnames="caches")
def _step(params: Params, prefix: Prefix, tokens: jax.Array, used: jax.Array, caches: list[LayerCache], *,
          config: ModelConfig, dtype: jnp.dtype) -> tuple[jax.Array, list[LayerCache]]:
  return bind(config, params, scan=False).decode(tokens, used=used, caches=caches, prefix=prefix, compute_dtype=dtype)


@jax.jit
def _scores(logits: jax.Array, tokens: jax.Array) -> jax.Array:
  """Returns the log-probabilities of tokens [B] and of the most likely ones: [2, B]."""
  logprobs = jax.nn.log_softmax(logits)
  return jnp.stack([jnp.take_along_axis(logprobs, tokens[:, None], axis=1)[:, 0], jnp.max(logprobs, axis=1)])
