"""The JAX sampler: continuous batching over a fixed number of rows.

Rows whose samples end make room for prompts that wait, a few at a time, so that answers of very different lengths keep
the device busy. Random keys are folded from (seed, prompt id, sample number, token number): which row a sample ran in
and what ran beside it changes nothing but the rounding of sums.
"""

import collections
import functools
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from imm_jax import progress
from imm_jax.errors import say_once
from imm_jax.model import hf, sharding
from imm_jax.model.decoder import LayerCache
from imm_jax.model.tokenization import decode_continuation, known_ids
from imm_jax.sampling import Completion, Prompt, completions
from imm_jax.sampling.native import decode

# Steps between looks at the text while stop strings are asked for.
_STOP_CHECK_EVERY = 16
_MIN_PROMPT_BUCKET = 64
# Rows join once this share of all is free: rarer than one by one, and most rows stay busy.
_REFILL_SHARE = 8
# Tokens that prompts are run in at once; what more would gain is small, what it would hold is not.
_PREFILL_TOKENS = 8192
# The cache has a multiple of this many slots, and as samples grow it doubles or grows by that many.
_SLOTS, _MIN_GROWTH = 128, 256
_DTYPES = ("bfloat16", "float16", "float32")


class NativeSampler:
  """Samples from an HF checkpoint folder, on one device or a mesh."""

  def __init__(self, folder: str | Path, *, compute_dtype: str = "bfloat16", batch_size: int = 64,
               mesh: Mesh | None = None):
    """Loads the checkpoint.

    Args:
      folder: an HF checkpoint folder with a tokenizer.
      compute_dtype: of weights, activations and cache: bfloat16, float16 or float32.
      batch_size: samples that are decoded at once.
      mesh: weights and cache are split over it, see `sharding.for_decoding`; None takes the first device.

    Raises:
      ValueError: for an argument out of range.
      UserError: for a checkpoint or tokenizer that cannot be read, or an end-of-text token that is no token id.
    """
    if compute_dtype not in _DTYPES:
      raise ValueError(f"compute_dtype={compute_dtype!r}: expected one of {', '.join(_DTYPES)}")
    if batch_size < 1:
      raise ValueError(f"batch_size={batch_size}: expected 1 or more")
    self._dtype = jnp.dtype(compute_dtype)
    self._batch_size = batch_size
    config = hf.read_config(folder)
    self._mesh = sharding.for_decoding(mesh, config.num_kv_heads) if mesh is not None and mesh.size > 1 else None
    place = functools.partial(sharding.param_sharding, self._mesh) if self._mesh else None
    # What is wrong with the small files shows before weights are read.
    self.tokenizer, self._eos = completions.load(Path(folder), config.vocab_size)
    self._config, self._params = hf.load(folder, dtype=self._dtype, place=place, stacked=False)
    known = np.zeros(self._config.vocab_size, bool)
    known[known_ids(self.tokenizer, len(known))] = True
    self._allowed = jax.device_put(known, NamedSharding(self._mesh, P()) if self._mesh else
                                   jax.tree.leaves(self._params)[0].sharding)

  def generate(self, prompts: Sequence[Prompt], *, max_new_tokens: int, num_samples: int = 1,
               temperatures: Sequence[float] = (0.0,), top_p: float = 1.0, stop: Sequence[str] = (), seed: int = 0,
               label: str = "sample", quiet: bool = False) -> list[list[Completion]]:
    """Samples `num_samples` completions of every prompt.

    Args:
      prompts: ids must differ where independent samples are wanted.
      max_new_tokens: at most this many a sample.
      num_samples: completions of each prompt.
      temperatures: sample j runs at `temperatures[j % len(temperatures)]`; 0 is greedy.
      top_p: sample from the smallest set of tokens that holds this much probability.
      stop: a completion ends before the first of these strings; a special token counts as the text that it stands
        for, such as `<|im_end|>`, alone or with other text.
      seed: of all samples.
      label: what the progress bar says.
      quiet: shows none.

    Returns:
      For each prompt, in order, its completions.

    Raises:
      ValueError: for a prompt without a token, or an argument out of range.
      UserError: for a prompt with a token that the embedding has no row of.
    """
    completions.check_arguments(max_new_tokens, num_samples, temperatures, top_p, stop, seed)
    ids = completions.encode(self.tokenizer, prompts, self._config.vocab_size)
    if ids and (self._config.max_positions or math.inf) < max(map(len, ids)) + max_new_tokens:
      say_once(f"warning: prompts with max_new_tokens={max_new_tokens} go past the {self._config.max_positions} "
               "positions that config.json gives the model (max_position_embeddings); what it writes there may make no "
               "sense")
    # A special token stops a sample where it is drawn, without a look at the text.
    ends, texts = completions.endings(self.tokenizer, self._eos, stop, self._config.vocab_size)
    asked = [_Sample(p, s, prompts[p].id, temperatures[s % len(temperatures)])
             for p in range(len(prompts)) for s in range(num_samples)]
    static = decode.Static(self._config, self._dtype, ends, top_p, not any(temperatures), self._mesh)
    results: list[list[Completion | None]] = [[None] * num_samples for _ in prompts]
    total_tokens = 0
    with progress.bar(len(asked), label, "sample", quiet=quiet) as bar:
      for sample, tokens in self._run(ids, asked, static, max_new_tokens, texts, seed):
        completion = completions.completion(self.tokenizer, tokens, ends, texts)
        results[sample.prompt][sample.number] = completion
        total_tokens += completion.num_tokens
        bar.update()
        bar.set_postfix(tokens=total_tokens, refresh=False)
    return results

  def _run(self, ids: list[list[int]], asked: list["_Sample"], static: decode.Static, max_new_tokens: int,
           stop: tuple[str, ...], seed: int) -> Iterator[tuple["_Sample", np.ndarray]]:
    """Yields samples with their tokens as they end."""
    # Few sizes of everything, for each is compiled.
    rows = rows_of(self._batch_size, len(asked))
    refill = _refill(rows)
    most_slots = slots_of(max(map(len, ids), default=0) + max_new_tokens)
    queue = _Queue(ids, asked, refill)
    slots = slots_of(1)
    state = decode.init(rows, slots, max_new_tokens, static)
    if self._mesh is None:  # where the weights are: an array that may be anywhere is another argument to jit
      state = jax.device_put(state, self._allowed.sharding)
    row_samples: list[_Sample | None] = [None] * rows
    while True:
      while queue and (free := [i for i, sample in enumerate(row_samples) if sample is None]):
        joining, prompts = queue.take(min(len(free), refill), lambda tokens, lengths: decode.prefill(
            self._params, tokens, lengths, static=static))
        # With room for some steps, or a size would be compiled for one step alone.
        slots = max(slots, min(most_slots, slots_of(int(prompts.lengths.max()) + _SLOTS)))
        state = decode.grow(state, slots)
        places = np.full(refill, rows, np.int32)
        places[:len(joining)] = free[:len(joining)]
        samples = [sample for _, sample in joining]
        state = decode.insert(
            state, *prompts.run, prompts.lengths, _padded([source for source, _ in joining], refill, np.int32), places,
            _row_keys(seed, samples, refill), _padded([s.temperature for s in samples], refill, np.float32),
            self._allowed, static=static)
        del prompts  # with its caches
        for place, sample in zip(places, samples, strict=False):
          row_samples[place] = sample
      going = [i for i, sample in enumerate(row_samples) if sample is not None]
      if not going:
        return
      used = int(np.asarray(state["used"])[going].max())
      if used >= slots:
        slots = min(most_slots, slots + max(slots, _MIN_GROWTH))
        state = decode.grow(state, slots)
      steps = min(slots - used, _STOP_CHECK_EVERY if stop else max_new_tokens)
      state = decode.decode(
          self._params, state, np.array([sample is None for sample in row_samples]), np.int32(steps),
          np.int32(refill if queue else rows), self._allowed, static=static)
      done, counts, tokens = (np.asarray(state[name]) for name in ("done", "count", "tokens"))
      for i in going:
        if done[i] or (stop and self._stopped(tokens[i, :counts[i]], stop)):
          yield row_samples[i], tokens[i, :counts[i]].copy()
          row_samples[i] = None

  def _stopped(self, tokens: np.ndarray, stop: tuple[str, ...]) -> bool:
    """Whether a stop string shows; a look at the end of the text says mostly that none does."""
    recent = _STOP_CHECK_EVERY + 4 * max(map(len, stop))  # a character has at most four tokens
    shows = lambda part: any(s in decode_continuation(self.tokenizer, part, skip_special_tokens=False) for s in stop)
    return shows(tokens[-recent:]) and shows(tokens)


