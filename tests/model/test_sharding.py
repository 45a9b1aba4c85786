"""Meshes, placement and a training step on eight faked devices.

The device count is fixed when jax starts, so this file runs itself in another process (`_main`), which leaves what it
saw in a folder; the tests look at that.
"""

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imm_jax.errors import UserError
from imm_jax.model import hf, sharding
from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import Params, abstract_params
from imm_jax.training import optimization, step as training
from imm_jax.training.computation import Computation

pytestmark = pytest.mark.full  # the other process takes a while

CONFIG = ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2,
                     head_dim=8, rope_theta=1e4, rms_norm_eps=1e-6, tie_embeddings=False, qkv_bias=True)
HF_CONFIG = {"model_type": "qwen2", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
             "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
# By axis, the mesh axes that split it; tensors that do not stand here are whole on every device.
BOTH = ("tensor", "fsdp")
SPLIT = {"embed_tokens.weight": (BOTH, ()), "lm_head.weight": (BOTH, ()),
         **{f"layers.self_attn.{name}_proj.weight": ((), BOTH, ()) for name in "qkv"},
         **{f"layers.self_attn.{name}_proj.bias": ((), ("tensor",)) for name in "qkv"},
         "layers.self_attn.o_proj.weight": ((), ("fsdp",), ("tensor",)),
         "layers.mlp.gate_proj.weight": ((), BOTH, ()), "layers.mlp.up_proj.weight": ((), BOTH, ()),
         "layers.mlp.down_proj.weight": ((), ("fsdp",), ("tensor",))}
LEARNING_RATE = 1e-2
STEPS = 20
FITTING = {(8, 1, 1): (8, 1, 1), (1, 8, 1): (1, 8, 1), (2, 4, 1): (2, 4, 1), (-1, 1, 1): (8, 1, 1),
           (1, -1, 1): (1, 8, 1), (-1, 2, 1): (4, 2, 1), (4, -1, 1): (4, 2, 1), (1, -1, 2): (1, 4, 2),
           (2, 2, -1): (2, 2, 2)}
NOT_FITTING = [(1, 1, 1), (2, 2, 1), (16, 1, 1), (4, 4, 1), (3, -1, 1), (-1, 3, 1), (-1, 16, 1), (16, -1, 1),
               (-1, -1, 1), (0, 8, 1), (0, -1, 1), (-1, 0, 1), (-2, -4, 1), (-2, 4, -1), (1, -1, 3), (1, 8, 2)]
# Mesh sizes, and how the step is run on them.
MESHES = {"one": ((1, 1, 1), {}), "data2": ((2, 1, 1), {}), "data4": ((4, 1, 1), {"accumulation": 2}),
          "fsdp2-tensor2": ((1, 2, 2), {"remat": "dots"}),
          "fsdp4": ((1, 4, 1), {"remat": "attention", "accumulation": 2}),
          "fsdp8": ((1, 8, 1), {"remat": "full", "chunk": 5}),
          "data2-fsdp4": ((2, 4, 1), {"remat": "dots", "chunk": 16}),
          "fsdp4-tensor2": ((1, 4, 2), {"chunk": 7}), "data2-fsdp2-tensor2": ((2, 2, 2), {"accumulation": 2})}


def _main(out: Path) -> None:
  """Runs on eight devices."""
  seen: dict[str, Any] = {"meshes": {}, "devices": jax.device_count()}
  for sizes in (*FITTING, *NOT_FITTING):
    try:
      data, fsdp, tensor = sizes
      seen["meshes"][str(sizes)] = list(sharding.make_mesh(data=data, fsdp=fsdp, tensor=tensor).shape.values())
    except UserError as e:
      seen["meshes"][str(sizes)] = str(e)
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: rng.normal(scale=0.2, size=leaf.shape).astype(np.float32), abstract_params(CONFIG))
  hf.save(params, out / "checkpoint")
  (out / "checkpoint" / "config.json").write_text(json.dumps(HF_CONFIG))
  half = np.arange(16) // 8
  batch = {"tokens": rng.integers(0, 64, (8, 16), np.int32), "weights": rng.integers(0, 2, (8, 16)).astype(np.float32),
           "positions": np.tile(np.arange(16, dtype=np.int32) % 8, (8, 1)),
           "segment_ids": np.tile((half + 1).astype(np.int32), (8, 1))}
  for name, (sizes, options) in MESHES.items():
    mesh = jax.make_mesh(sizes, sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3,
                         devices=jax.devices()[:int(np.prod(sizes))])
    seen[name] = _step(out, name, mesh, batch, **options)
  odd = sharding.param_sharding(sharding.make_mesh(data=1, fsdp=8), "embed_tokens.weight", (60, 32))
  seen["odd"] = odd.is_fully_replicated
  (out / "seen.json").write_text(json.dumps(seen))


