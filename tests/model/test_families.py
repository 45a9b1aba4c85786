"""The tables of families and keys against the classes and sources of the installed transformers."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import transformers

from imm_jax.errors import UserError
from imm_jax.model import hf_keys
from imm_jax.model.config import ModelConfig
from imm_jax.model.families import COMMON, FAMILIES
from tests import REPO

_SOURCES = Path(transformers.__file__).parent
_PUBLISHED = REPO.parent / "shared/checkpoints/configs.jsonl"
# `config.key` and `getattr(config, "key")`, but no methods.
_READS = re.compile(r"(?:\b(?:self\.)?(?:text_|model\.)?config\.(?!json)([a-z]\w*)\b(?!\()"
                    r"|(?:get|has)attr\((?:self\.)?(?:model\.)?(?:text_)?config, \"(\w+)\")")
_SHARED = ("masking_utils", "cache_utils", "modeling_rope_utils", "modeling_layers", "modeling_utils", "initialization",
           "configuration_utils", "integrations/sdpa_attention")


def _config_class(family: str) -> type[transformers.PreTrainedConfig]:
  return getattr(transformers, FAMILIES[family].architecture.replace("ForCausalLM", "Config"))


def _keys_read_in(file: str) -> set[str]:
  return {first or second for first, second in _READS.findall((_SOURCES / f"{file}.py").read_text())}


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_keys_are_known(family: str) -> None:
  """These are all keys that transformers declares or reads."""
  declared = {field.name for field in dataclasses.fields(_config_class(family))}
  read = _keys_read_in(f"models/{family}/modeling_{family}")
  assert {"hidden_act", "rms_norm_eps"} <= read & declared  # or the pattern has grown old
  shared = {key for file in _SHARED for key in _keys_read_in(file)}
  assert {"sliding_window", "attention_chunk_size", "per_layer_config"} <= shared
  shared |= transformers.GenerationConfig._get_default_generation_params().keys()
  methods = {key for key in shared if hasattr(transformers.PreTrainedConfig, key)} - declared
  assert declared | read | shared - methods <= hf_keys.known_keys(FAMILIES[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_and_defaults_are_those_of_the_class(family: str) -> None:
  defaults = {field.name: field.default for field in dataclasses.fields(_config_class(family))}
  for key, default in {**COMMON, **FAMILIES[family].keys}.items():
    assert defaults[key] == default, key
  assert FAMILIES[family].windows_by_layer == ("max_window_layers" in defaults)
  assert (FAMILIES[family].qkv_bias is None) == ("attention_bias" in defaults)
  if family == "granite":
    assert "head_dim" not in defaults


@pytest.mark.skipif(not _PUBLISHED.exists(), reason="published configs are not on this machine")
def test_published_configs_get_their_verdict() -> None:
  """Published configs get the verdict that transformers' classes give them."""
  rows = [json.loads(line) for line in _PUBLISHED.read_text().splitlines()]
  assert len(rows) == 83
  for row in rows:
    try:
      ModelConfig.from_hf(row["config"])
      verdict, reason = "accept", ""
    except UserError as e:
      verdict, reason = "refuse", str(e)
    assert verdict == row["expected"], (row["source"], reason)
    if row["why"] == "quantized weights":
      assert "take the unquantized model" in reason
    elif row["why"] == "another architecture":
      assert "architectures=" in reason
