"""Messages on the records of task `custom`: which are left out, and what looks as if a setting were missing."""

import re
from collections.abc import Mapping
from typing import Any

from imm_jax.tasks import custom
from imm_jax.tasks.fields import Record
from imm_jax.tasks.multiple import Question

# Share of records without an answer that can be judged above which a note is a warning.
_MAX_LEFT_OUT = 0.05
_NAMED = 3
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
# An answer with so many words looks like a sentence.
_MANY_WORDS = 4
_OPTIONS = re.compile(r"option|choice")


class Observations:
  """Collects what records show while they are read, in the order of the source."""

  def __init__(self, names: Mapping[str, str], kind: str) -> None:
    """Initializes for records with these field names (see `custom.resolve_fields`) and this kind of answers."""
    self._names, self._kind, self._records = names, kind, 0
    self._unjudged: list[str] = []
    self._golds: dict[str, tuple[str, str]] = {}
    self._contradicting: dict[str, str] = {}
    self._indices: list[int] = []
    self._sentences: list[str] = []
    self._unlisted: list[str] = []
    self._unshown: list[str] = []

  def add(self, place: str, record: Record, question: Question | None) -> None:
    """Adds a record and what was read from it; None for one without an answer that can be judged."""
    self._records += 1
    if question is None:
      self._unjudged.append(self._quote(place, record))
      return
    example = question.example
    key, gold, value = " ".join(example.question.split()), example.answer, record.get(self._names["answer"])
    first_gold, first_place = self._golds.setdefault(key, (gold, place))
    if first_gold != gold:
      self._contradicting.setdefault(key, f"{shorten(first_place)} ({first_gold:.40}) and {shorten(place)} "
                                          f"({gold:.40})")
    if self._kind == "latex" and len(_WORD.findall(gold)) >= _MANY_WORDS:
      self._sentences.append(self._quote(place, record))
    if self._kind == "choice":
      self._add_choice(place, question, value, record)
    elif any(_OPTIONS.search(field) for field in record):
      unshown = custom.find_unshown_options(record, self._names, example.question)
      if unshown and _OPTIONS.search(unshown):
        self._unshown.append(unshown)

  def _add_choice(self, place: str, question: Question, value: Any, record: Record) -> None:
    if question.choice is None and not custom.lists_options(question.example.question):
      self._unlisted.append(shorten(place))
    text = str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()
    listed = record.get(self._names.get("choices", ""))
    labels = listed.get("label", listed) if isinstance(listed, Mapping) else ()
    is_option = isinstance(value, str) and f") {text}" in (
        line[2:] for line in question.example.question.split("\n"))  # of which those of options are `(A) text`
    if text.isdecimal() and not is_option and text not in map(str, labels):
      self._indices.append(int(text))

  @property
  def unjudged(self) -> str:
    """The first records without an answer that can be judged, each with its line and its answer; "" for none."""
    more = len(self._unjudged) - _NAMED
    return "; ".join(self._unjudged[:_NAMED]) + (f"; and {more} more" if more > 0 else "")

  @property
  def leaves_out_many(self) -> bool:
    """Whether so many records are left out for lack of an answer that it is no detail."""
    return len(self._unjudged) > _MAX_LEFT_OUT * self._records

  def make_warnings(self, label: str) -> list[str]:
    """Returns warnings on what was read; `label` names task, split and source."""
    answer, warnings = self._names["answer"], []
    if self._contradicting:
      warnings.append(f"{len(self._contradicting)} questions occur with different answers, such as "
                      f"{next(iter(self._contradicting.values()))}; all but one answer are wrong")
    if self._sentences:
      warnings.append(f"{len(self._sentences)} answers look like sentences, which nothing may equal, such as "
                      f"{self._sentences[0]}; name the field of the bare answer with --config.task.fields.answer=NAME")
    if self._indices and min(self._indices) > 0:
      warnings.append(f"none of the {len(self._indices)} indices in {answer!r} is 0, from which they count; if yours "
                      "count from 1, the wrong options are taken for right: subtract 1, or write letters")
    if self._unlisted:
      warnings.append(f"{len(self._unlisted)} questions list no options by letter, (A) ... (B) ..., such as "
                      f"{self._unlisted[0]}; name the field of options with --config.task.fields.choices=NAME")
    if self._unshown:
      warnings.append(f"{len(self._unshown)} records have options in {self._unshown[0]!r}, which are not shown; "
                      f"multiple choice is --config.task.kind=choice --config.task.fields.choices={self._unshown[0]}")
    return [f"warning: {label}: {text}" for text in warnings]

  def _quote(self, place: str, record: Record) -> str:
    answer = self._names["answer"]
    if answer not in record:
      return f"{shorten(place)} has no {answer!r}"
    value = "null" if record[answer] is None else repr(record[answer])
    return f"{answer!r} of {shorten(place)} is {value if len(value) <= 60 else f'{value[:60]}...'}"


def shorten(place: str) -> str:
  """Returns a record's place without the folder of its file.

  >>> shorten("data/own.jsonl:3")
  'own.jsonl:3'
  """
  return place.rpartition("/")[2]
