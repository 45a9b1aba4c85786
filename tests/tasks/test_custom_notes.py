"""What is said about a user's own records: those left out, and those that look as if a setting were missing."""

import pytest

from imm_jax import tasks
from imm_jax.errors import UserError
from imm_jax.tasks.answers import verdict
from tests.tasks.records import write


def load(tmp_path, rows, capsys, **options):
  """Returns the golds by question, and the lines that were printed."""
  source = f"file:{write(tmp_path / 'own.jsonl', rows)}"
  found = tasks.load("custom", split="test", source=source, **options)
  lines = capsys.readouterr().err.splitlines()
  assert all(f": custom/test: {source}: " in line for line in lines)
  return {e.question: e.answer for e in found}, [line.replace(f" custom/test: {source}:", "") for line in lines]


@pytest.mark.parametrize(("text", "gold", "kinds"), [
    ("1+2=<<1+2=7>>7.\n#### 7", "7", "nl"), ("#### 7", "7", "nl"), ("#### B", "B", "c"), ("\\boxed{7}", "7", "nl"),
    ("So $x = \\boxed{7}$.", "7", "nl"), ("9-2=7. The answer is 7", "7", "nl"), ("Final answer: 7.", "7", "nl"),
    ("It is 3, so 4. The answer is $\\frac{1}{2}$.", "\\frac{1}{2}", "l"), ("#### 1,007", "1007", "n"),
    ("The answer is .5", ".5", "nl"), ("The answer is -.5.", "-.5", "nl"),
    ("So the answer is (B).", "B", "c"), ("$\\boxed{B}$", "B", "c")])
def test_a_stated_answer_is_the_gold(text, gold, kinds, tmp_path, capsys):
  """Judged as if a model had written it, the text that states it is right."""
  for kind in ("number", "latex", "choice"):
    if kind[0] in kinds:
      golds, lines = load(tmp_path / kind, [{"question": "? A) B)", "answer": text}], capsys, kind=kind)
      assert (list(golds.values()), lines) == ([gold], [])
      assert verdict(text, gold, kind, strict=True).correct


@pytest.mark.parametrize("text", ["7 pens", "3 or 4", "2 dozen", "none", "The answer is 7 pens", "3:30 p.m."])
def test_a_number_that_may_be_another_is_no_gold(text, tmp_path, capsys):
  golds, lines = load(tmp_path, [{"question": f"{i}?", "answer": i} for i in range(20)]
                      + [{"question": "?", "answer": text}], capsys)
  assert "?" not in golds
  assert lines == [f"note: of 21 records left out 1 without an answer that can be judged ('answer' of own.jsonl:21 is "
                   f"{text!r})"]


def test_records_left_out_are_named(tmp_path, capsys):
  """One rule holds for an answer that is not there, empty, another text, or no text; many of them are a warning."""
  rows = [{"question": f"{i}?", "answer": i} for i in range(10)]
  rows += [{"question": f"No {i}?", "answer": gold} for i, gold in enumerate((None, "", "x" * 99, ["4"], True))]
  golds, lines = load(tmp_path, [*rows, {"question": "Last?"}], capsys)
  assert set(golds) == {f"{i}?" for i in range(10)}
  assert lines == [
      "warning: of 16 records left out 6 without an answer that can be judged ('answer' of own.jsonl:11 is null; "
      f"'answer' of own.jsonl:12 is ''; 'answer' of own.jsonl:13 is '{'x' * 59}...; and 3 more)"]


def test_a_field_that_is_nowhere_is_an_error(tmp_path, capsys):
  """One that a later record lacks is no wrong name."""
  with pytest.raises(UserError, match=r"own.jsonl: no record has a field 'answer' but gold, question; name that of the "
                                      r"answers with --config.task.fields.answer=NAME"):
    load(tmp_path, [{"question": "?", "gold": 1}], capsys)
  with pytest.raises(UserError, match=r"b.jsonl:2: has no field 'question', which the records before it have$"):
    tasks.load("custom", split="test", source="file:" + str(write(tmp_path / "b.jsonl", [
        {"question": "?", "answer": 1}, {"answer": 1}])))


def test_questions_that_contradict_are_named(tmp_path, capsys):
  rows = [{"question": "1+1?", "answer": 2}, {"question": " 1+1?", "answer": "3"}, {"question": "2?", "answer": 2},
          {"question": "2?", "answer": 2}]
  _, lines = load(tmp_path, rows, capsys)
  assert lines == ["warning: 1 questions occur with different answers, such as own.jsonl:1 (2) and own.jsonl:2 (3); "
                   "all but one answer are wrong"]


def test_a_sentence_is_no_formula(tmp_path, capsys):
  sentence = "Ann has five pens because 9-4=5"
  _, lines = load(tmp_path, [{"question": "1?", "answer": sentence}, {"question": "2?", "answer": "\\text{east}"}],
                  capsys, kind="latex")
  assert len(lines) == 1
  assert f"1 answers look like sentences, which nothing may equal, such as 'answer' of own.jsonl:1 is {sentence!r}" in (
      lines[0])


@pytest.mark.parametrize("count", [1, 3, 9])
def test_indices_from_one_are_suspected(count, tmp_path, capsys):
  """They are, however few and wherever options stand, but not where an option or its label has the text."""
  texts = ["w", "x", "y", "z"]
  forms = {"list": texts, "text": "A) w B) x C) y D) z", "object": dict(zip("ABCD", texts, strict=True))}
  options = {"kind": "choice", "fields": {"choices": "options"}}
  rows = lambda form, answers: [{"question": f"{i}?", "options": form, "answer": answers[i % 3]} for i in range(count)]
  for name, form in forms.items():
    assert not load(tmp_path / f"{name}0", rows(form, [0, 1, 2]), capsys, **options)[1]
    for answers in ([1, 2, 3], ["1", "2", "3"], [1.0, 2.0, 3.0]):
      _, (line,) = load(tmp_path / f"{name}{answers[0]!r}", rows(form, answers), capsys, **options)
      assert f"none of the {count} indices in 'answer' is 0, from which they count" in line
  for i, form in enumerate((["3", "2", "1"], {"1": "x", "2": "y", "3": "z"},
                             {"text": ["x", "y", "z"], "label": ["1", "2", "3"]})):
    assert not load(tmp_path / f"texts{i}", rows(form, ["1", "2", "3"]), capsys, **options)[1]
  _, (line,) = load(tmp_path / "own", [{"question": f"{i}? (A) x (B) y", "answer": 1} for i in range(count)], capsys,
                    kind="choice")
  assert f"none of the {count} indices" in line


def test_options_without_a_setting_are_told(tmp_path, capsys):
  _, lines = load(tmp_path / "a", [{"question": "Which?", "options": ["4", "5"], "answer": 1}], capsys)
  assert lines == ["warning: 1 records have options in 'options', which are not shown; multiple choice is "
                   "--config.task.kind=choice --config.task.fields.choices=options"]
  _, lines = load(tmp_path / "b", [{"question": "Which?", "answer": "A"}, {"question": "(A) 1 (B) 2", "answer": "A"},
                                     {"question": "a) 1 b) 2", "answer": "a"}],
                  capsys, kind="choice")
  assert len(lines) == 1
  assert "1 questions list no options by letter, (A) ... (B) ..., such as own.jsonl:1; name the field" in lines[0]
