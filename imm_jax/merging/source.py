"""Checkpoint folders as the tensors of several models: matched, read in blocks, measured."""

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

from imm_jax import files, progress
from imm_jax.errors import UserError, listed
from imm_jax.merging import trees
from imm_jax.merging.statistics import Statistic
from imm_jax.model import folder as checkpoint
from imm_jax.model.safetensors import Entry, Reader, aligned

# Entries of a block: small enough for the caches, large enough to outweigh a call.
BLOCK = 1 << 19
# What follows from the code of a model, and which some checkpoints hold and others do not.
_BUFFERS = re.compile(r"(^|\.)(position_ids|masked_bias|attn\.bias|attention\.bias|num_batches_tracked)$")
Table = dict[str, Entry]


class CheckpointSource:
  """Checkpoint folders as the `Source` of a plan; use as a context manager."""

  traced = False

  def __init__(self, folders: Mapping[str, Path], *, block: int = BLOCK, only: Callable[[str], bool] | None = None,
               tables: Sequence[Table] | None = None, first_layer: int = 0):
    """Opens the folders and matches their tensors.

    Args:
      folders: label -> folder; the first one's tensors are what the others are compared with, and it is the base
        where its label is `base`.
      block: entries that are held at once.
      only: says by name which tensors count; None for all.
      tables: for each folder where the tensors lie, by the names that the output gives them; None for all of a
        folder's, by their own names.
      first_layer: where lists over the layers begin.

    Raises:
      UserError: for what `folder.tensors` raises, and unless all have the same tensors; it names those that differ.
    """
    self.folders, self.block, self.first_layer = dict(folders), block, first_layer
    self._reader = Reader()
    try:
      labels = self.labels = list(self.folders)
      if tables is None:
        tables = [self._table(path) if only is None else
                  {name: entry for name, entry in checkpoint.tensors(path).items() if only(name)}
                  for path in self.folders.values()]
      # Of an untied output whose tied inputs have no head of their own: their embedding is one.
      self.untied = [label for label, table in zip(labels, tables, strict=True) if _is_tied(table)
                     and any(checkpoint.HEAD in other for other in tables)]
      self._models = _align(tables)
      _match(labels, self._models)
    except BaseException:
      self.close()
      raise
    self.order = sorted(self._models[0], key=checkpoint.model_order)
    self.names = [name for name in self.order if floating(self._models[0][name])]
    self.num_models, self.has_base = len(self._models), labels[0] == "base"

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
    """Entries of a tensor with one index on its first axis; a tensor of at most one axis is one row."""
    shape = self._models[0][name].shape
    return math.prod(shape[1:] if len(shape) > 1 else shape)

  def entries(self, name: str) -> list[Entry]:
    """Where a tensor lies in every model."""
    return [model[name] for model in self._models]

  def read(self, entry: Entry, begin: int, out: np.ndarray) -> None:
    """Fills `out` with a tensor's entries from `begin` on."""
    self._reader.read(entry, begin, out)

  def tensors(self, name: str) -> list[jax.Array]:
    """None is ever traced."""
    raise NotImplementedError(name)

  def reduce(self, statistic: Statistic, combine: Callable[..., np.ndarray],
             arguments: Callable[[str], Mapping[str, np.ndarray]] = lambda _: {}, names: Sequence[str] | None = None,
             **static: Any) -> Iterator[tuple[str, np.ndarray]]:
    compiled = _compiled_statistic(statistic, tuple(static.items()))
    whole = names is None or len(names) == len(self.names)
    names, buffers = self.names if names is None else names, Buffers()
    total = sum(e.size * e.dtype.itemsize for name in names for e in self.entries(name))
    # What is measured for one tensor belongs to the bar of the merge.
    with progress.bar(total, "measure", "B", quiet=not whole, unit_scale=True, leave=False) as bar:
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

  def _table(self, path: Path) -> Table:
    """A model's tensors, less those that follow from the others."""
    found = checkpoint.tensors(path)
    head, embedding = found.get(checkpoint.HEAD), found.get(checkpoint.EMBEDDING)
    tied = files.read_json(path / "config.json").get("tie_word_embeddings")
    # Where config.json does not say, the family decides, and equal bytes tell.
    if head is not None and embedding is not None and (tied or tied is None):
      if self._equal([head, embedding]):
        del found[checkpoint.HEAD]
      elif tied:
        raise checkpoint.untied(path)
    return {name: entry for name, entry in found.items() if not checkpoint.is_rotary(name)}

  def _equal(self, entries: Sequence[Entry]) -> bool:
    if len({(e.dtype, e.shape) for e in entries}) > 1:
      return False
    for begin in range(0, entries[0].size, self.block):
      blocks = [aligned((min(self.block, e.size - begin),), e.dtype) for e in entries]
      for entry, block in zip(entries, blocks, strict=True):
        self.read(entry, begin, block)
      if len({block.tobytes() for block in blocks}) > 1:
        return False
    return True

  def read_equal(self, name: str) -> np.ndarray:
    """A tensor that is not merged; raises UserError unless it is the same in every model, or a counter."""
    entries = self.entries(name)
    if not trees.is_counter(name) and not self._equal(entries):
      raise UserError(f"{name} of {entries[0].dtype} differs between the models; only floating tensors are merged")
    whole = aligned((entries[0].size,), entries[0].dtype)
    self.read(entries[0], 0, whole)
    return whole


