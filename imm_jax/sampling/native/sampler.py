"""The JAX sampler: continuous batching over a fixed number of rows.

Waiting prompts take the rows of samples that have ended, a few at a time, so that answers of very different lengths
keep the device busy. Random keys are folded from (seed, prompt id, sample number, token number), so that the row of a
sample and the samples it runs with affect nothing but the rounding of sums.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P, SingleDeviceSharding

from imm_jax.errors import UserError, print_once
from imm_jax.model import hf, sharding
from imm_jax.model.cached import LayerCache, Prefix
from imm_jax.model.decode_kernels import KERNELS
from imm_jax.model.decoder import Params
from imm_jax.model.tokenization import decode_continuation, known_ids
from imm_jax.sampling import Completion, Prompt, completions
from imm_jax.sampling.native import decode, queue
from imm_jax.sampling.native.queue import Sample
from imm_jax.sampling.token_bar import Progress

# Steps between checks for stop strings and rows that are done, and updates of the progress bar.
_STEPS = 16
# Samples join once 1/_REFILL_SHARE of all rows are free: less often than one by one, while most rows stay busy.
_REFILL_SHARE = 8
_DTYPES = ("bfloat16", "float16", "float32")
# Seconds that each program of this process took to compile, or to come from the cache.
_COMPILED: list[float] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: _COMPILED.append(seconds) if event.endswith("/backend_compile_duration") else None)


class NativeSampler:
  """Samples from an HF checkpoint folder, on one device or a mesh."""

  def __init__(self, folder: str | Path, *, compute_dtype: str = "bfloat16", batch_size: int = 64,
               mesh: Mesh | None = None, params: Params | None = None, kernel: str = "auto"):
    """Loads the checkpoint.

    Args:
      folder: an HF checkpoint folder with a tokenizer.
      compute_dtype: dtype of weights, activations and cache: bfloat16, float16 or float32.
      batch_size: number of samples decoded at once.
      mesh: mesh that weights and cache are split over, see `sharding.decoding_mesh`; None takes the first device.
      params: weights in memory that replace those of the folder, with stacked layers as in training.
      kernel: attention kernel, one of `decode_kernels.KERNELS`, or `auto` for `columns` on CPUs and `xla` elsewhere.
        The kernels for GPUs and TPUs have not been run on these.

    Raises:
      ValueError: for an argument out of range.
      UserError: for a checkpoint or tokenizer that cannot be read, or an invalid end-of-text token id.
    """
    if compute_dtype not in _DTYPES:
      raise ValueError(f"compute_dtype={compute_dtype!r}: expected one of {', '.join(_DTYPES)}")
    if batch_size < 1:
      raise ValueError(f"batch_size={batch_size}: expected 1 or more")
    if kernel not in ("auto", *KERNELS):
      raise ValueError(f"kernel={kernel!r}: expected one of auto, {', '.join(KERNELS)}")
    self._dtype = jnp.dtype(compute_dtype)
    self._folder, self._batch_size = folder, batch_size
    self._sizes: set[str] = set()  # sizes of the programs that a call ran, for the log
    config = hf.read_config(folder)
    self._mesh = sharding.decoding_mesh(mesh, config.num_kv_heads) if mesh is not None and mesh.size > 1 else None
    device = SingleDeviceSharding(mesh.devices.item() if mesh is not None and mesh.size == 1 else
                                  jax.local_devices()[0])
    place = functools.partial(sharding.param_sharding, self._mesh) if self._mesh else lambda *_: device
    # The small files come first, so that their errors show before the weights are read.
    self.tokenizer, self._eos = completions.load(Path(folder), config.vocab_size)
    if params is None:
      self._config, self._params = hf.load(folder, dtype=self._dtype, place=place, stacked=False)
    else:
      self._config, self._params = config, _for_decoding(params, config.num_layers, self._dtype, place)
    known = np.zeros(self._config.vocab_size, bool)
    known[known_ids(self.tokenizer, len(known))] = True
    self._platform = next(iter(jax.tree.leaves(self._params)[0].devices())).platform
    self._kernel = kernel if kernel != "auto" else "columns" if self._platform == "cpu" else "xla"
    self._allowed = jax.device_put(known, NamedSharding(self._mesh, P()) if self._mesh else
                                   jax.tree.leaves(self._params)[0].sharding)

  def generate(self, prompts: Sequence[Prompt], *, max_new_tokens: int, num_samples: int = 1,
               temperatures: Sequence[float] = (0.0,), top_p: float = 1.0, stop: Sequence[str] = (), seed: int = 0,
               label: str = "sample", quiet: bool = False) -> list[list[Completion]]:
    """Samples completions as `Sampler.generate` says, without a journal; `quiet` hides the progress bar."""
    completions.check_arguments(max_new_tokens, num_samples, temperatures, top_p, stop, seed)
    ids = completions.encode(self.tokenizer, prompts, self._config.vocab_size)
    if ids and (self._config.max_positions or math.inf) < max(map(len, ids)) + max_new_tokens:
      print_once(f"warning: prompts with max_new_tokens={max_new_tokens} go past the {self._config.max_positions} "
                 "positions that config.json gives the model (max_position_embeddings); what it writes there may make "
                 "no sense")
    # Special tokens end a sample on the device, without decoding its text.
    ends, stop_texts = completions.endings(self.tokenizer, self._eos, stop, self._config.vocab_size)
    samples = [Sample(p, s, prompts[p].id, temperatures[s % len(temperatures)])
               for p in range(len(prompts)) for s in range(num_samples)]
    static = decode.Static(self._config, self._dtype, ends, top_p, not any(temperatures), self._mesh, self._kernel)
    results: list[list[Completion | None]] = [[None] * num_samples for _ in prompts]
    groups = queue.group_by_prefix(ids, least=-(-self._batch_size // num_samples))
    self._sizes.clear()
    compiled = len(_COMPILED)
    with Progress(len(samples), max_new_tokens, label, quiet=quiet) as bar:
      for group in groups:
        of_group = {p: ids[p] for p in group}
        for ended, running_tokens in self._run(of_group, [s for s in samples if s.prompt in of_group], static,
                                               max_new_tokens, stop_texts, seed):
          for sample, tokens in ended:
            completion = completions.completion(self.tokenizer, tokens, ends, stop_texts)
            results[sample.prompt][sample.number] = completion
            bar.end(completion.num_tokens)
          bar.draw(running_tokens)
    logging.info("%s: %d programs compiled or read from the cache, in %.1f s; sizes: %s", label,
                 len(_COMPILED) - compiled, sum(_COMPILED[compiled:]), ", ".join(sorted(self._sizes)))
    return results

  def _run(self, ids: dict[int, list[int]], samples: list[Sample], static: decode.Static, max_new_tokens: int,
           stop: tuple[str, ...], seed: int) -> Iterator[tuple[list[tuple[Sample, np.ndarray]], int]]:
    """Yields, every few steps, the samples that ended with their tokens, and the token count of running samples.

    Args:
      ids: tokens by the number of the prompt; what all begin with is run once.
      samples: samples of these prompts.
      static: see `decode.Static`.
      max_new_tokens: as in `generate`.
      stop: stop strings that are not single tokens.
      seed: as in `generate`.
    """
    parts, cpu = (self._mesh.shape["data"] if self._mesh else 1), self._platform == "cpu"
    prefix_length = queue.common_prefix([*ids.values()], len(samples))
    prefix = self._prefix(next(iter(ids.values()))[:prefix_length], static, parts)
    suffixes = {p: tokens[prefix_length:] for p, tokens in ids.items()}
    lengths = [*map(len, suffixes.values())]
    waiting = queue.Queue(suffixes, samples, queue.pack_shape(lengths, parts=parts, cpu=cpu),
                          lambda pack: self._prefill(prefix, pack, static), parts=parts)
    row_count = queue.choose_rows(self._batch_size, len(samples))
    refill = max(1, row_count // _REFILL_SHARE)
    sizes = queue.list_row_counts(row_count, max_new_tokens, parts)
    max_slots = queue.compute_max_slots(max(lengths) + max_new_tokens)
    slots = min(max_slots, queue.FIRST_SLOTS)
    rows = _Rows(self._commit(decode.init(row_count, slots, max_new_tokens, static)), [None] * row_count, slots,
                 max_slots)
    while True:
      self._admit(rows, waiting, refill, seed, static)
      if not rows.list_running():
        return
      if not waiting:
        rows.shrink(sizes, static)
      running, size = rows.list_running(), len(rows.samples)
      used = rows.make_room(running, static)
      # Decodes until enough rows are free for others to join, or for the rows to shrink.
      smaller = sizes[sizes.index(size) - 1] if size > sizes[0] else 0
      self._sizes.add(f"decode {size} rows x {rows.slots} slots after {prefix.caches[0][0].shape[1]}")
      rows.state = decode.decode(
          self._params, prefix, rows.state, np.array([sample is None for sample in rows.samples]),
          np.int32(min(rows.slots - used, _STEPS)), np.int32(refill if waiting else size - smaller), self._allowed,
          static=static)
      yield self._collect(rows, running, stop)

  def _admit(self, rows: "_Rows", waiting: queue.Queue, refill: int, seed: int, static: decode.Static) -> None:
    """Puts waiting samples into free rows, at most `refill` at a time, as long as there are both."""
    while waiting and (free_rows := [i for i, sample in enumerate(rows.samples) if sample is None]):
      taken, run = waiting.take(min(len(free_rows), refill))
      # Leaves room for some steps, so that no size is compiled for only a few steps.
      rows.grow(int(run.pack.lengths.max()) + _STEPS, static)
      joining = [sample for _, sample in taken]
      rows.state = decode.insert(
          rows.state, *run.run, run.pack.lengths, run.pack.starts, _padded([i for i, _ in taken], refill, np.int32),
          _padded(free_rows[:len(joining)], refill, np.int32, len(rows.samples)), _row_keys(seed, joining, refill),
          _padded([s.temperature for s in joining], refill, np.float32), self._allowed, static=static)
      del run  # frees its caches
      for row, sample in zip(free_rows, joining, strict=False):
        rows.samples[row] = sample

  def _collect(self, rows: "_Rows", running: Sequence[int], stop: tuple[str, ...],
               ) -> tuple[list[tuple[Sample, np.ndarray]], int]:
    """Frees the rows whose samples have ended; returns these with their tokens, and how many tokens the others have.

    Raises:
      UserError: when the model's logits are not finite.
    """
    done, counts, tokens = (np.asarray(rows.state[name]) for name in ("done", "count", "tokens"))
    ended = []
    for i in running:
      if done[i] and tokens[i, counts[i] - 1] < 0:
        raise UserError(f"{self._folder}: the model's logits are NaN or infinite after prompt {rows.samples[i].id!r} "
                        f"in {self._dtype}; its weights are broken, or out of the range of that dtype")
      if done[i] or (stop and self._stopped(tokens[i, :counts[i]], stop)):
        ended.append((rows.samples[i], tokens[i, :counts[i]].copy()))
        rows.samples[i] = None
    return ended, sum(int(counts[i]) for i in running if rows.samples[i] is not None)

  def _prefix(self, ids: list[int], static: decode.Static, parts: int) -> Prefix:
    """Runs the common prefix of all prompts."""
    slots = queue.round_up_slots(1)
    prefix = self._commit(decode.no_prefix(slots, static))
    if not ids:
      return prefix
    pack = queue.pack_prompts([[ids]], queue.Shape(parts, queue.round_up_slots(len(ids)), 1))
    _, caches = self._prefill(prefix, pack, static)
    return decode.take_prefix(caches, np.int32(len(ids)), slots=queue.round_up_prefix(len(ids)), static=static)

  def _prefill(self, prefix: Prefix, pack: queue.Pack, static: decode.Static) -> tuple[jax.Array, list[LayerCache]]:
    self._sizes.add(f"prefill {pack.tokens.shape[0]} x {pack.tokens.shape[1]} after {prefix.caches[0][0].shape[1]}")
    return decode.prefill(self._params, prefix, pack.tokens, pack.positions, pack.segment_ids, pack.last,
                          static=static)

  def _commit(self, arrays: Any) -> Any:
    """Commits arrays to the weights' device, because jit compiles again for uncommitted ones."""
    return arrays if self._mesh else jax.device_put(arrays, self._allowed.sharding)

  def _stopped(self, tokens: np.ndarray, stop: tuple[str, ...]) -> bool:
    """Returns whether the text has a stop string; mostly its last tokens suffice to rule that out."""
    recent = _STEPS + 4 * max(map(len, stop))  # a character has at most four tokens
    shows = lambda part: any(s in decode_continuation(self.tokenizer, part, skip_special_tokens=False) for s in stop)
    return shows(tokens[-recent:]) and shows(tokens)


