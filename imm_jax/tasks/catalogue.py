"""The real tasks: where each comes from, how its records look, and how many there should be."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from imm_jax.tasks import formats, multiple
from imm_jax.tasks.fields import Parser, Record

_STEM = ("abstract_algebra", "astronomy", "college_biology", "college_chemistry", "college_computer_science",
         "college_mathematics", "college_physics", "computer_security", "conceptual_physics", "electrical_engineering",
         "elementary_mathematics", "high_school_biology", "high_school_chemistry", "high_school_computer_science",
         "high_school_mathematics", "high_school_physics", "high_school_statistics", "machine_learning")
# MBPP is one list; its splits are ranges of task_id.
_MBPP_SPLITS = {"prompt": range(1, 11), "test": range(11, 511), "validation": range(511, 601), "train": range(601, 975)}


class Format(NamedTuple):
  """One form in which a task's records are published.

  Attributes:
    fields: what a record must have, in lower case; the first format of a task that fits is taken.
    parse: turns a record into an Example without an id; None where it has no gold that can be judged.
    sizes: the published numbers of records by split; several where parts are published, too.
  """

  fields: tuple[str, ...]
  parse: Parser
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
  select: Callable[[Record, str], bool] | None = None


def both(source: str, *splits: str) -> dict[str, str]:
  """One source for several splits, by default train and test."""
  return dict.fromkeys(splits or ("train", "test"), source)


TASKS: dict[str, Task] = {
    "gsm8k": Task(
        "id", "number", "MIT", both("hf:openai/gsm8k:main"),
        (Format(("question", "answer"), formats.grade_school, {"train": (7473,), "test": (1319,)}),)),
    "math": Task(
        "id", "latex", "MIT", both("hf:DigitalLearningGmbH/MATH-lighteval"),
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
        "ood", "choice", "Apache-2.0", both("hf:regisss/math_qa", "train", "validation", "test"),
        (Format(("problem", "options", "correct"), multiple.mathqa,
                {"train": (29837,), "validation": (4475,), "test": (2985, 1000)}),),
        files={"validation": ("dev.json",), "test": ("harness_test.jsonl",)}),
    "sat_math": Task(  # May 2023, without figures: the paper's
        "ood", "choice", "MIT", {"test": "hf:mcaleste/sat_multiple_choice_math_may_23::train"},
        (Format(("question", "options", "answer"), multiple.sat("options"), {"test": (32,)}),
         Format(("question", "possible answers", "answer"), multiple.sat("possible answers"), {"test": (32,)})),
        files={"test": ("harness_test.jsonl",)}),
    "sat_math_agieval": Task(
        "ood", "choice", "MIT", {"test": "hf:dmayhem93/agieval-sat-math"},
        (Format(("question", "options", "label"), multiple.agieval, {"test": (220,)}),
         Format(("query", "choices", "gold"), multiple.agieval_query, {"test": (220,)})),
        files={"test": ("*sat-math.jsonl",)}, folder="sat_math"),
    "mmlu_stem": Task(
        "ood", "choice", "MIT", both(f"hf:cais/mmlu:{'+'.join(_STEM)}", "dev", "test"),
        (Format(("question", "choices", "answer"), multiple.mmlu, {"dev": (90,), "test": (3018,)}),
         Format(("question", "choice0", "choice1", "choice2", "choice3", "answer"), multiple.mmlu_csv,
                {"dev": (90,), "test": (3018,)})),
        files={"dev": ("|".join(f"dev/{subject}_dev.csv" for subject in _STEM),),
               "test": ("|".join(f"test/{subject}_test.csv" for subject in _STEM), "harness_test.jsonl")},
        columns=("question", "choice0", "choice1", "choice2", "choice3", "answer")),
    "mbpp": Task(
        "importance", "", "CC-BY-4.0", both("hf:google-research-datasets/mbpp:full", *_MBPP_SPLITS),
        (Format(("text", "code", "task_id"), formats.mbpp, {name: (len(ids),) for name, ids in _MBPP_SPLITS.items()}),),
        files=dict.fromkeys(_MBPP_SPLITS, ("mbpp.jsonl",)),
        select=lambda record, split: int(record["task_id"]) in _MBPP_SPLITS[split]),
}
