"""The command that scores one checkpoint."""

import contextlib
import json
import subprocess
import sys

import pytest

from configs import tiny
from imm_jax import files, tasks
from imm_jax.stages import evaluate
from imm_jax.stages.result_cache import ResultCache
from tests import REPO, TINY


def test_first_prompts_are_those_sent(tmp_path, monkeypatch):
  """They are shown before anything is asked; the same prompts reach the sampler."""
  config = tiny.get_config()
  (tmp_path / "text.txt").write_text("a b c " * 100)
  files.write_jsonl(tmp_path / "arc.jsonl", [
      {"id": "1", "question": "What is up?", "answerKey": "A",
       "choices": {"text": ["sky", "ground"], "label": ["A", "B"]}}])
  config.task.ood, config.task.eval_questions = (f"arc_easy=file:{tmp_path / 'arc.jsonl'}",), 3
  config.eval.texts = (f"prose=file:{tmp_path / 'text.txt'}",)
  listed = evaluate.list_first_prompts(config, TINY)
  assert [(name, count) for name, count, _ in listed] == [("stories", 3), ("arc_easy", 1), ("prose", 1)]
  sent = []

  def sample(prompts, **_):
    sent.extend(prompt.text for prompt in prompts)
    raise KeyboardInterrupt

  monkeypatch.setattr(evaluate.synthesize, "open_sampler", lambda *_: contextlib.nullcontext(sample))
  with pytest.raises(KeyboardInterrupt):
    evaluate.evaluate(config, TINY, tmp_path / "scratch", ResultCache(tmp_path / "out"), label="tiny")
  assert listed[0][2] == sent[0]
  assert listed[1][2].splitlines()[1::2] == ["Answer:[ sky]", "Answer:[ ground]"]
  assert listed[2][2] == f"{('a b c ' * 100)[:200]}..."


@pytest.mark.full
def test_scores_of_one_checkpoint(environment, tmp_path):
  other, asked = tmp_path / "other", tasks.load("choice", split="test", count=5, seed=0)
  other.mkdir()
  files.write_jsonl(other / "choice.jsonl", [
      {"id": e.id, "question": e.question, "gold": e.answer, "correct": False} for e in asked])
  command = [sys.executable, "-m", "imm_jax.evaluate", "--config=configs/tiny.py", "--model=tiny",
             f"--out={tmp_path / 'out'}", f"--against={other}", "--config.task.ood=('choice',)",
             "--config.task.eval_questions=6", "--config.eval.batch_size=8", "--config.eval.num_samples=2"]
  done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  scores, _, compared = done.stdout.partition("answers and scores: ")
  printed = scores.splitlines()
  metrics = ("greedy", "pass@1", "pass@2", "majority@2")
  assert [line.split()[:2] for line in printed[:-2]] == [
      [task, metric] for task in ("stories", "choice") for metric in metrics]
  scores = json.loads((tmp_path / "out/scores.json").read_text())
  for line, task in zip(printed[-2:], ("stories", "choice"), strict=True):
    rows = [json.loads(row) for row in (tmp_path / f"out/{task}.jsonl").read_text().splitlines()]
    expected = {
        "name": "paper", "shots": 0, "n": 6, "mean_tokens": round(sum(row["tokens"] for row in rows) / 6, 2),
        "cut": round(sum(row["finish"] == "length" for row in rows) / 6, 4)}
    assert scores["protocol"][task].items() >= expected.items()
    assert line.startswith(f"{task}: protocol paper, 0 worked examples; ")
  assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
      "against.json", "choice.jsonl", "choice_samples.jsonl", "scores.json", "stories.jsonl", "stories_samples.jsonl"]
  assert f"choice: compared on the 5 questions that both answered; 1 only in {tmp_path}/out/choice.jsonl" in compared
  (found,), rows = (json.loads((tmp_path / "out/against.json").read_text()),
                    (tmp_path / "out/choice.jsonl").read_text().splitlines()[:5])
  assert [(test["task"], test["n"], test["only_this"]) for test in found["tests"]] == [
      ("choice", 5, sum(json.loads(row)["correct"] for row in rows))]
  again = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=False)
  assert again.returncode == 1
  assert "exists; give another folder, or --overwrite" in again.stderr
  (tmp_path / "out/thesis.txt").touch()
  foreign = subprocess.run([*command, "--overwrite"], cwd=REPO, env=environment, capture_output=True, text=True,
                           check=False)
  assert foreign.returncode == 1
  assert "is no earlier result (it holds thesis.txt), so it is not replaced" in foreign.stderr
  itself = subprocess.run([*command, "--overwrite", f"--against={tmp_path / 'out'}"], cwd=REPO, env=environment,
                          capture_output=True, text=True, check=False)
  assert itself.returncode == 1
  assert "is or holds the input --against" in itself.stderr


@pytest.mark.full
def test_answers_without_a_letter_are_counted(environment, tmp_path):
  """The embedded model, which writes sums, finds none among the options of a user's file."""
  files.write_jsonl(tmp_path / "own.jsonl", [
      {"question": f"Which, {i}?", "options": ["x", "y"], "answer": i % 2} for i in range(3)])
  done = subprocess.run(
      [sys.executable, "-m", "imm_jax.evaluate", "--config=configs/tiny.py", "--model=tiny",
       f"--out={tmp_path / 'out'}", "--config.task.name=custom", "--config.task.ood=()",
       f"--config.task.source=file:{tmp_path / 'own.jsonl'}",
       "--config.task.kind=choice", "--config.task.fields.choices=options", "--config.eval.max_new_tokens=10",
       "--config.prompt.few_shot=3"],
      cwd=REPO, env=environment, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert done.stderr.splitlines()[0] == ("note: --config.prompt.few_shot: is for training and has no effect here; that "
                                         "of evaluation is --config.eval.few_shot")
  rows = files.read_jsonl(tmp_path / "out/custom.jsonl", {"span": str})
  unread = sum(not row["span"] for row in rows)
  assert json.loads((tmp_path / "out/scores.json").read_text())["protocol"]["custom"]["unread"] == unread > 0
  assert f"warning: custom: in {unread} of 3 texts no answer was found, and they count as wrong" in done.stderr