@dataclasses.dataclass
class _Rows:
  """Holds the rows that are decoded together.

  Attributes:
    state: their arrays on the devices.
    samples: the running sample of each row; None for a free one.
    slots: cache slots of a row.
    max_slots: the most that any sample can need.
  """

  state: decode.State
  samples: list[Sample | None]
  slots: int
  max_slots: int

  def list_running(self) -> list[int]:
    """Lists the rows that are not free."""
    return [i for i, sample in enumerate(self.samples) if sample is not None]

  def shrink(self, sizes: Sequence[int], static: decode.Static) -> None:
    """Drops free rows, down to the smallest of the sizes that holds the running ones, which come first."""
    running = self.list_running()
    size = queue.choose_row_count(sizes, len(running))
    if size < len(self.samples):
      kept_rows = np.array([*running, *[0] * (size - len(running))])
      self.state = decode.shrink(self.state, kept_rows, np.arange(size) >= len(running), static=static)
      self.samples = [self.samples[i] for i in running] + [None] * (size - len(running))

  def grow(self, slots: int, static: decode.Static) -> None:
    """Grows the caches to a round number of slots, at least `slots` unless that is more than any sample needs."""
    self.slots = max(self.slots, min(self.max_slots, queue.round_up_slots(slots)))
    self.state = decode.grow(self.state, self.slots, columns=static.kernel == "columns")

  def make_room(self, running: Sequence[int], static: decode.Static) -> int:
    """Grows the caches if a running row's is full; returns the largest number of slots that one of them uses."""
    used = int(np.asarray(self.state["used"])[running].max())
    if used >= self.slots:
      self.grow(self.slots + 1, static)
    return used


def _for_decoding(params: Params, layers: int, dtype: jnp.dtype, place: hf.Place) -> Params:
  """Converts stacked parameters for decoding, one layer's parameter at a time: unstacks, casts and places them."""

  def convert(tree: Any, prefix: tuple[str, ...], take: Callable[[jax.Array], jax.Array]) -> Any:
    def put(path: tuple, leaf: jax.Array) -> jax.Array:
      taken = jnp.asarray(take(leaf), dtype)
      return jax.device_put(taken, place(".".join((*prefix, *(str(part.key) for part in path))), taken.shape))

    return jax.tree_util.tree_map_with_path(put, tree)

  rest = convert({name: value for name, value in params.items() if name != "layers"}, (), lambda leaf: leaf)
  return {**rest, "layers": {i: convert(params["layers"], ("layers", str(i)), lambda leaf, i=i: leaf[i])
                             for i in range(layers)}}


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
