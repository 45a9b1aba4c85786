"""The catalogue of real tasks: the source of each, the format of its records, and their published numbers."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from imm_jax.tasks import formats, multiple
from imm_jax.tasks.base import Example
from imm_jax.tasks.fields import Record

_STEM = ("abstract_algebra", "astronomy", "college_biology", "college_chemistry", "college_computer_science",
         "college_mathematics", "college_physics", "computer_security", "conceptual_physics", "electrical_engineering",
         "elementary_mathematics", "high_school_biology", "high_school_chemistry", "high_school_computer_science",
         "high_school_mathematics", "high_school_physics", "high_school_statistics", "machine_learning")
_HARNESS = "GAIR-NLP/math-evaluation-harness data"
_DERIVED = "question choices answer"
# MBPP is one list; its splits are ranges of task_id.
_MBPP_SPLITS = {"prompt": range(1, 11), "test": range(11, 511), "validation": range(511, 601), "train": range(601, 975)}


class Format(NamedTuple):
  """Describes one format in which a task's records are published.

  Attributes:
    fields: fields that a record must have, in lower case; the first matching format of a task is used.
    parse: converts a record to an Example without an id, or to both forms of multiple choice; None if it has no gold
      that can be judged.
    sizes: split -> published numbers of records; several if subsets are published too.
  """

  fields: tuple[str, ...]
  parse: Callable[[Record], Example | multiple.Question | None]
  sizes: Mapping[str, tuple[int, ...]]


class Task(NamedTuple):
  """Describes a real data set.

  Attributes:
    role: `id` (trained on and evaluated), `ood` (evaluated), or `importance` (read for layer importance only).
    kind: kind of most of its answers: `number`, `latex`, `choice`, or empty if they are not judged.
    license: license of the records.
    source: split -> default source; empty if none can be read in the published form.
    formats: formats of its records, that of the default source first.
    files: split -> published file names, for folders without `<split>.jsonl` or the like (see `sources.ReadOptions`).
    folder: its subfolder in a folder of many tasks; empty for the task's own name.
    columns: columns of its csv files without a header.
    select: tells whether a record belongs to a split, if one file holds several.
    usable: split -> number of usable questions in the default source, if less than that of its records: without those
      that lack a gold that can be judged, and in train those that are repeated or in the test set.
    measure: `answer` (generated and judged) or `choices` (the likelihood of each option).
    paper: if the default source has other test questions than the paper's figures, a line that says where those are.
  """

  role: str
  kind: str
  license: str
  source: Mapping[str, str]
  formats: tuple[Format, ...]
  files: Mapping[str, tuple[str, ...]] = {}
  folder: str = ""
  columns: tuple[str, ...] = ()
  select: Callable[[Record, str], bool] | None = None
  usable: Mapping[str, int] = {}
  measure: str = "answer"
  paper: str = ""


def same_source(source: str, *splits: str) -> dict[str, str]:
  """Returns a dict with the same source for several splits, by default train and test."""
  return dict.fromkeys(splits or ("train", "test"), source)


def _likelihood_task(file: str, license: str, repository: str, parsers: Sequence[tuple[str, multiple.Parser]],
                     train_size: int, test_size: int, *, test: str = "test") -> Task:
  """Makes a task scored by likelihood; `test` is the hub's split with golds, `file` its local name."""
  repository = f"hf:{repository}"
  return Task("ood", "choice", license, {"train": repository.removesuffix(":"), "test": f"{repository}:{test}"},
              tuple(Format(tuple(names.split()), parse, {"train": (train_size,), "test": (test_size,)})
                    for names, parse in parsers),
              files={"test": (f"{file}.jsonl",)}, folder="commonsense", measure="choices")