class _Sample(NamedTuple):
  """One completion that is asked for: of the prompt with this index and id, its number among that prompt's."""

  prompt: int
  number: int
  id: str
  temperature: float


class _Prompts(NamedTuple):
  """Prompts that were run: lengths [M], (logits, caches), and the samples that wait for a row, each with its prompt's
  place in the batch."""

  lengths: np.ndarray
  run: tuple[jax.Array, list[LayerCache]]
  waiting: collections.deque[tuple[int, _Sample]]


class _Queue:
  """Samples that wait for a row; prompts are run a few at a time, once each, those of a padded length together."""

  def __init__(self, ids: list[list[int]], asked: list[_Sample], size: int):
    self._ids, self._size = ids, size
    by_prompt = collections.defaultdict(list)
    for sample in asked:
      by_prompt[sample.prompt].append(sample)
    # Stable: short prompts first, then in the order asked.
    self._waiting = collections.deque(sorted(by_prompt.items(), key=lambda item: _bucket(len(ids[item[0]]))))
    self._prompts: _Prompts | None = None

  def __bool__(self) -> bool:
    return bool(self._waiting) or self._prompts is not None

  def take(self, count: int, run: Callable[[np.ndarray, np.ndarray], tuple[jax.Array, list[LayerCache]]],
           ) -> tuple[list[tuple[int, _Sample]], _Prompts]:
    """At most `count` samples, each with the place of its prompt in a batch, and the batch; runs one if need be."""
    prompts = self._prompts or self._next(run)
    taken = [prompts.waiting.popleft() for _ in range(min(count, len(prompts.waiting)))]
    self._prompts = prompts if prompts.waiting else None
    return taken, prompts

  def _next(self, run: Callable[[np.ndarray, np.ndarray], tuple[jax.Array, list[LayerCache]]]) -> _Prompts:
    length = _bucket(len(self._ids[self._waiting[0][0]]))
    count = _at_once(self._size, length)
    tokens, lengths, waiting = np.zeros((count, length), np.int32), np.ones(count, np.int32), collections.deque()
    for source in range(count):
      if not self._waiting or _bucket(len(self._ids[self._waiting[0][0]])) != length:
        break
      prompt, samples = self._waiting.popleft()
      lengths[source] = len(self._ids[prompt])
      tokens[source, :lengths[source]] = self._ids[prompt]
      waiting.extend((source, sample) for sample in samples)
    return _Prompts(lengths, run(tokens, lengths), waiting)


