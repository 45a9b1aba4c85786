"""Reads splits of the real tasks of `catalogue.py` and of `custom`, and assigns an id to each question."""

import functools
import hashlib
from collections.abc import Mapping, Sequence, Set
from typing import NamedTuple

from imm_jax.errors import UserError, suggest
from imm_jax.tasks import custom, custom_notes, formats, sources
from imm_jax.tasks.base import Choice, Example
from imm_jax.tasks.catalogue import TASKS, Format, Task, same_source
from imm_jax.tasks.fields import Record
from imm_jax.tasks.multiple import Question


class Split(NamedTuple):
  """Holds the questions of a split in a fixed order, and statistics of its records.

  Attributes:
    examples: questions in the order of the source. A test split includes repeated questions; other splits do not.
    choices: id -> the same question with options to score; empty if the task has none.
    counts: numbers of records read, of those left out without a gold or as questions of the test set, and of repeated
      ones (left out except in a test split).
    notes: messages for the user.
  """

  examples: tuple[Example, ...]
  choices: Mapping[str, Choice]
  counts: Mapping[str, int]
  notes: tuple[str, ...]


def read(name: str, *, split: str, source: str = "", fields: Mapping[str, str] | None = None,
         kind: str = "") -> Split:
  """Reads a split of a real task or of `custom`; results are cached.

  Args:
    name: a name in `TASKS`, or `custom`.
    split: a published split; `custom` has train and test.
    source: source in place of the task's own, see `sources`.
    fields: for `custom`: `custom.FIELDS` -> field names of the records. Question and answer default to their own names;
      rationale and choices are read only if given. A record may lack its rationale.
    kind: for `custom`: `number`, the default, `latex` or `choice`.

  Raises:
    KeyError: for an unknown name.
    UserError: for an unusable source, field or record.
  """
  return _read(name, split, source, tuple(sorted((fields or {}).items())), kind or "number" * (name == "custom"))


@functools.lru_cache(maxsize=64)
def _read(name: str, split: str, source: str, fields: tuple[tuple[str, str], ...], kind: str) -> Split:
  """Reads a split as `read` does; the fields are pairs, because what is cached needs arguments that can be hashed."""
  task = _get_task(name, split, source, fields, kind)
  test = set() if split == "test" else {_without_spaces(e) for e in _read(name, "test", source, fields, kind).examples}
  published, source = not source, source or task.source[split]
  if not source:
    raise UserError(f"task {name} {task.paper}: give {name}=file:PATH")
  # Records have lower-case keys; messages spell a name as it was given.
  spelling = {field.lower(): field for _, field in fields}
  options = sources.ReadOptions(split, task.folder or name, task.files.get(split, ()), task.columns,
                                "with the fields " + " or ".join(
                                    ", ".join(spelling.get(field, field) for field in f.fields) for f in task.formats),
                                with_file=bool(task.columns))  # MMLU's file names contain the subject
  names = custom.resolve_fields(dict(fields))
  observed = custom_notes.Observations(names, kind) if name == "custom" else None
  form, seen, collection = None, set[str](), _Collection(split, test)
  for place, record in sources.read(source, options):
    form = form or next((f for f in task.formats if record.keys() >= set(f.fields)), task.formats[0])
    if missing := [field for field in form.fields if field not in record]:
      raise UserError(f"{place}: " + _describe_missing(missing, record, seen, options.needs, name, fields))
    seen.update(record)
    try:
      if task.select and not task.select(record, split):
        continue
      question = _parse(form, record)
    except (TypeError, ValueError) as e:
      raise UserError(f"{place}: {e}") from e
    if observed:
      observed.add(place, record, question)
    collection.add(place, question)
  if observed and seen and names["answer"] not in seen:
    field = spelling.get(names["answer"], names["answer"])
    raise UserError(f"{source}: no record has a field {field!r} but {', '.join(sorted(seen))}; name that of "
                    "the answers with --config.task.fields.answer=NAME")
  if not collection.questions:
    raise UserError(f"{source}: holds no question for {name}/{split}{_suggest_split(source, collection.counts)}"
                    + _describe_unjudged(collection, observed, task.kind))
  rationale_field = dict(fields).get("rationale", "").lower()
  if rationale_field and split == "train" and rationale_field not in seen:
    raise UserError(f"{source}: no record has a field {spelling[rationale_field]!r} (task.fields.rationale) but "
                    f"{', '.join(sorted(seen))}")
  label = f"{name}/{split}: {source}"
  notes = _make_notes(label, form.sizes.get(split) if form else None, collection.counts,
                      keeps_repeated=split == "test", observed=observed)
  notes += observed.make_warnings(label) if observed else []
  if published and split == "test" and task.paper:
    notes.append(paper_note(name))
  questions = collection.list_with_ids(f"{name}/{split}")
  return Split(tuple(question.example for question in questions),
               {question.choice.id: question.choice for question in questions if question.choice}, collection.counts,
               tuple(notes))


