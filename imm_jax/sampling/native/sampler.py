"""The JAX sampler: continuous batching over a fixed number of rows.

Rows whose samples end make room for prompts that wait, a few at a time, so that answers of very different lengths keep
the device busy. Random keys are folded from (seed, prompt id, sample number, token number): which row a sample ran in
and what ran beside it changes nothing but the rounding of sums.
"""

import functools
import math
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from imm_jax.errors import say_once
from imm_jax.model import hf, sharding
from imm_jax.model.cached import LayerCache, Prefix
from imm_jax.model.decoder import Params, unstack_layers
from imm_jax.model.tokenization import decode_continuation, known_ids
from imm_jax.sampling import Completion, Prompt, completions
from imm_jax.sampling.native import decode, queue
from imm_jax.sampling.native.queue import Sample
from imm_jax.sampling.progress import Progress

# Steps between looks at what has come: at texts for stop strings, at rows that are done, and for the progress bar.
_STEPS = 16
# Rows join once this share of all is free: rarer than one by one, and most rows stay busy.
_REFILL_SHARE = 8
_DTYPES = ("bfloat16", "float16", "float32")


class NativeSampler:
  """Samples from an HF checkpoint folder, on one device or a mesh."""

  def __init__(self, folder: str | Path, *, compute_dtype: str = "bfloat16", batch_size: int = 64,
               mesh: Mesh | None = None, params: Params | None = None, kernel: str = ""):
    """Loads the checkpoint.

    Args:
      folder: an HF checkpoint folder with a tokenizer.
      compute_dtype: of weights, activations and cache: bfloat16, float16 or float32.
      batch_size: samples that are decoded at once.
      mesh: weights and cache are split over it, see `sharding.decoding_mesh`; None takes the first device.
      params: weights in memory in place of the folder's, whose other files still count; as training has them, with
        layers stacked.
      kernel: what reads the cache, one of `decode_kernels.KERNELS`; empty for `columns` on CPUs and `xla` elsewhere.
        The kernels for GPUs and TPUs have not run on them.

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
    self._sizes: set[str] = set()  # of what was compiled
    config = hf.read_config(folder)
    self._mesh = sharding.decoding_mesh(mesh, config.num_kv_heads) if mesh is not None and mesh.size > 1 else None
    place = functools.partial(sharding.param_sharding, self._mesh) if self._mesh else None
    # What is wrong with the small files shows before weights are read.
    self.tokenizer, self._eos = completions.load(Path(folder), config.vocab_size)
    if params is None:
      self._config, self._params = hf.load(folder, dtype=self._dtype, place=place, stacked=False)
    else:
      self._config, self._params = config, _for_decoding(params, config.num_layers, self._dtype, self._mesh)
    known = np.zeros(self._config.vocab_size, bool)
    known[known_ids(self.tokenizer, len(known))] = True
    self._platform = next(iter(jax.tree.leaves(self._params)[0].devices())).platform
    self._kernel = kernel or ("columns" if self._platform == "cpu" else "xla")
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
    asked = [Sample(p, s, prompts[p].id, temperatures[s % len(temperatures)])
             for p in range(len(prompts)) for s in range(num_samples)]
    static = decode.Static(self._config, self._dtype, ends, top_p, not any(temperatures), self._mesh, self._kernel)
    results: list[list[Completion | None]] = [[None] * num_samples for _ in prompts]
    with Progress(len(asked), max_new_tokens, label, quiet=quiet) as shown:
      for ended, going in self._run(ids, asked, static, max_new_tokens, texts, seed):
        for sample, tokens in ended:
          completion = completions.completion(self.tokenizer, tokens, ends, texts)
          results[sample.prompt][sample.number] = completion
          shown.end(completion.num_tokens)
        shown.draw(going)
    logging.info("%s: %d sizes of programs so far: %s", label, len(self._sizes), ", ".join(sorted(self._sizes)))
    return results

  def _run(self, ids: list[list[int]], asked: list[Sample], static: decode.Static, max_new_tokens: int,
           stop: tuple[str, ...], seed: int) -> Iterator[tuple[list[tuple[Sample, np.ndarray]], int]]:
    """Yields samples with their tokens as they end, and how many tokens all that go on have so far."""
    parts, cpu = (self._mesh.shape["data"] if self._mesh else 1), self._platform == "cpu"
    common = queue.shared(ids, len(asked))
    prefix = self._prefix(ids[0][:common] if ids else [], static, parts)
    own = [i[common:] for i in ids]
    waiting = queue.Queue(own, asked, queue.pack_shape(list(map(len, own)), parts=parts, cpu=cpu),
                          lambda pack: self._prefill(prefix, pack, static), parts=parts)
    rows = queue.rows_of(self._batch_size, len(asked))
    refill, sizes = max(1, rows // _REFILL_SHARE), queue.fewer_rows(rows, parts)
    most = queue.most_slots(max(map(len, own), default=0) + max_new_tokens)
    slots = min(most, queue.slots_of(1))
    state = self._here(decode.init(rows, slots, max_new_tokens, static))
    places: list[Sample | None] = [None] * rows
    while True:
      while waiting and (free := [i for i, sample in enumerate(places) if sample is None]):
        joining, run = waiting.take(min(len(free), refill))
        # With room for some steps, or a size would be compiled for few steps alone.
        slots = max(slots, min(most, queue.slots_of(int(run.pack.lengths.max()) + _STEPS)))
        state = decode.grow(state, slots, columns=static.kernel == "columns")
        samples = [sample for _, sample in joining]
        state = decode.insert(
            state, *run.run, run.pack.lengths, run.pack.starts, _padded([i for i, _ in joining], refill, np.int32),
            _padded(free[:len(joining)], refill, np.int32, rows), _row_keys(seed, samples, refill),
            _padded([s.temperature for s in samples], refill, np.float32), self._allowed, static=static)
        del run  # with its caches
        for place, sample in zip(free, samples, strict=False):
          places[place] = sample
      going = [i for i, sample in enumerate(places) if sample is not None]
      if not going:
        return
      size = len(places) if waiting else queue.fitting_rows(sizes, len(going))
      if size < len(places):
        kept = np.array([*going, *[0] * (size - len(going))])
        state = decode.shrink(state, kept, np.arange(size) >= len(going), static=static)
        places = [places[i] for i in going] + [None] * (size - len(going))
        going = list(range(len(going)))
      used = int(np.asarray(state["used"])[going].max())
      if used >= slots:
        slots = min(most, queue.slots_of(slots + 1))
        state = decode.grow(state, slots, columns=static.kernel == "columns")
      # Until some may join, or until fewer rows would do.
      fewer = sizes[sizes.index(size) - 1] if size > sizes[0] else 0
      self._sizes.add(f"decode {size} rows x {slots} slots after {prefix.caches[0][0].shape[1]}")
      state = decode.decode(
          self._params, prefix, state, np.array([sample is None for sample in places]),
          np.int32(min(slots - used, _STEPS)), np.int32(refill if waiting else size - fewer), self._allowed,
          static=static)
      done, counts, tokens = (np.asarray(state[name]) for name in ("done", "count", "tokens"))
      ended = []
      for i in going:
        if done[i] or (stop and self._stopped(tokens[i, :counts[i]], stop)):
          ended.append((places[i], tokens[i, :counts[i]].copy()))
          places[i] = None
      yield ended, sum(int(counts[i]) for i in going if places[i] is not None)

  def _prefix(self, ids: list[int], static: decode.Static, parts: int) -> Prefix:
    """What all prompts begin with, run once."""
    slots = queue.slots_of(1)
    prefix = self._here(decode.no_prefix(slots, static))
    if not ids:
      return prefix
    pack = queue.packed([[ids]], queue.Shape(parts, queue.slots_of(len(ids)), 1))
    _, caches = self._prefill(prefix, pack, static)
    return decode.prefix_of(caches, np.int32(len(ids)), slots=queue.slots_of(len(ids)), static=static)

  def _prefill(self, prefix: Prefix, pack: queue.Pack, static: decode.Static) -> tuple[jax.Array, list[LayerCache]]:
    self._sizes.add(f"prefill {pack.tokens.shape[0]} x {pack.tokens.shape[1]} after {prefix.caches[0][0].shape[1]}")
    return decode.prefill(self._params, prefix, pack.tokens, pack.positions, pack.segment_ids, pack.last,
                          static=static)

  def _here(self, arrays: Any) -> Any:
    """Arrays where the weights are: one that may be anywhere is another argument to jit."""
    return arrays if self._mesh else jax.device_put(arrays, self._allowed.sharding)

  def _stopped(self, tokens: np.ndarray, stop: tuple[str, ...]) -> bool:
    """Whether a stop string shows; a look at the end of the text says mostly that none does."""
    recent = _STEPS + 4 * max(map(len, stop))  # a character has at most four tokens
    shows = lambda part: any(s in decode_continuation(self.tokenizer, part, skip_special_tokens=False) for s in stop)
    return shows(tokens[-recent:]) and shows(tokens)


def _for_decoding(params: Params, layers: int, dtype: jnp.dtype, mesh: Mesh | None) -> Params:
  """Stacked parameters as decoding needs them: a list of layers, of this dtype, placed on the mesh or on one device."""
  device = jax.devices()[0] if mesh is None else None

  def put(path: tuple, leaf: jax.Array) -> jax.Array:
    name = ".".join(str(part.key) for part in path)
    return jax.device_put(jnp.asarray(leaf, dtype), device or sharding.param_sharding(mesh, name, leaf.shape))

  return jax.tree_util.tree_map_with_path(put, unstack_layers(params, layers))


def _padded(values: Sequence[float], size: int, dtype: type, fill: int = 0) -> np.ndarray:
  result = np.full(size, fill, dtype)
  result[:len(values)] = values
  return result


def _row_keys(seed: int, samples: Sequence[Sample], size: int) -> jax.Array:
  return _fold(np.uint32(seed), _padded([zlib.crc32(s.id.encode()) for s in samples], size, np.uint32),
               _padded([s.number for s in samples], size, np.uint32))


@jax.jit
def _fold(seed: jax.Array, codes: jax.Array, numbers: jax.Array) -> jax.Array:
  fold = lambda code, number: jax.random.key_data(
      jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), code), number))
  return jax.vmap(fold)(codes, numbers)
