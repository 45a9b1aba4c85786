"""The real data sets, where they lie in $IMM_JAX_DATA or in ../shared/data beside the repository; else skipped."""

import collections
import functools
import gzip
import json
import os
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import tensorflow_datasets as tfds

from imm_jax import tasks
from imm_jax.tasks import answers, registry
from tests import REPO

DATA = Path(os.environ.get("IMM_JAX_DATA", REPO.parent / "shared" / "data"))
SOURCE = f"file:{DATA}"
pytestmark = pytest.mark.skipif(not (DATA / "gsm8k").is_dir(), reason=f"no data sets in {DATA}")

# Task, split, records as published, without a gold, repeated, in the test set.
COUNTS = [("gsm8k", "train", 7473, 0, 0, 0), ("gsm8k", "test", 1319, 0, 0, 0), ("math", "train", 7500, 2, 1, 2),
          ("math", "test", 5000, 0, 0, 0), ("svamp", "test", 1000, 0, 0, 0), ("asdiv", "test", 2305, 90, 1, 0),
          ("mawps", "test", 2065, 0, 87, 0), ("mathqa", "validation", 4475, 0, 0, 0), ("mathqa", "test", 2985, 0, 0, 0),
          ("mawps_one_step", "train", 638, 0, 37, 0), ("mawps_one_step", "test", 354, 0, 25, 0),
          ("sat_math", "test", 32, 0, 0, 0), ("sat_math_agieval", "test", 220, 0, 0, 0),
          ("mmlu_stem", "dev", 90, 0, 1, 0), ("mmlu_stem", "test", 3018, 0, 12, 0), ("mbpp", "prompt", 10, 0, 0, 0),
          ("mbpp", "train", 374, 0, 0, 3), ("mbpp", "validation", 90, 0, 0, 0), ("mbpp", "test", 500, 0, 1, 0)]


@functools.cache
def read(name: str, split: str = "test", path: str = "") -> registry.Split:
  return registry.read(name, split=split, source=f"file:{DATA / path}")


def lines(path: str) -> list[dict]:
  opened = gzip.open if path.endswith("gz") else open
  with opened(DATA / path, "rt", encoding="utf-8") as f:
    return [json.loads(line) for line in f]


@pytest.mark.parametrize(("name", "split", "records", "no_gold", "repeated", "in_test"), COUNTS)
def test_counts_are_published_ones(name, split, records, no_gold, repeated, in_test):
  """Every record is accounted for."""
  found = read(name, split)
  assert found.counts == {"records": records, "no_gold": no_gold, "repeated": repeated, "in_test": in_test}
  whole = split == "test"  # those that repeat another are asked, too
  assert len(found.examples) == records - no_gold - in_test - (0 if whole else repeated)
  assert not any(note.startswith("warning") for note in found.notes)
  questions = {words(e.question) for e in found.examples}
  assert len({e.id for e in found.examples}) == len(found.examples) == len(questions) + repeated * whole
  if split != "test":
    assert not questions & {words(e.question) for e in read(name).examples}


@pytest.mark.parametrize(("name", "split"), [c[:2] for c in COUNTS if c[0] != "mbpp"])
def test_golds_have_their_kind(name, split):
  """Every rationale says its gold answer."""
  for e in read(name, split).examples:
    if e.kind == "number":
      assert answers.parse_number(e.answer) is not None
      assert not set(e.answer) & set(", $%()")
    elif e.kind == "choice":
      assert f"\n({e.answer}) " in e.question
    else:
      assert e.answer == e.answer.strip()
    if e.rationale:
      assert e.rationale.rstrip(".").endswith(f"The answer is {e.answer}")
      assert "<<" not in e.rationale or name == "math"


def words(text: str) -> str:
  return " ".join(text.split())


def test_gold_numbers_are_those_of_the_files():
  gold = {words(e.question): float(answers.parse_number(e.answer)) for name in ("gsm8k", "mawps", "svamp")
          for e in read(name).examples}
  for r in lines("gsm8k/test.jsonl"):
    assert gold[words(r["question"])] == float(r["answer"].rsplit("#### ", 1)[1].replace(",", ""))
  different = [r for r in lines("mawps/harness_test.jsonl") if gold[words(r["input"])] != r["target"]]
  assert len(different) == 1  # stands twice, with two golds
  for r in json.loads((DATA / "svamp/SVAMP.json").read_text()):
    full_stop = "" if r["Body"].strip().endswith((".", "?", "!")) else "."
    assert gold[words(f"{r['Body'].strip()}{full_stop} {r['Question']}")] == r["Answer"]


@pytest.mark.parametrize(("name", "split"), [("gsm8k", "train"), ("gsm8k", "test"), ("mathqa", "test")])
def test_every_rationale_is_judged_right(name, split):
  for e in read(name, split).examples:
    assert answers.verdict(e.rationale, e.answer, e.kind, strict=True).correct, e


def test_math_golds_stand_in_the_last_box():
  """The box is that of their solutions."""
  for e in (*read("math", "train").examples, *read("math").examples):
    solution = words(e.rationale.rpartition("\nThe answer is ")[0])
    assert e.answer in solution[max(solution.rfind("\\boxed"), solution.rfind("\\fbox")):]
    assert e.answer.count("{") == e.answer.count("}")


