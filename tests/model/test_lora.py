"""LoRA adapters against peft's own merge."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from imm_jax.errors import UserError
from imm_jax.model import hf, hub, lora, published, safetensors
from imm_jax.model.checkpoint_folder import list_side_files
from tests import REPO, TINY
from tests.fake_hub import Hub
from tests.helpers import run_convert

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

Make = Callable[..., Path]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
  monkeypatch.setenv("IMM_JAX_CACHE", str(tmp_path / "cache"))
  return tmp_path / "cache/adapters"


def _load(base: Path, rows: int | None = None) -> "transformers.PreTrainedModel":
  model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
  if rows:
    model.resize_token_embeddings(rows, mean_resizing=False)
  return model


@pytest.fixture
def adapter(tmp_path: Path) -> Make:
  """Trains an adapter of a base, so to speak: every tensor of it is random, of magnitudes from 1e-3 to 10."""

  def make(base: Path, *, rows: int | None = None, dtype: "torch.dtype | None" = None, **settings: Any) -> Path:
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"], **settings}
    with warnings.catch_warnings(action="ignore"):
      model = peft.get_peft_model(_load(base, rows), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
      for i, (name, p) in enumerate(model.named_parameters()):
        if p.requires_grad:
          scale = 10.0**(i % 5 - 3) if "lora_B" in name or "lora_embedding_B" in name else 0.3
          p.copy_(torch.randn(p.shape, generator=generator) * scale)
    folder = tmp_path / f"adapter{len(list(tmp_path.glob('adapter*')))}"
    with warnings.catch_warnings(action="ignore"):
      model.save_pretrained(folder)
    if dtype:
      _rewrite(folder, lambda t: t.update({name: x.astype(str(dtype).removeprefix("torch.")) for name, x in t.items()}))
    return folder

  return make


def _rewrite(adapter: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
  tensors = {name: np.array(x) for name, x in safetensors.read(adapter / "adapter_model.safetensors").items()}
  change(tensors)
  safetensors.write(adapter / "adapter_model.safetensors",
                    [(n, x.dtype, x.shape, lambda x=x: [x]) for n, x in tensors.items()])


def _configure(adapter: Path, **changes: Any) -> None:
  path = adapter / "adapter_config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _merged_by_peft(base: Path, adapter: Path, rows: int | None = None) -> "transformers.PreTrainedModel":
  with warnings.catch_warnings(action="ignore"):
    return peft.PeftModel.from_pretrained(_load(base, rows), adapter).merge_and_unload()


def _assert_equal(merged: Path, base: Path, adapter: Path, rows: int | None = None) -> None:
  """What transformers reads of the folder is what peft made: within a bf16 ulp of the operands, or 1e-6 in float32."""
  want_model, got_model = _merged_by_peft(base, adapter, rows), _load(merged)
  want, got, before = want_model.state_dict(), got_model.state_dict(), _load(base).state_dict()
  assert got.keys() == want.keys()
  assert got_model.config.tie_word_embeddings == want_model.config.tie_word_embeddings
  assert got_model.config.vocab_size == want_model.config.vocab_size
  changed, resized = 0, safetensors.read(adapter / "adapter_model.safetensors")
  for name, x in want.items():
    old, y = before[name].double(), got[name].double()
    if (key := f"base_model.model.{name.removesuffix('.weight')}.base_layer.weight") in resized:
      old = torch.tensor(resized[key].astype(np.float64))
    assert got[name].dtype == before[name].dtype
    assert y.shape == x.shape
    largest = x.double().abs()
    if old.shape == x.shape:
      largest = torch.stack([largest, old.abs(), (x.double() - old).abs()]).amax(0)
    ulp = torch.exp2(torch.floor(torch.log2(largest)) - 7)  # of bfloat16
    assert ((x.double() - y).abs() <= (ulp if got[name].dtype == torch.bfloat16 else 1e-6 * (1 + largest))).all(), name
    changed += old.shape != x.shape or not torch.equal(old, y)
  assert changed
  hf.check_folder(merged)


@pytest.mark.parametrize(("kind", "stored", "settings"), [
    ("llama", "bfloat16", {}),
    ("llama", "float32", {"target_modules": "all-linear", "use_rslora": True}),
    ("qwen2-tied", "bfloat16", {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7}, "use_rslora": True,
                                "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 32, "(q|up)_proj": 3}}),
    ("qwen2-tied", "float32", {"rank_pattern": {"up_proj": 3}, "alpha_pattern": {"model.layers.0.mlp.up_proj": 1}}),
    ("qwen2-untied", "bfloat16", {"target_modules": ["q_proj"],
                                  "modules_to_save": ["embed_tokens", "lm_head", "norm", "mlp"]}),
    ("qwen2-tied", "float32", {"modules_to_save": ["lm_head"]}),
    ("qwen2-tied", "bfloat16", {"modules_to_save": ["embed_tokens"]}),
    ("qwen2-tied", "float32", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    ("qwen2-untied", "float32", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    ("llama", "bfloat16", {"target_modules": ["embed_tokens", "lm_head"], "rows": 67}),
    ("qwen2-tied", "float32", {"rows": 67}),
    ("qwen2-untied", "bfloat16", {"bias": "all"}),
    ("qwen2-untied", "float32", {"lora_bias": True, "target_modules": ["q_proj"]}),
    ("qwen2-tied", "bfloat16", {"dtype": torch.bfloat16})], ids=lambda x: "-".join(x) if isinstance(x, dict) else x)
def test_a_merge_is_that_of_peft(
    checkpoint, adapter: Make, tmp_path: Path, kind: str, stored: str, settings: dict) -> None:
  _, base = checkpoint(kind, dtype=getattr(torch, stored))
  made = adapter(base, **settings)
  lora.merge(base, made, tmp_path / "out", max_shard_bytes=20_000)
  _assert_equal(tmp_path / "out", base, made, settings.get("rows"))
  if not {"modules_to_save", "rows"} & settings.keys():
    assert (tmp_path / "out/config.json").read_bytes() == (base / "config.json").read_bytes()


def test_blocks_make_no_difference(checkpoint, adapter: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  _, base = checkpoint("qwen2-untied", dtype=torch.bfloat16)
  made = adapter(base, target_modules=["q_proj", "embed_tokens"], lora_bias=False)
  lora.merge(base, made, tmp_path / "whole")
  monkeypatch.setattr(lora, "BLOCK", 7 * 48)
  lora.merge(base, made, tmp_path / "blocks")
  one, other = (path.joinpath("model.safetensors").read_bytes() for path in (tmp_path / "whole", tmp_path / "blocks"))
  assert one == other


@pytest.mark.parametrize(("config", "expected"), [
    ({"use_dora": True}, "use_dora=true (DoRA) is not supported; merge it with peft's merge_and_unload"),
    ({"peft_type": "IA3"}, "peft_type='IA3' is not supported; expected 'LORA'"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' is not supported"),
    ({"layer_replication": [[0, 2]]}, "layer_replication=[[0, 2]] is not supported"),
    ({"trainable_token_indices": [3]}, "trainable_token_indices=[3] is not supported"),
    ({"target_parameters": ["x"]}, "target_parameters=['x'] is not supported"),
    ({"megatron_config": {"a": 1}}, "megatron_config={'a': 1} is not supported"),
    ({"use_qalora": True}, "use_qalora=True is not supported"),
    ({"of_next_year": 7}, "of_next_year=7 is not supported"),
    ({"r": 0}, "r=0; expected a positive integer"),
    ({"bias": "weird"}, "bias='weird'; expected 'none', 'all' or 'lora_only'"),
    ({"lora_alpha": 10**400}, "lora_alpha=1000"),
    ({"lora_alpha": "16"}, "lora_alpha='16'; expected a positive number"),
    ({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern.q_proj=2.5; expected a positive integer"),
    ({"alpha_pattern": {"(": 2}}, "alpha_pattern: '(' is no regex"),
    ({"use_rslora": "yes"}, "use_rslora='yes'; expected true or false"),
    ({"r": 8}, "q_proj.lora_A.weight has shape (4, 48), adapter_config.json and the base need (8, 48)"),
    ({"target_modules": ["q_proj", "k_proj"]}, "an update of model.layers.0.self_attn.k_proj is missing"),
    ({"target_modules": r".*\.(q|k)_proj"}, "an update of model.layers.0.self_attn.k_proj is missing"),
    ({"target_modules": ["k_proj"], "layers_to_transform": 1},
     "an update of model.layers.1.self_attn.k_proj is missing"),
    ({"modules_to_save": ["lm_head"]}, "lm_head is missing, adapter_config.json names it in modules_to_save"),
    ({"lora_bias": True}, "a bias of the update of model.layers.0.self_attn.q_proj is missing")])
def test_other_settings_are_refused(checkpoint, adapter: Make, tmp_path: Path, config: dict, expected: str) -> None:
  """Settings that change the result are refused by name."""
  _, base = checkpoint("llama")
  made = adapter(base)
  _configure(made, **config)
  with pytest.raises(UserError) as raised:
    lora.merge(base, made, tmp_path / "out")
  assert expected in str(raised.value)
  assert str(raised.value).startswith(str(made / "adapter_"))
  assert not (tmp_path / "out").exists()
  with pytest.raises(UserError):
    hub.resolve(f"{base}+{made}")


PREFIX = "base_model.model.model.layers.0.self_attn.q_proj."


@pytest.mark.parametrize(("change", "expected"), [
    (lambda t: t.pop(f"{PREFIX}lora_B.weight"), "model.layers.0.self_attn.q_proj.lora_B.weight is missing"),
    (lambda t: t.update({f"{PREFIX}lora_A.weight": t[f"{PREFIX}lora_A.weight"][:, :5].copy()}), "has shape (4, 5)"),
    (lambda t: t.update({f"{PREFIX}lora_B.weight": np.zeros(0, np.float32)}), "has shape (0,)"),
    (lambda t: t.update({f"{PREFIX}lora_B.weight": np.zeros((32, 4), np.int32)}), "has dtype int32"),
    (lambda t: t.update({f"{PREFIX}weight": np.zeros((32, 48), np.float32)}), f"unknown {PREFIX}weight"),
    (lambda t: t.update({"base_model.model.score.weight": np.zeros(3, np.float32)}), "unknown base_model.model.score"),
    (lambda t: t.update({"model.norm.weight": np.zeros(48, np.float32)}), "unknown model.norm.weight"),
    (lambda t: t.update({"base_model.model.model.norm.weight": np.zeros(4, np.float32)}), "the base's (48,)"),
    (lambda t: t.update({"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": np.zeros((4, 48), np.float32)}),
     "model.layers.9.mlp.up_proj.lora_B.weight is missing"),
    (lambda t: t.update({f"{PREFIX}lora_B.bias": np.zeros(32, np.float32)}), "the base's bias is missing"),
    (lambda t: t.update({f"{PREFIX}lora_magnitude_vector": np.zeros(32, np.float32)}), "DoRA is not supported"),
    (lambda t: t.update({"base_model.model.lm_head.weight": np.zeros((70, 48), np.float32)}),
     "leaves model.embed_tokens.weight with 61 rows and lm_head.weight with 70"),
    (lambda t: t.update({f"{PREFIX}lora_B.weight": np.full((32, 4), np.nan, np.float32)}), "are not finite in float32"),
    (lambda t: t.clear(), "holds no tensor")],
    ids=["no-b", "narrow-a", "empty-b", "int-b", "weight", "foreign-module", "foreign-name", "short-norm",
         "ninth-layer", "bias", "magnitude", "larger-head", "nan", "empty"])
def test_tensors_that_do_not_fit_are_named(
    checkpoint, adapter: Make, tmp_path: Path, change: Callable, expected: str) -> None:
  _, base = checkpoint("llama")
  made = adapter(base)
  _rewrite(made, change)
  with pytest.raises(UserError) as raised:
    lora.merge(base, made, tmp_path / "out")
  assert expected in str(raised.value)
  assert "\n" not in str(raised.value)


def test_a_saved_module_of_several_tensors_is_whole(checkpoint, adapter: Make, tmp_path: Path) -> None:
  _, base = checkpoint("llama")
  made = adapter(base, target_modules=["q_proj"], modules_to_save=["mlp"])
  name = "model.layers.1.mlp.up_proj.weight"
  _rewrite(made, lambda t: t.pop(f"base_model.model.{name}"))
  with pytest.raises(UserError, match=f"{name} is missing, adapter_config.json names mlp in modules_to_save"):
    lora.merge(base, made, tmp_path / "out")


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_update_of_one_of_a_tied_pair_is_refused(checkpoint, adapter: Make, tmp_path: Path, target: str) -> None:
  """peft's merge changes both, and gives another model than the one that was trained."""
  _, base = checkpoint("qwen2-tied")
  with pytest.raises(UserError, match=rf"an update of .*{target}.weight, which the base ties"):
    lora.merge(base, adapter(base, target_modules=["q_proj", target]), tmp_path / "out")


