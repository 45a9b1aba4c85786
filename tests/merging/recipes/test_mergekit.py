"""Merging beside mergekit in its float32 mode; mergekit is not a dependency, so this runs where it is pointed at:

    python -m venv /tmp/mergekit && /tmp/mergekit/bin/pip install mergekit==0.1.5
    MERGEKIT_YAML=/tmp/mergekit/bin/mergekit-yaml python -m pytest tests/merging/recipes/test_mergekit.py
"""

import json
import os
import subprocess
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import yaml

from imm_jax.merging import on_disk
from imm_jax.merging.recipes import mergekit, recipe
from imm_jax.model import safetensors

PROGRAM = os.environ.get("MERGEKIT_YAML")
pytestmark = pytest.mark.skipif(not PROGRAM, reason="set MERGEKIT_YAML to mergekit's program")

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_NORMAL = np.float32(2.0**-126)
ROWS = {"self_attn.q_proj.weight": (7, 5), "self_attn.k_proj.weight": (64, 33), "self_attn.v_proj.weight": (1, 1),
        "self_attn.o_proj.weight": (3, 129), "self_attn.q_proj.bias": (7,), "self_attn.k_proj.bias": (64,),
        "self_attn.v_proj.bias": (1,), "mlp.gate_proj.weight": (31, 64), "mlp.up_proj.weight": (2, 1000),
        "mlp.down_proj.weight": (40, 40), "input_layernorm.weight": (5,), "post_attention_layernorm.weight": (5,)}
SHAPES = {"model.embed_tokens.weight": (50, 24), "model.norm.weight": (24,), "lm_head.weight": (50, 24),
          **{f"model.layers.{i}.{name}": shape for i in range(3) for name, shape in ROWS.items()}}


def adversarial(kind: str, shape: tuple[int, ...], base: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """A tuned tensor near the base."""
  delta = {"random": lambda: 0.01 * rng.normal(size=shape), "zero": lambda: np.zeros(shape),
           "heavy": lambda: 0.01 * rng.standard_t(1.2, size=shape),
           "sparse": lambda: rng.normal(size=shape) * (rng.random(shape) < 0.2)}[kind]()
  return base + delta


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
  root, rng = tmp_path_factory.mktemp("models"), np.random.default_rng(0)
  base = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
  # Everything cancels, subnormals, and numbers of either sign of zero.
  base["model.layers.0.self_attn.k_proj.bias"][:] = 1e-39
  base["model.layers.1.self_attn.k_proj.bias"][:] = -0.0
  kinds = ["random", "heavy", "zero", "sparse"]
  trees = {"base": base} | {
      model: {name: adversarial(kinds[(i + j) % 4], x.shape, x, rng) for j, (name, x) in enumerate(base.items())}
      for i, model in enumerate(("a", "b", "c"))}
  result = {}
  for model, tree in trees.items():
    folder = result[model] = root / model
    folder.mkdir()
    safetensors.write(folder / "model.safetensors", [
        (name, BFLOAT16, x.shape, lambda x=x: [x.astype(BFLOAT16)]) for name, x in tree.items()])
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 24, "intermediate_size": 64,
        "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 50,
        "tie_word_embeddings": False}))
  return result


