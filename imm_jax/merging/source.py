"""Matches the tensors of several checkpoint folders, reads them in blocks, and computes statistics of them."""

import collections
import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from imm_jax import files
from imm_jax.errors import UserError, join_items
from imm_jax.merging import model_configs, roles, trees
from imm_jax.merging.statistics import Statistic
from imm_jax.model import checkpoint_folder
from imm_jax.model.safetensors import Entry, Reader, empty_aligned
from imm_jax.runtime import hardware, progress

# Entries in a block: few enough to fit in CPU caches, enough to amortise the overhead of a call.
BLOCK = 1 << 19
# Buffers that a model's code computes, so that some checkpoints omit them.
_BUFFERS = re.compile(r"(^|\.)(position_ids|masked_bias|attn\.bias|attention\.bias|num_batches_tracked)$")
# Stacks of layers beside a language model's, which have a number of their own.
_OTHER_STACKS = re.compile(r"vision|visual|image|audio|speech|encoder|decoder|mtp")
Table = dict[str, Entry]


class CheckpointSource:
  """Implements `Source` for tensors in checkpoint folders. Use it as a context manager."""

  traced = False

  def __init__(self, folders: Mapping[str, Path], *, block: int = BLOCK, keep: Callable[[str], bool] | None = None,
               tables: Sequence[Table] | None = None, first_layer: int = 0, num_layers: int | None = None):
    """Opens the folders and matches their tensors.

    Args:
      folders: label -> folder; the others are compared with the first, which is the base if its label is `base`.
      block: number of entries held at once.
      keep: predicate on names that selects tensors; None for all.
      tables: for each folder, output name -> entry of the tensor; None for all tensors under their own names.
      first_layer: first layer of the output among these tensors, where lists over the layers begin.
      num_layers: number of layers of the output, of which these tensors are a slice; None for whole models.

    Raises:
      UserError: as `folder.read_entries` does, and if the folders' tensors differ; names those that do.
    """
    self.folders, self.block, self.first_layer = dict(folders), block, first_layer
    self._reader = Reader()
    try:
      labels = self.labels = list(self.folders)
      if tables is None:
        tables = [self._load_table(path) if keep is None else
                  {name: entry for name, entry in checkpoint_folder.read_entries(path).items() if keep(name)}
                  for path in self.folders.values()]
      self._models = _align(tables)
      _check_match(labels, self._models)
    except BaseException:
      self.close()
      raise
    self.order = sorted(self._models[0], key=checkpoint_folder.model_order)
    self.names = [name for name in self.order if is_floating(self._models[0][name])]
    self.num_models, self.has_base = len(self._models), labels[0] == "base"
    counts = trees.count_layers(self.names)
    self.layers = _cut_layers(counts, next(iter(self.folders.values()))) if num_layers is None else counts
    # A slice may hold no layer, but what stands before or after them.
    self.output_layers = self.layers if num_layers is None else dict.fromkeys(counts or ("layers",), num_layers)

  def __enter__(self) -> "CheckpointSource":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def close(self) -> None:
    """Closes all files."""
    self._reader.close()

  def size(self, name: str) -> int:
    return self._models[0][name].size

  def row_length(self, name: str) -> int:
    """Returns the number of entries in a row (one index of the first axis); below two axes a tensor is one row."""
    shape = self._models[0][name].shape
    return math.prod(shape[1:] if len(shape) > 1 else shape)

  def entries(self, name: str) -> list[Entry]:
    """Returns a tensor's entry in every model."""
    return [model[name] for model in self._models]

  def read(self, entry: Entry, begin: int, out: np.ndarray) -> None:
    """Fills `out` with a tensor's entries from `begin` on."""
    self._reader.read(entry, begin, out)

  def tensors(self, name: str) -> list[jax.Array]:
    """Raises NotImplementedError, because tensors on disk are never traced."""
    raise NotImplementedError(name)

  def reduce(self, statistic: Statistic, combine: Callable[..., np.ndarray],
             arguments: Callable[[str], Mapping[str, ArrayLike]] = lambda _: {}, names: Sequence[str] | None = None,
             **static: Any) -> Iterator[tuple[str, np.ndarray]]:
    compiled = _compiled_statistic(statistic, tuple(static.items()))
    whole = names is None or len(names) == len(self.names)
    names, buffers = self.names if names is None else names, Buffers()
    total = sum(e.size * e.dtype.itemsize for name in names for e in self.entries(name))
    # A pass over few tensors is part of the merge, which has its own progress bar.
    with progress.make_bar(total, "measure", "B", quiet=not whole, unit_scale=True, leave=False) as bar:
      for name in names:
        numbers, result = dict(arguments(name)), None
        columns = max(1, self.row_length(name))
        step = max(1, self.block // columns) * columns if static.get("rows") else self.block
        for begin in range(0, max(1, self.size(name)), step):
          count = min(step, self.size(name) - begin)
          tensors = [buffers.take(count, entry.dtype) for entry in self.entries(name)]
          for entry, tensor in zip(self.entries(name), tensors, strict=True):
            self.read(entry, begin, tensor)
          shaped = [t.reshape(-1, columns) for t in tensors] if static.get("rows") else tensors
          with jax.enable_x64(True), on_cpu():  # for sums in int64 and float64
            part = np.asarray(compiled(shaped, numbers))
          result = part if result is None else combine(result, part)
          bar.update(sum(t.nbytes for t in tensors))
          buffers.give(tensors)
        yield name, result

  def _load_table(self, path: Path) -> Table:
    """Loads the entries of a model's tensors, without those that are computed from others (tied head, rotary)."""
    table = checkpoint_folder.read_entries(path)
    tied = model_configs.ties_embeddings(files.read_json(path / "config.json"))
    # If config.json does not say, the family decides; equal bytes show that the head is tied.
    for head in roles.find_heads(table) if tied is not False else []:
      if self._are_equal([table[head], table[roles.find_embedding(table)]]):
        del table[head]
      elif tied:
        raise checkpoint_folder.untied_error(path, head)
    return {name: entry for name, entry in table.items() if not checkpoint_folder.is_rotary(name)}

  def _are_equal(self, entries: Sequence[Entry]) -> bool:
    if len({(e.dtype, e.shape) for e in entries}) > 1:
      return False
    for begin in range(0, entries[0].size, self.block):
      blocks = [empty_aligned((min(self.block, e.size - begin),), e.dtype) for e in entries]
      for entry, block in zip(entries, blocks, strict=True):
        self.read(entry, begin, block)
      if len({block.tobytes() for block in blocks}) > 1:
        return False
    return True

  def read_equal(self, name: str) -> np.ndarray:
    """Reads a tensor that is not merged; raises UserError unless it is equal in every model or a counter."""
    entries = self.entries(name)
    if not trees.is_counter(name) and not self._are_equal(entries):
      raise UserError(f"{name} of {entries[0].dtype} differs between the models; only floating tensors are merged")
    whole = empty_aligned((entries[0].size,), entries[0].dtype)
    self.read(entries[0], 0, whole)
    return whole


class Buffers:
  """Keeps aligned arrays for reuse, because the first touch of newly allocated memory is slow."""

  def __init__(self) -> None:
    self._spare: dict[int, list[np.ndarray]] = collections.defaultdict(list)

  def take(self, count: int, dtype: np.dtype) -> np.ndarray:
    """Returns an uninitialized array [count]."""
    spare = self._spare[count * dtype.itemsize]
    return spare.pop().view(dtype) if spare else empty_aligned((count,), dtype)

  def give(self, arrays: Iterable[np.ndarray]) -> None:
    """Returns arrays to the pool."""
    for array in arrays:
      self._spare[array.nbytes].append(array)


def is_floating(entry: Entry) -> bool:
  """Returns whether a tensor is floating and so is merged; others are copied."""
  return jax.numpy.issubdtype(entry.dtype, jax.numpy.floating)


def is_buffer(name: str) -> bool:
  """Returns whether a tensor is one that a model's code computes, which some checkpoints hold and others do not."""
  return _BUFFERS.search(name) is not None


def on_cpu() -> contextlib.AbstractContextManager:
  """Makes the CPU the default device: transfers to an accelerator and back would cost more than the merge."""
  return jax.default_device(hardware.cpu_device())


def _cut_layers(counts: Mapping[str, int], folder: Path) -> dict[str, int]:
  """Cuts numbers of layers to that of config.json; checkpoints may hold more, such as one that looks tokens ahead."""
  count = model_configs.read_layer_count(folder) if (folder / "config.json").exists() else None
  texts = [stack for stack in counts if not _OTHER_STACKS.search(stack)] if len(counts) > 1 else list(counts)
  cut = {stack: min(counts[stack], count) for stack in texts if count and len(texts) == 1}
  return {**counts, **cut}


def _align(tables: Sequence[Table]) -> list[Table]:
  """Removes differences between tables that models may have: tied or untied heads, and optional buffers."""
  names = [set(table) for table in tables]
  left_out = {name for name in set.union(*names) - set.intersection(*names) if is_buffer(name)}
  return roles.share_heads([{n: entry for n, entry in table.items() if n not in left_out} for table in tables])


def _check_match(labels: Sequence[str], models: Sequence[Mapping[str, Entry]]) -> None:
  first, problems = models[0], []
  for label, model in zip(labels[1:], models[1:], strict=True):
    problems += [f"{label} lacks {name}" for name in first.keys() - model.keys()]
    problems += [f"{label} has {name}, {labels[0]} has not" for name in model.keys() - first.keys()]
    for name in sorted(first.keys() & model.keys()):
      a, b = first[name], model[name]
      if a.shape != b.shape:
        vocabulary = (roles.is_embedding(name) or roles.is_head(name)) and a.shape[1:] == b.shape[1:]
        problems.append(f"{name} has shape {a.shape} in {labels[0]}, {b.shape} in {label}" + (
            " (other vocabularies: a recipe with tokenizer_source: base gives both the rows of one)"
            if vocabulary else ""))
      elif is_floating(a) != is_floating(b):
        problems.append(f"{name} is {a.dtype} in {labels[0]}, {b.dtype} in {label}")
  if problems:
    raise UserError(f"the checkpoints do not match: {join_items(sorted(problems)[:50], '; ')}")


@functools.cache
def _compiled_statistic(statistic: Statistic, static: tuple[tuple[str, Any], ...]) -> Callable[..., jax.Array]:
  return jax.jit(lambda tensors, numbers: statistic(tensors, **numbers, **dict(static)))
