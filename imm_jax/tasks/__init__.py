"""Loads tasks, questions with gold answers, by name.

`stories` and the other generated families are in `arithmetic.py`, the real data sets in `catalogue.py`; `custom` reads
records whose fields the config names. `texts.py` reads corpora without questions.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import TypeVar

from imm_jax.errors import UserError, print_once, suggest
from imm_jax.tasks import answers, arithmetic, prompts, registry
from imm_jax.tasks.base import Choice, Example
from imm_jax.tasks.catalogue import TASKS
from imm_jax.tasks.registry import paper_note
from imm_jax.tasks.texts import CORPORA, load_text

__all__ = [
  "CORPORA",
  "JUDGED",
  "NAMES",
  "Choice",
  "Example",
  "answers",
  "count_records",
  "default_measure",
  "has_choices",
  "has_default_source",
  "is_generated",
  "load",
  "load_choices",
  "load_text",
  "paper_note",
  "prompts",
  "published_records",
  "published_size",
  "splits",
]

NAMES = (*arithmetic.FAMILIES, *TASKS, "custom")
_Question = TypeVar("_Question", Choice, Example)
# Tasks whose answers are judged; the others serve for layer importance only.
JUDGED = tuple(name for name in NAMES if name not in TASKS or TASKS[name].kind)


def load(name: str, *, split: str, count: int | None = None, seed: int = 0, source: str = "",
         fields: Mapping[str, str] | None = None, kind: str = "") -> list[Example]:
  """Loads the first `count` questions of a task's split in an order that depends on the seed.

  A test split is complete: a question that occurs twice is asked twice. In other splits no question is repeated and
  none is in the test split. Notes on the source (records left out, a short file) are printed once to stderr.

  Args:
    name: a name in `NAMES`.
    split: `train` or `test`, or another published split.
    count: number of questions; None for all, which generated tasks do not support. The first n of a longer list are
      the list of n.
    seed: seed of the order, which for real tasks does not depend on the order of the source.
    source: source of a real task in place of its own: `hf:...`, `tfds:...` or `file:...` (see `sources.py`).
    fields: field names for `custom` (see `registry.read`).
    kind: kind of answers for `custom`.

  Raises:
    ValueError: for a name that is not in `NAMES`, or if the split holds fewer questions.
    UserError: for a source that cannot be read or holds other data.

  >>> [e.kind for e in load("choice", split="test", count=2, seed=0)]
  ['choice', 'choice']
  """
  _check_name(name)
  if is_generated(name):
    if count is None:
      raise ValueError(f"task {name} is generated and has no last question; say how many")
    return arithmetic.generate(name, split=split, count=count, seed=seed)
  return _select_in_order(name, split, _read_and_note(name, split, source, fields, kind).examples, count, seed)


def load_choices(name: str, *, split: str = "test", count: int | None = None, seed: int = 0, source: str = "",
                 fields: Mapping[str, str] | None = None) -> list[Choice]:
  """Loads the questions of `load`, in the same order and with the same ids, as options to score by likelihood.

  Contexts and options are those of lm-evaluation-harness (zero-shot) for the tasks that it has.

  Args:
    name: a multiple-choice task, or `custom` with `fields` that name the `choices`.
    split: see `load`.
    count: see `load`.
    seed: see `load`.
    source: see `load`.
    fields: field names for `custom`.

  Raises:
    ValueError: for a name that is not in `NAMES`, or if the split holds fewer questions.
    UserError: as `load` does, and for a task without options.
  """
  _check_name(name)
  kind = "choice" if name == "custom" else ""
  split_data = None if is_generated(name) else _read_and_note(name, split, source, fields, kind)
  if split_data is None or len(split_data.choices) < len(split_data.examples):
    scored = ", ".join(n for n, task in TASKS.items() if task.kind == "choice")
    raise UserError(f"task {name} has no options that can be scored; expected one of {scored}, or custom with "
                    "task.fields.choices")
  return _select_in_order(name, split, tuple(split_data.choices.values()), count, seed)


def _check_name(name: str) -> None:
  if name not in NAMES:
    raise ValueError(f"task {name!r}: {suggest(name, NAMES)}")


def _read_and_note(name: str, split: str, source: str, fields: Mapping[str, str] | None, kind: str) -> registry.Split:
  split_data = registry.read(name, split=split, source=source, fields=fields, kind=kind)
  for note in split_data.notes:
    print_once(note)
  return split_data


def _select_in_order(name: str, split: str, questions: Sequence[_Question], count: int | None, seed: int,
                     ) -> list[_Question]:
  if count is not None and count > len(questions):
    raise ValueError(f"{name}/{split} holds {len(questions)} questions, {count} were asked for")
  return sorted(questions, key=lambda e: hashlib.sha256(f"{seed}/{e.id}".encode()).digest())[:count]


def default_measure(name: str) -> str:
  """Returns a task's default measure: `answer` (generated and judged) or `choices` (by likelihood).

  >>> default_measure("gsm8k"), default_measure("piqa")
  ('answer', 'choices')
  """
  return TASKS[name].measure if name in TASKS else "answer"


def has_choices(name: str) -> bool:
  """Returns whether a task's questions have options that can be scored by likelihood.

  >>> [name for name in ("gsm8k", "piqa", "mmlu_stem", "stories") if has_choices(name)]
  ['piqa', 'mmlu_stem']
  """
  return name in TASKS and TASKS[name].kind == "choice"


def is_generated(name: str) -> bool:
  """Returns whether a task generates its questions, and so has no fixed number of them."""
  return name in arithmetic.FAMILIES


def splits(name: str) -> tuple[str, ...]:
  """Lists the splits of a task.

  >>> splits("gsm8k"), splits("svamp")
  (('train', 'test'), ('test',))
  """
  return tuple(TASKS[name].source) if name in TASKS else ("train", "test")


def published_size(name: str, split: str) -> int | None:
  """Returns the published number of questions in a split of a real task's own source; None for other tasks."""
  return TASKS[name].usable.get(split, published_records(name, split)) if name in TASKS else None


def published_records(name: str, split: str) -> int | None:
  """Returns the published number of records in a split, including those without a gold that can be judged."""
  sizes = TASKS[name].formats[0].sizes.get(split) if name in TASKS else None
  return sizes[0] if sizes else None


def count_records(name: str, split: str, *, source: str = "", fields: Mapping[str, str] | None = None,
                  kind: str = "") -> int:
  """Counts the records of a split of a real task's source, including unusable ones; arguments are those of `load`."""
  return _read_and_note(name, split, source, fields, kind).counts["records"]


def has_default_source(name: str) -> bool:
  """Returns whether a task can be loaded without naming a source."""
  return name not in TASKS or all(TASKS[name].source.values())
