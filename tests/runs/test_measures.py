"""Options by likelihood, texts, tasks of lm-evaluation-harness in the loop: evaluation, base_weight=auto, report."""

import importlib
import json
import math
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs import tiny
from imm_jax import config_checks, files
from imm_jax.errors import UserError
from imm_jax.model import sharding
from imm_jax.model.tokenizer import load_tokenizer
from imm_jax.report.results import Results
from imm_jax.sampling.native import NativeSampler
from imm_jax.scoring import Scorer, encode_text
from imm_jax.stages import evaluate as evaluate_stage, likelihood, lm_eval_tasks
from imm_jax.stages.result_cache import ResultCache
from imm_jax.stages.task_entries import get_tasks
from tests import TINY
from tests.runs.helpers import command


@pytest.fixture
def data(tmp_path: Path) -> Path:
  """Records of arc_easy in both splits, a text, and two tasks of lm_eval."""
  rng, folder = random.Random(0), tmp_path / "data"
  folder.mkdir()
  for split, count in (("train", 9), ("test", 7)):
    rows = []
    for i in range(count):
      a, b = rng.randint(2, 9), rng.randint(2, 9)
      options = [str(a + b), str(a + b + 1), str(abs(a - b))]
      rows.append({"question": f"What is {a} + {b} in {split} {i}?", "choices": options, "answer": i % 3})
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  (folder / "prose.txt").write_text("Tom has 3 apples.\n\n" * 300)
  (folder / "lm_eval").mkdir()
  common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "test.jsonl")}},
            "test_split": "test", "doc_to_text": "{{question}}"}
  (folder / "lm_eval/options.yaml").write_text(yaml.safe_dump(common | {
      "task": "own_options", "output_type": "multiple_choice", "doc_to_choice": "{{choices}}",
      "doc_to_target": "{{answer}}", "metric_list": [
          {"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc_norm", "acc")]}))
  take = {"function": "take_first"}
  (folder / "lm_eval/answers.yaml").write_text(yaml.safe_dump(common | {
      "task": "own_answers", "output_type": "generate_until", "doc_to_target": "{{choices[0]}}",
      "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 30},
      "filter_list": [{"name": "strict", "filter": [{"function": "regex", "regex_pattern": r"answer is (\d+)"}, take]},
                      {"name": "any-number", "filter": [{"function": "regex", "regex_pattern": r"(\d+)"}, take]}],
      "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]}))
  return folder


@pytest.mark.full
def test_a_run_measures_all_kinds(data: Path, tmp_path: Path, environment: dict[str, str]) -> None:
  pytest.importorskip("lm_eval")
  extra = ["--config.rounds=1", "--config.method=imm", "--config.merge.base_weight=auto",
           "--config.merge.auto.weights=(0.5,)", "--config.merge.auto.questions=6",
           f"--config.merge.auto.general=('arc_easy=file:{data}',)", "--config.task.questions_per_round=12",
           "--config.eval.lm_eval.path=" + str(data / "lm_eval"),
           f"--config.eval.texts=('text=file:{data / 'prose.txt'}',)"]
  workdir, environment = tmp_path / "run", environment | {"HF_HUB_OFFLINE": "1"}
  # Given once: flags of a tuple add up.
  asked = [a for a in command(workdir, *extra) if not a.startswith("--config.task.ood")] + [
      f"--config.task.ood=('groups','arc_easy=file:{data}','lm_eval:own_options','lm_eval:own_answers')"]
  done = subprocess.run(asked, env=environment, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  results = Results.read(workdir)
  assert not results.problems
  assert results.ood_tasks == ("groups", "arc_easy", "lm_eval:own_options", "lm_eval:own_answers")
  for model in results.models:
    assert [model.answer_stats[task].name.split()[0] for task in results.ood_tasks] == [
        "paper", "likelihood", "lm_eval", "lm_eval"]
    assert {task: list(found) for task, found in model.other_scores.items()} == {
        "arc_easy": ["acc_norm"], "lm_eval:own_options": ["acc_norm"],
        "lm_eval:own_answers": ["exact_match_any_number"]}
    lines = (workdir / model.folder / "lm_eval:own_answers.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert all(row["tokens"] and row["text"] != row["span"] for row in rows)
    assert model.answer_stats["lm_eval:own_answers"].mean_tokens == round(sum(row["tokens"] for row in rows) / 7, 2)
    assert model.answer_stats["lm_eval:own_answers"].cut == round(sum(row["finish"] == "length" for row in rows) / 7, 4)
    # lm_eval asks the same questions in a form of its own.
    rows = [json.loads(line) for line in (workdir / model.folder / "arc_easy.jsonl").read_text().splitlines()]
    assert model.scores["arc_easy"].value == sum(row["correct"] for row in rows) / 7
    assert all(row["question"].startswith("What is") and len(row["logprobs"]) == 3 for row in rows)
    assert 0 < model.texts["text"]["nats_per_token"]["value"] < 20
  (tried,) = json.loads((workdir / "round_0/base_weight.json").read_text())["tried"]
  assert (tried["in_domain"]["n"], tried["general"]["n"]) == (6, 6)
  assert tried["protocol"]["arc_easy"]["name"] == "likelihood"
  told = done.stdout
  assert "base, text text: " in told
  assert "arc_easy: base acc_norm " in told
  page = (workdir / "report/index.html").read_text()
  assert "Likelihood of texts" in page
  assert "Further figures" in page
  (data / "prose.txt").write_text("Tom has 4 apples.")  # what a run reads may not change unseen
  again = subprocess.run([*asked, "--dry_run"], env=environment, capture_output=True, text=True, check=False)
  assert "base/eval" in again.stdout
  assert again.stdout.partition("base/eval")[2].split()[0] == "again"


@pytest.mark.full
def test_lm_eval_scores_as_our_own_do(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """The same options in the same form: acc of lm_eval's task is that of ours. What is no accuracy is no score: figures
  of which less is better, or whose aggregate is not the mean of the documents'."""
  pytest.importorskip("lm_eval")
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  path = data / "lm_eval/options.yaml"
  path.write_text(path.read_text().replace("'{{question}}'", r'"Question: {{question}}\nAnswer:"'))
  task = yaml.safe_load(path.read_text())
  for name, metrics in (("some", (("acc_norm", "mean", True), ("acc", "mean", False))),
                        ("none", (("acc", "mean", False), ("acc_norm", "median", True)))):
    task |= {"task": f"own_{name}", "metric_list": [
        dict(zip(("metric", "aggregation", "higher_is_better"), m, strict=True)) for m in metrics]}
    (data / f"lm_eval/{name}.yaml").write_text(yaml.safe_dump(task))
  config = tiny.get_config()
  config.task.ood, config.eval.lm_eval.path = ("lm_eval:own_options", "lm_eval:own_some"), str(data / "lm_eval")
  measure = lambda module, cache: module.measure(config, TINY, tmp_path / "scratch", cache, "tiny")["scores"]
  for name in ("out", "again"):
    (tmp_path / name).mkdir()
  out = ResultCache(tmp_path / "out", tmp_path / "none")
  found = measure(lm_eval_tasks, out)
  with monkeypatch.context() as patch:
    patch.setattr(lm_eval_tasks, "_run", None)
    assert measure(lm_eval_tasks, ResultCache(tmp_path / "again", out.out)) == found
  assert files.digest(tmp_path / "again") == files.digest(out.out)
  row, *_ = map(json.loads, (tmp_path / "out/lm_eval:own_some.jsonl").read_text().splitlines())
  config.task.ood = (f"arc_easy=file:{data}",)
  ours = measure(likelihood, out)["arc_easy"]
  assert found == {"lm_eval:own_options": ours, "lm_eval:own_some": {"acc_norm": ours["acc_norm"]}}
  assert row["correct"] == row["metrics"]["acc_norm"]
  config.task.ood = ("lm_eval:own_none",)
  with pytest.raises(UserError, match=r"own_none: has no figure of each document .* \(it has acc, acc_norm\)"):
    measure(lm_eval_tasks, out)


@pytest.mark.full
def test_what_was_scored_is_not_scored_again(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """Killed at the third, fifth and seventh part, an evaluation by likelihood and lm_eval comes to the same bits."""
  pytest.importorskip("lm_eval")
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  harness = importlib.import_module("imm_jax.scoring.harness")
  for module, name, size in ((likelihood, "_QUESTIONS", 4), (likelihood, "_PASSAGES", 1), (harness, "_REQUESTS", 8)):
    monkeypatch.setattr(module, name, size)
  config = tiny.get_config()
  config.task.name, config.task.source, config.task.eval_questions = "arc_easy", f"file:{data}", 0
  config.eval.by_likelihood, config.eval.lm_eval.path = ("arc_easy",), str(data / "lm_eval")
  config.eval.texts = (f"prose=file:{data}/prose.txt",)
  config.task.ood = ("lm_eval:own_options", "lm_eval:own_answers")
  config.task.eval_questions = 2
  assert len(get_tasks(config).load_passages()["prose"]) == 2
  config.eval.passages = 1
  assert len(get_tasks(config).load_passages()["prose"]) == 1
  config.eval.passages = config.task.eval_questions = 0
  calls, limits = [], []

  def count(scored: type, name: str) -> None:
    own = getattr(scored, name)

    def counted(*args: Any, **options: Any) -> Any:
      if len(calls) in limits:
        raise KeyboardInterrupt
      calls.append(options["label"].partition(": ")[2])
      return own(*args, **options)

    monkeypatch.setattr(scored, name, counted)

  count(Scorer, "score")
  count(NativeSampler, "generate")
  evaluate = lambda name: evaluate_stage.evaluate(config, TINY, tmp_path / f"{name}_scratch",
                                                  ResultCache(tmp_path / name), label="it")
  expected, whole = evaluate("whole"), calls.copy()
  assert whole == ["arc_easy (1 of 2)", "arc_easy (2 of 2)", "prose (1 of 3)", "prose (2 of 3)", "prose (3 of 3)",
                   "continuations (1 of 3)", "continuations (2 of 3)", "continuations (3 of 3)", "texts"]
  calls.clear()
  for limits in ([1], [4], [7]):  # noqa: B007
    with pytest.raises(KeyboardInterrupt):
      evaluate("killed")
    shutil.rmtree(tmp_path / "killed")
  limits = []
  assert evaluate("killed") == expected
  assert calls == whole  # each once, in all starts together
  for path in (tmp_path / "whole").iterdir():
    assert (tmp_path / "killed" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.full
def test_lm_eval_task_without_data_is_found(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """It is found before the run."""
  pytest.importorskip("lm_eval")
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  (data / "test.jsonl").unlink()
  config = tiny.get_config()
  config.task.ood, config.eval.lm_eval.path = ("lm_eval:own_options",), str(data / "lm_eval")
  with pytest.raises(UserError, match=r"config\.task\.ood: lm_eval cannot run own_options \("):
    config_checks.validate(config)
  config.task.ood = ("lm_eval:own_options=file:data",)
  with pytest.raises(UserError, match="tasks of lm_eval take no source"):
    config_checks.validate(config)


@pytest.mark.parametrize(("settings", "message"), [
    ({"eval.by_likelihood": ("arc_eazy",)}, "did you mean arc_easy"),
    ({"eval.by_likelihood": ("mmlu_stem",)}, "neither task.name nor in task.ood"),
    ({"eval.texts": ("tiny_shakespear",)}, "did you mean tiny_shakespeare"),
    ({"eval.texts": ("alice",)}, "or a text of your own, alice=file:PATH.txt"),
    ({"eval.texts": ("text=x",)}, "expected hf:ID"),
    ({"eval.texts": ("text=file:a.txt", "text=file:b.txt")}, "names a text twice"),
    pytest.param({"task.ood": ("lm_eval:arc_eazy",)}, "did you mean arc_easy", marks=pytest.mark.full),
    ({"task.ood": ("lm_eval:arc_easy",), "eval.lm_eval.path": "/no/such"}, "no such folder"),
    ({"merge.base_weight": "auto", "merge.auto.general": ("lm_eval:arc_easy",)}, "has no train split")])
def test_what_cannot_be_measured_is_one_line(settings: dict, message: str) -> None:
  if "lm_eval" in str(settings):
    pytest.importorskip("lm_eval")
  config = tiny.get_config()
  config.update_from_flattened_dict(settings)
  with pytest.raises(UserError, match=message):
    config_checks.validate(config)


def test_a_text_costs_what_its_tokens_cost() -> None:
  """Nats a token of a text that the model was trained on lie below those of its words in another order."""
  scorer = Scorer.load(TINY, mesh=sharding.make_mesh(data=1, fsdp=1), compute_dtype="float32")
  tokenizer = load_tokenizer(TINY)
  text = "Tom has 3 apples and buys 4 more. How many apples does Tom have now?"
  words = text.split()
  random.Random(0).shuffle(words)
  nats = []
  for words_ in (text, " ".join(words)):
    (score,) = scorer.score(encode_text(tokenizer, words_, rows=scorer.config.vocab_size, positions=128), quiet=True)
    nats.append(-score.logprob / score.tokens)
  assert nats[0] < nats[1] < 3 * math.log(scorer.config.vocab_size)
