"""Worked examples for a user's own records: own field names, options, and test questions among them."""

from pathlib import Path

import ml_collections
import pytest

from configs import tiny
from imm_jax.errors import UserError
from imm_jax.stages.round_questions import load_round
from imm_jax.stages.task_entries import get_tasks
from imm_jax.stages.worked_examples import load_shots
from imm_jax.tasks.answers import verdict
from tests.tasks.records import write

STEM = "Which of these is right?"


def config(source: Path, kind: str, shots: Path | None, **fields: str) -> ml_collections.ConfigDict:
  found = tiny.get_config()
  found.update_from_flattened_dict({
      "task.name": "custom", "task.source": f"file:{source}", "task.kind": kind, "task.ood": (),
      "task.questions_per_round": 0, "eval.protocol": "harness", "eval.few_shot": 1,
      "eval.shots_file": str(shots or ""), **{f"task.fields.{field}": name for field, name in fields.items()}})
  return found


def shown(*options: object) -> list[tuple[str, str]]:
  asked = get_tasks(config(*options[:3], **options[3]))
  return [(e.question, e.rationale) for e in load_shots(asked, asked.in_domain)]


def test_own_field_names_hold_in_examples(tmp_path):
  """They do with either name, and a number is an answer as it is in the questions."""
  tests = write(tmp_path / "test.jsonl", [{"problem": "What is 1+1?", "answer": 2}])
  names = {"question": "Problem", "rationale": "solution"}
  for row in ({"problem": "3+4?", "solution": "Add.", "answer": 7}, {"question": "3+4?", "rationale": "Add.",
                                                                    "answer": "7"}):
    assert shown(tests, "number", write(tmp_path / "shots.jsonl", [row]), names) == [
        ("3+4?", "Add.\nThe answer is 7")]
  work = write(tmp_path / "shots.jsonl", [{"question": "3+4?", "answer": "3+4=7.\n#### 7"}])
  tests = write(tmp_path / "texts.jsonl", [{"problem": "What is 1+1?", "answer": "#### 2"}])
  assert shown(tests, "number", work, {"question": "problem", "rationale": "answer"}) == [
      ("3+4?", "3+4=7.\n#### 7\nThe answer is 7")]
  with pytest.raises(UserError, match="expected rows with Problem, and answer or solution or both"):
    shown(tests, "number", write(tmp_path / "shots.jsonl", [{"problem": "3+4?"}]), names)


@pytest.mark.parametrize("row", [
    {"options": ["x", "y"], "answer": "B"}, {"choices": ["x", "y"], "answer": 1},
    {"options": {"A": "x", "B": "y"}, "answer": "y"}])
def test_options_are_shown_as_those_of_questions(row, tmp_path):
  tests = write(tmp_path / "test.jsonl", [{"question": "Why?", "options": ["x", "z"], "answer": "A"}])
  shots = write(tmp_path / "shots.jsonl", [{"question": STEM, "rationale": "So."} | row])
  assert shown(tests, "choice", shots, {"choices": "options"}) == [
      (f"{STEM}\n(A) x\n(B) y", "So.\nThe answer is B")]


def test_options_of_another_name_are_refused(tmp_path):
  """No example is shown without its options."""
  tests = write(tmp_path / "test.jsonl", [{"question": "Why? (A) x (B) y", "answer": "A"}])
  for more in ({"rationale": "So."}, {}):
    shots = write(tmp_path / "shots.jsonl", [{"question": STEM, "candidates": ["x", "y"], "answer": "B"} | more])
    with pytest.raises(UserError, match=r"shots.jsonl:1: 'candidates' looks like options.*name the field choices"):
      shown(tests, "choice", shots, {})


@pytest.mark.parametrize("answer", ["B", "b", "(B)", "tea", 1, "1", "B) tea", "#### B", "Tea. The answer is (B)."])
@pytest.mark.parametrize("protocol", ["paper", "harness", "qwen"])
def test_a_bare_answer_is_shown_as_it_is_judged(answer, protocol, tmp_path):
  """What a model copies from it counts as right."""
  tests = write(tmp_path / "test.jsonl", [{"question": "Why?", "options": ["x", "z"], "answer": "A"}])
  shots = write(tmp_path / "shots.jsonl", [{"question": STEM, "options": ["milk", "tea", "ink"], "answer": answer}])
  asked = config(tests, "choice", shots, choices="options")
  asked.eval.protocol = protocol
  (example,) = load_shots(get_tasks(asked), get_tasks(asked).in_domain)
  read = get_tasks(asked).get_protocol(get_tasks(asked).in_domain).read
  assert verdict(read(example.rationale, "choice"), "B", "choice", strict=False).correct
  assert ("The answer is B" in example.rationale) or example.rationale == answer


def test_numbers_are_shown_as_they_stand(tmp_path):
  tests = write(tmp_path / "test.jsonl", [{"question": "1+1?", "answer": 2}])
  for answer, text in ((4, "4"), ("$1,600", "$1,600"), ("3+1=4.\n#### 4", "3+1=4.\n#### 4")):
    shots = write(tmp_path / "shots.jsonl", [{"question": "2+2?", "answer": answer}])
    assert shown(tests, "number", shots, {}) == [("2+2?", text)]


def test_indices_from_one_are_suspected_here_too(tmp_path, capsys):
  tests = write(tmp_path / "test.jsonl", [{"question": "Why?", "options": ["x", "z"], "answer": "A"}])
  for i, (options, answer, suspected) in enumerate(((["x", "y"], 1, True), (["x", "y"], 0, False),
                                                    (["2", "1"], "1", False), (["x", "y"], "B", False))):
    row = {"question": STEM, "options": options, "answer": answer}
    shown(tests, "choice", write(tmp_path / f"{i}.jsonl", [row]), {"choices": "options"})
    said = f"worked examples of {tmp_path}/{i}.jsonl: none of the 1 indices in 'answer' is 0" in capsys.readouterr().err
    assert said == suspected


