"""Contexts, options and golds of multiple choice, against those of lm-evaluation-harness's own tasks on the same data.

The records are invented, in the fields of the hub; lm_eval reads them from a file, so nothing is downloaded.
"""

import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from imm_jax import tasks
from imm_jax.tasks import catalogue

with warnings.catch_warnings():
  warnings.simplefilter("ignore")
  pytest.importorskip("lm_eval", minversion="0.4.9")
  import lm_eval
  from lm_eval.api.task import ConfigurableTask

TASKS = Path(lm_eval.__file__).parent / "tasks"


def labelled(texts: list[str], labels: str) -> dict[str, list[str]]:
  return {"text": texts, "label": list(labels)}


ODD = " Is it {x} % $y$,  or \\frac12 é? "  # spaces, braces and marks stay as they are
ARC = [{"id": "a", "question": ODD, "choices": labelled(["one ", " two", "[three]", "4"], "ABCD"), "answerKey": "C"},
       {"id": "b", "question": "Which?\nSay.", "choices": labelled(["x", "y", "z"], "123"), "answerKey": "1"},
       {"id": "c", "question": "Which?", "choices": labelled(["v", "w", "x", "y", "z"], "ABCDE"), "answerKey": "E"}]
MATHQA = {"Rationale": "so", "category": "gain", "annotated_formula": "", "linear_formula": ""}
# Task: its YAML in lm_eval, and records.
CASES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "arc_easy": ("arc/arc_easy.yaml", ARC), "arc_challenge": ("arc/arc_challenge.yaml", ARC),
    "boolq": ("super_glue/boolq/default.yaml", [
        {"passage": f" The sun -- {ODD}", "question": "is the sun a star", "idx": 0, "label": 1},
        {"passage": "The moon.", "question": "is it one ", "idx": 1, "label": 0}]),
    "openbookqa": ("openbookqa/openbookqa.yaml", [
        {"id": "a", "question_stem": ODD, "choices": labelled(["a", "b ", "c", "d"], "ABCD"), "answerKey": " B"},
        {"id": "b", "question_stem": "Ice is", "choices": labelled(["a", "b", "c", "d"], "ABCD"), "answerKey": "D"}]),
    "piqa": ("piqa/piqa.yaml", [
        {"goal": ODD, "sol1": "Take [this].", "sol2": " Or  that. ", "label": 1},
        {"goal": "dresser", "sol1": "x", "sol2": "y", "label": 0}]),
    "sciq": ("sciq/sciq.yaml", [
        {"question": "What is it?", "distractor1": "a", "distractor2": "b ", "distractor3": "c", "correct_answer": "d",
         "support": f"\n {ODD}"},
        {"question": "What now?", "distractor1": "a", "distractor2": "b", "distractor3": "c", "correct_answer": "d",
         "support": ""}]),
    "siqa": ("siqa/siqa.yaml", [
        {"context": ODD, "question": "Why?", "answerA": "a", "answerB": "b ", "answerC": "c", "label": "3"},
        {"context": "C.", "question": "How?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "1"}]),
    "winogrande": ("winogrande/default.yaml", [
        {"sentence": "Ann saw _ , so she ran. ", "option1": "Tom", "option2": "the  cat", "answer": "2"},
        {"sentence": "_ was late", "option1": "Tom", "option2": "Sam", "answer": "1"}]),
    "hellaswag": ("hellaswag/hellaswag.yaml", [
        {"ctx_a": "[header] How to  swim [title] Go in. [step]  Stand.", "ctx_b": "then you And I", "label": "1",
         "activity_label": " Sport", "endings": [" swim   far.", "[substeps] sink. [title] End", "x [a] [b] y", "z"]},
        {"ctx_a": "A man runs.", "ctx_b": "he", "activity_label": "Running", "label": "3",
         "endings": ["a.", "b.", "c.", "d."]}]),
    "mathqa": ("mathqa/mathqa.yaml", [
        {"Problem": f"x{ODD}", "options": "a ) 4 , b ) 5 , 5 , c ) 1 / 2 , d ) $ 7 , e ) none of these",
         "correct": "b", **MATHQA},
        {"Problem": "p ?", "options": "['a ) 2 : 3', 'b ) 4 : 5', 'c ) 16 : 9', 'd ) 7 : 9', 'e ) 8 : 5']",
         "correct": "e", **MATHQA},
        {"Problem": "q ?", "options": "a ) a ) 2 , b ) b ) 5 , c ) c ) 7 , d ) d ) 8 , e ) e ) 9", "correct": "a",
         **MATHQA}]),
    "mmlu_stem": ("mmlu/default/mmlu_college_computer_science.yaml", [
        {"question": f"{ODD}\n", "subject": "college_computer_science", "choices": ["one ", "2", "(C)", "4"],
         "answer": 3}]),
}


def config_of(file: Path) -> dict[str, Any]:
  """A task's YAML with what it includes; its functions are those of the modules beside the file."""
  loader = type("Loader", (yaml.SafeLoader,), {})

  def function(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
    module, _, name = loader.construct_scalar(node).rpartition(".")
    spec = importlib.util.spec_from_file_location(f"{file.parent.name}_{module}", file.parent / f"{module}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return getattr(found, name)

  loader.add_constructor("!function", function)
  config = yaml.load(file.read_text(), loader)
  include = config.pop("include", None)
  return (config_of(file.parent / include) if include else {}) | config


def test_every_set_that_is_scored_is_compared():
  assert CASES.keys() >= {name for name, task in catalogue.TASKS.items() if task.measure == "choices"}


@pytest.mark.parametrize("name", CASES)
def test_forms_equal_lm_eval(name, tmp_path, monkeypatch):
  """Contexts, options and gold answers are those of lm_eval."""
  file, records = CASES[name]
  monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
  (tmp_path / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
  config = config_of(TASKS / file) | {
      "dataset_path": "json", "dataset_name": None, "training_split": None, "validation_split": None,
      "fewshot_split": None, "test_split": "test",
      "dataset_kwargs": {"data_files": {"test": str(tmp_path / "test.jsonl")}}}
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    theirs = ConfigurableTask(config=config)
    docs = list(theirs.eval_docs)
  ours = {choice.contexts + choice.options: choice
          for choice in tasks.load_choices(name, source=f"file:{tmp_path}/test.jsonl")}
  assert len(ours) == len(docs) == len(records)
  for doc in docs:
    requests = theirs.construct_requests(doc, theirs.fewshot_context(doc, 0))
    contexts, options = zip(*(request.args for request in requests), strict=True)
    choice = ours[tuple(dict.fromkeys(contexts)) + options]
    gold = theirs.doc_to_text(doc) if theirs.multiple_input else theirs.doc_to_target(doc)
    assert choice.gold == int(gold)
    if not theirs.multiple_input:  # what acc_norm divides by
      assert [len(option) - 1 for option in choice.options] == [len(text) for text in theirs.doc_to_choice(doc)]
