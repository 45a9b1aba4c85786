"""Tasks by name: questions with gold answers.

`stories` and the other generated families stand in `arithmetic.py`, the real data sets in `catalogue.py`; `custom` is
whatever records a config names the fields of. `texts.py` reads corpora without questions.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import TypeVar

from imm_jax.errors import UserError, say_once
from imm_jax.tasks import arithmetic, registry
from imm_jax.tasks.base import Choice, Example
from imm_jax.tasks.catalogue import TASKS
from imm_jax.tasks.registry import paper_note
from imm_jax.tasks.texts import CORPORA, load_text

__all__ = ["CORPORA", "JUDGED", "NAMES", "Choice", "Example", "count_records", "has_choices", "has_place", "is_endless",
           "load", "load_choices", "load_text", "measure_of", "paper_note", "published_records", "published_size",
           "splits"]

NAMES = (*arithmetic.FAMILIES, *TASKS, "custom")
_Question = TypeVar("_Question", Choice, Example)
# Those whose answers can be right or wrong; the others are for layer importance.
JUDGED = tuple(name for name in NAMES if name not in TASKS or TASKS[name].kind)


def load(name: str, *, split: str, count: int | None = None, seed: int = 0, source: str = "",
         fields: Mapping[str, str] | None = None, kind: str = "") -> list[Example]:
  """The first `count` questions of a task's split, in the order of the seed.

  A test split is whole: a question that stands twice in it is asked twice. Of another split none occurs twice, and none
  is of the test split. What a source leaves unsaid (records left out, a file that is short) is told once on stderr.

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
  return _ordered(name, split, _read(name, split, source, fields, kind).examples, count, seed)


def load_choices(name: str, *, split: str = "test", count: int | None = None, seed: int = 0, source: str = "",
                 fields: Mapping[str, str] | None = None) -> list[Choice]:
  """The same questions, in the same order and with the same ids, as options to be scored by likelihood.

  Contexts and options are those of lm-evaluation-harness for sets that it has (zero-shot).

  Args:
    name: of a task of multiple choice, or `custom` with `fields` that name the `choices`.
    split: as of `load`.
    count: as of `load`.
    seed: as of `load`.
    source: as of `load`.
    fields: of `custom`.

  Raises:
    KeyError: for a name that is not in `NAMES`.
    ValueError: when the split holds fewer questions.
    UserError: as `load`, and for a task without options.
  """
  found = None if is_endless(name) else _read(name, split, source, fields, "choice" if name == "custom" else "")
  if found is None or len(found.choices) < len(found.examples):
    scored = ", ".join(n for n, task in TASKS.items() if task.kind == "choice")
    raise UserError(f"task {name} has no options that can be scored; expected one of {scored}, or custom with "
                    "task.fields.choices")
  return _ordered(name, split, tuple(found.choices.values()), count, seed)


def _read(name: str, split: str, source: str, fields: Mapping[str, str] | None, kind: str) -> registry.Split:
  found = registry.read(name, split=split, source=source, fields=fields, kind=kind)
  for note in found.notes:
    say_once(note)
  return found


def _ordered(name: str, split: str, found: Sequence[_Question], count: int | None, seed: int) -> list[_Question]:
  if count is not None and count > len(found):
    raise ValueError(f"{name}/{split} holds {len(found)} questions, {count} were asked for")
  return sorted(found, key=lambda e: hashlib.sha256(f"{seed}/{e.id}".encode()).digest())[:count]


def measure_of(name: str) -> str:
  """How a task is measured unless it is said otherwise: `answer` (generated, judged) or `choices` (by likelihood).

  >>> measure_of("gsm8k"), measure_of("piqa")
  ('answer', 'choices')
  """
  return TASKS[name].measure if name in TASKS else "answer"


def has_choices(name: str) -> bool:
  """Whether a task's questions come with options that can be scored by likelihood.

  >>> [name for name in ("gsm8k", "piqa", "mmlu_stem", "stories") if has_choices(name)]
  ['piqa', 'mmlu_stem']
  """
  return name in TASKS and TASKS[name].kind == "choice"


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
  """How many questions a real task's own source has for a split, as published; None for a task of another kind."""
  return TASKS[name].usable.get(split, published_records(name, split)) if name in TASKS else None


def published_records(name: str, split: str) -> int | None:
  """How many records that source has for it, those without a gold that can be judged, too."""
  sizes = TASKS[name].formats[0].sizes.get(split) if name in TASKS else None
  return sizes[0] if sizes else None


def count_records(name: str, split: str, *, source: str = "", fields: Mapping[str, str] | None = None,
                  kind: str = "") -> int:
  """How many records a real task's source holds for a split, those that are no usable question, too; as `load`."""
  return _read(name, split, source, fields, kind).facts["records"]


def has_place(name: str) -> bool:
  """Whether a task has questions where no source is given."""
  return name not in TASKS or all(TASKS[name].source.values())