TASKS: dict[str, Task] = {
    "gsm8k": Task(
        "id", "number", "MIT", same_source("hf:openai/gsm8k:main"),
        (Format(("question", "answer"), formats.parse_gsm8k, {"train": (7473,), "test": (1319,)}),)),
    "math": Task(
        "id", "latex", "MIT", same_source("hf:DigitalLearningGmbH/MATH-lighteval"),
        (Format(("problem", "solution"), formats.parse_math, {"train": (7500,), "test": (5000,)}),),
        files={split: (f"{split}/*/*.json",) for split in ("train", "test")}, usable={"train": 7495}),
    "math_500": Task(
        "ood", "latex", "MIT", {"test": "hf:HuggingFaceH4/MATH-500"},
        (Format(("problem", "solution", "answer"), formats.parse_math_500, {"test": (500,)}),)),
    "gsm_plus": Task(
        "ood", "number", "CC-BY-SA-4.0", {"test": "hf:qintongli/GSM-Plus"},
        (Format(("question", "solution", "answer"), formats.parse_gsm_plus, {"test": (10552, 2400)}),),
        # The "critical thinking" questions, one in eight, lack information that an answer needs.
        usable={"test": 9233}),
    "gsm_symbolic": Task(
        "ood", "number", "CC-BY-NC-ND-4.0", {"test": "hf:apple/GSM-Symbolic:main"},
        (Format(("question", "answer"), formats.parse_gsm8k, {"test": (5000, 2500)}),)),
    "svamp": Task(
        "ood", "number", "MIT", {"test": "hf:ChilleD/SVAMP::train+test"},  # published as one set of 1000
        (Format(("body", "question", "answer"), formats.parse_svamp, {"test": (1000,)}),),
        files={"test": ("SVAMP.json", "harness_test.jsonl")}),
    "asdiv": Task(
        "ood", "number", "CC-BY-NC-4.0", {"test": "hf:EleutherAI/asdiv:asdiv:validation"},
        # 2215 are left without the questions that ask for several values.
        (Format(("body", "question", "answer"), formats.parse_asdiv, {"test": (2305, 2215)}),),
        files={"test": ("ASDiv.xml", "harness_test.jsonl")}, usable={"test": 2215}),
    "mawps": Task(
        "ood", "number", "MIT", {"test": "hf:MU-NLPC/Calc-mawps"},
        (Format(("question", "result_float"), formats.numeric_parser("question", "result_float"), {"test": (520,)}),
         Format(("input", "target"), formats.numeric_parser("input", "target"), {"test": (2065,)}),
         Format(("squestion", "lsolutions"), formats.parse_mawps_source, {"test": (2373,)}),
         Format(("original_text", "ans"), formats.numeric_parser("original_text", "ans"), {"test": (2373, 238)})),
        files={"test": ("harness_test.jsonl", "MAWPS.json", "mawps_source.json")},
        paper=f"has 520 other questions than the paper's 2065, which are {_HARNESS}/mawps/test.jsonl"),
    "mawps_one_step": Task(  # a selection of this project: the one-step problems of MAWPS, for training and testing
        "id", "number", "MIT", same_source("hf:MU-NLPC/Calc-mawps::train+validation+test"),
        tuple(Format(names, formats.parse_one_step, {}) for names in formats.ONE_STEP_FIELDS),
        files=dict.fromkeys(("train", "test"), ("mawps_source.json", "MAWPS.json")), folder="mawps",
        select=formats.select_one_step),
    "multiarith": Task(
        "ood", "number", "none stated", {"test": "hf:ChilleD/MultiArith::train+test"},  # published as one set of 600
        (Format(("question", "final_ans"), formats.numeric_parser("question", "final_ans"), {"test": (600,)}),
         Format(("input", "target"), formats.numeric_parser("input", "target"), {"test": (600,)})),
        files={"test": ("harness_multiarith.jsonl",)}, folder="mawps"),
    "tabmwp": Task(
        "ood", "number", "CC-BY-NC-SA-4.0", {"test": ""},
        (Format(("question", "answer", "table"), formats.parse_tabmwp, {"test": (1000, 7686)}),),
        files={"test": ("harness_test.jsonl",)},
        paper=f"is on no hub in a form that can be read; 1000 of its questions are {_HARNESS}/tabmwp/test.jsonl"),
    "mathqa": Task(
        "ood", "choice", "Apache-2.0", same_source("hf:regisss/math_qa", "train", "validation", "test"),
        (Format(("problem", "options", "correct"), multiple.parse_mathqa,
                {"train": (29837,), "validation": (4475,), "test": (2985, 1000)}),),
        files={"validation": ("dev.json",), "test": ("harness_test.jsonl",)},
        paper="has all 2985 questions; the 1000 of them that the paper's figures are most likely over are "
        f"{_HARNESS}/mathqa/test.jsonl"),
    "sat_math": Task(  # as in the paper: May 2023, without figures
        "ood", "choice", "MIT", {"test": "hf:mcaleste/sat_multiple_choice_math_may_23::train"},
        (Format(("question", "options", "answer"), multiple.sat_parser("options"), {"test": (32,)}),
         Format(("question", "possible answers", "answer"), multiple.sat_parser("possible answers"), {"test": (32,)})),
        files={"test": ("harness_test.jsonl",)}),
    "sat_math_agieval": Task(
        "ood", "choice", "MIT", {"test": "hf:dmayhem93/agieval-sat-math"},
        (Format(("question", "options", "label"), multiple.parse_agieval, {"test": (220,)}),
         Format(("query", "choices", "gold"), multiple.parse_agieval_query, {"test": (220,)})),
        files={"test": ("*sat-math.jsonl",)}, folder="sat_math"),
    "mmlu_stem": Task(
        "ood", "choice", "MIT", same_source(f"hf:cais/mmlu:{'+'.join(_STEM)}", "dev", "test"),
        (Format(("question", "choices", "answer"), multiple.parse_mmlu, {"dev": (90,), "test": (3018,)}),
         Format(("question", "choice0", "choice1", "choice2", "choice3", "answer"), multiple.parse_mmlu_csv,
                {"dev": (90,), "test": (3018,)})),
        files={"dev": ("|".join(f"dev/{subject}_dev.csv" for subject in _STEM),),
               "test": ("|".join(f"test/{subject}_test.csv" for subject in _STEM), "harness_test.jsonl")},
        columns=("question", "choice0", "choice1", "choice2", "choice3", "answer")),
    "mbpp": Task(
        "importance", "", "CC-BY-4.0", same_source("hf:google-research-datasets/mbpp:full", *_MBPP_SPLITS),
        (Format(("text", "code", "task_id"), formats.parse_mbpp,
                {name: (len(ids),) for name, ids in _MBPP_SPLITS.items()}),),
        files=dict.fromkeys(_MBPP_SPLITS, ("mbpp.jsonl",)),
        select=lambda record, split: int(record["task_id"]) in _MBPP_SPLITS[split]),
    "arc_easy": _likelihood_task(
        "arc_easy", "CC-BY-SA-4.0", "allenai/ai2_arc:ARC-Easy", (
            ("question choices answerkey", multiple.parse_arc),
            (_DERIVED, multiple.derived_parser(multiple.QUESTION))), 2251, 2376),
    "arc_challenge": _likelihood_task(
        "arc_challenge", "CC-BY-SA-4.0", "allenai/ai2_arc:ARC-Challenge", (
            ("question choices answerkey", multiple.parse_arc),
            (_DERIVED, multiple.derived_parser(multiple.QUESTION))), 1119, 1172),
    "boolq": _likelihood_task(
        "boolq", "CC-BY-SA-3.0", "aps/super_glue:boolq", (
            ("passage question label", multiple.boolq_parser("label")),
            ("passage question answer", multiple.boolq_parser("answer")),
            (_DERIVED, multiple.parse_derived_boolq)), 9427, 3270, test="validation"),
    "openbookqa": _likelihood_task(
        "openbookqa", "Apache-2.0", "allenai/openbookqa:main", (
            ("question_stem choices answerkey", multiple.parse_openbookqa),
            (_DERIVED, multiple.derived_parser("{}"))), 4957, 500),
    "piqa": _likelihood_task(
        "piqa", "AFL-3.0", "baber/piqa:", (
            ("goal sol1 sol2 label", multiple.parse_piqa),
            (_DERIVED, multiple.derived_parser(multiple.QUESTION))), 16113, 1838, test="validation"),
    "sciq": _likelihood_task(
        "sciq", "CC-BY-NC-3.0", "allenai/sciq:", (
            ("question correct_answer distractor1 distractor2 distractor3 support", multiple.parse_sciq),
            (_DERIVED, multiple.derived_parser(f"\n{multiple.QUESTION}"))), 11679, 1000),
    "siqa": _likelihood_task(
        "social_i_qa", "CC-BY-4.0", "lighteval/siqa:", (
            ("context question answera answerb answerc label", multiple.parse_siqa),
            (_DERIVED, multiple.derived_parser("Q: {}\nA:"))), 33410, 1954, test="validation"),
    "winogrande": _likelihood_task(
        "winogrande", "CC-BY", "allenai/winogrande:winogrande_xl", (
            ("sentence option1 option2 answer", multiple.parse_winogrande),
            (_DERIVED, multiple.parse_derived_winogrande)), 40398, 1267, test="validation"),
    "hellaswag": _likelihood_task(
        "hellaswag", "MIT", "Rowan/hellaswag:", (
            ("ctx_a ctx_b activity_label endings label", multiple.parse_hellaswag),
            (_DERIVED, multiple.derived_parser("{}"))), 39905, 10042, test="validation"),
}