def test_what_is_no_adapter_is_named(checkpoint, adapter: Make, tmp_path: Path) -> None:
  _, base = checkpoint("llama")
  made = adapter(base)
  with pytest.raises(UserError, match=rf"{made} is a LoRA adapter and {base} a model; give {base}\+{made}"):
    hub.resolve(f"{made}+{base}")
  with pytest.raises(UserError, match=rf"{made} is a LoRA adapter and tiny a model; give tiny\+{made}"):
    hub.resolve(f"{made}+tiny")
  with pytest.raises(UserError, match=f"{base}: has no adapter_config.json; expected a LoRA adapter"):
    hub.resolve(f"{base}+{base}")
  with pytest.raises(UserError, match=rf"{made}: is a LoRA adapter of {base}, not a whole model; give {base}\+{made}"):
    hf.check_folder(hub.resolve(str(made)))
  with pytest.raises(UserError, match=rf"{made}: is a LoRA adapter of {base}, not a whole model; give {base}\+{made}"):
    run_convert(source=made, out=tmp_path / "out", to="hf")
  (made / "adapter_model.safetensors").rename(made / "adapter_model.bin")
  with pytest.raises(UserError, match=r"adapter_model\.safetensors: missing; adapter_model\.bin is a pickle"):
    hub.resolve(f"{base}+{made}")


