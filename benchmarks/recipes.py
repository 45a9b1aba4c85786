"""Runs the recipes of mergekit's own tests with mergekit and with imm_jax, and compares the outputs.

    python benchmarks/recipes.py --workdir=/tmp/merge-recipes

Fetches mergekit's source release with pip into the work folder, installs it into a separate environment on top of this
one's packages, and runs its tests (test_basic_merges, test_tokenizer, test_chat_template) with one change: each recipe
is merged by mergekit in float32 and by imm_jax, and the tests check the output of imm_jax. Prints a Markdown table:
whether a recipe ran, and the largest difference in units in the last place of bfloat16.
"""

import json
import os
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

from absl import app, flags

_WORKDIR = flags.DEFINE_string("workdir", "/tmp/merge-recipes", "Folder for package, environment and outputs.")
_ONLY = flags.DEFINE_string("only", "", "Part of the names of the tests to run.")
MERGEKIT = "mergekit==0.1.5"
REPO = Path(__file__).parent.parent
# Replaces mergekit's tests/common.py, which the release lacks.
COMMON = '''
import json, os, sys, tempfile, traceback
from pathlib import Path
import ml_dtypes, numpy as np
import torch, transformers as tf
from mergekit.io import LazyTensorLoader
from mergekit.merge import MergeOptions, run_merge
from imm_jax.merging import command, mergekit

def _save(config, kind, path, seed=[0]):
  seed[0] += 1
  torch.manual_seed(seed[0])
  kind(config).save_pretrained(path, safe_serialization=True)
  return str(path)

def make_picollama(path, vocab_size=64):
  return _save(tf.LlamaConfig(vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_attention_heads=16,
                              num_hidden_layers=2), tf.LlamaForCausalLM, path)

def make_gpt2size(path, vocab_size=64):
  config = tf.GPT2Config(n_ctx=128, n_embd=32, n_head=4, n_layer=12, vocab_size=vocab_size)
  return _save(config, tf.GPT2LMHeadModel, path)

def make_picogranite(path, vocab_size=64):
  return _save(tf.GraniteConfig(vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_attention_heads=16,
                                num_hidden_layers=2), tf.GraniteForCausalLM, path)

def make_picoLlaVa(path, vocab_size=64):
  vision = tf.CLIPVisionConfig(image_size=32, patch_size=8, num_hidden_layers=2, num_attention_heads=2, hidden_size=32,
                               intermediate_size=48)
  text = tf.LlamaConfig(vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_attention_heads=2,
                        num_hidden_layers=2)
  return _save(tf.LlavaConfig(vision_config=vision, text_config=text, image_seq_length=16, image_token_index=4),
               tf.LlavaForConditionalGeneration, path)

def _position(values):
  values = values.astype(ml_dtypes.bfloat16)
  bits = np.where(np.abs(values.astype(np.float32)) < 2.0**-126, 0, values.view(np.uint16)).astype(np.int64)
  return np.where(bits & 0x8000, -(bits & 0x7FFF), bits)

def _ulps(ours, theirs):
  found = {}
  a, b = LazyTensorLoader.from_disk(ours), LazyTensorLoader.from_disk(theirs)
  names = set(a.index.tensor_paths) | set(b.index.tensor_paths)
  for name in names:
    x, y = a.get_tensor(name, raise_on_missing=False), b.get_tensor(name, raise_on_missing=False)
    if x is None or y is None or x.shape != y.shape:
      found[name] = "missing here" if x is None else "missing there" if y is None else "other shape"
      continue
    x, y = x.float().numpy(), y.float().numpy()
    if np.abs(x - y).max(initial=0) > 1e-5 * np.abs(y).max(initial=0):
      found[name] = int(np.abs(_position(x) - _position(y)).max())
  lacking = [name for name, what in found.items() if isinstance(what, str)]
  return {"tensors": len(names), "furthest": max((n for n in found.values() if isinstance(n, int)), default=0),
          "lacking": lacking[:2]}

def run_and_check_merge(config, check_nan=True, check_tensors=True, validate=None, auto_arch=False, **_):
  with tempfile.TemporaryDirectory() as root:
    plain = config.model_copy(update={"dtype": "float32"})
    row = {"test": os.environ["PYTEST_CURRENT_TEST"].split("::")[-1].split(" ")[0], "method": config.merge_method}
    text = config.to_yaml()
    (Path(root) / "recipe.yml").write_text(text)
    try:
      try:
        run_merge(plain, f"{root}/theirs", options=MergeOptions())
      except Exception as e:
        row["theirs"] = f"{type(e).__name__}: {e}"[:120]
      made = mergekit.read(Path(root) / "recipe.yml")
      command.merge({Path(root) / "ours": made}, command.How())
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
        file.write(json.dumps(row) + "\\n")
'''


def main(_: list[str]) -> None:
  root = Path(_WORKDIR.value).resolve()
  home = root / "environment"
  if not home.exists():
    venv.create(home, with_pip=True)
    places = [path for path in sys.path if path.endswith("site-packages")]
    packages = next(home.glob("lib/python*/site-packages"))
    (packages / "beside.pth").write_text("\n".join([*places, str(REPO)]) + "\n")
    subprocess.run([home / "bin/pip", "install", "--quiet", "--no-deps", MERGEKIT, "immutables"], check=True)
    subprocess.run([home / "bin/pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "-d", root, MERGEKIT],
                   check=True)
  package = next(root.glob("mergekit-*.tar.gz"))
  with tarfile.open(package) as archive:
    archive.extractall(root, filter="data")
  source = root / package.name.removesuffix(".tar.gz")
  (source / "tests/common.py").write_text(COMMON)
  (source / "tests/__init__.py").touch()
  out = root / "results.jsonl"
  out.unlink(missing_ok=True)
  environment = {**os.environ, "RECIPES_OUT": str(out), "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{REPO}:{source}",
                 "CUDA_VISIBLE_DEVICES": ""}
  names = [f"tests/test_{name}.py" for name in ("basic_merges", "tokenizer", "chat_template")]
  subprocess.run([home / "bin/python", "-m", "pytest", "-q", "--tb=line", "-o", "addopts=", *names, "-k", _ONLY.value],
                 cwd=source, env=environment, check=False)
  rows = [json.loads(line) for line in out.read_text().splitlines()]
  print("\n| recipe | method | here | furthest, bfloat16's last places | mergekit |\n|---|---|---|---|---|")
  for row in rows:
    here = "ran" if row.get("ran") else row.get("error")
    found = row.get("different", {})
    far = f"names differ, such as {found['lacking'][0]}" if found.get("lacking") else found.get("furthest", "")
    print(f"| {row['test']} | {row['method']} | {here} | {far} | {row.get('theirs', 'ran')} |")
  print(f"\n{sum(bool(row.get('ran')) for row in rows)} of {len(rows)} recipes ran.")


if __name__ == "__main__":
  app.run(main)
