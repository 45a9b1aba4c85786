"""SFT interventions: closed forms, exact masks, and resumed runs; on one and on eight simulated devices.

The device count is fixed when jax starts, so this file runs itself in another process (`_main`).
"""

import functools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from imm_jax.errors import PreemptedError
from imm_jax.model import sharding
from imm_jax.model.decoder import Params, init_params
from imm_jax.training import gradients, interventions, optimization, step as training, trainer
from imm_jax.training.computation import Computation
from imm_jax.training.interventions import Intervention
from imm_jax.training.optimization import Optimization
from imm_jax.training.reporting import Reporting
from imm_jax.training.states import Checkpoints
from tests.training import test_step as t

TOP_P = 0.3
STEPS = 6
MESHES = {"fsdp8": (1, 8, 1), "data2-fsdp2-tensor2": (2, 2, 2)}


def make_mesh(sizes: tuple[int, int, int] = (1, 1, 1)) -> jax.sharding.Mesh:
  return jax.make_mesh(sizes, sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3,
                       devices=jax.devices()[:int(np.prod(sizes))])


def flat(tree: Params) -> dict[str, np.ndarray]:
  return {sharding.path_name(path): np.array(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def make_params(mesh: jax.sharding.Mesh) -> Params:
  params = jax.tree.map(lambda p: p * 4 if p.ndim > 1 else p, init_params(t.CONFIG, key=jax.random.key(0)))
  down = params["layers"]["mlp"]["down_proj"]
  down["weight"] = down["weight"].at[1, :, ::2].set(-0.0)
  return jax.tree_util.tree_map_with_path(lambda path, leaf: jax.device_put(
      leaf, sharding.param_sharding(mesh, sharding.path_name(path), leaf.shape)), params)


def make_grads(mesh: jax.sharding.Mesh) -> Params:
  """Returns gradients with many zeros and ties, like those of embeddings."""
  rng = np.random.default_rng(0)
  params = make_params(mesh)

  def draw(path: tuple, leaf: jax.Array) -> jax.Array:
    grad = rng.normal(size=leaf.shape).astype(np.float32)
    if "embed" in sharding.path_name(path):
      grad[rng.random(len(grad)) < 0.8] = 0
    if "o_proj" in sharding.path_name(path):
      grad = np.round(grad) / np.asarray(leaf)  # products about 0, 1 and 2, many of them equal
    return jax.device_put(grad, leaf.sharding)

  return jax.tree_util.tree_map_with_path(draw, params)


def matrices(name: str, leaf: np.ndarray) -> list[np.ndarray]:
  """Returns the weight matrices of a leaf; none for a norm or bias."""
  stacked = name.startswith("layers.")
  return [] if leaf.ndim - stacked < 2 else list(leaf) if stacked else [leaf]


def sorted_mask(score: np.ndarray, top_p: float) -> np.ndarray:
  """Computes the mask by sorting the whole matrix."""
  mask = np.zeros(score.size, bool)
  mask[np.argsort(-score.ravel(), kind="stable")[:max(1, round(top_p * score.size))]] = True
  return mask.reshape(score.shape)


def train(mesh: jax.sharding.Mesh, intervention: Intervention, load=None, report=lambda *_, **__: None, **options,
          ) -> Params:
  batches = t.pack(t.make_examples(24), global_batch=8, epochs=2, row_multiple=8)
  assert len(batches) == STEPS
  return trainer.train(
      t.CONFIG, load or (lambda: make_params(mesh)), batches,
      Optimization(optax.constant_schedule(1e-2), 0.1, 1.0, intervention), Computation(mesh, jnp.float32),
      Reporting(report, "SFT", log_every=1), **options).params


def train_in_two(folder: Path, meshes: list[jax.sharding.Mesh], intervention: Intervention) -> Params:
  """Stops after some steps and resumes from the saved state, each part on its own mesh."""

  def stop(step: int, **values: float) -> None:
    if step == 1:
      os.kill(os.getpid(), signal.SIGTERM)

  states = lambda: Checkpoints(folder, save_interval=100, max_to_keep=1, identity={})
  with states() as checkpoints, pytest.raises(PreemptedError):
    train(meshes[0], intervention, report=stop, checkpoints=checkpoints)
  with states() as checkpoints:
    assert 0 < checkpoints.step < STEPS
    return train(meshes[1], intervention, checkpoints=checkpoints, load=lambda: pytest.fail("the first model is read"))


def _main(out: Path) -> None:
  """Runs on eight devices."""
  placed = {}
  for name, sizes in MESHES.items():
    mesh = make_mesh(sizes)
    params = make_params(mesh)
    mask = interventions.importance_mask(params, make_grads(mesh), TOP_P)
    placed[name] = all(jax.tree.leaves(jax.tree.map(
        lambda m, p: m.sharding.is_equivalent_to(p.sharding, p.ndim), mask, params)))
    np.savez(out / f"{name}.npz", **flat(mask))
  mesh = make_mesh(MESHES["fsdp8"])
  np.savez(out / "two-meshes.npz", **flat(train_in_two(
      out / "states", [mesh, make_mesh()], interventions.weight_masking(TOP_P))))
  (out / "placed.json").write_text(json.dumps(placed))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, run_on_devices) -> Path:
  folder = tmp_path_factory.mktemp("interventions")
  run_on_devices(__file__, folder)
  return folder


@pytest.fixture
def optimizer_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[Intervention], optax.GradientTransformation]:
  """Returns the optimizer of a training with an intervention, whose steps do nothing."""

  def find(intervention: Intervention) -> optax.GradientTransformation:
    result = []
    metrics = {name: jnp.float32(1) for name in ("loss", "grad_norm", "tokens")}
    monkeypatch.setattr(trainer, "make_train_step", lambda config, optimizer, *_, **__: result.append(optimizer) or (
        lambda state, batch, learning_rate: (state, metrics)))
    train(make_mesh(), intervention)
    return result[0]

  return find


