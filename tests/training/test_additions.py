"""Additions to SFT, compared with torch's autograd, peft and float64 numpy; on one and on eight simulated devices.

The device count is fixed when jax starts, so this file runs itself in another process (`_main`).
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imm_jax.model import hf, lora as adapters_on_disk, safetensors, sharding
from imm_jax.model.decoder import Params, init_params
from imm_jax.training import lora, optimization, step as training
from imm_jax.training.additions import Additions
from imm_jax.training.computation import Computation
from imm_jax.training.lora import Lora
from imm_jax.training.loss import anchored_loss
from tests.training import test_interventions as i, test_step as t

EVERYTHING = Additions(kl=0.7, l2_sp=0.3, ema=0.9)
ADAPTED = Additions(lora=Lora(4, 6.0), ema=0.8)
LEARNING_RATE = 1e-2
# Name -> mesh sizes, the step's computation, and its chunk.
MESHES = {"one": ((1, 1, 1), {}, 0), "data2-fsdp4": ((2, 4, 1), {"accumulation": 2, "remat": "full"}, 0),
          "data2-fsdp2-tensor2": ((2, 2, 2), {"accumulation": 2}, 7)}


def random_tree(tree: Params, seed: int, scale: float) -> Params:
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda leaf: rng.normal(scale=scale, size=leaf.shape).astype(np.float32), tree)


def placed(tree: Params, mesh: jax.sharding.Mesh) -> Params:
  return jax.tree_util.tree_map_with_path(lambda path, leaf: jax.device_put(
      leaf, sharding.param_sharding(mesh, sharding.path_name(path), leaf.shape)), tree)


def make_trees() -> tuple[Params, Params, Params]:
  """Returns a model's parameters, another model's, and adapters."""
  shapes = jax.eval_shape(lambda: init_params(t.CONFIG, key=jax.random.key(0)))
  return (random_tree(shapes, 0, 0.3), random_tree(shapes, 1, 0.3),
          random_tree(lora.abstract(t.CONFIG, ADAPTED.lora), 2, 0.2))


def two_steps(name: str, additions: Additions) -> dict[str, np.ndarray]:
  """Runs two steps on a mesh; returns parameters, first moments, average and metrics."""
  sizes, options, chunk = MESHES[name]
  mesh = i.make_mesh(sizes)
  params, anchor, adapters = make_trees()
  frozen = {"base": placed(params, mesh)} if additions.lora else {"anchor": placed(anchor, mesh)}
  optimizer = optimization.make_optimizer(weight_decay=0.1, grad_clip=1.0)
  state = training.init_state(placed(adapters if additions.lora else params, mesh), optimizer, mesh,
                              additions=additions, frozen=frozen)
  like = training.abstract_state(t.CONFIG, optimizer, mesh, additions=additions, frozen_dtype=jnp.float32)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), like)
  assert jax.tree.all(jax.tree.map(lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim), state, like))
  step = training.make_train_step(t.CONFIG, optimizer, Computation(mesh, jnp.float32, **options), additions=additions,
                                  chunk=chunk)
  batches = t.pack(t.make_examples(40), global_batch=20, row_multiple=16)
  assert batches[0]["segment_ids"].max() > 1
  for number in range(2):
    batch = jax.device_put(batches[number], jax.NamedSharding(mesh, sharding.BATCH))
    state, metrics = step(state, batch, LEARNING_RATE)
  assert jax.tree.all(jax.tree.map(lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim), state, like))
  arrays = {"params": state["params"], "mu": state["opt_state"][1].mu, "average": state["average"],
            "frozen": state["frozen"]}
  return {**i.flat(arrays), **{f"metric {key}": np.asarray(value) for key, value in metrics.items()}}


def _main(out: Path) -> None:
  """Runs on eight devices."""
  for kind, additions in (("everything", EVERYTHING), ("lora", ADAPTED)):
    for name in MESHES:
      np.savez(out / f"{kind}-{name}.npz", **two_steps(name, additions))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, run_on_devices) -> Path:
  folder = tmp_path_factory.mktemp("additions")
  run_on_devices(__file__, folder)
  return folder


@pytest.mark.slow
@pytest.mark.parametrize("mesh", list(MESHES)[1:])
@pytest.mark.parametrize("kind", ["everything", "lora"])
def test_steps_are_equal_on_all_meshes(out: Path, kind: str, mesh: str):
  expected, actual, start = np.load(out / f"{kind}-one.npz"), np.load(out / f"{kind}-{mesh}.npz"), make_trees()
  assert ("metric kl" in expected) == (kind == "everything")
  start = i.flat({"params": start[2 if kind == "lora" else 0]})
  for name in expected:
    scale = np.abs(expected[name]).max()
    if name.startswith(("params", "average")):
      moved = np.abs(expected[name] - start[name.replace("average", "params")])
      assert moved.max() > 0, name
      # Adam divides a gradient by its size, which leaves nothing but rounding of a tiny one.
      mu = np.abs(expected[f"mu.{name.partition('.')[2]}"])
      clear = mu > 1e-4 * mu.max()
      assert clear.mean() > 0.5, name
      np.testing.assert_allclose(actual[name][clear], expected[name][clear], rtol=1e-5, atol=1e-2 * LEARNING_RATE,
                                 err_msg=name)
    else:
      np.testing.assert_allclose(actual[name], expected[name], rtol=1e-5, atol=1e-5 * scale, err_msg=name)


def gradient_of(config, params: Params, batch, additions: Additions, frozen: dict[str, Params]):
  of = training.gradient_function(config, Computation(i.make_mesh(), jnp.float32), additions=additions, chunk=5)
  return jax.jit(lambda params, frozen: of(params, batch, None, frozen))(params, frozen)


def to_checkpoint_names(tree: Params) -> dict[str, np.ndarray]:
  """Returns the leaves by their names in a checkpoint."""
  result = {}
  for names, leaf in zip(jax.tree.leaves(hf.tensor_names(tree), is_leaf=lambda n: isinstance(n, tuple)),
                         jax.tree.leaves(tree), strict=True):
    result |= {names: leaf} if isinstance(names, str) else dict(zip(names, leaf, strict=True))
  return {name: np.asarray(leaf) for name, leaf in result.items()}


def torch_losses(model, base, examples):
  """Returns mean -log p and mean KL(p_base || p) of the response tokens in float64, without packing."""
  torch = pytest.importorskip("torch")
  loss, kl, count = 0.0, 0.0, 0
  for example in examples:
    ids, begin = torch.tensor([example.prompt + example.response]), len(example.prompt)
    log_p = model(input_ids=ids).logits[0].log_softmax(-1)[begin - 1:-1]
    with torch.no_grad():
      log_base = base(input_ids=ids).logits[0].log_softmax(-1)[begin - 1:-1]
    loss -= log_p.gather(-1, ids[0, begin:, None]).sum()
    kl += (log_base.exp() * (log_base - log_p)).sum()
    count += len(example.response)
  return loss / count, kl / count


@pytest.fixture
def models(checkpoint):
  """Returns a torch model in float64, another one, and their parameters."""
  torch = pytest.importorskip("torch")
  model, folder = checkpoint("qwen2-tied")
  config, params = hf.load(folder)
  generator = torch.Generator().manual_seed(1)
  import copy

  base = copy.deepcopy(model)
  with torch.no_grad():
    for p in base.parameters():
      p += 0.1 * torch.randn(p.shape, generator=generator)
  base.save_pretrained(folder / "base")
  return config, model.double(), params, base.double(), hf.load(folder / "base")[1]


def test_kl_and_its_gradient_equal_torch(models):
  config, model, params, base, anchor = models
  examples, weight = t.make_examples(9), 0.6
  batch = t.pack(examples, global_batch=9, row_length=24)[0]
  loss, grads, numbers = gradient_of(config, params, batch, Additions(kl=weight), {"anchor": anchor})
  expected, kl = torch_losses(model, base, examples)
  total = expected + weight * kl
  total.backward()
  assert float(numbers["kl"]) == pytest.approx(kl.item(), rel=1e-5)
  assert kl.item() > 0.1
  assert float(loss) == pytest.approx(total.item(), rel=1e-6)
  actual = to_checkpoint_names(grads)
  for name, p in model.named_parameters():
    np.testing.assert_allclose(actual[name], p.grad.numpy(), rtol=1e-4, atol=2e-6 * p.grad.abs().max().item() + 1e-7,
                               err_msg=name)


@pytest.mark.full
def test_the_kl_of_a_model_to_itself_is_zero(models):
  config, _, params, *_ = models
  batch = t.pack(t.make_examples(9), global_batch=9, row_length=24)[0]
  plain, grads, _ = gradient_of(config, params, batch, Additions(), {})
  loss, same, numbers = gradient_of(config, params, batch, Additions(kl=3.0), {"anchor": params})
  assert abs(float(numbers["kl"])) < 1e-6
  assert float(loss) == pytest.approx(float(plain), rel=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(a).max()), grads, same)


@pytest.mark.parametrize("chunk", [1, 5, 14])
def test_chunked_kl_equals_that_of_whole_logits(chunk: int):
  """Sums are float32 in bfloat16, too: only the rounding of the inputs differs from float64."""
  rng = np.random.default_rng(0)
  x, base_x = rng.normal(size=(2, 3, 14, 8))
  w, base_w = rng.normal(size=(2, 37, 8))
  targets, weights = rng.integers(0, 37, (3, 14)), rng.integers(0, 3, (3, 14)).astype(np.float32)

  def soft(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    logits = x @ w.T
    logits -= logits.max(axis=-1, keepdims=True)
    return np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)

  p, base_p = soft(x, w), soft(base_x, base_w)
  kl = (weights * (base_p * (np.log(base_p) - np.log(p))).sum(-1)).sum()
  loss = -(weights * np.log(np.take_along_axis(p, targets[..., None], -1)[..., 0])).sum()
  d = (p - np.eye(37)[targets] + 0.4 * (p - base_p)) * weights[..., None]
  given = [jnp.asarray(a, jnp.float32) for a in (x, w, base_x, base_w)]
  run = jax.jit(jax.value_and_grad(lambda x, w: anchored_loss(
      x, w, *given[2:], jnp.asarray(targets), jnp.asarray(weights), chunk, 0.4), (0, 1), has_aux=True))
  (total, result), (dx, dw) = run(*given[:2])
  assert float(result) == pytest.approx(kl, rel=1e-5)
  assert float(total) == pytest.approx(loss + 0.4 * kl, rel=1e-5)
  np.testing.assert_allclose(dx, d @ w, atol=1e-5)
  np.testing.assert_allclose(dw, np.einsum("btv,btd->vd", d, x), atol=1e-4)


def adamw(p: np.ndarray, grads: list[np.ndarray], rate: float) -> list[np.ndarray]:
  """Returns the weights after each step of AdamW without decay, in float64."""
  m, v, result = np.zeros_like(p), np.zeros_like(p), []
  for n, g in enumerate(grads, 1):
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    p = p - rate * (m / (1 - 0.9**n)) / (np.sqrt(v / (1 - 0.999**n)) + 1e-8)
    result.append(p)
  return result


@pytest.mark.full
def test_l2_sp_and_average_equal_their_closed_forms():
  """Runs two steps without learned tokens, where L2-SP alone changes the weights."""
  mesh, additions = i.make_mesh(), Additions(l2_sp=0.25, ema=0.75)
  params, anchor, _ = make_trees()
  optimizer = optimization.make_optimizer(weight_decay=0.0, grad_clip=0.0)
  state = training.init_state(placed(params, mesh), optimizer, mesh, additions=additions,
                              frozen={"anchor": placed(anchor, mesh)})
  batch = jax.tree.map(np.array, t.pack(t.make_examples(4))[0])
  step = training.make_train_step(t.CONFIG, optimizer, Computation(mesh, jnp.float32), additions=additions)
  plain = training.gradient_function(t.CONFIG, Computation(mesh, jnp.float32))
  start, base = i.flat(params), i.flat(anchor)
  loss, grads, _ = jax.jit(plain)(params, batch)
  away = {name: start[name].astype(np.float64) - base[name] for name in start}
  pulled = {name: g + 0.25 * away[name] for name, g in i.flat(grads).items()}
  state, metrics = step(state, jax.device_put(batch, jax.NamedSharding(mesh, sharding.BATCH)), 1e-2)
  squares = sum((a**2).sum() for a in away.values())
  assert float(metrics["l2_sp"]) == pytest.approx(0.125 * squares, rel=1e-5)
  assert float(metrics["loss"]) == pytest.approx(float(loss) + 0.125 * squares, rel=1e-6)
  assert float(metrics["grad_norm"]) == pytest.approx(np.sqrt(sum((g**2).sum() for g in pulled.values())), rel=1e-5)
  new, mu, average = i.flat(state["params"]), i.flat(state["opt_state"][1].mu), i.flat(state["average"])
  for name in start:
    np.testing.assert_allclose(mu[name], 0.1 * pulled[name], rtol=1e-4, atol=1e-7, err_msg=name)
    clear = np.abs(pulled[name]) > 1e-4
    expected = adamw(start[name].astype(np.float64), [pulled[name]], 1e-2)[0]
    np.testing.assert_allclose(new[name][clear], expected[clear], rtol=1e-6, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(average[name], 0.75 * start[name] + 0.25 * new[name].astype(np.float64), rtol=1e-6,
                               atol=1e-7, err_msg=name)


def test_unplaced_weights_compile_one_step():
  """Neither those that are trained nor frozen ones make the second step another program."""
  mesh, additions = i.make_mesh(), Additions(l2_sp=0.25)
  optimizer = optimization.make_optimizer(weight_decay=0.0, grad_clip=0.0)
  plain = lambda: jax.tree.map(jnp.asarray, make_trees()[0])
  state = training.init_state(plain(), optimizer, mesh, additions=additions, frozen={"anchor": plain()})
  given = jax.tree.leaves(state)
  step = training.jit_step(training.step_function(
      t.CONFIG, optimizer, Computation(mesh, jnp.float32), additions=additions), state)
  batch = jax.device_put(t.pack(t.make_examples(4))[0], jax.NamedSharding(mesh, sharding.BATCH))
  for _ in range(2):
    state, _ = step(state, batch, np.float32(1e-2))
  assert step._cache_size() == 1
  assert all(leaf.is_deleted() for leaf in given)  # donated


def test_non_finite_step_changes_nothing():
  """It changes neither weights nor their average."""
  mesh, additions = i.make_mesh(), Additions(ema=0.75)
  params = make_trees()[0]
  params["norm"]["weight"][0] = np.nan
  optimizer = optimization.make_optimizer(weight_decay=0.0, grad_clip=0.0)
  state = training.init_state(placed(params, mesh), optimizer, mesh, additions=additions)
  step = training.make_train_step(t.CONFIG, optimizer, Computation(mesh, jnp.float32), additions=additions)
  batch = jax.device_put(t.pack(t.make_examples(4))[0], jax.NamedSharding(mesh, sharding.BATCH))
  state, _ = step(state, batch, 1e-2)
  assert state["halted"]
  jax.tree.map(np.testing.assert_array_equal, state["average"], params)


def test_lora_trains_and_merges_like_peft(checkpoint, tmp_path: Path):
  """Compares loss and gradients of A and B with torch's through peft's layers, and the merged folder with peft's."""
  torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
  import transformers

  settings = Lora(3, 5.0)
  _, folder = checkpoint("qwen2-untied")
  config, params = hf.load(folder)
  adapters = random_tree(lora.abstract(config, settings), 2, 0.2)
  examples = t.make_examples(9)
  batch = t.pack(examples, global_batch=9, row_length=24)[0]
  loss, grads, _ = gradient_of(config, adapters, batch, Additions(lora=settings), {"base": params})
  mesh = i.make_mesh()
  lora.save(placed(adapters, mesh), settings, tmp_path / "merged", like=folder)

  load = lambda path, dtype: transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
  model = peft.PeftModel.from_pretrained(load(folder, torch.float64), tmp_path / "merged" / lora.FOLDER,
                                         is_trainable=True).double()
  expected, _ = torch_losses(model, model, examples)
  expected.backward()
  assert float(loss) == pytest.approx(expected.item(), rel=1e-5)
  trained = {name.removeprefix("base_model.model.model.").replace(".default", ""): p
             for name, p in model.named_parameters() if p.requires_grad}
  count = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(grads["layers"]):
    for layer, grad in enumerate(leaf):
      p = trained[f"layers.{layer}.{sharding.path_name(path)}.weight"].grad.numpy()
      np.testing.assert_allclose(grad, p, rtol=1e-3, atol=1e-5 * np.abs(p).max())
      count += 1
  assert count == len(trained) == 2 * 2 * 7

  merged = peft.PeftModel.from_pretrained(load(folder, torch.float32),
                                          tmp_path / "merged" / lora.FOLDER).merge_and_unload()
  actual = load(tmp_path / "merged", torch.float32)
  assert actual.state_dict().keys() == merged.state_dict().keys()
  for name, p in merged.state_dict().items():
    np.testing.assert_allclose(actual.state_dict()[name].numpy(), p.numpy(), rtol=1e-6, atol=1e-6, err_msg=name)
  again = tmp_path / "again"
  adapters_on_disk.merge(folder, tmp_path / "merged" / lora.FOLDER, again)
  assert (again / "model.safetensors").read_bytes() == (tmp_path / "merged/model.safetensors").read_bytes()
  # The merged model has the same loss as the model with adapters.
  plain, *_ = gradient_of(config, hf.load(tmp_path / "merged")[1], batch, Additions(), {})
  assert float(plain) == pytest.approx(float(loss), rel=1e-6)