OPTIONS = {"question": STEM, "choices": ["milk", "tea"]}


@pytest.mark.parametrize(("kind", "row", "said"), [
    ("choice", OPTIONS | {"answer": "D"}, "names none of the 2 options"),
    ("choice", OPTIONS | {"answer": "coffee"}, "names none of the 2 options"),
    ("choice", OPTIONS | {"answer": 2}, "names none of the 2 options"),
    ("choice", {"question": f"{STEM} (A) x (B) y", "answer": "C"}, "its answer is C, and it lists no such option"),
    ("choice", {"question": "2+2?", "answer": 4}, "lists no options, as the questions of task custom do"),
    ("choice", {"question": "2+2?", "rationale": "It is 4."}, "lists no options, as the questions of task custom do"),
    ("choice", OPTIONS | {"rationale": "It is tea."}, "reads no answer; expected one that ends in `The answer is X`"),
    ("choice", OPTIONS | {"rationale": "The answer is always wet.", "answer": "B"}, "reads the answer 'A'; expected a "
     "text from which it reads B, such as 'The answer is B'"),
    ("choice", {"question": STEM, "choices": [*"uvwxyz"], "answer": "F"}, "does not even read 'The answer is F'"),
    ("number", OPTIONS | {"answer": "B"}, "has options, which are not shown, while the answers are of kind number"),
    ("number", {"question": "2+2?", "answer": "I do not know"}, "is no number that can be judged; expected a number"),
    ("number", {"question": "2+2?", "rationale": "I do not know"}, "reads no answer"),
    ("number", {"question": "2+2?", "rationale": "\\boxed{5}, no.", "answer": 4}, "rationale states another answer, 5"),
    ("number", {"question": "2+2?", "rationale": "#### 5", "answer": 4}, "states another answer, 5, than 4"),
    ("latex", {"question": "2+2?", "rationale": "So \\boxed{3}", "answer": "4"}, "states another answer, 3, than 4"),
    ("choice", OPTIONS | {"rationale": "The answer is A.", "answer": "B"}, "its rationale states another answer, A, ")])
def test_an_example_that_is_none_is_one_line(kind, row, said, tmp_path, capsys):
  """Nothing is asked with it; the line names file, line and what would be right."""
  rows = {"choice": {"question": "Why? (A) x (B) z", "answer": "A"}, "number": {"question": "1+1?", "answer": 2},
          "latex": {"question": "1+1?", "answer": "2"}}
  tests = write(tmp_path / "test.jsonl", [rows[kind]])
  with pytest.raises(UserError) as raised:
    shown(tests, kind, write(tmp_path / "shots.jsonl", [row]), {})
  assert "shots.jsonl:1: " in str(raised.value)
  assert said in str(raised.value)
  assert "\n" not in str(raised.value)
  assert not capsys.readouterr().err


def test_a_misread_example_of_a_train_split(tmp_path, capsys):
  rows = [{"question": f"{i}?", "options": ["x", "y"], "answer": "B", "why": "The answer is a letter."} for i in (0, 1)]
  for split, row in zip(("train", "test"), rows, strict=True):
    write(tmp_path / f"data/{split}.jsonl", [row])
  assert len(shown(tmp_path / "data", "choice", None, {"choices": "options", "rationale": "why"})) == 1
  assert "warning: worked example custom/train/" in (printed := capsys.readouterr().err)
  assert "eval.protocol=harness reads the answer 'A'" in printed


@pytest.mark.parametrize(("row", "leaks"), [
    ({"question": STEM, "choices": ["x", "y"]}, True), ({"question": STEM, "choices": ["y", "x"]}, True),
    ({"question": STEM}, True), ({"question": f"{STEM}\nA. x\nB. y"}, True),
    ({"question": STEM, "choices": ["x", "z"]}, False), ({"question": "Another?", "choices": ["x", "y"]}, False)])
def test_test_questions_are_found_among_examples(row, leaks, tmp_path):
  """However they are written; other options make another question."""
  tests = write(tmp_path / "test.jsonl", [{"question": STEM, "options": ["x", "y"], "answer": "A"}])
  shots = write(tmp_path / "shots.jsonl", [row | {"rationale": "So.", "answer": "B"}])
  options = (tests, "choice", shots, {"choices": "options"})
  if leaks:
    with pytest.raises(UserError, match=r"shots.jsonl:1: .*is a test question of custom"):
      shown(*options)
  else:
    assert len(shown(*options)) == 1


def test_no_round_asks_a_bare_example(tmp_path):
  rows = [{"question": f"{i}?", "options": ["x", "y"], "answer": "A"} for i in range(4)]
  write(tmp_path / "data/train.jsonl", rows[:3])
  write(tmp_path / "data/test.jsonl", rows[3:])
  shots = write(tmp_path / "shots.jsonl", [{"question": "1?", "rationale": "So.", "answer": "A"}])
  asked = get_tasks(config(tmp_path / "data", "choice", shots, choices="options"))
  assert {e.question[:2] for e in load_round(asked, 0).round_questions} == {"0?", "2?"}


def test_a_file_of_tests_alone_names_shots_file(tmp_path):
  tests = write(tmp_path / "test.jsonl", [{"question": "1+1?", "answer": 2, "why": "So."}])
  with pytest.raises(UserError, match=r"shows 1 worked example, and the train split of custom cannot be used: .* the "
                                      r"test set's; .*or give examples alone in --config.eval.shots_file=FILE.jsonl"):
    shown(tests, "number", None, {"rationale": "why"})