class Buffers:
  """Aligned arrays that are used again: memory that the system hands out anew is slow at its first touch."""

  def __init__(self) -> None:
    self._spare: dict[int, list[np.ndarray]] = collections.defaultdict(list)

  def take(self, count: int, dtype: np.dtype) -> np.ndarray:
    """An array [count] with anything in it."""
    spare = self._spare[count * dtype.itemsize]
    return spare.pop().view(dtype) if spare else aligned((count,), dtype)

  def give(self, arrays: Iterable[np.ndarray]) -> None:
    """Takes arrays back."""
    for array in arrays:
      self._spare[array.nbytes].append(array)


def floating(entry: Entry) -> bool:
  """Whether a tensor is merged; others are copied."""
  return jax.numpy.issubdtype(entry.dtype, jax.numpy.floating)


def on_cpu() -> contextlib.AbstractContextManager:
  """Where there is an accelerator too: to and fro would cost more than the merge."""
  try:
    return jax.default_device(jax.local_devices(backend="cpu")[0])
  except RuntimeError:  # the user has switched that backend off
    return contextlib.nullcontext()


def _is_tied(table: Mapping[str, Entry]) -> bool:
  return checkpoint.HEAD not in table and checkpoint.EMBEDDING in table


def _align(tables: Sequence[Table]) -> list[Table]:
  """Tables with the same tensors, where the difference follows from the model: tied heads, buffers."""
  names = [set(table) for table in tables]
  one_sided = set.union(*names) - set.intersection(*names)
  left_out = {name for name in one_sided if _BUFFERS.search(name)}
  aligned_tables = [{n: entry for n, entry in table.items() if n not in left_out} for table in tables]
  if checkpoint.HEAD in one_sided:
    for table in filter(_is_tied, aligned_tables):
      table[checkpoint.HEAD] = table[checkpoint.EMBEDDING]
  return aligned_tables


def _match(labels: Sequence[str], models: Sequence[Mapping[str, Entry]]) -> None:
  first, problems = models[0], []
  for label, model in zip(labels[1:], models[1:], strict=True):
    problems += [f"{label} lacks {name}" for name in first.keys() - model.keys()]
    problems += [f"{label} has {name}, {labels[0]} has not" for name in model.keys() - first.keys()]
    for name in sorted(first.keys() & model.keys()):
      a, b = first[name], model[name]
      if a.shape != b.shape:
        vocabulary = name.endswith(("embed_tokens.weight", "lm_head.weight")) and a.shape[1:] == b.shape[1:]
        problems.append(f"{name} has shape {a.shape} in {labels[0]}, {b.shape} in {label}" + (
            " (other vocabularies: a recipe with tokenizer_source: base gives both the rows of one)"
            if vocabulary else ""))
      elif floating(a) != floating(b):
        problems.append(f"{name} is {a.dtype} in {labels[0]}, {b.dtype} in {label}")
  if problems:
    raise UserError(f"the checkpoints do not match: {listed(sorted(problems)[:50], '; ')}")


@functools.cache
def _compiled_statistic(statistic: Statistic, static: tuple[tuple[str, Any], ...]) -> Callable[..., jax.Array]:
  return jax.jit(lambda tensors, numbers: statistic(tensors, **numbers, **dict(static)))