def both(made: dict, folders: dict[str, Path], root: Path, out_dtype: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """By tensor: what mergekit wrote, and what we write, from one recipe."""
  text = yaml.safe_dump({**made, "dtype": "float32", "out_dtype": out_dtype})
  for model, folder in folders.items():
    text = text.replace(f"@{model}@", str(folder))
  (root / "recipe.yml").write_text(text)
  subprocess.run([PROGRAM, root / "recipe.yml", root / "theirs", "--quiet"], check=True, capture_output=True)
  ours = mergekit.read(root / "recipe.yml")
  with on_disk.CheckpointSource(ours.models) as source:
    plan = recipe.build_plan(source, ours.method, ours.options)
    on_disk.merge(source, [on_disk.Output(root / "ours", plan, recipe.DTYPES[ours.dtype])],
                  key=np.zeros(2, np.uint32))
  theirs = {n: x for file in (root / "theirs").glob("*.safetensors") for n, x in safetensors.read(file).items()}
  mine = safetensors.read(root / "ours/model.safetensors")
  assert mine.keys() == theirs.keys() == SHAPES.keys()
  return {name: (theirs[name], mine[name]) for name in theirs}


def entry(model: str, **parameters) -> dict:
  return {"model": f"@{model}@", "parameters": parameters}


def is_subnormal(x: np.ndarray) -> np.ndarray:
  return np.abs(x.astype(np.float32)) < _NORMAL


def ulps(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Distance in units of the last place of bfloat16; subnormals count as zero, which is what XLA makes of them."""
  def position(values: np.ndarray) -> np.ndarray:
    bits = np.where(is_subnormal(values), 0, values.view(np.uint16)).astype(np.int64)
    return np.where(bits & 0x8000, -(bits & 0x7FFF), bits)
  return np.abs(position(x) - position(y))


@pytest.mark.parametrize("made", [
    {"models": [entry("a", weight=0.3), entry("b", weight=0.7)]},
    {"models": [entry("a", weight=0.31), entry("b", weight=0.17), entry("c", weight=-1.3)]},
    {"models": [entry("a", weight=[0.0, 0.9]), entry("b", weight=1.1)]},
    {"models": [entry("a", weight=0.3), entry("b", weight=0.6)], "parameters": {"normalize": False}}])
def test_linear_equals_mergekit(made: dict, folders: dict[str, Path], tmp_path: Path):
  """Every element is equal in float32."""
  for name, (theirs, mine) in both({"merge_method": "linear", **made}, folders, tmp_path, "float32").items():
    small = is_subnormal(theirs)
    np.testing.assert_array_equal(mine[~small], theirs[~small], name)
    assert (mine[small] == 0).all() or (np.abs(mine[small]) <= _NORMAL).all()


# A density of its own for every tensor.
EACH = [{"filter": name, "value": 0.3 + 0.01 * i} for i, name in enumerate(sorted(SHAPES))] + [{"value": 1.0}]


def undecided(made: dict, folders: dict[str, Path]) -> dict[str, np.ndarray]:
  """Where trimming has no one answer: several entries have the magnitude of the last that stays or the first that goes.

  mergekit keeps whichever its sort puts first, we keep all.
  """
  stored = {m: safetensors.read(folder / "model.safetensors") for m, folder in folders.items()}
  read = lambda model: {n: x.astype(np.float32) for n, x in stored[model].items()}
  base, result = read("base"), {name: np.zeros(shape, bool) for name, shape in SHAPES.items()}
  gamma = made.get("parameters", {}).get("gamma", 0)
  for name, entry_ in ((n, m) for n in SHAPES for m in made["models"]):
    magnitude = np.abs(read(entry_["model"].strip("@"))[name] - base[name])
    density = entry_["parameters"].get("density", made.get("parameters", {}).get("density"))
    density = density if isinstance(density, float) else next(
        f["value"] for f in density if f.get("filter", "") in name)
    size, kept = magnitude.size, int(density * magnitude.size) or (made["merge_method"] == "ties")
    first = max(0, size - kept - int(gamma * size))
    order = np.sort(magnitude, axis=None)
    for before, after in ((first - 1, first), (first + kept - 1, first + kept)):
      # Zeros may stay or go: they change nothing.
      if before >= 0 and after < size and order[before] == order[after] and order[after]:
        result[name] |= magnitude == order[before]
  return result


@pytest.mark.parametrize("made", [
    {"merge_method": "task_arithmetic", "models": [entry("a", weight=0.8), entry("b", weight=-0.4)]},
    {"merge_method": "task_arithmetic", "models": [entry("a", weight=0.8), entry("b", weight=0.4)],
     "parameters": {"normalize": True, "lambda": 0.7}},
    {"merge_method": "ties",
     "models": [entry(m, weight=w, density=EACH) for m, w in (("a", 0.8), ("b", 0.5), ("c", 1))]},
    {"merge_method": "ties", "models": [entry("a", weight=1), entry("b", weight=1)],
     "parameters": {"density": EACH, "normalize": False, "lambda": 0.5}},
    {"merge_method": "ties", "models": [entry("b", weight=1, density=0.3)]},
    {"merge_method": "breadcrumbs_ties", "models": [entry("a", weight=0.8), entry("b", weight=0.5)],
     "parameters": {"density": 0.6, "gamma": 0.05}},
    {"merge_method": "della_linear", "models": [entry("a", weight=0.8)], "parameters": {"density": 1.0}},
    {"merge_method": "nuslerp", "models": [entry("a", weight=0.8), entry("b", weight=0.4)]},
    {"merge_method": "nuslerp", "models": [entry("a", weight=0.8), entry("b", weight=0.4)],
     "parameters": {"nuslerp_flatten": False}},
    {"merge_method": "ram", "models": [entry("a"), entry("b")], "parameters": {"epsilon": 0.003}},
    {"merge_method": "ramplus_tl", "models": [entry("a"), entry("b")], "parameters": {"epsilon": 0.003, "r": 0.5}},
    {"merge_method": "karcher", "models": [entry("a"), entry("b"), entry("c")]},
    {"merge_method": "nearswap", "models": [entry("a")], "parameters": {"t": 0.003}},
    {"merge_method": "arcee_fusion", "models": [entry("a")]},
    {"merge_method": "model_stock", "models": [entry("a"), entry("b"), entry("c")],
     "parameters": {"filter_wise": True}},
    {"merge_method": "breadcrumbs", "models": [entry("a", weight=0.8), entry("b", weight=0.5)],
     "parameters": {"density": 0.6, "gamma": 0.05}},
    {"merge_method": "dare_linear", "models": [entry("a", weight=0.8), entry("b", weight=0.5)],
     "parameters": {"density": 1.0}},
    {"merge_method": "dare_ties", "models": [entry("a", weight=0.8), entry("b", weight=0.5)],
     "parameters": {"density": 1.0}},
    {"merge_method": "della", "models": [entry("a", weight=0.8), entry("b", weight=0.5)],
     "parameters": {"density": 1.0}},
    {"merge_method": "slerp", "models": [entry("base"), entry("a")], "parameters": {"t": 0.3}},
    {"merge_method": "slerp", "models": [entry("a")],
     "parameters": {"t": [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"filter": "mlp", "value": [1, 0.2]},
                          {"value": 0.5}]}},
    {"merge_method": "model_stock", "models": [entry("a"), entry("b"), entry("c")]}],
    ids=lambda made: made["merge_method"])
def test_methods_agree_with_mergekit(made: dict, folders: dict[str, Path], tmp_path: Path):
  """They differ by at most one unit of bfloat16 in the last place."""
  different = {}
  skip = undecided(made, folders) if made["merge_method"] in ("ties", "breadcrumbs", "breadcrumbs_ties") else {}
  assert sum(mask.mean() for mask in skip.values()) < 0.2 * len(SHAPES)
  for name, (theirs, mine) in both({"base_model": "@base@", **made}, folders, tmp_path, "bfloat16").items():
    distance = ulps(theirs, mine)[~skip.get(name, np.zeros(mine.shape, bool))]
    if distance.max(initial=0) > 1:
      different[name] = (int((distance > 1).sum()), int(distance.max()))
  assert different == {}


def test_sce_agrees_with_mergekit(folders: dict[str, Path], tmp_path: Path):
  """Of entries with the same variance mergekit selects some and we select all, which changes the weights, too."""
  stored = [safetensors.read(folders[m] / "model.safetensors") for m in ("base", "a", "b", "c")]
  shares = []
  for name in sorted(SHAPES):
    start, *tuned = (model[name].astype(np.float32) for model in stored)
    variance = np.var([(x - start).astype(np.float64) for x in tuned], axis=0)
    order = np.sort(variance[variance > 0])[::-1]
    edges = np.flatnonzero(order[:-1] > order[1:] * 1.00001) + 1
    if edges.size:
      kept = edges[np.abs(edges - 0.4 * order.size).argmin()]
      shares.append({"filter": name, "value": float((kept + 0.5) / order.size)})
  made = {"merge_method": "sce", "base_model": "@base@", "models": [entry("a"), entry("b"), entry("c")],
          "parameters": {"select_topk": [*shares, {"value": 1.0}]}}
  assert len(shares) > 0.7 * len(SHAPES)
  for name, (theirs, mine) in both(made, folders, tmp_path, "bfloat16").items():
    assert ulps(theirs, mine).max(initial=0) <= 1, name


def test_dare_rescaling_differs_from_mergekit(folders: dict[str, Path], tmp_path: Path):
  """1 / (1 - p), so that the mean over masks stays; mergekit's factor depends on the mask that was drawn."""
  made = {"merge_method": "dare_linear", "base_model": "@base@", "models": [entry("a", weight=1, density=0.5)]}
  base, tuned = (safetensors.read(folders[m] / "model.safetensors")["model.embed_tokens.weight"].astype(np.float32)
                 for m in ("base", "a"))
  theirs, mine = both(made, folders, tmp_path, "float32")["model.embed_tokens.weight"]
  ratio = lambda merged: np.unique(np.round((merged - base)[(tuned != base) & (merged != base)]
                                            / (tuned - base)[(tuned != base) & (merged != base)], 2))
  assert ratio(mine).tolist() == [2.0]
  assert ratio(theirs).tolist() != [2.0]
