"""Records of a user's own form."""

import ml_collections
import pytest
import torch
import transformers

from configs import tiny
from imm_jax import config_checks, tasks
from imm_jax.errors import UserError
from imm_jax.model import hub
from imm_jax.model.tokenizer import load_tokenizer
from imm_jax.stages import likelihood
from imm_jax.stages.result_cache import ResultCache
from imm_jax.stages.task_entries import get_tasks
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
      ({"kind": "number"}, "needs a source"),
      ({"source": source, "kind": "nummer"}, "did you mean number"),
      ({"source": source, "kind": "number", "fields": {"anwser": "gold"}}, "no field 'anwser': did you mean answer"),
      ({"source": source, "kind": "number"}, "has no field 'question' but prompt, gold, work, opts"),
      ({"source": source, "kind": "choice", "fields": {"question": "prompt", "choices": "A,B"}},
       "has no field 'A,B' but prompt, gold, work, opts; expected records with the fields prompt, A,B; name it with "
       "--config.task.fields.choices=NAME"),
      ({"source": source, "kind": "number", "fields": {"question": "prompt", "answer": "Key"}},
       "no record has a field 'Key' but"),
      ({"source": source, "kind": "latex", "fields": {"question": "prompt", "answer": "gold", "rationale": "Why"}},
       r"no record has a field 'Why' \(task.fields.rationale\) but gold, opts, prompt, work")]:
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
    ({"gold": True}, "judged, the first of them 'gold' of own.jsonl:1 is True; expected a formula"),
    ({"gold": ["42"]}, r"the first of them 'gold' of own.jsonl:1 is \['42'\]"),
    ({"prompt": "half \ud83d"}, r"own.jsonl:1: .*surrogates not allowed"),
    ({"gold": None}, "no answer that can be judged")])
def test_bad_gold_is_an_error_with_its_line(change, message, tmp_path):
  """So is a text that is none."""
  source = f"file:{write(tmp_path / 'own.jsonl', [CUSTOM | change])}"
  with pytest.raises(UserError, match=message):
    tasks.load("custom", split="test", source=source, kind="latex", fields={"question": "prompt", "answer": "gold"})


def multiple_choice(source: str, **changes: object) -> ml_collections.ConfigDict:
  found = tiny.get_config()
  found.update_from_flattened_dict({
      "task.name": "custom", "task.source": source, "task.kind": "choice", "task.fields.choices": "options",
      "task.ood": (), "task.eval_questions": 0, "eval.by_likelihood": ("custom",), **changes})
  return found


def test_own_options_are_scored_by_likelihood(tmp_path):
  """They are scored as those of a published task, and as transformers scores them."""
  rows = [{"question": f"What is {i}+4?", "options": [str(i + 4), f"{i + 3} pens", "9"], "answer": i % 3}
          for i in range(4)]
  source = f"file:{write(tmp_path / 'own.jsonl', rows)}"
  config = multiple_choice(source)
  config_checks.validate(config, trains=False)
  own, = get_tasks(config).load_test_choices().values()
  published = tasks.load_choices("arc_easy", split="test", source="file:" + str(write(tmp_path / "arc.jsonl", [
      {"question": row["question"], "answer": row["answer"], "choices": row["options"]} for row in rows])))
  forms = lambda choices: sorted((c.question, c.contexts, c.options, c.gold) for c in choices)
  assert forms(own) == forms(published)

  folder = hub.resolve("tiny")
  found = likelihood.measure(config, folder, tmp_path / "scratch", ResultCache(tmp_path), "tiny")
  judge = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
  tokenizer, right = load_tokenizer(folder), 0
  for choice in own:
    nats = []
    for option in choice.options:
      ids, start = tokenizer(choice.contexts[0] + option)["input_ids"], len(tokenizer(choice.contexts[0])["input_ids"])
      logprobs = judge(torch.tensor([ids])).logits[0].log_softmax(-1).detach()
      nats.append(sum(float(logprobs[i - 1, ids[i]]) for i in range(start, len(ids))))
    right += nats.index(max(nats)) == choice.gold
  assert (found["scores"]["custom"]["acc"]["n"], found["scores"]["custom"]["acc"]["value"]) == (4, right / 4)


@pytest.mark.parametrize(("changes", "message"), [
    ({"task.kind": "number", "task.fields.choices": ""}, "has 'custom', whose options are not known: give --config"
                                                         ".task.kind=choice and the name of their field"),
    ({"task.kind": "number", "eval.by_likelihood": ()}, "choices=options: names options, while .*kind=number")])