class _Collection:
  """Collects the questions of a split, and counts its records and those of them that are left out.

  Attributes:
    questions: the questions by their words, in the order of the source; several of the same words in a test split.
    counts: see `Split`.
    unjudged: the place of the first record without a gold; "" for none.
  """

  def __init__(self, split: str, test: Set[str]):
    """Takes the split, and the questions of the test set without white space, which other splits must not have."""
    self._keeps_repeated, self._test = split == "test", test
    self.questions: dict[str, list[Question]] = {}
    self.counts = dict.fromkeys(("records", "no_gold", "repeated", "in_test"), 0)
    self.unjudged = ""

  def add(self, place: str, question: Question | None) -> None:
    """Adds the question of a record, None for one without a gold."""
    self.counts["records"] += 1
    if question is None:
      self.counts["no_gold"] += 1
      self.unjudged = self.unjudged or place
      return
    key = _question_key(question.example)
    if key in self.questions:
      self.counts["repeated"] += 1
      if self._keeps_repeated:
        self.questions[key].append(question)
    elif _without_spaces(question.example) in self._test:
      self.counts["in_test"] += 1
    else:
      self.questions[key] = [question]

  def list_with_ids(self, label: str) -> list[Question]:
    """Returns all questions, those of the same words together, with ids that begin with the label."""
    return [question for key, group in self.questions.items() for question in _assign_ids(label, key, group)]


def _get_task(name: str, split: str, source: str, fields: tuple[tuple[str, str], ...], kind: str) -> Task:
  """Returns a task that has the split; raises UserError if there is none, or it takes no fields and kind."""
  task = _make_custom_task(dict(fields), kind, source) if name == "custom" else TASKS[name]
  if name != "custom" and (fields or kind):
    raise UserError(f"task {name} has its own fields and kind; only task custom takes them from the config")
  if split not in task.source:
    raise UserError(f"task {name} has no {split} split, only {', '.join(task.source)}"
                    + ("; it is for evaluation" if split == "train" else ""))
  return task


def _parse(form: Format, record: Record) -> Question | None:
  """Parses a record; raises ValueError or TypeError if it cannot be parsed, or has what is no text."""
  parsed = form.parse(record)
  question = parsed if isinstance(parsed, Question | None) else Question(parsed, None)
  if question:  # encoding fails for lone surrogates, which JSON can express
    "".join((*question.example, *(() if question.choice is None else question.choice.contexts))).encode()
  return question


def _describe_missing(missing: Sequence[str], record: Record, seen: Set[str], needs: str, name: str,
                      fields: Sequence[tuple[str, str]]) -> str:
  """Says that a record lacks fields, which the records before it may have had (`seen`), and what was expected."""
  key, field = next(((key, own) for key, own in fields if own.lower() == missing[0]), (missing[0], missing[0]))
  if set(missing) <= seen:
    return f"has no field {field!r}, which the records before it have"
  advice = f"; name it with --config.task.fields.{key}=NAME" if name == "custom" else ""
  return f"has no field {field!r} but {', '.join(record)}; expected records {needs}{advice}"


