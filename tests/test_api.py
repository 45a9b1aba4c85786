"""The Python API against the modules and files that commands use, and the examples."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import imm_jax
from imm_jax import UserError, files
from imm_jax.merging import masks, on_disk
from imm_jax.model import safetensors
from tests import REPO, TINY


@pytest.fixture(scope="module")
def model() -> imm_jax.Model:
  return imm_jax.load("tiny")


def test_importing_the_package_leaves_jax_alone():
  code = ("import sys, imm_jax; assert 'jax' not in sys.modules; assert {*imm_jax.__all__} <= {*dir(imm_jax)};"
          "assert 'numpy' not in sys.modules; imm_jax.load; assert 'jax' in sys.modules")
  subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True)


def test_no_function_shares_its_name_with_a_module():
  """Which importing that module would put in the function's place."""
  modules = {path.stem for path in Path(imm_jax.__file__).parent.iterdir()}
  assert modules.intersection(imm_jax.__all__) == {"merging", "tasks"}
  with pytest.raises(AttributeError, match="no attribute 'lod'"):
    _ = imm_jax.lod


def test_logits_and_scores_are_those_of_transformers(model: imm_jax.Model):
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  other = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
  context, continuation = "Ann has 3 pens. 3+4=", "7. The answer is 7."
  ids = model.encode(context + continuation)
  with torch.no_grad():
    expected = other(torch.tensor([ids])).logits[0].numpy()
  found = model.logits(context + continuation, compute_dtype="float32")
  np.testing.assert_allclose(found, expected, atol=2e-4)
  np.testing.assert_allclose(model.logits([ids, ids], compute_dtype="float32")[1], found, atol=1e-5)
  start = len(model.encode(context))
  logprobs = torch.log_softmax(torch.tensor(expected), -1)[range(start - 1, len(ids) - 1), ids[start:]]
  score, = model.score([(context, continuation)], compute_dtype="float32")
  assert score.tokens == len(ids) - start
  assert math.isclose(score.logprob, logprobs.sum().item(), rel_tol=1e-4)


def test_a_model_is_saved_as_it_was_read(model: imm_jax.Model, tmp_path: Path):
  model.save(tmp_path / "same")
  assert (tmp_path / "same/model.safetensors").read_bytes() == (TINY / "model.safetensors").read_bytes()
  with pytest.raises(UserError, match="same: exists"):
    model.save(tmp_path / "same")
  changed = model.with_params(jax.tree.map(lambda leaf: leaf.astype(jnp.float32) * 2, model.params))
  changed.save(tmp_path / "wide", keep_dtypes=False)
  assert {tensor.dtype for tensor in safetensors.read(tmp_path / "wide/model.safetensors").values()} == {
      np.dtype("float32")}
  with pytest.raises(ValueError, match=r"norm\.weight is \(3,\), expected \(128,\)"):
    model.with_params(model.params | {"norm": {"weight": jnp.ones(3)}})


def test_memory_and_disk_merges_agree(model: imm_jax.Model, tmp_path: Path):
  """A merge in memory has the bits of one on disk."""
  tuned = model.with_params(jax.tree.map(
      lambda leaf: leaf + jnp.linspace(0, 0.1, leaf.size).reshape(leaf.shape).astype(leaf.dtype), model.params))
  tuned.save(tmp_path / "tuned")
  options = {"base_weight": [0.2, 0.6], "drop_rate": 0.5}
  on_disk.merge_folders("imm", {"base": TINY, "start": TINY, "tuned": tmp_path / "tuned"},
                        {tmp_path / "disk": options}, key=masks.key_words(jax.random.key(3)))
  merged = model.with_params(imm_jax.merging.imm(
      model.params, model.params, tuned.params, names=model.names, key=jax.random.key(3), **options))
  merged.save(tmp_path / "memory")
  there, here = (safetensors.read(tmp_path / name / "model.safetensors") for name in ("disk", "memory"))
  assert there.keys() == here.keys()
  assert all(there[name].tobytes() == here[name].tobytes() for name in there)