def _step(out: Path, name: str, mesh: jax.sharding.Mesh, batch: dict[str, np.ndarray], *, chunk: int = 0,
          **computation: Any) -> dict[str, Any]:
  config, params = hf.load(out / "checkpoint", place=functools.partial(sharding.param_sharding, mesh))
  assert config == CONFIG
  np.savez(out / f"{name}-loaded.npz", **_flat(params))
  optimizer = optimization.make_optimizer(weight_decay=0.1, grad_clip=1.0)
  state = training.init_state(params, optimizer, mesh)
  before = _shards(state)
  placed = jax.device_put(batch, jax.sharding.NamedSharding(mesh, sharding.BATCH))
  step = training.make_train_step(config, optimizer, Computation(mesh, jnp.float32, **computation), chunk=chunk)
  state, metrics = step(state, placed, LEARNING_RATE)
  np.savez(out / f"{name}-params.npz", **_flat(state["params"]))
  np.savez(out / f"{name}-mu.npz", **_flat(_moments(state)["mu"]))
  after, metrics = _shards(state), {k: float(v) for k, v in metrics.items()}
  losses = []
  for i in range(1, STEPS):
    turned = {key: np.roll(rows, i, axis=0) for key, rows in batch.items()}
    state, more = step(state, jax.device_put(turned, jax.sharding.NamedSharding(mesh, sharding.BATCH)),
                       LEARNING_RATE)
    losses.append(float(more["loss"]))
  np.savez(out / f"{name}-trained.npz", **_flat(state["params"]))
  return {"before": before, "after": after, "metrics": metrics, "losses": losses,
          "batch": [len(placed["tokens"].sharding.device_set), *placed["tokens"].addressable_shards[0].data.shape]}


def _moments(state: training.TrainState) -> dict[str, Params]:
  adam = next(s for s in jax.tree.leaves(state["opt_state"], is_leaf=lambda x: hasattr(x, "mu")) if hasattr(s, "mu"))
  return {"mu": adam.mu, "nu": adam.nu}