def test_the_tokenizer_beside_the_adapter_counts(checkpoint, adapter: Make, tmp_path: Path) -> None:
  _, base = checkpoint("llama")
  made = adapter(base)
  for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "merges.txt"):
    (base / name).write_text("base")
  (made / "chat_template.jinja").write_text("adapter")
  lora.merge(base, made, tmp_path / "one")
  texts = lambda out: {name: (out / name).read_text() for name in list_side_files(out) if "config.json" not in name}
  assert texts(tmp_path / "one") == {"tokenizer.json": "base", "merges.txt": "base", "chat_template.jinja": "adapter"}
  (made / "chat_template.jinja").unlink()
  (made / "tokenizer.json").write_text("adapter")
  lora.merge(base, made, tmp_path / "two")
  assert texts(tmp_path / "two") == {"tokenizer.json": "adapter"}  # no template of another tokenizer
  assert not (tmp_path / "two/tokenizer_config.json").exists()


def test_a_model_with_an_adapter_is_merged_once(
    adapter: Make, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
  base = shutil.copytree(TINY, tmp_path / "base")
  made = adapter(base)
  name = f"{base}+{made}"
  assert not hub.is_local(name)
  assert published.find_config(name) == hf.read_config(base)
  assert not cache.exists()  # neither asks for more than the base's config.json
  first = hub.resolve(name)
  assert first.parent == cache
  assert f"merging the LoRA adapter {made} into {base}: {first}\n" in capsys.readouterr().err
  stamp = (first / "model.safetensors").stat().st_mtime_ns
  assert hub.resolve(name) == first
  assert (first / "model.safetensors").stat().st_mtime_ns == stamp
  assert not capsys.readouterr().err
  _assert_equal(first, base, made)
  _rewrite(made, lambda t: t.update({key: x * 2 for key, x in t.items()}))
  second = hub.resolve(name)
  assert second != first
  (base / "generation_config.json").write_text("{}")
  assert hub.resolve(name) not in (first, second)
  assert sorted(path.name for path in cache.iterdir() if path.name.startswith(".")) == []


def test_processes_that_ask_at_once_share_a_merge(adapter: Make, cache: Path) -> None:
  made = adapter(TINY)
  code = f"from imm_jax.model import hub; print(hub.resolve('tiny+{made}'))"
  running = [subprocess.Popen([sys.executable, "-c", code], cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}) for _ in range(2)]
  outs, errors = zip(*(process.communicate(timeout=120) for process in running), strict=True)
  assert outs[0] == outs[1]
  assert sum(error.count("merging the LoRA adapter") for error in errors) == 1, errors
  assert [path.name for path in cache.iterdir()] == [Path(outs[0].strip()).name]


