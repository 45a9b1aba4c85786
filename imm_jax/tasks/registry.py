"""Reading the real tasks of `catalogue.py`, and `custom`: the questions of a split, each with an id."""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from imm_jax.errors import UserError, nearest
from imm_jax.tasks import formats, sources
from imm_jax.tasks.base import Choice, Example
from imm_jax.tasks.catalogue import TASKS, Format, Task, both
from imm_jax.tasks.multiple import Posed

CUSTOM_FIELDS = ("question", "answer", "rationale", "choices")
# What answers of a kind can be judged.
_JUDGED = {"number": "a number alone, such as 42", "latex": "a formula or a text", "choice": "an option"}


class Split(NamedTuple):
  """The questions of a split in a fixed order, and what became of its records.

  Attributes:
    examples: in the order of the source. A test split has all of them, those that repeat another, too; of any other
      no question is there twice.
    choices: by id, the same questions with options to score; empty where the task has none.
    facts: counts: records read; those left out for want of a gold, or as questions of the test set; and those that
      repeat another (left out of what is no test split).
    notes: a line for each thing that a reader should know.
  """

  examples: tuple[Example, ...]
  choices: Mapping[str, Choice]
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
      choices are then not looked for. A record may lack its rationale.
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
  published, source = not source, source or task.source[split]
  if not source:
    raise UserError(f"task {name} {task.paper}: give {name}=file:PATH")
  where = sources.Where(split, task.folder or name, task.files.get(split, ()), task.columns,
                        "with the fields " + " or ".join(", ".join(f.fields) for f in task.formats),
                        with_file=bool(task.columns))  # the subject of MMLU's
  form, unjudged, facts, seen = None, "", dict.fromkeys(("records", "no_gold", "repeated", "in_test"), 0), set[str]()
  found: dict[str, list[Posed]] = {}
  for place, record in sources.read(source, where):
    form = form or next((f for f in task.formats if record.keys() >= set(f.fields)), task.formats[0])
    missing = [field for field in form.fields if field not in record]
    if missing:
      raise UserError(f"{place}: has no field {missing[0]!r} but {', '.join(record)}; expected records {where.needs}")
    seen.update(record)
    try:
      if task.select and not task.select(record, split):
        continue
      parsed = form.parse(record)
      posed = parsed if isinstance(parsed, Posed | None) else Posed(parsed, None)
      if posed:  # JSON can spell half of a surrogate pair
        "".join((*posed.example, *(() if posed.choice is None else posed.choice.contexts))).encode()
    except (TypeError, ValueError) as e:
      raise UserError(f"{place}: {e}") from e
    facts["records"] += 1
    key = _key(posed.example) if posed else ""
    unjudged = unjudged or (place if not posed else "")
    fact = "no_gold" if not posed else "repeated" if key in found else "in_test" if _unspaced(
        posed.example) in test else ""
    if fact:
      facts[fact] += 1
    if not fact or (fact == "repeated" and split == "test"):
      found.setdefault(key, []).append(posed)
  if not found:
    raise UserError(f"{source}: holds no question for {name}/{split}" + _one_for_both(source, facts)
                    + (f"; {facts['no_gold']} of its {facts['records']} records have no answer that can be judged, the "
                       f"first of them {unjudged}; expected {_JUDGED.get(task.kind, 'one')}"
                       if facts["no_gold"] else ""))
  worked = dict(fields).get("rationale", "").lower()
  if worked and split == "train" and worked not in seen:
    raise UserError(f"{source}: no record has a field {worked!r} (task.fields.rationale) but {', '.join(sorted(seen))}")
  notes = _notes(f"{name}/{split}: {source}", form.sizes.get(split), facts, keeps_repeated=split == "test")
  if published and split == "test" and task.paper:
    notes.append(paper_note(name))
  questions = [posed for key, group in found.items() for posed in _with_ids(f"{name}/{split}", key, group)]
  return Split(tuple(posed.example for posed in questions),
               {posed.choice.id: posed.choice for posed in questions if posed.choice}, facts, tuple(notes))


def paper_note(name: str) -> str:
  """A line that says where the paper's test questions are, where the task's own source has others; else nothing."""
  task = TASKS.get(name)
  if not task or not task.paper:
    return ""
  return f"note: {name}: {task.source['test']} {task.paper}; give {name}=file:PATH for those"


def _with_ids(what: str, key: str, group: Sequence[Posed]) -> list[Posed]:
  """Questions of the same words with ids that follow from the content, whatever the source and its order."""
  ranks = {i: rank for rank, i in enumerate(sorted(range(len(group)), key=lambda i: group[i].example), 1)}
  stem = f"{what}/{hashlib.sha256(key.encode()).hexdigest()[:16]}"
  ids = [stem if ranks[i] == 1 else f"{stem}-{ranks[i]}" for i in range(len(group))]
  return [Posed(posed.example._replace(id=id_), posed.choice._replace(id=id_) if posed.choice else None)
          for id_, posed in zip(ids, group, strict=True)]


def _one_for_both(source: str, facts: Mapping[str, int]) -> str:
  """What to do where a source gives the same questions for train and test."""
  if not facts["in_test"]:
    return ""
  files = ("; make DIR/train.jsonl and DIR/test.jsonl of it and give file:DIR, or file:DIR/{split}.jsonl"
           if source.startswith("file:") else "")
  return f", for its {facts['in_test']} are the test set's; does it name one split for both?{files}"


def _key(example: Example) -> str:
  """What makes two questions of a split the same: their words."""
  return " ".join(example.question.split())


def _unspaced(example: Example) -> str:
  """What makes a train question one of the test set: what it says, however that is spaced."""
  return "".join(example.question.split())


def _notes(what: str, sizes: Sequence[int] | None, facts: Mapping[str, int], *, keeps_repeated: bool) -> list[str]:
  notes = []
  if sizes and facts["records"] not in sizes:
    notes.append(f"warning: {what} holds {facts['records']} records, published are {' or '.join(map(str, sizes))}; "
                 "the source is short or changed")
  left_out = {"no_gold": "without an answer that can be judged", "repeated": "that repeat another",
              "in_test": "that are in the test set"}
  counted = [f"{facts[fact]} {words}" for fact, words in left_out.items()
             if facts[fact] and not (fact == "repeated" and keeps_repeated)]
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
  needed = tuple(name for field, name in names.items() if field != "rationale")
  return Task("id", kind, "", both(source), (Format(needed, formats.custom(names, kind), {}),))
