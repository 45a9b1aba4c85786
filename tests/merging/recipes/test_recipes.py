"""Recipes as people publish them: slices, adapters, several documents; and what is checked before work."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import yaml

from imm_jax.errors import UserError
from imm_jax.merging.recipes import command, mergekit
from imm_jax.model import safetensors
from tests.merge_folders import one_line, read, run
from tests.merging.recipe_models import CONFIG, merged, save, source


def test_slices_stack_layers_anew(pair, tmp_path: Path):
  """A depth up-scaling of two models: what comes before the layers is the first's, what comes after them the last's."""
  a, b = map(read, pair)
  got = merged(tmp_path, {"merge_method": "passthrough", "dtype": "float32", "slices": [
      {"sources": [source(pair[0], [0, 3])]}, {"sources": [source(pair[1], [1, 4])]}]})
  assert len(got) == 3 + 2 * 6
  for out, (tree, layer) in enumerate([(a, 0), (a, 1), (a, 2), (b, 1), (b, 2), (b, 3)]):
    for name in ("mlp.up_proj.weight", "self_attn.q_proj.weight"):
      np.testing.assert_array_equal(got[f"model.layers.{out}.{name}"], tree[f"model.layers.{layer}.{name}"])
  np.testing.assert_array_equal(got["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
  np.testing.assert_array_equal(got["lm_head.weight"], b["lm_head.weight"])
  config = json.loads((tmp_path / "out/config.json").read_text())
  full, sliding = CONFIG["layer_types"][:2]
  assert (config["num_hidden_layers"], config["layer_types"]) == (6, [full, sliding, full, sliding, full, sliding])


def test_gradients_go_over_a_slice(pair, tmp_path: Path):
  a, b = map(read, pair)
  got = merged(tmp_path, {"merge_method": "linear", "parameters": {"normalize": False}, "slices": [
      {"sources": [source(pair[0], [0, 2], weight=1), source(pair[1], [2, 4], weight=[0, 1])]},
      {"sources": [source(pair[0], [1, 4], weight=[0.0, 0.5]), source(pair[1], [0, 3], weight=0)],
       "parameters": {"normalize": False}}]})
  name = "model.layers.{}.mlp.up_proj.weight".format
  np.testing.assert_array_equal(got[name(0)], a[name(0)])
  np.testing.assert_allclose(got[name(1)], a[name(1)] + b[name(3)], rtol=1e-6)
  for i, weight in enumerate((0, 0.25, 0.5)):
    np.testing.assert_allclose(got[name(2 + i)], weight * a[name(1 + i)], rtol=1e-6)
  np.testing.assert_array_equal(got["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
  np.testing.assert_array_equal(got["model.norm.weight"], 0 * a["model.norm.weight"])


@pytest.mark.parametrize("family", ["llama", "gpt2", "towers"])
def test_lists_go_over_the_layers_of_the_config(family: str, tmp_path: Path):
  """Checkpoints may hold another layer, which predicts a token further ahead; mergekit counts by the config too."""
  stack = {"llama": "model.layers", "gpt2": "transformer.h", "towers": "language_model.model.layers"}[family]
  config = {"num_hidden_layers": None, "n_layers": 3} if family == "gpt2" else {"num_hidden_layers": 3}
  more = {f"vision_tower.encoder.layers.{i}.w": (2, 2) for i in range(5)} if family == "towers" else {}
  folder = save(tmp_path / "a", 0, {f"{stack}.{i}.w": (2, 2) for i in range(4)} | more, **config)
  got, tree = merged(tmp_path, {"merge_method": "passthrough", "models": [
      {"model": str(folder), "parameters": {"scale": [0, 1]}}]}), read(folder)
  scales = {f"{stack}.{i}.w": scale for i, scale in enumerate((0, 0.5, 1, 1))}
  for name, scale in {**scales, **{name: i / 4 for i, name in enumerate(more)}}.items():
    np.testing.assert_array_equal(got[name], np.float32(scale) * tree[name], err_msg=name)


def test_irrelevant_keys_change_nothing(pair, tmp_path: Path, capsys):
  """These are keys of other methods, and `modules`."""
  both = [{"model": str(folder), "parameters": {"weight": 0.5, "density": 0.5}} for folder in pair]
  plain = merged(tmp_path, {"merge_method": "slerp", "base_model": str(pair[0]), "parameters": {"t": 0.4},
                            "models": [{"model": str(pair[1])}], "dtype": "bfloat16"}, "plain")
  more = merged(tmp_path, {
      "merge_method": "slerp", "base_model": str(pair[0]), "dtype": "torch.bfloat16", "random_seed": 1,
      "tokenizer_source": None, "chat_template": None, "name": "mine",
      "modules": {"default": {"models": both, "parameters": {"t": 0.4, "embed_slerp": True, "int8_mask": True}}}},
      "more")
  assert "parameters.weight has no effect on slerp" in capsys.readouterr().err
  for name, x in plain.items():
    np.testing.assert_array_equal(more[name], x)


def test_base_gives_config_and_tokenizer(pair, tmp_path: Path):
  """This holds for every method."""
  (pair[0] / "tokenizer.json").write_text('{"of": "a"}')
  (pair[1] / "tokenizer.json").write_text('{"of": "b"}')
  merged(tmp_path, {"merge_method": "linear", "base_model": str(pair[1]), "models": [
      {"model": str(folder), "parameters": {"weight": 1}} for folder in pair]})
  assert json.loads((tmp_path / "out/tokenizer.json").read_text()) == {"of": "b"}


def test_several_documents_build_on_each_other(pair, tmp_path: Path):
  first = {"name": "mean", "merge_method": "linear", "models": [
      {"model": str(folder), "parameters": {"weight": 1}} for folder in pair]}
  last = {"merge_method": "linear", "parameters": {"normalize": False}, "models": [
      {"model": "mean", "parameters": {"weight": 2}}, {"model": str(pair[0]), "parameters": {"weight": -1}}]}
  (tmp_path / "recipe.yml").write_text(yaml.safe_dump_all([first, last]))
  done = run(f"--recipe={tmp_path / 'recipe.yml'}", f"--out={tmp_path / 'out'}")
  assert done.returncode == 0, done.stderr
  for name, x in read(tmp_path / "out").items():
    np.testing.assert_allclose(x, read(pair[1])[name], atol=1e-6)
  assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]
  made = json.loads((tmp_path / "out/merge.json").read_text())["inputs"]["models[0]"]
  assert (made["path"], made["made_by"]["method"]) == ("mean", "linear")


LINEAR = {"merge_method": "linear", "parameters": {"weight": 1}}


def test_incompatible_configs_are_refused(pair, tmp_path: Path, capsys):
  """Their configs have no common meaning."""
  for key, value in (("model_type", "mistral"), ("num_attention_heads", 4), ("hidden_act", "gelu")):
    other = save(tmp_path / key, 2, **{"hidden_act": "silu", key: value})
    first = save(tmp_path / f"{key}-first", 3, hidden_act="silu")
    with pytest.raises(UserError, match=f"has {key}={value!r} in config.json"):
      merged(tmp_path, {**LINEAR, "models": [{"model": str(first)}, {"model": str(other)}]})
  other = save(tmp_path / "fp8", 2, quantization_config={"quant_method": "fp8"})
  with pytest.raises(UserError, match=r"has quantization_config in config\.json: quantized weights are not merged"):
    merged(tmp_path, {**LINEAR, "models": [{"model": str(other)}, {"model": str(pair[0])}]})
  other = save(tmp_path / "far", 2, rope_theta=1e6, rms_norm_eps=1e-5)
  merged(tmp_path, {**LINEAR, "models": [{"model": str(pair[0])}, {"model": str(other)}]})
  notes = capsys.readouterr().err
  assert "models[1] has rms_norm_eps=1e-05" in notes
  assert "models[1] has other rotary embeddings" in notes


# Family -> its embedding and head.
TABLES = {"llama": ("model.embed_tokens.weight", "lm_head.weight"),
          "gpt2": ("transformer.wte.weight", "lm_head.weight"),
          "gpt_neox": ("gpt_neox.embed_in.weight", "embed_out.weight"),
          "bert": ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight")}


@pytest.mark.parametrize("family", TABLES)
def test_tied_and_untied_models_make_an_untied_one(family: str, tmp_path: Path):
  embedding, head = TABLES[family]
  untied = save(tmp_path / "untied", 0, {embedding: (12, 8), head: (12, 8), "h.0.w": (8, 8)})
  tied = save(tmp_path / "tied", 2, {embedding: (12, 8), "h.0.w": (8, 8)}, tie_word_embeddings=True)
  copied = save(tmp_path / "copied", 0, tree=read(tied) | {head: read(tied)[embedding]}, tie_word_embeddings=True)
  for base, other in ((untied, tied), (tied, tied), (untied, copied), (copied, tied)):
    out = tmp_path / f"{base.name}-{other.name}"
    got = merged(tmp_path, {**LINEAR, "base_model": str(base), "models": [
        {"model": str(untied)}, {"model": str(other)}]}, out.name)
    np.testing.assert_allclose(got[head], (read(untied)[head] + read(tied)[embedding]) / 2, rtol=1e-6)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
  assert head not in merged(tmp_path, {**LINEAR, "models": [{"model": str(copied)}, {"model": str(tied)}]})


def test_extra_buffers_and_counters_are_ignored(tmp_path: Path):
  """Buffers that one model alone has, and counters, are no obstacle."""
  tree = {"encoder.layer.0.w": np.ones((2, 2), np.float32), "encoder.layer.1.w": np.ones((2, 2), np.float32),
          "bn.num_batches_tracked": np.array(3)}
  a = save(tmp_path / "a", 0, tree={**tree, "embeddings.position_ids": np.arange(4)})
  b = save(tmp_path / "b", 0, tree={**tree, "bn.num_batches_tracked": np.array(5)})
  got = merged(tmp_path, {"merge_method": "linear", "parameters": {"normalize": False}, "models": [
      {"model": str(a), "parameters": {"weight": [0, 1]}}, {"model": str(b), "parameters": {"weight": 0}}]})
  assert sorted(got) == sorted(tree)
  assert (got["bn.num_batches_tracked"], got["encoder.layer.0.w"][0, 0], got["encoder.layer.1.w"][0, 0]) == (3, 0, 1)


@pytest.mark.parametrize("method", ["linear", "ties", "slerp", "dare_linear", "passthrough"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_are_named(method: str, value: float, pair, tmp_path: Path):
  tree = read(pair[1])
  tree["model.layers.2.mlp.up_proj.weight"][1, 2] = value
  bad = save(tmp_path / "bad", 0, tree=tree)
  made = {"merge_method": method, "parameters": {"weight": 0.5, "t": 0.5, "density": 0.5},
          "models": [{"model": str(bad)}] if method == "passthrough" else [{"model": str(m)} for m in (pair[0], bad)],
          **({} if method in ("linear", "passthrough") else {"base_model": str(pair[0])})}
  with pytest.raises(UserError, match=r"layers\.2\.mlp\.up_proj\.weight has NaN or infinity"):
    merged(tmp_path, made)
  if method == "linear":
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(made))
    made = mergekit.read(tmp_path / "recipe.yml")
    command.merge({tmp_path / "allowed": made}, command.OutputOptions(allow_nonfinite=True))


def test_values_beyond_the_output_dtype_are_counted(pair, tmp_path: Path, capsys):
  tree = read(pair[0])
  tree["model.norm.weight"][:3] = 7e4
  big = save(tmp_path / "big", 0, tree=tree)
  got = merged(tmp_path, {"merge_method": "passthrough", "dtype": "float16", "models": [{"model": str(big)}]})
  assert np.isinf(got["model.norm.weight"]).sum() == 3
  assert "3 entries are beyond what float16 holds and became infinite: model.norm.weight (3)" in capsys.readouterr().err
  assert json.loads((tmp_path / "out/merge.json").read_text())["overflowed"] == {"model.norm.weight": 3}


def test_code_is_copied_or_refused(tmp_path: Path):
  """Code and pipelines beside the weights are copied or refused."""
  folder = save(tmp_path / "own", 0, auto_map={"AutoConfig": "configuration_own.OwnConfig"})
  (folder / "configuration_own.py").write_text("class OwnConfig: ...")
  (folder / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}]))
  (folder / "1_Pooling").mkdir()
  (folder / "1_Pooling/config.json").write_text("{}")
  made = {"merge_method": "passthrough", "models": [{"model": str(folder)}]}
  merged(tmp_path, made)
  for name in ("configuration_own.py", "modules.json", "1_Pooling/config.json"):
    assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
  (folder / "1_Pooling/model.safetensors").write_bytes(b"")
  with pytest.raises(UserError, match="1_Pooling, which has weights of its own"):
    merged(tmp_path, made, "again")


@pytest.mark.parametrize("mapped", ["config.json", "tokenizer_config.json", "processor_config.json", None])
def test_needed_files_are_copied(mapped: str | None, pair, tmp_path: Path, capsys):
  """Other files are named."""
  needed = ["processor_config.json", "video_preprocessor_config.json", "spm.model", "normalizer.json",
            "tokenizer_config.json", "qwen.tiktoken"]
  for name in (*needed, "tokenization_own.py", "own.json", "trainer_state.json", "train_results.json", "LICENSE"):
    (pair[0] / name).write_text("{}")
  if mapped:
    config = json.loads((pair[0] / mapped).read_text())
    (pair[0] / mapped).write_text(json.dumps({**config, "auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}}))
  merged(tmp_path, {**LINEAR, "models": [{"model": str(folder)} for folder in pair]})
  written = {path.name for path in (tmp_path / "out").iterdir()}
  code = {"tokenization_own.py"} if mapped else set()
  assert written == {"config.json", "model.safetensors", "merge.json", "README.md", *needed, *code}
  names = "own.json" if mapped else "own.json, tokenization_own.py"
  which = "it" if mapped else "them"
  assert f"{pair[0]}: {names}: not copied; copy {which} yourself if the model needs {which}" in capsys.readouterr().err


def test_lone_models_are_refused(pair, tmp_path: Path):
  """These are `model_stock` of one model, and adapters alone."""
  with pytest.raises(UserError, match="model_stock takes 2 or more models other than base_model, not 1"):
    merged(tmp_path, {"merge_method": "model_stock", "base_model": str(pair[0]), "models": [{"model": str(pair[1])}]})
  adapter = tmp_path / "adapter"
  adapter.mkdir()
  (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))
  with pytest.raises(UserError, match=r"is a LoRA adapter of some/base.*give some/base\+"):
    merged(tmp_path, {**LINEAR, "models": [{"model": str(adapter)}]})


def test_ties_by_tensor_or_by_model(tmp_path: Path):
  base = save(tmp_path / "base", 0, tree={"a": np.zeros(10, np.float32), "b": np.zeros(10, np.float32)})
  tuned = save(tmp_path / "tuned", 0, tree={"a": np.arange(1, 11, dtype=np.float32),
                                           "b": np.arange(1, 11, dtype=np.float32) * 100})
  flags = ("--method=ties", f"--base={base}", f"--models={tuned}", "--densities=0.5")
  for scope, kept in (("tensor", (5, 5)), ("model", (0, 10))):
    done = run(*flags, f"--out={tmp_path / scope}", f"--scope={scope}")
    assert done.returncode == 0, done.stderr
    assert tuple(int((x != 0).sum()) for _, x in sorted(read(tmp_path / scope).items())) == kept
  assert "--scope='half': expected 'tensor' or 'model'" in one_line(run(*flags, "--out=x", "--scope=half"))


def test_fisher_weighs_entry_by_entry(pair, tmp_path: Path):
  fishers = [save(tmp_path / f"f{i}", 0, tree={n: np.full_like(x, v) for n, x in read(pair[0]).items()})
             for i, v in enumerate((3.0, 1.0))]
  done = run("--method=fisher", f"--models={pair[0]},{pair[1]}", f"--fishers={fishers[0]},{fishers[1]}",
             f"--out={tmp_path / 'out'}")
  assert done.returncode == 0, done.stderr
  for name, x in read(tmp_path / "out").items():
    np.testing.assert_allclose(x, 0.75 * read(pair[0])[name] + 0.25 * read(pair[1])[name], rtol=1e-5, atol=1e-6)


def test_bfloat16_is_the_default_output(pair, tmp_path: Path):
  """It is written where there is no `out_dtype`."""
  got = merged(tmp_path, {"merge_method": "passthrough", "dtype": "bfloat16", "models": [{"model": str(pair[0])}]})
  assert {x.dtype for x in got.values()} == {np.dtype(ml_dtypes.bfloat16)}


def test_an_adapter_is_merged_into_its_base_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setenv("IMM_JAX_CACHE", str(tmp_path / "cache"))
  base, adapter = save(tmp_path / "base", 0, layer_types=["full_attention"] * 4), tmp_path / "adapter"
  adapter.mkdir()
  (adapter / "adapter_config.json").write_text(json.dumps({
      "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"], "layers_to_transform": [1],
      "base_model_name_or_path": "a"}))
  low, high = np.ones((2, 8), np.float32), np.ones((6, 2), np.float32)
  prefix = "base_model.model.model.layers.1.mlp.up_proj"
  safetensors.write(adapter / "adapter_model.safetensors", [
      (f"{prefix}.lora_{part}.weight", x.dtype, x.shape, lambda x=x: [x]) for part, x in (("A", low), ("B", high))])
  got = merged(tmp_path, {"merge_method": "passthrough", "models": [{"model": f"{base}+{adapter}"}]})
  name = "model.layers.1.mlp.up_proj.weight"
  np.testing.assert_allclose(got[name], read(base)[name] + 4, rtol=1e-6)


@pytest.mark.parametrize("method", ["ties", "della"])
def test_recipes_have_the_defaults_of_functions(method: str, pair, tmp_path: Path):
  """Both divide by the sum of weights unless they are told not to, as mergekit does."""
  base, other = map(read, pair)
  got = merged(tmp_path, {"merge_method": method, "dtype": "float32", "base_model": str(pair[0]), "models": [
      {"model": str(pair[1]), "parameters": {"weight": 0.5, "density": 1.0}}]})
  name = "model.layers.0.mlp.up_proj.weight"
  np.testing.assert_allclose(got[name], other[name], rtol=1e-6)
  assert not np.allclose(got[name], base[name])