def _flat(tree: Params) -> dict[str, jax.Array]:
  return {".".join(p.key for p in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _shards(state: training.TrainState) -> dict[str, dict[str, Any]]:
  """For parameters and moments, by path: shape, shape on one device, and which device holds which part."""
  trees = {"params": state["params"], **_moments(state)}
  return {kind: {path: [list(leaf.shape), list(leaf.addressable_shards[0].data.shape),
                        sorted([s.device.id, str(s.index)] for s in leaf.addressable_shards)]
                 for path, leaf in _flat(tree).items()} for kind, tree in trees.items()}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, run_on_devices: Callable[..., None]) -> Path:
  folder = tmp_path_factory.mktemp("eight-devices")
  run_on_devices(__file__, folder)
  return folder


def test_mesh_sizes_that_fit_take_all_devices(seen: dict[str, Any]) -> None:
  assert seen["devices"] == 8
  assert {sizes: tuple(seen["meshes"][str(sizes)]) for sizes in FITTING} == FITTING


@pytest.mark.parametrize("sizes", NOT_FITTING, ids=str)
def test_mesh_sizes_that_do_not_fit_are_refused(seen: dict[str, Any], sizes: tuple[int, int, int]) -> None:
  message = seen["meshes"][str(sizes)]
  assert isinstance(message, str)
  assert "mesh data={}, fsdp={}, tensor={}".format(*sizes) in message
  assert ("sizes are 1 or more, or -1" if {0, -2} & set(sizes) else "8 device") in message
  assert "\n" not in message


@pytest.mark.parametrize(("count", "hidden_size", "tensor", "slices", "want"), [
    (1, 896, 1, 1, (1, 1, 1)), (16, 896, 1, 1, (2, 8, 1)), (16, 3584, 1, 1, (1, 16, 1)), (256, 3584, 1, 1, (8, 32, 1)),
    (256, 4096, 1, 1, (1, 256, 1)), (512, 4096, 1, 2, (2, 256, 1)), (16, 4096, 4, 1, (1, 4, 4)),
    (8, 100, 1, 1, (8, 1, 1)), (8, 128, 1, 1, (1, 8, 1))])
def test_chosen_mesh_keeps_whole_tiles(count: int, hidden_size: int, tensor: int, slices: int,
                                       want: tuple[int, int, int]) -> None:
  """A parameter that is split leaves whole tiles to each device of a slice."""
  assert sharding.mesh_sizes(count, data=-1, fsdp=-1, tensor=tensor, hidden_size=hidden_size, slices=slices) == want


@pytest.mark.parametrize("mesh", list(MESHES)[1:])
def test_loaded_parameters_follow_the_table(out: Path, seen: dict[str, Any], mesh: str) -> None:
  """They are split as it says."""
  sizes = dict(zip(sharding.AXES, MESHES[mesh][0], strict=True))
  placed = seen[mesh]["before"]["params"]
  assert placed.keys() > SPLIT.keys()
  for path, (shape, on_one, where) in placed.items():
    parts = [int(np.prod([sizes[axis] for axis in axes])) for axes in SPLIT.get(path, ((),) * len(shape))]
    assert on_one == [size // part for size, part in zip(shape, parts, strict=True)], path
    assert len({device for device, _ in where}) == np.prod(list(sizes.values()))
    assert len({index for _, index in where}) == np.prod(parts)
  whole = np.load(out / "one-loaded.npz")
  assert all((np.load(out / f"{mesh}-loaded.npz")[path] == whole[path]).all() for path in whole)


def test_undivided_parameter_is_replicated(seen: dict[str, Any]) -> None:
  """A parameter that the mesh does not divide is whole on every device."""
  assert seen["odd"] is True


@pytest.mark.parametrize("mesh", MESHES)
def test_moments_lie_where_their_parameters_lie(seen: dict[str, Any], mesh: str) -> None:
  before = seen[mesh]["before"]
  assert before["mu"] == before["params"]
  assert before["nu"] == before["params"]


@pytest.mark.parametrize("mesh", MESHES)
def test_a_step_leaves_everything_where_it_lies(seen: dict[str, Any], mesh: str) -> None:
  assert seen[mesh]["after"] == seen[mesh]["before"]


def test_a_batch_is_split_over_both_axes(seen: dict[str, Any]) -> None:
  assert seen["fsdp8"]["batch"] == seen["data2-fsdp4"]["batch"] == [8, 1, 16]
  assert seen["fsdp4-tensor2"]["batch"] == [8, 2, 16]


@pytest.mark.parametrize("mesh", list(MESHES)[1:])
def test_mesh_step_equals_one_device(out: Path, seen: dict[str, Any], mesh: str) -> None:
  """One step on several devices equals that on one."""
  assert seen[mesh]["metrics"] == pytest.approx(seen["one"]["metrics"], rel=1e-6)
  load = lambda name: dict(np.load(out / f"{name}.npz"))
  start, mu, want = load("one-loaded"), load("one-mu"), load("one-params")
  other_mu, got = load(f"{mesh}-mu"), load(f"{mesh}-params")
  for path in want:
    scale = np.abs(mu[path]).max()
    assert scale > 0, path
    np.testing.assert_allclose(other_mu[path], mu[path], rtol=1e-5, atol=1e-5 * scale, err_msg=path)
    # Adam divides a gradient by its size, which leaves nothing but rounding of a tiny one.
    clear = (mu[path] == 0) | (np.abs(mu[path]) > 1e-4 * scale)
    assert clear.mean() > 0.9, path
    np.testing.assert_allclose(got[path][clear], want[path][clear], rtol=1e-6, atol=1e-3 * LEARNING_RATE, err_msg=path)
    assert (np.abs(want[path] - start[path]) > 0.1 * LEARNING_RATE).mean() > 0.5, path


@pytest.mark.parametrize("mesh", list(MESHES)[1:])
def test_twenty_mesh_steps_equal_one_device(out: Path, seen: dict[str, Any], mesh: str) -> None:
  losses = seen["one"]["losses"]
  assert losses[-1] < 0.8 * losses[0]
  assert seen[mesh]["losses"] == pytest.approx(losses, rel=2e-6)
  want, got, start = (np.load(out / f"{name}.npz") for name in ("one-trained", f"{mesh}-trained", "one-loaded"))
  for path in want:
    moved = np.linalg.norm(want[path] - start[path])
    assert moved > 0, path
    # Adam's first steps move an entry with a tiny gradient by its sign, which rounding decides.
    assert np.linalg.norm(got[path] - want[path]) < 3e-4 * moved, path


if __name__ == "__main__":
  _main(Path(sys.argv[1]))
