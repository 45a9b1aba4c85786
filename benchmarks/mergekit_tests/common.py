"""Stands in for the module `common` of mergekit's tests: merges each recipe with mergekit in float32 and here."""

import itertools
import json
import os
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
import transformers as tf
from mergekit.io import LazyTensorLoader
from mergekit.merge import MergeOptions, run_merge

from imm_jax.merging.recipes import command, mergekit

_SEEDS = itertools.count(1)


def save_random(config, kind, path):
  torch.manual_seed(next(_SEEDS))
  kind(config).save_pretrained(path, safe_serialization=True)
  return str(path)


def make_picollama(path, vocab_size=64):
  return _make_small(tf.LlamaConfig, tf.LlamaForCausalLM, path, vocab_size)


def make_picogranite(path, vocab_size=64):
  return _make_small(tf.GraniteConfig, tf.GraniteForCausalLM, path, vocab_size)


def _make_small(config, kind, path, vocab_size):
  return save_random(config(vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_attention_heads=16,
                            num_hidden_layers=2), kind, path)


def make_gpt2size(path, vocab_size=64):
  config = tf.GPT2Config(n_ctx=128, n_embd=32, n_head=4, n_layer=12, vocab_size=vocab_size)
  return save_random(config, tf.GPT2LMHeadModel, path)


def make_picoLlaVa(path, vocab_size=64):  # noqa: N802  mergekit's name
  vision = tf.CLIPVisionConfig(image_size=32, patch_size=8, num_hidden_layers=2, num_attention_heads=2, hidden_size=32,
                               intermediate_size=48)
  text = tf.LlamaConfig(vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_attention_heads=2,
                        num_hidden_layers=2)
  return save_random(tf.LlavaConfig(vision_config=vision, text_config=text, image_seq_length=16, image_token_index=4),
                     tf.LlavaForConditionalGeneration, path)


def _position(values):
  values = values.astype(ml_dtypes.bfloat16)
  bits = np.where(np.abs(values.astype(np.float32)) < 2.0**-126, 0, values.view(np.uint16)).astype(np.int64)
  return np.where(bits & 0x8000, -(bits & 0x7FFF), bits)


def _ulps(ours, theirs):
  differences = {}
  a, b = LazyTensorLoader.from_disk(ours), LazyTensorLoader.from_disk(theirs)
  names = set(a.index.tensor_paths) | set(b.index.tensor_paths)
  for name in names:
    x, y = a.get_tensor(name, raise_on_missing=False), b.get_tensor(name, raise_on_missing=False)
    if x is None or y is None or x.shape != y.shape:
      differences[name] = "missing here" if x is None else "missing there" if y is None else "other shape"
      continue
    x, y = x.float().numpy(), y.float().numpy()
    # What float32 loses to cancellation has the size of the largest entry; it can be many units of a small one.
    apart = np.abs(x - y) > 1e-6 * np.abs(y).max(initial=0)
    differences[name] = int((np.abs(_position(x) - _position(y)) * apart).max(initial=0))
  lacking = [name for name, difference in differences.items() if isinstance(difference, str)]
  return {"tensors": len(names), "furthest": max((n for n in differences.values() if isinstance(n, int)), default=0),
          "lacking": lacking[:2]}


def run_and_check_merge(config, check_nan=True, check_tensors=True, validate=None, auto_arch=False, text="", **_):
  with tempfile.TemporaryDirectory() as root:
    plain = config.model_copy(update={"dtype": "float32"})
    row = {"test": os.environ["PYTEST_CURRENT_TEST"].split("::")[-1].split(" ")[0], "method": config.merge_method}
    (Path(root) / "recipe.yml").write_text(text or config.to_yaml())
    try:
      try:
        run_merge(plain, f"{root}/theirs", options=MergeOptions())
      except Exception as e:
        row["theirs"] = f"{type(e).__name__}: {e}"[:120]
      made = mergekit.read(Path(root) / "recipe.yml")
      command.merge({Path(root) / "ours": made}, command.OutputOptions())
      if "theirs" not in row:
        row["different"] = _ulps(f"{root}/ours", f"{root}/theirs")
      if validate:
        validate(f"{root}/ours")
      if not auto_arch:
        tf.AutoModelForCausalLM.from_pretrained(f"{root}/ours")
      row["ran"] = True
    except Exception as e:
      row["error"] = f"{type(e).__name__}: {e}".splitlines()[0][:300]
      raise (RuntimeError if "theirs" in row and row["theirs"].startswith("RuntimeError") else
             ValueError if "theirs" in row else type(e))(str(e)) from e
    finally:
      with open(os.environ["RECIPES_OUT"], "a") as file:
        file.write(json.dumps(row) + "\n")