def plain_optimizer(grad_clip: float = 1.0) -> optax.GradientTransformation:
  return optax.chain(optax.clip_by_global_norm(grad_clip), optax.adamw(1e-2, weight_decay=0.1))


@pytest.mark.full
def test_a_step_without_intervention_equals_optax():
  batch = t.pack(t.make_examples(9), global_batch=9, row_multiple=8)[0]
  mesh, optimizer = make_mesh(), plain_optimizer()
  batch = jax.device_put(batch, jax.NamedSharding(mesh, sharding.BATCH))

  @jax.jit
  def plain(params: Params, opt_state: optax.OptState, batch: dict[str, jax.Array]) -> tuple[Params, optax.OptState]:
    loss = lambda params: training.token_losses(t.CONFIG, params, batch, compute_dtype=jnp.float32)[0] / jnp.sum(
        batch["weights"][:, 1:])
    updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  built = optimization.make_optimizer(weight_decay=0.1, grad_clip=1.0)
  state = training.init_state(make_params(mesh), built, mesh)
  step = training.make_train_step(t.CONFIG, built, Computation(mesh, jnp.float32))
  params, opt_state = make_params(mesh), optimizer.init(make_params(mesh))
  for _ in range(3):
    state, _ = step(state, batch, 1e-2)
    params, opt_state = plain(params, opt_state, batch)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, state["params"], params)
  jax.tree.map(close, state["opt_state"][1], opt_state[1][0])  # count and moments


def test_decay_scales_layer_updates(optimizer_of):
  """Gradient decay scales the update of each layer."""
  gamma, rng = 0.8, np.random.default_rng(0)
  tree = lambda: {"embed_tokens": {"weight": jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)},
                  "layers": {"mlp": {"up_proj": {"weight": jnp.asarray(rng.normal(size=(3, 6, 4)), jnp.float32)}},
                             "input_layernorm": {"weight": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)}},
                  "norm": {"weight": jnp.asarray(rng.normal(size=4), jnp.float32)}}
  params, decayed, plain = tree(), optimizer_of(interventions.gradient_decay(gamma)), plain_optimizer()
  states = [optimizer.init(params) for optimizer in (decayed, plain)]
  factor = {"embed_tokens.weight": 1, "norm.weight": 1, "layers.input_layernorm.weight": np.array([[0.64], [0.8], [1]]),
            "layers.mlp.up_proj.weight": np.array([[[0.64]], [[0.8]], [[1]]])}
  for step in range(3):
    grads = tree()
    actual, states[0] = decayed.update(grads, states[0], params, learning_rate=1e-2)
    expected, states[1] = plain.update(grads, states[1], params)
    for name, update in flat(actual).items():
      np.testing.assert_allclose(update, factor[name] * flat(expected)[name], rtol=1e-6, err_msg=name)
      if step == 0:  # Adam's first step is the gradient's sign
        first = -1e-2 * (np.sign(flat(grads)[name]) + 0.1 * flat(params)[name]) * factor[name]
        np.testing.assert_allclose(update, first, rtol=1e-4, err_msg=name)


def test_gradient_clipping_clips_at_its_own_norm(optimizer_of):
  grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}  # norm 5
  optimizer, plain = optimizer_of(interventions.gradient_clipping()), plain_optimizer(2.0)
  states = [optimizer.init(grads), plain.init(grads)]
  for _ in range(3):
    actual, states[0] = optimizer.update(grads, states[0], grads, learning_rate=1e-2)
    expected, states[1] = plain.update(grads, states[1], grads)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
  moments = optax.tree_utils.tree_get(states[0], "nu")
  assert float(sum(m.sum() for m in jax.tree.leaves(moments))) == pytest.approx((1 - 0.999**3) * 2.0**2, rel=1e-4)


