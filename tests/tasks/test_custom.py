"""Records of a user's own form."""

import pytest

from imm_jax import tasks
from imm_jax.errors import UserError
from tests.tasks.records import CUSTOM, gsm8k, write


@pytest.mark.parametrize(("kind", "change", "fields", "expected"), [
    ("number", {}, {}, ("P?", "1600", "")),
    ("number", {}, {"rationale": "Work"}, ("P?", "1600", "So it is.\nThe answer is 1600")),
    ("number", {"gold": 7}, {}, ("P?", "7", "")),
    ("number", {"work": "It is 7. The answer is 7.", "gold": 7}, {"rationale": "work"},
     ("P?", "7", "It is 7. The answer is 7.")),
    ("latex", {"gold": "$\\pi$"}, {}, ("P?", "\\pi", "")),
    ("latex", {"gold": "Hence $\\boxed{\\frac12}$."}, {}, ("P?", "\\frac12", "")),
    ("choice", {"gold": "b", "opts": None}, {}, ("P?", "B", "")),
    ("choice", {"gold": "(B)"}, {"choices": "opts"}, ("P?\n(A) x\n(B) y", "B", "")),
    ("choice", {"gold": 0}, {"choices": "opts"}, ("P?\n(A) x\n(B) y", "A", "")),
    ("choice", {"gold": "1", "opts": ["2", "1", "0"]}, {"choices": "opts"}, ("P?\n(A) 2\n(B) 1\n(C) 0", "B", "")),
    ("choice", {"gold": "yes", "opts": ["no", "yes"]}, {"choices": "opts"}, ("P?\n(A) no\n(B) yes", "B", "")),
], ids=["number", "rationale", "int", "rationale-with-answer", "latex", "box", "letter", "option-letter",
        "option-index", "option-number", "option-text"])
def test_custom_records_are_read_by_the_names_given(kind, change, fields, expected, tmp_path):
  source = f"file:{write(tmp_path / 'own.jsonl', [CUSTOM | change])}"
  example, = tasks.load("custom", split="test", source=source, kind=kind,
                        fields={"question": "Prompt", "answer": "gold", **fields})
  assert (example.question, example.answer, example.rationale) == expected
  assert example.kind == kind
  assert example.id.startswith("custom/test/")


@pytest.mark.parametrize("kind", ["number", "latex", "choice"])
def test_records_without_gold_are_counted(kind, tmp_path, capsys):
  """They are left out."""
  rows = [CUSTOM | {"opts": "", "gold": "A" if kind == "choice" else "7"},
          CUSTOM | {"opts": "", "Prompt": "R?", "gold": None}]
  source = f"file:{write(tmp_path / 'own.jsonl', rows)}"
  found = tasks.load("custom", split="test", source=source, kind=kind, fields={"question": "Prompt", "answer": "gold"})
  assert len(found) == 1
  assert "of 2 records left out 1 without an answer that can be judged" in capsys.readouterr().err


def test_custom_needs_source_kind_and_fields(tmp_path):
  """The fields have to be there."""
  write(tmp_path / "train.jsonl", [CUSTOM])
  write(tmp_path / "test.jsonl", [CUSTOM | {"prompt": "Other?"}])
  source = f"file:{tmp_path}"
  for options, message in [
      ({"kind": "number"}, "needs a source"), ({"source": source}, "kind='' of its answers: "),
      ({"source": source, "kind": "nummer"}, "did you mean number"),
      ({"source": source, "kind": "number", "fields": {"anwser": "gold"}}, "no field 'anwser': did you mean answer"),
      ({"source": source, "kind": "number"}, "has no field 'question' but prompt, gold, work, opts"),
      ({"source": source, "kind": "latex", "fields": {"question": "prompt", "answer": "gold", "rationale": "why"}},
       r"no record has a field 'why' \(task.fields.rationale\) but gold, opts, prompt, work")]:
    with pytest.raises(UserError, match=message):
      tasks.load("custom", split="train", **options)
  with pytest.raises(UserError, match="task gsm8k has its own fields and kind"):
    tasks.load("gsm8k", split="test", source=source, kind="number")


def test_rows_without_a_worked_answer_are_questions(tmp_path):
  rows = [{"question": f"{i}?", "answer": i, **more} for i, more in enumerate(
      ({"why": "So."}, {}, {"why": None}, {"why": " "}))]
  write(tmp_path / "train.jsonl", rows)
  write(tmp_path / "test.jsonl", [{"question": "Test?", "answer": 1}])  # evaluation needs none at all
  load = lambda split: tasks.load("custom", split=split, source=f"file:{tmp_path}", kind="number",
                                  fields={"rationale": "why"})
  assert {e.question: e.rationale for e in load("train")} == {
      "0?": "So.\nThe answer is 0", "1?": "", "2?": "", "3?": ""}
  assert [e.question for e in load("test")] == ["Test?"]


def test_nothing_that_can_be_judged_is_an_error(tmp_path):
  source = f"file:{write(tmp_path / 'a.jsonl', [gsm8k('A?', 'none')])}"
  with pytest.raises(UserError, match="holds no question for gsm8k/test"):
    tasks.load("gsm8k", split="test", source=source)


@pytest.mark.parametrize(("change", "message"), [
    ({"gold": True}, "no answer that can be judged"), ({"gold": ["42"]}, "no answer that can be judged"),
    ({"prompt": "half \ud83d"}, r"own.jsonl:1: .*surrogates not allowed"),
    ({"gold": None}, "no answer that can be judged")])
def test_bad_gold_is_an_error_with_its_line(change, message, tmp_path):
  """So is a text that is none."""
  source = f"file:{write(tmp_path / 'own.jsonl', [CUSTOM | change])}"
  with pytest.raises(UserError, match=message):
    tasks.load("custom", split="test", source=source, kind="latex", fields={"question": "prompt", "answer": "gold"})
