"""Records of every published form: their question, gold answer, kind, and errors."""

import pytest

from imm_jax.errors import UserError
from imm_jax.tasks import answers, catalogue, registry
from tests.tasks.records import parsed, write

_OPTIONS = "\n(A) 4\n(B) 5 , 5\n(C) $f(A)$\n(D) none"
ARC = {"question": "Q?", "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "answerKey": "2"}
DERIVED = {"question": "Q?", "choices": ["x", "y"], "answer": 1}
NUTS = "Ann has 5 nuts. Bob has 2. How many?"  # of the third that is the test set
# Task, record, question, gold, kind: one for each form in which a task is published.
FORMS = [
    ("gsm8k", {"question": " Two and\u2028three? ", "answer": "2+3=<<2+3=5>>5 and <<5*320=1600>>1,600\n#### 1,600"},
     "Two and\u2028three?", "1600", "number"),
    ("gsm8k", {"question": "Q?", "answer": "Down.\n#### -12", "annotation": "Down.\n", "short_answer": "-12"},
     "Q?", "-12", "number"),
    ("math", {"problem": "Half of {x}?", "solution": r"First \boxed{1}, no: $\boxed{\frac{1}{2}.}$", "level": "Level 1",
              "type": "Algebra"}, "Half of {x}?", r"\frac{1}{2}", "latex"),
    ("math", {"problem": "P?", "solution": r"It is $\boxed 7$."}, "P?", "7", "latex"),
    ("math", {"problem": "P?", "solution": "$\\boxed{9 \\text{ square\nfeet}}$"},
     "P?", r"9 \text{ square feet}", "latex"),
    ("svamp", {"ID": "x", "Body": "Ann has 5 pens", "Question": "How many?", "Equation": "5", "Answer": 145.0,
               "Type": "none"}, "Ann has 5 pens. How many?", "145", "number"),
    ("svamp", {"Body": "Is it so?", "Question": "How many?", "Answer": "2.5"}, "Is it so? How many?", "2.5", "number"),
    ("asdiv", {"body": "A.", "question": "B?", "answer": "9 (apples)", "formula": ""}, "A. B?", "9", "number"),
    ("asdiv", {"body": "A.", "question": "B?", "answer": "-(1/3)"}, "A. B?", "-1/3", "number"),
    ("asdiv", {"body": "A.", "question": "B?", "answer": "5/2"}, "A. B?", "5/2", "number"),
    ("asdiv", {"body": "A.", "question": "B?", "answer": "The 60th caller."}, "A. B?", "60", "number"),
    ("asdiv", {"body": "A.", "question": "B?", "answer": "June 1st"}, "A. B?", "1", "number"),
    ("asdiv", {"body": "A.", "question": "B?", "answer": "5:6"}, "A. B?", "5:6", "latex"),
    ("asdiv", {"body": "A.", "question": "B?", "answer": "3:30 p.m."}, "A. B?", "3:30 p.m.", "latex"),
    ("asdiv", {"body": "A.", "question": "B?", "answer": "They are equal."}, "A. B?", "They are equal", "latex"),
    ("mawps", {"input": "N?", "target": 43.0, "type": "addsub", "idx": 0}, "N?", "43", "number"),
    ("mawps", {"input": "N?", "target": 1.8333333333333335}, "N?", "1.8333333333333335", "number"),
    ("mawps", {"iIndex": 1, "sQuestion": " N? ", "lEquations": ["X=1"], "lSolutions": [504.0]}, "N?", "504", "number"),
    ("mawps", {"id": 1, "original_text": "N?", "segmented_text": "N ?", "equation": "x", "ans": "11687.0"},
     "N?", "11687", "number"),
    ("mawps", {"id": "m", "question": "N?", "chain": "", "result": "1_000", "result_float": 1000.0},
     "N?", "1000", "number"),
    ("mathqa", {"Problem": "P ?", "Rationale": '"so . answer : d"', "correct": "d", "category": "other",
                "options": "a ) 4 , b ) 5 , 5 , c ) $f(A)$ , d ) none"}, f"P ?{_OPTIONS}", "D", "choice"),
    ("mathqa", {"problem": "P ?", "rationale": "so", "correct": "b",
                "options": "['a ) 4', 'b ) 5 , 5', 'c ) $f(A)$', \"d ) none\"]"}, f"P ?{_OPTIONS}", "B", "choice"),
    ("mathqa", {"problem": "P ?", "rationale": "so", "correct": "a", "options": "a ) a ) 4 , b ) b ) 5"},
     "P ?\n(A) 4\n(B) 5", "A", "choice"),
    ("sat_math", {"id": "0", "question": "P?", "options": "A) 4 B) 5 , 5 C) $f(A)$ D) none", "Answer": "C"},
     f"P?{_OPTIONS}", "C", "choice"),
    ("sat_math", {"Question": "P?", "Possible Answers": "A. 4 B. 5 , 5 C. $f(A)$ D. none", "Answer": "C"},
     f"P?{_OPTIONS}", "C", "choice"),
    ("sat_math_agieval", {"passage": "", "question": "P?", "options": ["(A)4", "(B)5 , 5", "(C)$f(A)$", "(D)none"],
                          "label": "A", "other": {"solution": "Choice A."}}, f"P?{_OPTIONS}", "A", "choice"),
    ("sat_math_agieval", {"passage": "A table.", "question": "P?", "options": ["(A)4", "(B)5"], "label": "B"},
     "A table.\nP?\n(A) 4\n(B) 5", "B", "choice"),
    ("sat_math_agieval", {"query": "A table.Q: P? Answer Choices: (A)4 (B)5\nA: Among A through B, the answer is",
                          "choices": ["(A)4", "(B)5"], "gold": [1]}, "A table.\nP?\n(A) 4\n(B) 5", "B", "choice"),
    ("mmlu_stem", {"question": "P?", "type": "x", "choices": ["4", "5 , 5", "$f(A)$", "none"], "answer": 3},
     f"P?{_OPTIONS}", "D", "choice"),
    ("mmlu_stem", {"question": "P?", "choice0": "0", "choice1": "1", "choice2": "2", "choice3": "3", "answer": "0"},
     "P?\n(A) 0\n(B) 1\n(C) 2\n(D) 3", "A", "choice"),
    ("math_500", {"problem": "P?", "solution": r"$\boxed{\dfrac12}$", "answer": r"\frac{1}{2}", "subject": "Algebra"},
     "P?", r"\frac{1}{2}", "latex"),
    ("gsm_plus", {"question": "Q?", "solution": "2+3 = 5\n#### 5", "answer": "5.0", "perturbation_type": "x"},
     "Q?", "5", "number"),
    ("gsm_symbolic", {"id": 0, "instance": 0, "question": "Q?", "answer": "1+2=<<1+2=3>>3\n#### 3"},
     "Q?", "3", "number"),
    ("mawps_one_step", {"question": NUTS, "expression": "(5 + 2)", "equation": "x=5+2", "result_float": 7.0}, NUTS, "7",
     "number"),
    ("mawps_one_step", {"sQuestion": NUTS, "lEquations": ["X=(5.0*2.0)"], "lSolutions": [10.0]}, NUTS, "10", "number"),
    ("mawps_one_step", {"original_text": NUTS, "equation": "5-2 = x", "ans": 3}, NUTS, "3", "number"),
    ("multiarith", {"question": " Q? ", "final_ans": "12"}, "Q?", "12", "number"),
    ("multiarith", {"input": "Q?", "target": 12.0}, "Q?", "12", "number"),
    ("tabmwp", {"question": "How many?", "choices": None, "answer": "1,200", "ans_type": "integer_number",
                "table_title": "Apples", "table": "Day | Number\nMonday | 1,200"},
     "Table: Apples\nDay | Number\nMonday | 1,200\nHow many?", "1200", "number"),
    ("tabmwp", {"question": "Which?", "choices": ["a hat", "a cap"], "answer": "a hat", "ans_type": "multi_text",
                "table_title": "", "table": "x | y"}, "Table:\nx | y\nWhich?\nOptions: a hat, a cap", "a hat", "latex"),
    ("arc_easy", ARC, "Q?\n(A) x\n(B) y\n(C) z", "B", "choice"),
    ("arc_easy", DERIVED, "Q?\n(A) x\n(B) y", "B", "choice"),
    ("arc_challenge", ARC, "Q?\n(A) x\n(B) y\n(C) z", "B", "choice"),
    ("arc_challenge", DERIVED, "Q?\n(A) x\n(B) y", "B", "choice"),
    ("boolq", {"passage": "P.", "question": "is it so", "label": 1, "idx": 0},
     "P.\nis it so?\n(A) no\n(B) yes", "B", "choice"),
    ("boolq", {"passage": "P.", "question": "is it so", "answer": False, "title": "T"},
     "P.\nis it so?\n(A) no\n(B) yes", "A", "choice"),
    ("boolq", {"question": "is it so?", "choices": ["true", "false"], "answer": 0},
     "is it so?\n(A) no\n(B) yes", "B", "choice"),
    ("openbookqa", {"question_stem": "It is", "choices": ARC["choices"], "answerKey": "3"},
     "It is\n(A) x\n(B) y\n(C) z", "C", "choice"),
    ("openbookqa", DERIVED, "Q?\n(A) x\n(B) y", "B", "choice"),
    ("piqa", {"goal": "Do it.", "sol1": " one", "sol2": "two ", "label": 0}, "Do it.\n(A) one\n(B) two", "A", "choice"),
    ("piqa", DERIVED, "Q?\n(A) x\n(B) y", "B", "choice"),
    ("sciq", {"question": "Q?", "support": "S. ", "distractor1": "x", "distractor2": "y", "distractor3": "z",
              "correct_answer": "w"}, "S.\nQ?\n(A) x\n(B) y\n(C) z\n(D) w", "D", "choice"),
    ("sciq", DERIVED, "Q?\n(A) x\n(B) y", "B", "choice"),
    ("siqa", {"context": "C.", "question": "Q?", "answerA": "x", "answerB": "y", "answerC": "z", "label": "3"},
     "C. Q?\n(A) x\n(B) y\n(C) z", "C", "choice"),
    ("siqa", DERIVED, "Q?\n(A) x\n(B) y", "B", "choice"),
    ("winogrande", {"sentence": "Ann saw _ run.", "option1": "Tom", "option2": "Sam", "answer": "2"},
     "Ann saw _ run.\n(A) Tom\n(B) Sam", "B", "choice"),
    ("winogrande", DERIVED | {"question": "Ann saw _ run."}, "Ann saw _ run.\n(A) x\n(B) y", "B", "choice"),
    ("hellaswag", {"ctx_a": "[header] How to swim [title] Go in.", "ctx_b": "you", "activity_label": "Sport",
                   "endings": ["swim.", "sink [step] ."], "label": "1"},
     "Sport: How to swim. Go in. You\n(A) swim.\n(B) sink .", "B", "choice"),
    ("hellaswag", DERIVED, "Q?\n(A) x\n(B) y", "B", "choice"),
    ("mbpp", {"text": "Add two.", "code": "def f(a, b):\r\n  return a+b", "task_id": 11, "test_list": []},
     "Add two.", "", ""),
]


@pytest.mark.parametrize(("name", "record", "question", "gold", "kind"), FORMS,
                         ids=[f"{name}-{' '.join(record)}"[:50] for name, record, *_ in FORMS])
def test_published_forms_are_read(name, record, question, gold, kind, tmp_path):
  """Each gives question, gold answer and kind."""
  example = parsed(tmp_path, name, record)
  assert (example.question, example.answer, example.kind) == (question, gold, kind)
  if kind == "number":
    assert answers.parse_number(example.answer) is not None


def test_every_form_of_every_task_is_tried():
  tried = {(name, form.fields) for name, record, *_ in FORMS for form in catalogue.TASKS[name].formats
           if {k.lower() for k in record} >= set(form.fields)}
  assert tried == {(name, form.fields) for name, task in catalogue.TASKS.items() for form in task.formats}


def test_rationale_ends_in_the_answer(tmp_path):
  """It holds no calculator's marks."""
  assert parsed(tmp_path / "a", "gsm8k", FORMS[0][1]).rationale == "2+3=5 and 1,600\nThe answer is 1600"
  solution = FORMS[2][1]["solution"]
  assert parsed(tmp_path / "b", "math", FORMS[2][1]).rationale == f"{solution}\nThe answer is \\frac{{1}}{{2}}"
  mathqa = next(f for f in FORMS if f[0] == "mathqa")[1]
  assert parsed(tmp_path / "c", "mathqa", mathqa).rationale == "so . answer : d\nThe answer is D"
  assert parsed(tmp_path / "d", "mbpp", FORMS[-1][1]).rationale == "def f(a, b):\n  return a+b"
  for name, record, *_, kind in FORMS:
    example = parsed(tmp_path / "e" / str(id(record)), name, record)
    if example.rationale and kind in ("number", "choice"):
      assert answers.verdict(example.rationale, example.answer, kind, strict=True).correct


@pytest.mark.parametrize(("name", "record", "message"), [
    ("gsm8k", {"question": "Q?", "answer": "5"}, "'answer' has no line `#### number`"),
    ("gsm8k", {"question": "", "answer": "#### 5"}, "'question' is empty"),
    ("gsm8k", {"question": 5, "answer": "#### 5"}, "'question' is no text"),
    ("gsm8k", {"problem": "Q?", "answer": "#### 5"}, "has no field 'question' but problem, answer; expected records "
                                                    "with the fields question, answer"),
    ("svamp", {"body": "B", "question": "Q", "answer": None}, "None is no number"),
    ("mawps", {"squestion": "Q", "lsolutions": 5.0}, "'lSolutions' is no list"),
    ("mathqa", {"problem": "Q", "options": "a ) 1 , b ) 2", "correct": "c"}, "the gold 'C' is none of the 2 options"),
    ("mathqa", {"problem": "Q", "options": "[]", "correct": "c"}, r"'\[\]' is no list of 2 to 8 options"),
    ("mathqa", {"problem": "Q", "options": "yes or no", "correct": "c"}, "'yes or no' holds no options"),
    ("mmlu_stem", {"question": "Q", "choices": "1, 2", "answer": 0}, "'1, 2' is no list of 2 to 8 options"),
    ("mmlu_stem", {"question": "Q", "choices": list("ABCD"), "answer": 4}, "the gold 'E' is none of the 4 options"),
    ("sat_math_agieval", {"query": "Q?", "choices": ["1", "2"], "gold": [0]}, "'query' is not of the form"),
    ("arc_easy", ARC | {"answerKey": "D"}, "the gold 'D' is none of the options 1, 2, 3"),
    ("arc_easy", ARC | {"choices": ["x", "y"]}, r"'choices' is .*expected lists `text` and `label`"),
    ("arc_easy", DERIVED | {"answer": 2}, "the gold 2 is none of the 2 options"),
    ("piqa", DERIVED | {"answer": "b"}, "the gold 'b' is no index of an option"),
    ("piqa", {"goal": "G", "sol1": 1, "sol2": "x", "label": 0}, "'sol1' is no text"),
    ("winogrande", DERIVED, "'Q.' has no gap `_`"),
    ("boolq", DERIVED, r"\['x', 'y'\] are not true and false"),
    ("mbpp", {"text": "T", "code": "C", "task_id": "x"}, "invalid literal"),
], ids=lambda value: "" if isinstance(value, dict) else None)
def test_a_wrong_record_is_named_by_file_and_line(name, record, message, tmp_path):
  with pytest.raises(UserError, match=message) as raised:
    parsed(tmp_path, name, record)
  assert str(raised.value).startswith(f"{tmp_path}/one.jsonl:1: ")
  assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("name", "record"), [
    ("gsm_plus", {"question": "Q?", "solution": "It is not said.", "answer": "None"}),
    ("arc_easy", ARC | {"answerKey": ""}), ("piqa", {"goal": "G", "sol1": "x", "sol2": "y", "label": -1}),
    ("siqa", {"context": "C.", "question": "Q?", "answerA": "x", "answerB": "y", "answerC": "z", "label": ""}),
    ("winogrande", {"sentence": "A _.", "option1": "x", "option2": "y", "answer": ""})])