def test_fine_tuning_leaves_the_model_as_it_is():
  """Training writes over its own weights, which are float32 as these are."""
  model, rates = imm_jax.load("tiny", dtype="float32"), []
  before = jax.tree.map(np.asarray, model.params)
  pairs = [("3+4=", "7."), ("2+2=", "4.")]
  tuned = imm_jax.fine_tune(model, pairs, learning_rate=1e-2, epochs=2, global_batch=1, warmup_ratio=0.0,
                            schedule="linear", row_length=64, remat="none",
                            report=lambda step, learning_rate, **_: rates.append(learning_rate))
  assert jax.tree.all(jax.tree.map(np.array_equal, before, model.params))
  assert np.abs(tuned.params["norm"]["weight"] - before["norm"]["weight"]).max() > 1e-3
  assert rates == pytest.approx([1e-2, 5e-3])
  with pytest.raises(ValueError, match="no example"):
    imm_jax.fine_tune(model, [])
  with pytest.warns(UserWarning, match=r"2 pairs in 3 epochs: 1 step; a smaller global_batch than 128 gives more"):
    imm_jax.fine_tune(model, pairs, learning_rate=0.0, row_length=64, remat="none")
  with pytest.warns(UserWarning, match=r"2 steps, the first at a learning rate of 0; warmup_ratio=0 has none such"):
    imm_jax.fine_tune(model, pairs[:1], learning_rate=0.0, epochs=2, global_batch=1, row_length=64, remat="none")


@pytest.mark.parametrize(("config", "changes", "message"), [
    ("tny", {}, "did you mean tiny?"), ("tiny", {"sft.epoch": 1}, "sft.epoch is no setting: did you mean sft.epochs"),
    ("tiny", {"sft": 3}, "sft is a group of settings; give one of them, such as sft."),
    ("tiny", {"rounds": "three"}, "rounds='three'"), ("tiny", {"rounds": 0}, "config.rounds=0: expected 1 or more"),
    ("paper:table=5,scale=tiny", {}, "several runs")])
def test_impossible_run_is_one_line(config: str, changes: dict, message: str, tmp_path: Path):
  """It cannot start."""
  with pytest.raises(UserError, match=message):
    imm_jax.run(config, workdir=tmp_path / "run", **changes)
  assert not (tmp_path / "run").exists()


@pytest.mark.full
def test_a_run_gives_its_results_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture):
  small = {"rounds": 1, "task.questions_per_round": 24, "task.eval_questions": 8, "task.ood": ("groups",),
           "sample.batch_size": 12, "eval.batch_size": 8, "sft.epochs": 1, "sft.global_batch": 4,
           "analysis.examples": 0, "analysis.drift": 0}
  results = imm_jax.run("tiny", workdir=tmp_path / "run", **small)
  assert [model.label for model in results.models] == ["base", "round 0 sft", "round 0 merged"]
  assert results.models[0].scores["stories"].n == 8
  capsys.readouterr()
  imm_jax.run("tiny", workdir=tmp_path / "run", **small)
  assert "\n0 of " in "\n" + capsys.readouterr().out
  assert imm_jax.load(tmp_path / "run/round_0/merged").config.num_layers == 4


@pytest.mark.parametrize(("call", "message"), [
    (lambda model: model.sample("3+4="), "expected a list of texts"),
    (lambda model: model.score(["ab"]), r"pairs\[0\]='ab': expected a pair of texts"),
    (lambda model: model.logits([5, 100_000]), "tokens: from 5 to 100000; expected 0 to 567"),
    (lambda model: model.logits([1.5, 2.0]), "of dtype float64; expected whole numbers"),
    (lambda model: model.logits([1] * 257), "257 of them, and the model's context has 256"),
    (lambda model: model.logits(""), r"tokens: of shape \(0,\)"),
    (lambda model: model.with_params({"a": 1}), "not of this model's form"),
    (lambda model: imm_jax.fine_tune(model, [("3+4=", "")], ends=False), "no token of a prompt, or none to learn"),
    (lambda model: imm_jax.fine_tune(model, [("3+4=", "7")], schedule="cos"), "schedule='cos': expected one of cosine"),
    (lambda model: imm_jax.fine_tune(model, [("3+4=", "7")], remat="x"), "remat='x': expected one of none"),
    (lambda model: imm_jax.fine_tune(model, [("3+4=", "7")], epochs=0), "epochs=0: expected a finite number, 1"),
    (lambda model: imm_jax.fine_tune(model, [("3+4=", "7")], learning_rate=math.nan), "learning_rate=nan: expected a"),
    (lambda model: imm_jax.fine_tune(model, [("3+4=", "7")], warmup_ratio=2), "warmup_ratio=2: expected less than 1"),
    (lambda model: imm_jax.importance(model, [("3+4=", "7")], global_batch=0), "global_batch=0: expected a finite"),
    (lambda model: model.score([("3+4=", "7")], compute_dtype="foo"), "compute_dtype='foo': expected one of auto, bfl"),
    (lambda model: imm_jax.load("tiny", dtype="float3"), "dtype='float3': expected one of bfloat16")],
    ids=["sample", "score", "range", "kind", "length", "empty", "params", "nothing-learned", "schedule", "remat",
         "epochs", "learning-rate", "warmup", "batch", "compute-dtype", "dtype"])