def test_initial_adapters_are_inert(tmp_path: Path):
  """They change nothing, and depend on the key."""
  mesh, settings = i.make_mesh(), Lora(4, 8.0)
  first = lora.init(t.CONFIG, settings, mesh, key=jax.random.key(0))
  _, anchor, _ = make_trees()
  hf.save(anchor, tmp_path / "base")
  (tmp_path / "base" / "config.json").write_text("""{"model_type": "qwen2", "vocab_size": 61, "hidden_size": 16,
    "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "tie_word_embeddings": false}""")
  lora.save(first, settings, tmp_path / "out", like=tmp_path / "base")
  base, out = (safetensors.read(tmp_path / name / "model.safetensors") for name in ("base", "out"))
  assert base.keys() == out.keys()
  assert all((base[name] == out[name]).all() for name in base)
  a = first["layers"]["mlp"]["down_proj"]["lora_A"]
  assert a.shape == (2, 4, 24)
  assert float(jnp.std(a)) == pytest.approx(24**-0.5, rel=0.15)
  other = lora.init(t.CONFIG, settings, mesh, key=jax.random.key(1))
  assert not (other["layers"]["mlp"]["down_proj"]["lora_A"] == a).any()
  assert not (first["layers"]["mlp"]["up_proj"]["lora_A"][:, :, 0] == first["layers"]["mlp"]["gate_proj"]["lora_A"][
      :, :, 0]).any()


if __name__ == "__main__":
  _main(Path(sys.argv[1]))
