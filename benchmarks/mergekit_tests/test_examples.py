"""Merges example recipes with random models of as many layers as each recipe takes."""

import os
import re
from pathlib import Path

import pytest
import transformers as tf
import yaml
from mergekit.config import MergeConfiguration
from tests.common import run_and_check_merge, save_random

FILES = sorted(Path(os.environ["RECIPES_EXAMPLES"]).glob("*.y*ml")) if os.environ["RECIPES_EXAMPLES"] else []


def _names(tree):
  if isinstance(tree, dict):
    for key, value in tree.items():
      yield from [value] if key in ("model", "base_model") and isinstance(value, str) else _names(value)
  elif isinstance(tree, list):
    for value in tree:
      yield from _names(value)


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_example(path, tmp_path):
  text = path.read_text()
  layers = max([int(end) for end in re.findall(r"layer_range: *\[ *\d+, *(\d+)", text)], default=6)
  for i, name in enumerate(sorted(set(_names(yaml.safe_load(text))))):
    config = tf.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4,
                            num_hidden_layers=layers)
    folder = save_random(config, tf.LlamaForCausalLM, tmp_path / str(i))
    text = re.sub(rf"(model: +){re.escape(name)}(?=\s|$)", rf"\g<1>{folder}", text)
  text = re.sub(r"(?m)^dtype: .*$", "dtype: float32", text)  # float16 has no small values of the random weights
  run_and_check_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), text=text)