def _bucket(length: int) -> int:
  """The padded length of a prompt: a power of two, so that few shapes are compiled."""
  return max(_MIN_PROMPT_BUCKET, 1 << (length - 1).bit_length())


def _refill(rows: int) -> int:
  return max(1, rows // _REFILL_SHARE)


def _at_once(most: int, length: int) -> int:
  return max(1, min(most, _PREFILL_TOKENS // length))


def rows_of(batch_size: int, asked: int) -> int:
  """Samples that are decoded at once, of so many that are asked for."""
  return min(batch_size, 1 << (max(1, asked) - 1).bit_length())


def prompts_at_once(rows: int, longest: int) -> tuple[int, int]:
  """How many prompts are run at once beside so many rows, and their padded length."""
  return _at_once(_refill(rows), _bucket(longest)), _bucket(longest)


def slots_of(length: int) -> int:
  """Slots of the cache that hold so many tokens."""
  return -(-length // _SLOTS) * _SLOTS


def _padded(values: Sequence[float], size: int, dtype: type) -> np.ndarray:
  result = np.zeros(size, dtype)
  result[:len(values)] = values
  return result


def _row_keys(seed: int, samples: Sequence[_Sample], size: int) -> jax.Array:
  return _fold(np.uint32(seed), _padded([zlib.crc32(s.id.encode()) for s in samples], size, np.uint32),
               _padded([s.number for s in samples], size, np.uint32))


@jax.jit
def _fold(seed: jax.Array, codes: jax.Array, numbers: jax.Array) -> jax.Array:
  fold = lambda code, number: jax.random.key_data(
      jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), code), number))
  return jax.vmap(fold)(codes, numbers)
