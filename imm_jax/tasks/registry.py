"""Reading the real tasks of `catalogue.py`, and `custom`: the questions of a split, each with an id."""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from imm_jax.errors import UserError, nearest
from imm_jax.tasks import formats, sources
from imm_jax.tasks.base import Example
from imm_jax.tasks.catalogue import TASKS, Format, Task, both

CUSTOM_FIELDS = ("question", "answer", "rationale", "choices")


class Split(NamedTuple):
  """The questions of a split in a fixed order, and what became of its records.

  Attributes:
    examples: in the order of the source, no question twice.
    facts: counts: records read, and those left out for want of a gold, as repeated, or as questions of the test set.
    notes: a line for each thing that a reader should know.
  """

  examples: tuple[Example, ...]
  facts: Mapping[str, int]
  notes: tuple[str, ...]


def read(name: str, *, split: str, source: str = "", fields: Mapping[str, str] | None = None,
         kind: str = "") -> Split:
  """A split of a real task or of `custom`; the same arguments are read once.

  Args:
    name: of `TASKS`, or `custom`.
    split: as published; `custom` has train and test.
    source: in place of the task's own (`sources` says of which forms).
    fields: for `custom`: the record's names of `CUSTOM_FIELDS`; what is not given has its own name, and rationale and
      choices are then not looked for.
    kind: for `custom`: `number`, `latex` or `choice`.

  Raises:
    KeyError: for an unknown name.
    UserError: for what a user can put right, in one line.
  """
  return _read(name, split, source, tuple(sorted((fields or {}).items())), kind)


@functools.lru_cache(maxsize=64)
def _read(name: str, split: str, source: str, fields: tuple[tuple[str, str], ...], kind: str) -> Split:
  task = _custom(dict(fields), kind, source) if name == "custom" else TASKS[name]
  if name != "custom" and (fields or kind):
    raise UserError(f"task {name} has its own fields and kind; only task custom takes them from the config")
  if split not in task.source:
    raise UserError(f"task {name} has no {split} split, only {', '.join(task.source)}"
                    + ("; it is for evaluation" if split == "train" else ""))
  test = set() if split == "test" else {_unspaced(e) for e in _read(name, "test", source, fields, kind).examples}
  source = source or task.source[split]
  where = sources.Where(split, task.folder or name, task.files.get(split, ()), task.columns,
                        "with the fields " + " or ".join(", ".join(f.fields) for f in task.formats))
  form, facts = None, dict.fromkeys(("records", "no_gold", "repeated", "in_test"), 0)
  found: dict[str, Example] = {}
  for place, record in sources.read(source, where):
    form = form or next((f for f in task.formats if record.keys() >= set(f.fields)), task.formats[0])
    missing = [field for field in form.fields if field not in record]
    if missing:
      raise UserError(f"{place}: has no field {missing[0]!r} but {', '.join(record)}; expected records {where.needs}")
    try:
      if task.select and not task.select(record, split):
        continue
      example = form.parse(record)
      "".join(filter(None, example or ())).encode()  # JSON can spell half of a surrogate pair
    except (TypeError, ValueError) as e:
      raise UserError(f"{place}: {e}") from e
    facts["records"] += 1
    key = _key(example) if example else ""
    left_out = "no_gold" if not example else "repeated" if key in found else "in_test" if _unspaced(
        example) in test else ""
    if left_out:
      facts[left_out] += 1
    else:
      # From the content, so that it is the same whatever the source, and in whatever order.
      found[key] = example._replace(id=f"{name}/{split}/{hashlib.sha256(key.encode()).hexdigest()[:16]}")
  if not found:
    raise UserError(f"{source}: holds no question for {name}/{split}"
                    + (f", for its {facts['in_test']} are the test set's; does it name one split for both?"
                       if facts["in_test"] else "")
                    + (f"; {facts['no_gold']} of its {facts['records']} records have no answer that can be judged"
                       if facts["no_gold"] else ""))
  return Split(tuple(found.values()), facts, tuple(_notes(f"{name}/{split}: {source}", form.sizes.get(split), facts)))


def _key(example: Example) -> str:
  """What makes two questions of a split the same: their words."""
  return " ".join(example.question.split())


def _unspaced(example: Example) -> str:
  """What makes a train question one of the test set: what it says, however that is spaced."""
  return "".join(example.question.split())


def _notes(what: str, sizes: Sequence[int] | None, facts: Mapping[str, int]) -> list[str]:
  notes = []
  if sizes and facts["records"] not in sizes:
    notes.append(f"warning: {what} holds {facts['records']} records, published are {' or '.join(map(str, sizes))}; "
                 "the source is short or changed")
  left_out = {"no_gold": "without an answer that can be judged", "repeated": "that repeat another",
              "in_test": "that are in the test set"}
  counted = [f"{facts[fact]} {words}" for fact, words in left_out.items() if facts[fact]]
  if counted:
    notes.append(f"note: {what}: of {facts['records']} records left out {', '.join(counted)}")
  return notes


def _custom(fields: Mapping[str, str], kind: str, source: str) -> Task:
  """The task that a config describes."""
  if not source:
    raise UserError("task custom needs a source: --config.task.source=file:PATH (or hf:ID, tfds:NAME)")
  if kind not in formats.KINDS:
    raise UserError(f"task custom: kind={kind!r} of its answers: {nearest(kind, list(formats.KINDS))}")
  for field in fields:
    if field not in CUSTOM_FIELDS:
      raise UserError(f"task custom has no field {field!r}: {nearest(field, list(CUSTOM_FIELDS))}")
  names = {"question": "question", "answer": "answer"} | {field: name for field, name in fields.items() if name}
  names = {field: name.lower() for field, name in names.items()}
  return Task("id", kind, "", both(source), (Format(tuple(names.values()), formats.custom(names, kind), {}),))
