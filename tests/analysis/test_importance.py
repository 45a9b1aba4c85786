"""Layer importance against torch, against removing weights one by one, and on eight faked devices.

The device count is fixed when jax starts, so this file runs itself in another process (`_main`).
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imm_jax.analysis import diversity
from imm_jax.analysis.drift import measure_drift
from imm_jax.analysis.importance import LayerImportance, layer_importance
from imm_jax.analysis.weight_change import spearman
from imm_jax.errors import UserError
from imm_jax.model import hf, sharding
from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import Params, abstract_params, init_params
from imm_jax.training import gradients, step as training_step
from imm_jax.training.computation import Computation
from imm_jax.training.packing import PackedBatches
from tests.training import test_step as t

BLOCK = {**dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "self_attn"),
         **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp")}
# Mesh sizes, and how the gradient is computed on them.
MESHES = {"one": ((1, 1, 1), {}), "fsdp8": ((1, 8, 1), {"remat": "full"}),
          "data2-fsdp4": ((2, 4, 1), {"accumulation": 2}), "fsdp2-tensor2": ((1, 2, 2), {"remat": "dots"})}


def of_module(params: Params, name: str) -> jax.Array:
  return params["layers"][BLOCK[name]][name]["weight"]


def with_module(params: Params, name: str, weight: jax.Array) -> Params:
  block = params["layers"][BLOCK[name]]
  return {**params, "layers": {**params["layers"], BLOCK[name]: {**block, name: {**block[name], "weight": weight}}}}


def make_params(scale: float = 4) -> Params:
  return jax.tree.map(lambda p: p * scale if p.ndim > 1 else p + 0.1, init_params(t.CONFIG, key=jax.random.key(0)))


def place(params: Params, mesh: jax.sharding.Mesh) -> Params:
  return jax.tree_util.tree_map_with_path(lambda path, leaf: jax.device_put(
      leaf, sharding.param_sharding(mesh, sharding.path_name(path), leaf.shape)), params)


def gradient(params: Params, batches: PackedBatches, mesh: jax.sharding.Mesh | None = None, *,
             config: ModelConfig = t.CONFIG, label: str = "importance", **computation) -> Params:
  mesh = mesh or sharding.make_mesh(data=1, fsdp=1)
  return gradients.gradient(config, place(params, mesh), batches,
                             Computation(mesh, jnp.float32, **{"remat": "full", **computation}), label=label)


def second_order(config: ModelConfig, params: Params, batches: PackedBatches,
                 mesh: jax.sharding.Mesh | None = None) -> LayerImportance:
  mesh = mesh or sharding.make_mesh(data=1, fsdp=1)
  params = place(params, mesh)
  sums = gradients.gradient_and_squares(config, params, batches, Computation(mesh, jnp.float32))
  return layer_importance(params, *sums)


def entropy(config: ModelConfig, params: Params, batches: PackedBatches,
            mesh: jax.sharding.Mesh | None = None) -> float:
  mesh = mesh or sharding.make_mesh(data=1, fsdp=1)
  return diversity.token_entropy(config, place(params, mesh), batches, Computation(mesh, jnp.float32))


def beside_the_two(mesh: jax.sharding.Mesh) -> float:
  """What adding a batch's gradient to the sum needs beside parameters and sum, over the parameters' size; compiled."""
  config = dataclasses.replace(t.CONFIG, vocab_size=64, hidden_size=128, intermediate_size=512, num_layers=12)
  placed = lambda shape, dtype, where: jax.ShapeDtypeStruct(shape, dtype, sharding=where)
  params = jax.tree_util.tree_map_with_path(lambda path, leaf: placed(leaf.shape, leaf.dtype, sharding.param_sharding(
      mesh, sharding.path_name(path), leaf.shape)), abstract_params(config))
  size = sum(4 * np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(params))
  rows = (sharding.num_batch_shards(mesh), 16)
  batch = {name: placed(rows, dtype, jax.NamedSharding(mesh, sharding.BATCH)) for name, dtype in {
      "tokens": jnp.int32, "positions": jnp.int32, "segment_ids": jnp.int32, "weights": jnp.float32}.items()}
  sums = (params, placed((), jnp.int32, jax.NamedSharding(mesh, sharding.P())))
  add = gradients.make_accumulate(config, Computation(mesh, jnp.float32, remat="full"))
  memory = training_step.jit_step(add, sums).lower(sums, params, batch).compile().memory_analysis()
  assert memory.argument_size_in_bytes == pytest.approx(2 * size, rel=0.01)
  assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 0.01 * size
  return memory.temp_size_in_bytes / size


def close(got: LayerImportance, want: LayerImportance, rel: float) -> None:
  assert got.modules.keys() == want.modules.keys()
  np.testing.assert_allclose(got.total, want.total, rtol=rel)
  for name, scores in want.modules.items():
    np.testing.assert_allclose(got.modules[name], scores, rtol=rel, err_msg=name)


def _main(out: Path) -> None:
  """Runs on eight devices."""
  batches, few = (t.pack(t.make_examples(count), global_batch=16, row_multiple=16) for count in (60, 8))
  more: dict[str, Any] = {}
  for name, (sizes, options) in MESHES.items():
    mesh = jax.make_mesh(sizes, sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3,
                         devices=jax.devices()[:int(np.prod(sizes))])
    params = make_params()
    grads = gradient(params, batches, mesh, **options)
    scores = layer_importance(params, grads)
    placed = jax.tree_util.tree_map_with_path(
        lambda path, leaf, mesh=mesh: leaf.sharding.is_equivalent_to(
            sharding.param_sharding(mesh, sharding.path_name(path), leaf.shape), leaf.ndim), grads)
    (out / f"{name}.json").write_text(json.dumps(
        {"total": scores.total.tolist(), "modules": {key: value.tolist() for key, value in scores.modules.items()},
         "placed": all(jax.tree.leaves(placed)), "batches": len(batches)}))
    # Gradients are mapped over `fsdp`; the entropy is left to the partitioner on any mesh.
    if name in ("one", "fsdp8"):
      more[f"second order, {name}"] = second_order(t.CONFIG, params, few, mesh).total.tolist()
    if name in ("one", "fsdp2-tensor2"):
      more[f"entropy, {name}"] = entropy(t.CONFIG, params, few, mesh)
      both = (place(p, mesh) for p in (make_params(3), params))
      more[f"drift, {name}"] = measure_drift(t.CONFIG, *both, few, Computation(mesh, jnp.float32))
    np.savez(out / f"{name}.npz", **{sharding.path_name(path): leaf for path, leaf in
                                     jax.tree_util.tree_leaves_with_path(grads)})
  more["memory, data8"] = beside_the_two(sharding.make_mesh(data=8, fsdp=1))
  (out / "more.json").write_text(json.dumps(more))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, run_on_devices) -> Path:
  folder = tmp_path_factory.mktemp("importance")
  run_on_devices(__file__, folder)
  return folder


@pytest.mark.full
@pytest.mark.parametrize("mesh", list(MESHES)[1:])
def test_a_mesh_gives_the_scores_of_one_device(out: Path, mesh: str):
  read = lambda name: json.loads((out / f"{name}.json").read_text())
  scores = lambda seen: LayerImportance(np.array(seen["total"]), {k: np.array(v) for k, v in seen["modules"].items()})
  assert read(mesh)["placed"]
  assert read(mesh)["batches"] > 2
  close(scores(read(mesh)), scores(read("one")), rel=2e-6)
  got, want = np.load(out / f"{mesh}.npz"), np.load(out / "one.npz")
  for path in want:
    np.testing.assert_allclose(got[path], want[path], atol=1e-5 * np.abs(want[path]).max(), err_msg=path)


@pytest.mark.full
def test_meshes_agree_with_one_device(out: Path):
  """A mesh gives the second order, the entropy and the drift of one device."""
  found = json.loads((out / "more.json").read_text())
  np.testing.assert_allclose(found["second order, fsdp8"], found["second order, one"], rtol=5e-6)
  np.testing.assert_allclose(found["entropy, fsdp2-tensor2"], found["entropy, one"], rtol=2e-6)
  np.testing.assert_allclose(found["drift, fsdp2-tensor2"], found["drift, one"], rtol=5e-6)
  assert found["drift, one"][1] > 0.01


@pytest.mark.parametrize("kind", ["qwen2-tied", "llama"])
def test_scores_equal_torch(checkpoint, kind):
  """Those of the whole data are compared."""
  model, folder = checkpoint(kind)
  config, params = hf.load(folder, place=lambda *_: t.replicated())
  examples = t.make_examples(24)
  batches = t.pack(examples, global_batch=6)
  assert len(batches) > 3
  t.torch_loss(model, examples).backward()

  def torch_scores(grad) -> LayerImportance:
    modules = {}
    for name, block in BLOCK.items():
      weights = [getattr(getattr(layer, block), name).weight for layer in model.model.layers]
      modules[name] = np.array([(grad(w).double() * w.double()).abs().sum().item() for w in weights])
    return LayerImportance(sum(modules.values()), modules)

  got = layer_importance(params, gradient(params, batches, config=config))
  close(got, torch_scores(lambda w: w.grad), rel=1e-4)

  # Eq. 3 takes the absolute value last. Taken batch by batch, what cancels would count.
  whole = sum(len(e.response) for e in examples)
  parts = []
  for i in range(0, len(examples), 4):
    model.zero_grad()
    part = examples[i:i + 4]
    (t.torch_loss(model, part) * sum(len(e.response) for e in part) / whole).backward()
    parts.append(torch_scores(lambda w: w.grad).total)
  assert (sum(parts) > 1.3 * got.total).all()


@pytest.mark.full
def test_scores_rank_weights_as_removing_them_does(checkpoint, monkeypatch):
  """In float64, with weights so small that the loss is nearly linear in each."""
  torch = pytest.importorskip("torch")
  from transformers.models.qwen2 import modeling_qwen2

  # Its own goes through float32.
  monkeypatch.setattr(modeling_qwen2.Qwen2RMSNorm, "forward", lambda self, x: self.weight * x * torch.rsqrt(
      x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))
  model, folder = checkpoint("qwen2-tied")
  with torch.no_grad():
    for p in model.parameters():
      p *= 0.1 if p.ndim > 1 else 1
  model.save_pretrained(folder)
  config, params = hf.load(folder, place=lambda *_: t.replicated())
  examples, rng = t.make_examples(30), np.random.default_rng(0)
  grads = gradient(params, t.pack(examples, global_batch=9), config=config)

  model.double()
  ids = torch.zeros(len(examples), 14, dtype=torch.long)  # what follows an example is not seen from it
  learned = torch.zeros(ids.shape)
  for row, e in enumerate(examples):
    ids[row, :len(e.prompt + e.response)] = torch.tensor(e.prompt + e.response)
    learned[row, len(e.prompt):len(e.prompt + e.response)] = 1

  def loss() -> float:
    log_p = model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    assert log_p.dtype == torch.float64
    return -(log_p * learned[:, 1:]).sum().item() / learned.sum().item()

  removed, scored = [], []
  with torch.no_grad():
    whole = loss()
    for name, block in BLOCK.items():
      weights, grad = of_module(params, name), of_module(grads, name)
      for n, i, j in rng.integers(0, weights.shape, (40, 3)):
        entry = getattr(getattr(model.model.layers[n], block), name).weight[i, j]
        before = entry.item()
        entry.fill_(0)
        removed.append(abs(loss() - whole))
        entry.fill_(before)
        scored.append(abs(float(weights[n, i, j]) * float(grad[n, i, j])))
  assert spearman(removed, scored) > 0.99
  assert sum(scored) == pytest.approx(sum(removed), rel=0.05)


@pytest.mark.full
def test_scores_are_independent_of_batches():
  """They also repeat bit for bit."""
  examples, params = t.make_examples(40), make_params()
  grads = {size: gradient(params, t.pack(examples, global_batch=size)) for size in (4, 9, 40)}
  again = gradient(params, t.pack(examples, global_batch=4))
  jax.tree.map(np.testing.assert_array_equal, again, grads[4])
  want = layer_importance(params, grads[40])
  assert (want.total > 0).all()
  for size in (4, 9):
    close(layer_importance(params, grads[size]), want, rel=2e-6)


def test_memory_is_the_parameters_and_one_gradient():
  """With short rows, what else is needed is less than half of the parameters."""
  assert beside_the_two(sharding.make_mesh(data=1, fsdp=1)) < 0.5


@pytest.mark.full
def test_memory_on_copies_of_the_model_is_no_more(out: Path):
  assert json.loads((out / "more.json").read_text())["memory, data8"] < 0.6


def test_the_parameters_are_left_as_they_are():
  params = make_params()
  before = jax.tree.map(np.array, params)
  gradient(params, t.pack(t.make_examples(8)))
  jax.tree.map(np.testing.assert_array_equal, params, before)


def test_one_epoch_holds_every_example_once():
  examples = t.make_examples(30)
  three = t.pack(examples, epochs=3, global_batch=7, row_multiple=2)
  one = three.to_single_epoch()
  assert sorted(i for step in range(len(one)) for i in one.members(step)) == list(range(30))
  assert (one.rows % 2, one.row_length) == (0, three.row_length)
  order = lambda batches: [tuple(tokens) for i in range(len(batches)) for tokens, _, _ in t.segments(batches[i])]
  assert order(one) == order(three)[:30]


def test_a_gradient_that_is_not_finite_is_an_error():
  params = make_params()
  params = with_module(params, "up_proj", of_module(params, "up_proj").at[1, 2, 3].set(jnp.nan))
  with pytest.raises(UserError, match=r"importance: the gradient .* is not finite") as caught:
    gradient(params, t.pack(t.make_examples(8)), label="round 0: importance")
  assert "\n" not in str(caught.value)


if __name__ == "__main__":
  _main(Path(sys.argv[1]))