def test_asdiv_keeps_what_can_be_judged():
  """By kind: plain numbers, ordinals as numbers; the rest as it is written; several values are left out."""
  problems = [{c.tag: c.text for c in p} for p in ElementTree.parse(DATA / "asdiv/ASDiv.xml").getroot().iter("Problem")]
  assert sum(";" in p["Answer"] for p in problems) == read("asdiv").counts["no_gold"]
  kinds = collections.Counter(e.kind for e in read("asdiv").examples)
  assert kinds == {"number": 2097, "latex": 118}
  ratios = [e.answer for e in read("asdiv").examples if e.kind == "latex" and e.answer.replace(":", "").isdecimal()]
  assert len(ratios) == 56
  names = {e.answer for e in read("asdiv").examples if e.kind == "latex"} - set(ratios)
  assert {"Yes", "No", "They are equal", "3:30 p.m."} <= names
  assert not any(answers.parse_number(name) for name in names)


# Task, file, how many questions the paper's figures are over.
WHOLE = [("mawps", "mawps/harness_test.jsonl", 2065), ("mmlu_stem", "mmlu_stem/harness_test.jsonl", 3018),
         ("asdiv", "asdiv/harness_test.jsonl", 2215), ("mathqa", "mathqa/harness_test.jsonl", 1000),
         ("svamp", "svamp/harness_test.jsonl", 1000), ("sat_math", "sat_math/harness_test.jsonl", 32),
         ("math", "math", 5000), ("gsm8k", "gsm8k", 1319), ("multiarith", "mawps/harness_multiarith.jsonl", 600)]


@pytest.mark.parametrize(("name", "path", "count"), WHOLE)
def test_no_test_question_of_the_paper_is_left_out(name, path, count):
  found = read(name, path=path)
  assert len(found.examples) == len({e.id for e in found.examples}) == count
  assert not found.notes


# The file, and how often each option is the right one.
COMMON = {"arc_easy": 2376, "arc_challenge": 1172, "boolq": 3270, "openbookqa": 500, "piqa": 1838, "sciq": 1000,
          "siqa": 1954, "winogrande": 1267}


@pytest.mark.parametrize(("name", "size"), COMMON.items())
def test_common_sets_are_whole(name, size):
  """Their gold answers are those of the files."""
  choices, examples = tasks.load_choices(name, source=SOURCE), tasks.load(name, split="test", source=SOURCE)
  assert len(choices) == size
  assert [c.id for c in choices] == [e.id for e in examples]
  assert not read(name).notes
  file = {"siqa": "social_i_qa"}.get(name, name)
  right = collections.Counter(r["choices"][r["answer"]].strip() for r in lines(f"commonsense/{file}.jsonl"))
  listed = collections.Counter(
      re.search(rf"\n\({e.answer}\) (.*)", e.question, re.DOTALL)[1].partition("\n(")[0] for e in examples)
  if name == "boolq":
    right = {"yes": right["true"], "no": right["false"]}
  assert listed == right
  for c in choices:
    assert all(option.startswith(" ") for option in c.options)
    assert len(c.contexts) in (1, len(c.options))
    assert 0 <= c.gold < len(c.options)


def test_choices_do_not_hang_on_the_form_of_the_file():
  files = {tuple(tasks.load_choices("mmlu_stem", source=f"file:{DATA / path}"))
           for path in ("mmlu_stem", "mmlu_stem/harness_test.jsonl")}
  assert len(files) == 1


@pytest.mark.parametrize(("name", "files"), [
    ("math", ["math"]), ("svamp", ["svamp/SVAMP.json", "svamp/harness_test.jsonl"]),
    ("asdiv", ["asdiv/ASDiv.xml", "asdiv/harness_test.jsonl"]),
    ("mawps", ["mawps/harness_test.jsonl"]), ("mmlu_stem", ["mmlu_stem", "mmlu_stem/harness_test.jsonl"])])
def test_all_forms_give_the_same_questions(name, files):
  """Every published form does so."""
  assert {frozenset(read(name, path=file).examples) for file in files} == {frozenset(read(name).examples)}


def test_part_of_a_set_gives_part():
  """A part of a set gives a part of its questions."""
  assert set(read("mathqa", path="mathqa/harness_test.jsonl").examples) < set(read("mathqa").examples)
  assert len(read("mathqa", path="mathqa/harness_test.jsonl").examples) == 1000
  assert not read("mathqa", path="mathqa/harness_test.jsonl").notes
  for file in ("MAWPS.json", "mawps_source.json", "testset.json"):
    assert not any(note.startswith("warning") for note in read("mawps", path=f"mawps/{file}").notes)


@pytest.mark.full
def test_tfds_and_files_agree_on_gsm8k(tmp_path, monkeypatch):
  """They give the same questions."""
  registry._read.cache_clear()  # another test's tfds is another
  monkeypatch.setattr(tfds, "data_source", functools.partial(tfds.data_source, data_dir=tmp_path))
  monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", lambda _, urls: {
      name: DATA / "gsm8k" / f"{name.removesuffix('_socratic')}.jsonl" for name in urls})
  for split in ("train", "test"):
    assert tasks.load("gsm8k", split=split, source="tfds:gsm8k") == tasks.load("gsm8k", split=split, source=SOURCE)


@pytest.mark.parametrize("name", ["tinyshakespeare", "gutenberg_11_alice", "gutenberg_1342_pride_and_prejudice"])
def test_texts_are_cut_into_passages(name):
  path = DATA / "text" / f"{name}.txt"
  passages = tasks.load_text(source=f"file:{path}")
  held = sum(map(len, passages)) / len(path.read_text(encoding="utf-8").replace("\r\n", "\n"))
  assert 0.87 < held <= 1
  assert not any("Project Gutenberg" in passage for passage in passages)