def test_a_wrong_argument_is_named(call: Callable[[imm_jax.Model], object], message: str):
  with pytest.raises(ValueError, match=message):
    call(imm_jax.load("tiny"))


def test_a_numpy_temperature_is_a_number():
  assert len(imm_jax.load("tiny").sample(["3+4="], temperature=np.float32(0.5), max_new_tokens=2)) == 1


def test_a_setting_of_another_type_is_named(tmp_path: Path):
  with pytest.raises(imm_jax.UserError, match="rounds='2': expected a value of type int"):
    imm_jax.run("tiny", workdir=tmp_path, rounds="2")


def test_the_example_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  monkeypatch.chdir(tmp_path)
  code, = re.findall(r"```python\n(.*?)```", (REPO / "README.md").read_text(), re.S)
  exec(code, names := {})
  assert [len(answers) for answers in names["answers"]] == [3]
  assert imm_jax.load(tmp_path / "merged").config == names["model"].config


@pytest.mark.full
def test_the_examples_of_the_docs_run(tmp_path, monkeypatch):
  files.write_jsonl(tmp_path / "mine.jsonl", [{"problem": "3+4=", "answer": 7}])
  monkeypatch.chdir(tmp_path)
  blocks = re.findall(r"```python\n(.*?)```", (REPO / "docs/python_api.md").read_text(), re.S)
  *shown, _ = blocks  # the last is a run
  names: dict = {}
  for block in shown:
    exec(block.replace("Qwen/Qwen2.5-0.5B-Instruct", "tiny").replace("max_new_tokens=512", "max_new_tokens=8"), names)
  assert names["loss"](names["stepped"].params, names["tokens"]) < names["loss"](names["model"].params, names["tokens"])
  assert len(names["losses"]) == 3
  assert names["scores"].total.shape == (4,)


def _cells() -> str:
  cells = json.loads((REPO / "examples/self_improvement.ipynb").read_text())["cells"]
  return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def _run_python(*command: str) -> str:
  done = subprocess.run([sys.executable, *command], cwd=REPO, env=os.environ | {"PYTHONPATH": str(REPO)},
                        capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.mark.full
def test_learned_weights_beat_fixed_ones():
  """As examples/adamerging.py prints: of each model alone, of fixed weights, and of learned ones by layer."""
  printed = _run_python(str(REPO / "examples/adamerging.py"))
  first, second, fixed, learned = map(float, re.findall(r"0\.\d{3}\b", printed)[:4])
  assert max(first, second) < fixed < learned


@pytest.mark.full
@pytest.mark.parametrize("kind", ["script", "notebook"])
def test_an_example_does_what_it_says(kind: str):
  printed = _run_python(*[str(REPO / "examples/self_improvement.py")] if kind == "script" else ["-c", _cells()])
  rows = {line.split()[0]: line.split() for line in printed.splitlines() if line.strip()}
  base, tuned, merged = rows["base"], rows["tuned"], rows["merged"]
  in_domain, out_of_domain = 2, 4
  assert float(base[in_domain]) < float(tuned[in_domain])
  assert float(tuned[out_of_domain]) < float(merged[out_of_domain])
