"""The real tasks: where each comes from, how its records are read, and how many there should be."""

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from imm_jax.errors import UserError, nearest
from imm_jax.tasks import formats, sources
from imm_jax.tasks.base import Example

_STEM = ("abstract_algebra", "astronomy", "college_biology", "college_chemistry", "college_computer_science",
         "college_mathematics", "college_physics", "computer_security", "conceptual_physics", "electrical_engineering",
         "elementary_mathematics", "high_school_biology", "high_school_chemistry", "high_school_computer_science",
         "high_school_mathematics", "high_school_physics", "high_school_statistics", "machine_learning")
# MBPP is one list; its splits are ranges of task_id.
_MBPP_SPLITS = {"prompt": range(1, 11), "test": range(11, 511), "validation": range(511, 601), "train": range(601, 975)}
CUSTOM_FIELDS = ("question", "answer", "rationale", "choices")


class Format(NamedTuple):
  """One form in which a task's records are published.

  Attributes:
    fields: what a record must have, in lower case; the first format of a task that fits is taken.
    parse: turns a record into an Example without an id; None where it has no gold that can be judged.
    sizes: the published numbers of records by split; several where parts are published, too.
  """

  fields: tuple[str, ...]
  parse: formats.Parser
  sizes: Mapping[str, tuple[int, ...]]


class Task(NamedTuple):
  """A real data set.

  Attributes:
    role: `id` (trained on and evaluated), `ood` (evaluated), or `importance` (read for layer importance only).
    kind: of most of its answers: `number`, `latex`, `choice`, or empty where they are not judged.
    licence: of the records, in a word.
    source: of each split, where no other is given.
    formats: how its records look.
    files: the published names by split, for a folder that holds no `<split>.jsonl` or the like (see `sources.Where`).
    folder: its name below a folder of many tasks; empty for the task's own name.
    columns: of its csv files, where they have no header.
    select: whether a record belongs to a split, where one file holds several.
  """

  role: str
  kind: str
  licence: str
  source: Mapping[str, str]
  formats: tuple[Format, ...]
  files: Mapping[str, tuple[str, ...]] = {}
  folder: str = ""
  columns: tuple[str, ...] = ()
  select: Callable[[formats.Record, str], bool] | None = None


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


def _both(source: str, *splits: str) -> dict[str, str]:
  return dict.fromkeys(splits or ("train", "test"), source)


TASKS: dict[str, Task] = {
    "gsm8k": Task(
        "id", "number", "MIT", _both("hf:openai/gsm8k:main"),
        (Format(("question", "answer"), formats.grade_school, {"train": (7473,), "test": (1319,)}),)),
    "math": Task(
        "id", "latex", "MIT", _both("hf:DigitalLearningGmbH/MATH-lighteval"),
        (Format(("problem", "solution"), formats.competition, {"train": (7500,), "test": (5000,)}),),
        files={split: (f"{split}/*/*.json",) for split in ("train", "test")}),
    "svamp": Task(
        "ood", "number", "MIT", {"test": "hf:ChilleD/SVAMP::train+test"},  # published as one set of 1000
        (Format(("body", "question", "answer"), formats.svamp, {"test": (1000,)}),),
        files={"test": ("SVAMP.json", "harness_test.jsonl")}),
    "asdiv": Task(
        "ood", "number", "CC-BY-NC-4.0", {"test": "hf:EleutherAI/asdiv:asdiv:validation"},
        # 2215: without the questions that ask for several values.
        (Format(("body", "question", "answer"), formats.asdiv, {"test": (2305, 2215)}),),
        files={"test": ("ASDiv.xml", "harness_test.jsonl")}),
    "mawps": Task(
        # The hub has no copy of the 2065 questions that the paper's figures are over: give them as file:.
        "ood", "number", "MIT", {"test": "hf:MU-NLPC/Calc-mawps"},
        (Format(("input", "target"), formats.numeric("input", "target"), {"test": (2065,)}),
         Format(("squestion", "lsolutions"), formats.mawps_source, {"test": (2373,)}),
         Format(("original_text", "ans"), formats.numeric("original_text", "ans"), {"test": (2373, 238)}),
         Format(("question", "result_float"), formats.numeric("question", "result_float"), {"test": (520,)})),
        files={"test": ("harness_test.jsonl", "MAWPS.json", "mawps_source.json")}),
    "mathqa": Task(
        "ood", "choice", "Apache-2.0", _both("hf:regisss/math_qa", "train", "validation", "test"),
        (Format(("problem", "options", "correct"), formats.mathqa,
                {"train": (29837,), "validation": (4475,), "test": (2985, 1000)}),),
        files={"validation": ("dev.json",), "test": ("harness_test.jsonl",)}),
    "sat_math": Task(  # May 2023, without figures: the paper's
        "ood", "choice", "MIT", {"test": "hf:mcaleste/sat_multiple_choice_math_may_23::train"},
        (Format(("question", "options", "answer"), formats.sat("options"), {"test": (32,)}),
         Format(("question", "possible answers", "answer"), formats.sat("possible answers"), {"test": (32,)})),
        files={"test": ("harness_test.jsonl",)}),
    "sat_math_agieval": Task(
        "ood", "choice", "MIT", {"test": "hf:dmayhem93/agieval-sat-math"},
        (Format(("question", "options", "label"), formats.agieval, {"test": (220,)}),
         Format(("query", "choices", "gold"), formats.agieval_query, {"test": (220,)})),
        files={"test": ("*sat-math.jsonl",)}, folder="sat_math"),
    "mmlu_stem": Task(
        "ood", "choice", "MIT", _both(f"hf:cais/mmlu:{'+'.join(_STEM)}", "dev", "test"),
        (Format(("question", "choices", "answer"), formats.mmlu, {"dev": (90,), "test": (3018,)}),
         Format(("question", "choice0", "choice1", "choice2", "choice3", "answer"), formats.mmlu_csv,
                {"dev": (90,), "test": (3018,)})),
        files={"dev": ("|".join(f"dev/{subject}_dev.csv" for subject in _STEM),),
               "test": ("|".join(f"test/{subject}_test.csv" for subject in _STEM), "harness_test.jsonl")},
        columns=("question", "choice0", "choice1", "choice2", "choice3", "answer")),
    "mbpp": Task(
        "importance", "", "CC-BY-4.0", _both("hf:google-research-datasets/mbpp:full", *_MBPP_SPLITS),
        (Format(("text", "code", "task_id"), formats.mbpp, {name: (len(ids),) for name, ids in _MBPP_SPLITS.items()}),),
        files=dict.fromkeys(_MBPP_SPLITS, ("mbpp.jsonl",)),
        select=lambda record, split: int(record["task_id"]) in _MBPP_SPLITS[split]),
}


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
  return Task("id", kind, "", _both(source), (Format(tuple(names.values()), formats.custom(names, kind), {}),))