@pytest.mark.full
@pytest.mark.parametrize(("top_p", "tied"), [(0.001, 1), (0.05, 2), (TOP_P, 3), (0.5, 3), (1.0, 0)])
def test_masks_equal_those_of_sorting(top_p: float, tied: int):
  """Of equal scores at the threshold the first are taken; so many matrices have some."""
  mesh = make_mesh()
  params, grads = make_params(mesh), make_grads(mesh)
  masks = flat(interventions.importance_mask(params, grads, top_p))
  scores = flat(jax.tree.map(lambda p, g: jnp.abs(p * g), params, grads))
  ties = 0
  for name, mask in masks.items():
    assert mask.dtype == bool
    if not matrices(name, mask):
      assert mask.all()
    for of_matrix, score in zip(matrices(name, mask), matrices(name, scores[name]), strict=True):
      np.testing.assert_array_equal(of_matrix, sorted_mask(score, top_p), err_msg=name)
      ties += top_p < 1 and score[of_matrix].min() == score[~of_matrix].max()
  assert ties == tied


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_masks_are_the_same_on_every_mesh(out: Path, mesh: str):
  assert json.loads((out / "placed.json").read_text())[mesh]
  one = make_mesh()
  masks = np.load(out / f"{mesh}.npz")
  for name, mask in flat(interventions.importance_mask(make_params(one), make_grads(one), TOP_P)).items():
    np.testing.assert_array_equal(masks[name], mask, err_msg=name)


def moved(trained: dict[str, np.ndarray], start: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns which entries have changed in any bit."""
  return {name: trained[name].view(np.uint32) != before.view(np.uint32) for name, before in start.items()}


@pytest.fixture(scope="module")
def masked():
  """Runs a masked training on one device; returns (trained, start, masks)."""
  mesh = make_mesh()
  start = make_params(mesh)
  data = t.pack(t.make_examples(24), global_batch=8)
  grads = gradients.gradient(t.CONFIG, start, data, Computation(mesh, jnp.float32))
  masks = {}
  for (name, weight), grad in zip(flat(start).items(), flat(grads).values(), strict=True):
    of_leaf = [sorted_mask(score, TOP_P) for score in matrices(name, np.abs(weight * grad))]
    masks[name] = np.stack(of_leaf).reshape(weight.shape) if of_leaf else np.ones(weight.shape, bool)
  return flat(train(mesh, interventions.weight_masking(TOP_P))), flat(start), masks


@pytest.mark.full
def test_masked_entries_stay_bitwise_the_same(masked):
  trained, start, masks = masked
  for name, changed in moved(trained, start).items():
    if matrices(name, changed):
      np.testing.assert_array_equal(changed, masks[name], err_msg=name)
    elif "k_proj" not in name:  # softmax hardly feels a key's bias
      assert changed.all(), name
  negative = trained["layers.mlp.down_proj.weight"][1, :, ::2]
  assert (np.signbit(negative) & (negative == 0)).all()


def test_a_resumed_masked_run_gives_the_same_bits(masked, tmp_path: Path):
  mesh = make_mesh()
  resumed = flat(train_in_two(tmp_path, [mesh, mesh], interventions.weight_masking(TOP_P)))
  jax.tree.map(np.testing.assert_array_equal, resumed, masked[0])


@pytest.mark.full
def test_masked_run_resumes_on_another_mesh(out: Path):
  """Its mask stays."""
  start = flat(make_params(make_mesh()))
  for name, changed in moved(np.load(out / "two-meshes.npz"), start).items():
    for of_matrix in matrices(name, changed):
      assert of_matrix.sum() == round(TOP_P * of_matrix.size), name


def test_masks_are_not_compiled_into_the_step():
  mesh, intervention = make_mesh(), interventions.weight_masking(TOP_P)
  optimizer = optimization.make_optimizer(weight_decay=0.1, grad_clip=1.0, transform=intervention.transform)
  batch = jax.device_put(t.pack(t.make_examples(9), global_batch=9, row_multiple=8)[0],
                         jax.NamedSharding(mesh, sharding.BATCH))
  step, shares = None, []
  for share in (0.1, 0.6):
    params = make_params(mesh)
    before = flat(params)
    mask = interventions.importance_mask(params, make_grads(mesh), share)
    state = interventions.set_mask(training.init_state(params, optimizer, mesh), mask)
    step = step or training.jit_step(
        training.step_function(t.CONFIG, optimizer, Computation(mesh, jnp.float32)), state)
    given = jax.tree.leaves(state)
    for _ in range(2):
      state, _ = step(state, batch, 1e-2)
    assert all(leaf.is_deleted() for leaf in given)  # donated, the mask too
    shares.append(moved(flat(state["params"]), before)["lm_head.weight"].mean())
  assert step._cache_size() == 1
  assert shares == pytest.approx([0.1, 0.6], abs=0.01)


if __name__ == "__main__":
  _main(Path(sys.argv[1]))
