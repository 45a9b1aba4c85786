"""Tasks by name: questions with gold answers.

`stories` and the other generated families stand in `arithmetic.py`, the real data sets in `catalogue.py`; `custom` is
whatever records a config names the fields of. `texts.py` reads corpora without questions.
"""

import functools
import hashlib
import sys
from collections.abc import Mapping

from imm_jax.tasks import arithmetic, registry
from imm_jax.tasks.base import Example
from imm_jax.tasks.catalogue import TASKS
from imm_jax.tasks.texts import load_text

__all__ = ["JUDGED", "NAMES", "Example", "is_endless", "load", "load_text", "published_size",
           "splits"]

NAMES = (*arithmetic.FAMILIES, *TASKS, "custom")
# Those whose answers can be right or wrong; the others are for layer importance.
JUDGED = tuple(name for name in NAMES if name not in TASKS or TASKS[name].kind)


def load(name: str, *, split: str, count: int | None = None, seed: int = 0, source: str = "",
         fields: Mapping[str, str] | None = None, kind: str = "") -> list[Example]:
  """The first `count` questions of a task's split, in the order of the seed; none occurs twice.

  What a source leaves unsaid (records left out, a file that is short) is told once on stderr.

  Args:
    name: of `NAMES`.
    split: `train` or `test`, or another one that is published.
    count: how many; None for all, which only a real task has. The first n of a longer draw are the draw of n.
    seed: of the order: that of a real task follows from seed and split alone, whatever the order of the source.
    source: of a real task, in place of its own: `hf:...`, `tfds:...` or `file:...` (see `sources.py`).
    fields: of `custom` (see `registry.read`).
    kind: of `custom`.

  Raises:
    KeyError: for a name that is not in `NAMES`.
    ValueError: when the split holds fewer questions.
    UserError: for a source that cannot be read, or holds something else.

  >>> [e.kind for e in load("choice", split="test", count=2, seed=0)]
  ['choice', 'choice']
  """
  if is_endless(name):
    if count is None:
      raise ValueError(f"task {name} is generated and has no last question; say how many")
    return arithmetic.generate(name, split=split, count=count, seed=seed)
  found = registry.read(name, split=split, source=source, fields=fields, kind=kind)
  for note in found.notes:
    _say(note)
  if count is not None and count > len(found.examples):
    raise ValueError(f"{name}/{split} holds {len(found.examples)} questions, {count} were asked for")
  order = sorted(found.examples, key=lambda e: hashlib.sha256(f"{seed}/{e.id}".encode()).digest())
  return order[:count]


def is_endless(name: str) -> bool:
  """Whether a task makes as many questions as it is asked for."""
  return name in arithmetic.FAMILIES


def splits(name: str) -> tuple[str, ...]:
  """The splits of a task.

  >>> splits("gsm8k"), splits("svamp")
  (('train', 'test'), ('test',))
  """
  return tuple(TASKS[name].source) if name in TASKS else ("train", "test")


def published_size(name: str, split: str) -> int | None:
  """How many records a real task's split is published with; None for a task of another kind."""
  sizes = TASKS[name].formats[0].sizes.get(split) if name in TASKS else None
  return sizes[0] if sizes else None


@functools.cache  # once, however often the split is loaded
def _say(note: str) -> None:
  print(note, file=sys.stderr)