def _describe_unjudged(collection: _Collection, observed: custom_notes.Observations | None, kind: str) -> str:
  """Says, where a split has no question, how many records have no gold, and what such looks like."""
  if not collection.unjudged:
    return ""
  counts, first = collection.counts, observed.unjudged if observed else collection.unjudged
  return (f"; {counts['no_gold']} of its {counts['records']} records have no answer that can be judged, the first of "
          f"them {first}; expected {custom.EXPECTED.get(kind, 'one')}")


def paper_note(name: str) -> str:
  """Returns a note on where the paper's test questions are if the task's own source has others, else ""."""
  task = TASKS.get(name)
  if not task or not task.paper:
    return ""
  return f"note: {name}: {task.source['test']} {task.paper}; give {name}=file:PATH for those"


def _assign_ids(label: str, key: str, group: Sequence[Question]) -> list[Question]:
  """Gives questions of the same words ids that depend on their content only, not on the source and its order."""
  ranks = {i: rank for rank, i in enumerate(sorted(range(len(group)), key=lambda i: group[i].example), 1)}
  stem = f"{label}/{hashlib.sha256(key.encode()).hexdigest()[:16]}"
  ids = [stem if ranks[i] == 1 else f"{stem}-{ranks[i]}" for i in range(len(group))]
  return [Question(question.example._replace(id=id_), question.choice._replace(id=id_) if question.choice else None)
          for id_, question in zip(ids, group, strict=True)]


def _suggest_split(source: str, counts: Mapping[str, int]) -> str:
  """Suggests what to do if a source has the same questions for train and test."""
  if not counts["in_test"]:
    return ""
  files = ("; make DIR/train.jsonl and DIR/test.jsonl of it and give file:DIR, or file:DIR/{split}.jsonl"
           if source.startswith("file:") else "")
  return f", for its {counts['in_test']} are the test set's; does it name one split for both?{files}"


def _question_key(example: Example) -> str:
  """Returns the key by which questions of a split are the same: their words."""
  return " ".join(example.question.split())


def _without_spaces(example: Example) -> str:
  """Returns the question without white space, by which training questions are compared with the test set."""
  return "".join(example.question.split())


def _make_notes(label: str, sizes: Sequence[int] | None, counts: Mapping[str, int], *, keeps_repeated: bool,
                observed: custom_notes.Observations | None) -> list[str]:
  notes = []
  if sizes and counts["records"] not in sizes:
    notes.append(f"warning: {label} holds {counts['records']} records, published are {' or '.join(map(str, sizes))}; "
                 "the source is short or changed")
  left_out = {"no_gold": "without an answer that can be judged", "repeated": "that repeat another",
              "in_test": "that are in the test set"}
  counted = [f"{counts[exclusion]} {words}" for exclusion, words in left_out.items()
             if counts[exclusion] and not (exclusion == "repeated" and keeps_repeated)]
  if counted:
    level = "warning" if observed and observed.leaves_out_many else "note"
    which = f" ({observed.unjudged})" if observed and counts["no_gold"] else ""
    notes.append(f"{level}: {label}: of {counts['records']} records left out {', '.join(counted)}{which}")
  return notes


def _make_custom_task(fields: Mapping[str, str], kind: str, source: str) -> Task:
  """Makes the task that a config describes."""
  if not source:
    raise UserError("task custom needs a source: --config.task.source=file:PATH (or hf:ID, tfds:NAME)")
  if kind not in formats.KINDS:
    raise UserError(f"task custom: kind={kind!r} of its answers: {suggest(kind, list(formats.KINDS))}")
  for field in fields:
    if field not in custom.FIELDS:
      raise UserError(f"task custom has no field {field!r}: {suggest(field, list(custom.FIELDS))}")
  if fields.get("choices") and kind != "choice":
    raise UserError(f"task custom: the field {fields['choices']!r} has options, while kind={kind!r}; expected choice")
  names = custom.resolve_fields(fields)
  needed = tuple(name for field, name in names.items() if field not in ("answer", "rationale"))
  return Task("id", kind, "", same_source(source), (Format(needed, custom.make_parser(names, kind), {}),))