def test_records_with_no_told_gold_are_counted(name, record, tmp_path):
  """They are left out."""
  known = next(r for n, r, *_ in FORMS if n == name)
  found = registry.read(name, split="test", source=f"file:{write(tmp_path / 'a.jsonl', [known, record])}")
  assert found.counts == {"records": 2, "no_gold": 1, "repeated": 0, "in_test": 0}


def test_one_step_selection_and_split(tmp_path):
  """Problems of one step are told by their equation and split by their words."""
  equations = {"5 + 2": 7.0, "6 / 3": 2.0, "(9-4)": 5.0, "5 + 2 + 1": 8.0, "0.5 * 8": 4.0, "2 - 5": -3.0, "5 + 3": 9.0,
               "8": 8.0, "7 / 2": 3.5, "4 / 0": 0.0}
  records = [{"question": f"{i} of {equation}?", "expression": equation, "result_float": result}
             for equation, result in equations.items() for i in range(20)]
  found = {split: registry.read("mawps_one_step", split=split, source=f"file:{write(tmp_path / 'all.jsonl', rows)}")
           for split, rows in (("train", records), ("test", records[::-1]))}
  asked = {split: {e.question for e in of.examples} for split, of in found.items()}
  assert not asked["train"] & asked["test"]
  assert asked["train"] | asked["test"] == {f"{i} of {e}?" for e in ("5 + 2", "6 / 3", "(9-4)") for i in range(20)}
  assert 10 < len(asked["test"]) < 30
  assert {e.rationale for of in found.values() for e in of.examples} == {
      "5 + 2 = 7.\nThe answer is 7", "6 / 3 = 2.\nThe answer is 2", "9 - 4 = 5.\nThe answer is 5"}
  spaced = [r | {"question": r["question"].replace(" of", "  of")} for r in records]
  again = registry.read("mawps_one_step", split="test", source=f"file:{write(tmp_path / 'spaced.jsonl', spaced)}")
  assert {" ".join(e.question.split()) for e in again.examples} == asked["test"]


def test_one_file_holds_the_splits_of_mbpp(tmp_path):
  records = [{"text": f"Task {i}.", "code": "pass", "task_id": i} for i in range(1, 975)]
  source = f"file:{write(tmp_path / 'mbpp.jsonl', records).parent}"
  for split, size in {"prompt": 10, "test": 500, "validation": 90, "train": 374}.items():
    found = registry.read("mbpp", split=split, source=source)
    assert len(found.examples) == size
    assert not found.notes
