"""How far models go from the base: KL, loss and entropy against torch, and the stage of a round."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny
from imm_jax import loop
from imm_jax.analysis.drift import measure_drift
from imm_jax.model import hf, sharding
from imm_jax.runs.run import Checkpoint, Run
from imm_jax.stages import fine_tune, measure_drift as drift_stage
from imm_jax.stages.task_entries import get_tasks
from imm_jax.tasks import prompts
from imm_jax.training.computation import Computation
from imm_jax.training.loss import compare_heads
from imm_jax.training.packing import TokenizedExample
from tests import TINY
from tests.training import test_step as t


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_sums_are_those_of_whole_logits(chunk: int):
  rng = np.random.default_rng(0)
  x, base_x = rng.normal(size=(3, 14, 8)), rng.normal(size=(3, 14, 6))
  w, base_w, weights = rng.normal(size=(37, 8)), rng.normal(size=(37, 6)), rng.integers(0, 3, (3, 14))
  targets = rng.integers(0, 37, (3, 14))
  of = lambda x, w: (z := x @ w.T) - np.log(np.exp(z).sum(-1, keepdims=True))
  p, base = of(x, w), of(base_x, base_w)
  at = lambda logs: -np.take_along_axis(logs, targets[..., None], -1)[..., 0]
  entropy = lambda logs: -(np.exp(logs) * logs).sum(-1)
  want = [(weights * a).sum() for a in (
      (np.exp(base) * (base - p)).sum(-1), at(p), at(base), entropy(p), entropy(base))]
  float32 = lambda *arrays: [jnp.asarray(a, jnp.float32) for a in arrays]
  got = compare_heads(*float32(x, w, base_x, base_w), jnp.asarray(targets), *float32(weights), chunk)
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_drift_equals_that_of_torch(checkpoint, tmp_path: Path):
  torch = pytest.importorskip("torch")
  base, folder = checkpoint("llama")
  model, generator = copy.deepcopy(base), torch.Generator().manual_seed(1)
  with torch.no_grad():
    for p in model.parameters():
      p.add_(0.05 * torch.randn(p.shape, generator=generator))
  model.save_pretrained(tmp_path / "tuned")
  (config, first), (_, params) = (hf.load(f, place=lambda *_: t.replicated()) for f in (folder, tmp_path / "tuned"))
  examples = t.make_examples(11)
  want = np.sum([of_torch(base, model, e) for e in examples], axis=0) / sum(len(e.response) for e in examples)
  computation = Computation(sharding.make_mesh(data=1, fsdp=1), jnp.float32)
  got = measure_drift(config, first, params, t.pack(examples, global_batch=4), computation)
  assert got.tokens == sum(len(e.response) for e in examples)
  assert got.kl > 0.01
  np.testing.assert_allclose(got[1:], want, rtol=1e-4)
  assert measure_drift(config, params, params, t.pack(examples, global_batch=11), computation).kl == 0


def of_torch(base: Any, model: Any, e: TokenizedExample) -> list[float]:
  """Sums over an example's learned tokens: KL, both losses, both entropies."""
  import torch

  begin = max(1, len(e.prompt))  # nothing predicts the first token
  ids = torch.tensor([e.prompt + e.response])
  with torch.no_grad():
    of, of_base = (torch.log_softmax(m(input_ids=ids).logits[0, begin - 1:-1].double(), -1) for m in (model, base))
  at = lambda logs: -logs.gather(1, ids[0, begin:, None]).sum().item()
  entropy = lambda logs: -(logs.exp() * logs).sum().item()
  kl = torch.nn.functional.kl_div(of, of_base, log_target=True, reduction="sum").item()
  return [kl, at(of), at(of_base), entropy(of), entropy(of_base)]


def test_rounds_measure_all_held_out_texts(tmp_path: Path):
  """Worked answers, the right one of some options, passages; against transformers on the embedded model."""
  transformers = pytest.importorskip("transformers")
  rows = [{"question": f"What is {a} + 2?", "choices": [str(a + 3), str(a + 2)], "answer": 1} for a in range(5)]
  (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  (tmp_path / "prose.txt").write_text("Tom has 3 apples and buys 4 more.\n\n" * 200)
  config = tiny.get_config()
  config.task.ood, config.eval.texts = ("groups", f"arc_easy=file:{tmp_path}"), (f"prose=file:{tmp_path}/prose.txt",)
  config.analysis.drift, config.sft.ema = 2, True
  run = Run(config, tmp_path, Checkpoint(TINY, "base"))
  tuned = tmp_path / "round_0/sft"
  noise = np.random.default_rng(0)
  move = lambda p: p + 0.02 * noise.normal(size=p.shape).astype(p.dtype)
  hf.save(jax.tree.map(move, fine_tune.load_params(config, TINY)), tuned, like=TINY)
  for same in ("round_0/merged", "round_0/sft/ema"):
    shutil.copytree(TINY, tmp_path / same)
  stage = drift_stage.build_stage(run, Checkpoint(tuned, "round_0/sft"), 0)
  assert stage.needs == ("base", "round_0/sft", "round_0/merged", "test questions")
  facts = stage.make(tmp_path / "drift.json", {})

  found, texts = json.loads((tmp_path / "drift.json").read_text()), dict(drift_stage.encode_texts(config, TINY))
  assert list(found["texts"]) == list(texts) == ["stories", "groups", "arc_easy", "prose"]
  assert all(values["kl"] == 0 for kind in ("merged", "ema") for values in found["models"][kind].values())
  assert facts["kl"] == {kind: of["stories"]["kl"] for kind, of in found["models"].items()}
  assert stage.summarize(facts).endswith("ema 0.0000, merged 0.0000")
  tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
  asked = get_tasks(config).load_tests()["stories"][1]
  assert tokenizer.decode(texts["stories"][1].prompt).endswith(f"{asked.question}\n\n{prompts.RESPONSE}\n")
  assert tokenizer.decode(texts["stories"][1].response) == f"{asked.rationale}{tokenizer.eos_token}"
  option = texts["arc_easy"][0]
  right = get_tasks(config).load_test_choices()["arc_easy"][0]
  assert tokenizer.decode(option.prompt + option.response) == f"{right.contexts[0]}{right.options[1]}"
  assert tokenizer.decode(option.response).strip() == right.options[1].strip()
  models = [transformers.AutoModelForCausalLM.from_pretrained(f, dtype="float32") for f in (TINY, tuned)]
  for name, examples in texts.items():
    count = sum(len(e.response) - (not e.prompt) for e in examples)
    kl, loss, base_loss, entropy, base_entropy = np.sum([of_torch(*models, e) for e in examples], axis=0) / count
    close = lambda value: pytest.approx(value, rel=1e-3, abs=2e-7)
    assert found["texts"][name] == {"examples": len(examples), "tokens": count, "loss": close(base_loss),
                                    "entropy": close(base_entropy)}
    assert found["models"]["sft"][name] == {"kl": close(kl), "loss": close(loss), "entropy": close(entropy)}
  row = json.loads((tmp_path / "metrics.jsonl").read_text())
  assert (row["stage"], row["kl/sft/prose"]) == ("round_0/drift", found["models"]["sft"]["prose"]["kl"])


def test_no_round_is_measured_where_it_is_turned_off(tmp_path: Path):
  config = tiny.get_config()
  named = lambda: [s.name for s in loop.plan(Run(config, tmp_path, Checkpoint(TINY, "base"))) if "drift" in s.name]
  assert named() == [f"round_{t}/drift.json" for t in range(3)]
  config.analysis.drift = 0
  assert named() == []