def test_hub_adapter_is_judged_first(adapter: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """An adapter of the hub is judged before its weights come."""
  fake, made = Hub(tmp_path / "hub", monkeypatch), adapter(TINY)
  files = {name: (made / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}
  others = {"README.md": b"x", "config.json": b"{}", "checkpoint-5/tokenizer.json": b"{}"}
  fake.add("org/adapter", {**files, **others}, "v1")
  got, want = (hf.load(hub.resolve(f"tiny+{name}"))[1]["layers"]["mlp"]["up_proj"]["weight"]
               for name in ("org/adapter@v1", made))
  np.testing.assert_array_equal(got, want)
  assert fake.fetched == ["adapter_config.json", "adapter_model.safetensors@cv1"]
  fake.fetched.clear()
  _configure(made, use_dora=True)
  fake.add("org/dora", {**files, "adapter_config.json": (made / "adapter_config.json").read_bytes()})
  with pytest.raises(UserError, match=r"org/dora/adapter_config.json: use_dora=true \(DoRA\) is not supported"):
    hub.resolve("tiny+org/dora")
  assert fake.fetched == ["adapter_config.json"]


def test_convert_writes_a_merge_as_an_hf_folder(adapter: Make, tmp_path: Path, cache: Path) -> None:
  made = adapter(TINY)
  run_convert(source=f"tiny+{made}", out=tmp_path / "out", to="hf")
  assert not cache.exists()
  _assert_equal(tmp_path / "out", TINY, made)
  run_convert(source=f"tiny+{made}", out=tmp_path / "out", to="hf", overwrite=True)
  with pytest.raises(UserError, match="is or holds the input --source, its adapter"):
    run_convert(source=f"tiny+{made}", out=made, to="hf", overwrite=True)


def test_merges_take_models_with_adapters(adapter: Make, tmp_path: Path) -> None:
  made = adapter(TINY)
  done = subprocess.run([sys.executable, "-m", "imm_jax.merge", "--method=linear", f"--models=tiny,tiny+{made}",
                         "--weights=[0.25,0.75]", f"--out={tmp_path / 'out'}", "--out_dtype=float32"], cwd=REPO,
                        capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  base, tuned, merged = (hf.load(path, dtype=np.float32)[1]["layers"]["mlp"]["up_proj"]["weight"]
                         for path in (TINY, hub.resolve(f"tiny+{made}"), tmp_path / "out"))
  np.testing.assert_allclose(merged, 0.25 * np.asarray(base) + 0.75 * np.asarray(tuned), rtol=1e-5, atol=1e-6)


def test_one_folder_may_hold_base_and_adapter(checkpoint, adapter: Make, tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setenv("IMM_JAX_CACHE", str(tmp_path / "cache"))
  _, base = checkpoint("llama")
  for file in adapter(base).iterdir():
    (base / file.name).write_bytes(file.read_bytes())
  lora.merge(base, base, tmp_path / "out")
  merged = hub.resolve(f"{base}+{base}")
  assert (merged / "model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()