def test_options_need_both_settings(changes, message, tmp_path):
  source = f"file:{write(tmp_path / 'own.jsonl', [{'question': '?', 'options': ['x', 'y'], 'answer': 0}])}"
  with pytest.raises(UserError, match=message):
    config_checks.validate(multiple_choice(source, **changes), trains=False)
  with pytest.raises(UserError, match="the field 'options' has options, while kind='number'"):
    tasks.load("custom", split="test", source=source, kind="number", fields={"choices": "options"})


@pytest.mark.parametrize(("options", "answer", "letter"), [
    (["x", "y"], "y", "B"), (["x", "y"], 1.0, "B"), (["x", "y"], "The answer is (B).", "B"), (["x", "y"], "b) y", "B"),
    (["A) x", "B) y"], "y", "B"), ({"A": "x", "B": "y"}, "B", "B"), ({"B": "y", "A": "x"}, "y", "B"),
    ({"1": "x", "2": "y"}, 2, "B"), ({"A": "x", "B": "y", "C": None}, "B", "B"),
    ({"text": ["x", "y"], "label": ["1", "2"]}, "2", "B"), ({"text": ["x", "y"], "label": ["C", "d"]}, "(D)", "B"),
    ("A) x B) y", "B", "B"), ([3, 4], "4", "B"), (["A. x", "B. y"], "B. y", "B"), (["(A) x", "(B) y"], "y", "B"),
    (["A: x", "B: y"], "B", "B"), (["[a] x", "[b] y"], "[b] y", "B"), ({"1": "A. x", "2": "B. y"}, 2, "B"),
    ("A. x B. y", "B. y", "B")])
def test_options_and_answers_have_forms(options, answer, letter, tmp_path):
  source = f"file:{write(tmp_path / 'own.jsonl', [{'question': '?', 'options': options, 'answer': answer}])}"
  example, = tasks.load("custom", split="test", source=source, kind="choice", fields={"choices": "options"})
  assert example.answer == letter
  assert example.question in ("?\n(A) x\n(B) y", "?\n(A) 3\n(B) 4")
  choice, = tasks.load_choices("custom", split="test", source=source, fields={"choices": "options"})
  assert choice.options in ((" x", " y"), (" 3", " 4"))


@pytest.mark.parametrize(("options", "answer", "message"), [
    (["x", "y"], 2, r"own.jsonl:1: 'answer' is 2, which names none of the 2 options; expected the text of one, a "
                    r"letter from A to B, or an index, which counts from 0 \(to 1\)"),
    (["x", "y"], "C", "'answer' is 'C', which names none"),
    (["x", "y"], "The answer is z.", "is 'z', which names none"),
    (["B", "A"], "A", "'A', which may mean different options"), (["x", "x"], "x", "may mean different options"),
    (["x", None], "A", "option 2 of 'options' is None"), (["x", ["y"]], "A", r"option 2 of 'options' is \['y'\]"),
    ({"1": "x", "2": "y"}, 0, r"which names none of the 2 options; expected the text of one, or its label \(1, 2\)"),
    ({"C": "x", "D": "y"}, "A", r"or its label \(C, D\)"), ({"text": ["x"], "label": []}, "A", "1 texts and 0 labels"),
    ({"right": "x", "wrong": ["y", "z"]}, "x", "option 2 of 'options'"), (["x"], "A", "is no list of 2 to 8 options"),
    ("x, y", "A", "is no list of 2 to 8 options")])
def test_an_option_that_is_not_there_is_quoted(options, answer, message, tmp_path):
  source = f"file:{write(tmp_path / 'own.jsonl', [{'question': '?', 'options': options, 'answer': answer}])}"
  with pytest.raises(UserError, match=message):
    tasks.load("custom", split="test", source=source, kind="choice", fields={"choices": "options"})


@pytest.mark.parametrize("options", [["x", "y"], {"A": "x", "B": "y"}, "A) x B) y"])
def test_options_that_no_prompt_shows(options, tmp_path):
  load = lambda question: tasks.load("custom", split="test", kind="choice", source="file:" + str(write(
      tmp_path / f"{len(question)}.jsonl", [{"question": question, "alternatives": options, "answer": "A"}])))
  with pytest.raises(UserError, match=r":1: 'alternatives' looks like options.*task.fields.choices=alternatives"):
    load("Which?")
  assert load("Which? (A) x (B) y")
