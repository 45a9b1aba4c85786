"""config.json: what is read, what is refused and what is passed over."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from imm_jax.errors import UserError
from imm_jax.model import hf_keys
from imm_jax.model.config import ModelConfig, read_config
from imm_jax.model.families import FAMILIES
from imm_jax.model.rope import Llama3Scaling

# A config.json that is read without complaint, in the key of each family.
PLAIN = {"model_type": "llama", "vocab_size": 61, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}

@pytest.mark.parametrize(("change", "named"), [
    ({"model_type": "qwen3_moe"}, "model_type='qwen3_moe' is not supported; expected one of: llama"),
    ({"model_type": None}, "model_type"),
    ({"hidden_act": "relu2"}, "hidden_act='relu2' is not supported; expected one of silu"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.low_freq_factor=None"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0,
                       "original_max_position_embeddings": 8192}}, "must be less than high_freq_factor"),
    ({"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
    ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor=None"),
    ({"rope_scaling": {"type": "linear", "factor": -2.0}}, "rope_scaling.factor=-2.0"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
    ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_type='longrope'"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
     "needs original_max_position_embeddings, or max_position"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "beta_slow": 40}},
     "beta_slow=40 must be less than beta_fast=32"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "truncate": "no"}},
     "truncate='no'"),
    ({"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 8}}, "rope_scaling.factor=None"),
    ({"rope_scaling": {"rope_type": ["linear"], "factor": 2.0}}, "rope_type=['linear']"),
    ({"rope_scaling": "linear"}, "rope_scaling='linear'; expected an object"),
    ({"rope_theta": 1}, "rope_theta=1;"),
    ({"rope_theta": 1e39}, "rope_theta=1e+39;"),
    ({"hidden_act": ["silu"]}, "hidden_act=['silu']"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
      "rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "disagree"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 0}}, "low_freq_factor=0;"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "rope_parameters.full_attention"),
    ({"rope_scaling": {"type": "llama3", "rope_type": "default"}}, "disagree"),
    ({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "disagree"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
    ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
     "sliding_window=8 with use_sliding_window=True"),
    ({"attention_bias": "yes"}, "attention_bias='yes'"),
    ({"quantization_config": {"quant_method": "gptq"}}, "take the unquantized model"),
    ({"quantization": {"bits": 4}}, "take the unquantized model"),
    ({"text_config": {"model_type": "llama"}}, "text_config={'model_type': 'llama'}: the model has parts besides the"),
    ({"pruned_heads": {"0": [1]}}, "pruned_heads={'0': [1]}: heads were taken out of the model"),
    ({"is_encoder_decoder": True}, "take a decoder-only model"),
    ({"model_type": ["llama"]}, "model_type=['llama'] is not supported; expected one of: llama, mistral"),
    ({"num_attention_heads": 96, "num_key_value_heads": 96}, "num_attention_heads=96 is more than hidden_size=48"),
    ({"rope_theta": float("nan")}, "rope_theta=nan"),
    ({"rope_theta": 10**400}, "rope_theta=1000"),
    ({"rms_norm_eps": 10**400}, "rms_norm_eps=1000"),
    ({"model_type": "granite", "logits_scaling": 10**400}, "logits_scaling=1000"),
    ({"rope_scaling": {"type": "linear", "factor": 10**400}}, "rope_scaling.factor=1000"),
    ({"max_position_embeddings": 10**400, "rope_scaling": {"type": "yarn", "factor": None}}, "_embeddings=1000"),
    ({"max_position_embeddings": 10**400}, "max_position_embeddings is 1000"),
    ({"original_max_position_embeddings": float("nan"), "rope_scaling": {"type": "yarn", "factor": 2}}, "=nan"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1e38,
                       "beta_slow": 1e-320}}, "rope_scaling.beta_slow=1e-320"),
    ({"is_causal": False}, "is_causal=False"),
    ({"rope_theta": float("inf")}, "rope_theta=inf"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false'"),
    ({"num_hidden_layers": 10**11}, "num_hidden_layers"),
    ({"num_hidden_layers": 10**5}, "num_hidden_layers=100000"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "architectures=['LlamaForSequenceClassification']"),
    ({"architectures": ["MistralForCausalLM"]}, "expected ['LlamaForCausalLM']"),
    ({"architectures": ["TransGQAForCausalLM"]}, "TransGQAForCausalLM"),
    ({"architectures": "LlamaForCausalLM"}, "architectures='LlamaForCausalLM'"),
    ({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, "auto_map={'AutoModelForCausalLM'"),
    ({"sliding_window": 8}, "sliding_window=8"),
    ({"sliding_window": 8, "use_sliding_window": False}, "sliding_window=8"),  # generate slides in transformers
    ({"model_type": "mistral"}, "sliding_window=4096"),  # the default of its class
    ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window=4096"),
    ({"model_type": "granite", "residual_multiplier": 0}, "residual_multiplier=0"),
    ({"attention_chunk_size": 8192}, "attention_chunk_size=8192"),
    ({"per_layer_config": {"0": {"hidden_act": "relu"}}}, "per_layer_config="),
    ({"layer_types": ["full_attention"]}, "layer_types has 1 entries, num_hidden_layers is 2"),
    ({"layer_types": {}}, "layer_types={}; expected a list"),
    ({"hidden_act": None}, "hidden_act=None"),
    ({"head_dim": 0}, "head_dim is 0"),
    ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
    ({"num_key_value_heads": False}, "num_key_value_heads is False"),
    ({"vocab_size": None}, "vocab_size is None"),
    ({"max_position_embeddings": "4k"}, "max_position_embeddings is '4k'"),
])
def test_arithmetic_options_are_refused(change: dict[str, Any], named: str) -> None:
  """Options that change the arithmetic are refused by name."""
  with pytest.raises(UserError) as error:
    ModelConfig.from_hf({**PLAIN, **change}, source="folder/config.json")
  assert str(error.value).startswith("folder/config.json: ")
  assert named in str(error.value)
  assert "\n" not in str(error.value)


def test_any_value_is_read_or_refused() -> None:
  """Whatever stands at a key is read, or refused in one line."""
  values = (float("nan"), float("inf"), 10**400, -10**400, 1e-320, -1, 0, True, False, None, "x", "", [], [1], [{}], {},
            {"a": [1]}, {"rope_type": {}})
  scaling = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
             "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.5, "rope_theta": 1e4}
  found = [{**PLAIN, "model_type": family, key: value} for family in FAMILIES
           for key in hf_keys.known_keys(FAMILIES[family]) for value in values]
  found += [{**PLAIN, "max_position_embeddings": 64, "rope_scaling": {**scaling, "rope_type": kind, key: value}}
            for kind in ("default", "linear", "llama3", "yarn")
            for key in (*scaling, "rope_type", "type", "attention_factor", "truncate", "x") for value in values]
  messages = []
  for config in found:
    try:
      ModelConfig.from_hf(config)
    except UserError as e:
      messages.append(str(e))
  assert messages
  assert not [message for message in messages if "\n" in message or len(message) > 800]


@pytest.mark.parametrize("change", [
    {"architectures": ["LLaMAForCausalLM"]}, {"architectures": ["FSDPLlamaForCausalLM"]},
    {"rope_scaling": False}, {"rope_scaling": []}, {"rope_scaling": {"type": None, "factor": 2.0}},
    {"rope_scaling": {"rope_type": "default", "factor": 1.0}}, {"attention_dropout": 0.1},
    {"pretraining_tp": 2}, {"clip_qkv": 1.0}, {"is_llama_config": True},
    {"use_sliding_window": True},  # Llama's class has no such key
    {"model_type": "qwen2", "num_key_value_heads": 2, "use_sliding_window": True, "max_window_layers": 2},
    {"model_type": "qwen2", "num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": None,
     "max_window_layers": 0},
])
def test_inert_keys_are_read(change: dict[str, Any]) -> None:
  """They change nothing in transformers."""
  plain = ModelConfig.from_hf({**PLAIN, **{k: v for k, v in change.items() if k == "model_type"}})
  assert ModelConfig.from_hf({**PLAIN, **change}) == plain


def test_options_that_are_on_are_read() -> None:
  config = ModelConfig.from_hf({**PLAIN, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu_new"})
  assert (config.qkv_bias, config.o_bias, config.mlp_bias, config.activation) == (True, True, True, "gelu_tanh")
  # Qwen2's biases are fixed, Mistral has none, whatever stands there.
  config = ModelConfig.from_hf({**PLAIN, "model_type": "qwen2", "attention_bias": True})
  assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (True, False, False)
  config = ModelConfig.from_hf({**PLAIN, "model_type": "mistral", "sliding_window": None, "mlp_bias": True})
  assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (False, False, False)
  config = ModelConfig.from_hf({**PLAIN, "model_type": "granite", "attention_multiplier": 0.5, "logits_scaling": 8,
                                "embedding_multiplier": 12, "residual_multiplier": 0.25})
  assert (config.attention_scale, config.logits_divisor) == (0.5, 8.0)
  assert (config.embedding_multiplier, config.residual_multiplier) == (12.0, 0.25)


def test_keys_that_are_passed_over_are_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
  odd = {"is_llama_config": True, "transformers.js_config": {"dtype": "q4"},
         "rope_scaling": {"type": "default", "x": 1}}
  (tmp_path / "config.json").write_text(json.dumps({**PLAIN, **odd}))
  assert read_config(tmp_path) == read_config(tmp_path) == ModelConfig.from_hf(PLAIN)
  assert capsys.readouterr().err.splitlines() == [
      f"note: {tmp_path / 'config.json'}: ignored, because transformers does not read them for this model: "
      "is_llama_config, transformers.js_config, rope_scaling.x"]


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                 "num_attention_heads"])
def test_a_missing_size_is_named(key: str) -> None:
  with pytest.raises(UserError, match=rf"config\.json: .*{key}.* missing"):
    ModelConfig.from_hf({k: v for k, v in PLAIN.items() if k != key})


LLAMA31 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(("first", "second"), [
    ({"rope_theta": 5e5, **LLAMA31}, LLAMA31),  # transformers takes the second alone, with the default theta
    ({"rope_theta": 5e5, **LLAMA31}, {"rope_theta": 5e5, "rope_type": "default"}),
    ({"rope_theta": 5e5, **LLAMA31}, {"rope_theta": 5e5, **LLAMA31, "factor": 32.0}),
], ids=["theta", "type", "factor"])
def test_contradicting_rope_keys_are_named(first: dict[str, Any], second: dict[str, Any]) -> None:
  """Both keys are named."""
  with pytest.raises(UserError, match=r"rope_parameters=\{.*rope_scaling=\{.*disagree"):
    ModelConfig.from_hf({**PLAIN, "rope_parameters": first, "rope_scaling": second})


def test_two_keys_of_rope_that_agree_are_read() -> None:
  new = {"rope_parameters": {"rope_theta": 5e5, **LLAMA31}}
  old = {"rope_theta": 5e5, "rope_scaling": {"type" if k == "rope_type" else k: v for k, v in LLAMA31.items()}}
  want = ModelConfig.from_hf({**PLAIN, **new})
  assert want.rope_theta == 5e5
  assert want.rope_scaling == Llama3Scaling(8.0, 1.0, 4.0, 8192.0)
  assert ModelConfig.from_hf({**PLAIN, **old}) == want
  assert ModelConfig.from_hf({**PLAIN, **old, **new}) == want


def test_options_that_are_switched_off_are_accepted() -> None:
  off = {"hidden_act": "silu", "rope_scaling": None, "use_sliding_window": False, "sliding_window": None,
         "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0, "quantization_config": None,
         "pretraining_tp": 1, "partial_rotary_factor": 1.0, "layer_types": ["full_attention"] * 2,
         "unknown": None, "unheard_of": False, "never_seen": {}, "nowhere": [], "auto_map": {}}
  assert ModelConfig.from_hf({**PLAIN, **off}) == ModelConfig.from_hf(PLAIN)


# What the configs of published models hold, beside the keys that all of them have.
_ALL = {"attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02, "use_cache": True,
        "transformers_version": "4.40.0", "torch_dtype": "bfloat16"}
_QWEN2 = {**_ALL, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rms_norm_eps": 1e-6,
          "bos_token_id": 151643, "eos_token_id": 151643, "tie_word_embeddings": True, "use_mrope": False,
          "use_sliding_window": False, "vocab_size": 151936, "num_key_value_heads": 2}
_LLAMA = {**_ALL, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5,
          "pretraining_tp": 1, "tie_word_embeddings": False, "num_attention_heads": 32}
_LLAMA3 = {**_LLAMA, "attention_bias": False, "bos_token_id": 128000, "eos_token_id": 128001, "rope_scaling": None,
           "rope_theta": 500000.0, "vocab_size": 128256, "num_key_value_heads": 8}
PUBLISHED = {
    "Qwen2.5-0.5B": ({**_QWEN2, "hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 32768,
                      "max_window_layers": 24, "num_attention_heads": 14, "num_hidden_layers": 24,
                      "rope_theta": 1000000.0, "sliding_window": 32768}, (1e6, 64, 2, True, None)),
    "Qwen2.5-Math-1.5B": ({**_QWEN2, "hidden_size": 1536, "intermediate_size": 8960, "max_position_embeddings": 4096,
                           "max_window_layers": 21, "num_attention_heads": 12, "num_hidden_layers": 28,
                           "rope_theta": 10000, "sliding_window": 4096}, (1e4, 128, 2, True, None)),
    "Qwen3-0.6B": ({**_QWEN2, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False,
                    "head_dim": 128, "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960,
                    "max_window_layers": 28, "num_attention_heads": 16, "num_hidden_layers": 28,
                    "num_key_value_heads": 8, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None},
                   (1e6, 128, 8, True, None)),
    "Llama-2-7b": ({**_LLAMA, "_name_or_path": "meta-llama/Llama-2-7b-hf", "bos_token_id": 1, "eos_token_id": 2,
                    "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 4096,
                    "num_hidden_layers": 32, "num_key_value_heads": 32, "rope_scaling": None, "torch_dtype": "float16",
                    "vocab_size": 32000}, (1e4, 128, 32, False, None)),
    "Meta-Llama-3-8B": ({**_LLAMA3, "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 8192,
                         "num_hidden_layers": 32}, (5e5, 128, 8, False, None)),
    "Llama-3.1-8B": ({**_LLAMA3, "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 131072,
                      "mlp_bias": False, "num_hidden_layers": 32, "rope_scaling": LLAMA31},
                     (5e5, 128, 8, False, (8, 1, 4, 8192))),
    "Llama-3.2-1B": ({**_LLAMA3, "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192, "mlp_bias": False,
                      "max_position_embeddings": 131072, "num_hidden_layers": 16, "tie_word_embeddings": True,
                      "rope_scaling": {**LLAMA31, "factor": 32.0}}, (5e5, 64, 8, True, (32, 1, 4, 8192)))}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(name: str) -> None:
  raw, want = PUBLISHED[name]
  config = ModelConfig.from_hf(raw)
  assert (config.rope_theta, config.head_dim, config.num_kv_heads, config.tie_embeddings, config.rope_scaling) == want
  assert config.max_positions == raw["max_position_embeddings"]
  assert (config.qkv_bias, config.qk_norm) == (raw["model_type"] == "qwen2", raw["model_type"] == "qwen3")


# Every key that transformers 4 wrote with to_dict, beside those of the model, where it is not None, False or empty.
_TRANSFORMERS4 = {
    "return_dict": True, "chunk_size_feed_forward": 0, "max_length": 20, "min_length": 0, "num_beams": 1,
    "num_beam_groups": 1, "diversity_penalty": 0.0, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "typical_p": 1.0,
    "repetition_penalty": 1.0, "length_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0,
    "num_return_sequences": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "use_cache": True,
    "_attn_implementation_autoset": True, "torch_dtype": "float32", "transformers_version": "4.57.0",
    "_name_or_path": "somewhere", "pruned_heads": {}, "torchscript": False, "is_decoder": False}


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Llama", "Mistral", "Granite"])
def test_all_that_transformers_writes_is_known(family: str, tmp_path: Path) -> None:
  window = {"sliding_window": None} if family == "Mistral" else {}
  config = getattr(transformers, f"{family}Config")(**{k: v for k, v in PLAIN.items() if k != "model_type"}, **window)
  config.architectures = [f"{family}ForCausalLM"]
  config.save_pretrained(tmp_path)
  want = ModelConfig.from_hf(json.loads((tmp_path / "config.json").read_text()))
  assert ModelConfig.from_hf(config.to_dict()) == want
  assert ModelConfig.from_hf({**config.to_dict(), **_TRANSFORMERS4}) == want


def test_missing_keys_have_defaults() -> None:
  """They mean what they mean in transformers."""
  few = {k: v for k, v in PLAIN.items() if k not in ("num_key_value_heads", "tie_word_embeddings")}
  expected = ModelConfig(vocab_size=61, hidden_size=48, intermediate_size=80, num_layers=2, num_heads=4, num_kv_heads=4,
                         head_dim=12, rope_theta=10_000.0, rms_norm_eps=1e-6, tie_embeddings=False, qkv_bias=False)
  assert ModelConfig.from_hf(few) == expected
  few["sliding_window"] = None
  for family in ("Llama", "Qwen2", "Qwen3", "Mistral", "Granite"):
    for change in ({"num_attention_heads": 64, "hidden_size": 128}, {"num_key_value_heads": None}, {"head_dim": 8}):
      raw = {**few, "num_key_value_heads": 4, **change, "model_type": family.lower()}
      if "hidden_size" in change:
        del raw["num_key_value_heads"]
      if family == "Mistral" and None in change.values():
        continue  # its class takes no null
      theirs = getattr(transformers, f"{family}Config")(**{k: v for k, v in raw.items() if k != "model_type"})
      ours = ModelConfig.from_hf(raw)
      assert ours.num_kv_heads == theirs.num_key_value_heads, (family, change)
      derived = theirs.hidden_size // theirs.num_attention_heads
      assert ours.head_dim == (getattr(theirs, "head_dim", None) or derived), (family, change)
