"""Packing, the loss, the optimizer and the trainer, compared with plain loops and torch."""

import collections
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings, strategies as st

from imm_jax.model import hf, sharding
from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import bind, init_params
from imm_jax.training import optimization, step as training_step
from imm_jax.training.computation import Computation
from imm_jax.training.packing import Batch, PackedBatches, TokenizedExample
from tests.training.helpers import train

CONFIG = ModelConfig(vocab_size=61, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=1,
                     head_dim=8, rope_theta=100.0, rms_norm_eps=1e-5, tie_embeddings=False, qkv_bias=True)


def make_examples(count: int, seed: int = 0, *, longest: int = 7) -> list[TokenizedExample]:
  rng = np.random.default_rng(seed)
  draw = lambda: rng.integers(1, 60, rng.integers(1, longest + 1)).tolist()
  return [TokenizedExample(draw(), draw()) for _ in range(count)]


def pack(examples: list[TokenizedExample], **options) -> PackedBatches:
  return PackedBatches(examples, **{"epochs": 1, "global_batch": 4, "row_length": 16, "seed": 0, **options})


def replicated() -> jax.NamedSharding:
  """Returns one sharding for everything, as in the trainer, so that a step compiles once."""
  return jax.NamedSharding(sharding.make_mesh(data=1, fsdp=1), sharding.P())


def segments(batch: Batch) -> Iterator[tuple[list[int], list[int], list[float]]]:
  """Yields tokens, positions and weights of each segment; checks that segments are 1, 2, ..., then padding."""
  for r in range(len(batch["tokens"])):
    ids = batch["segment_ids"][r].tolist()
    last = max(ids)
    used = sum(i > 0 for i in ids)
    assert ids[:used] == sorted(ids[:used])
    assert set(ids[:used]) == set(range(1, last + 1))
    for name in ("tokens", "positions", "segment_ids", "weights"):
      assert not batch[name][r, used:].any()
    for segment in range(1, last + 1):
      begin, end = ids.index(segment), ids.index(segment) + ids.count(segment)
      yield tuple(batch[name][r, begin:end].tolist() for name in ("tokens", "positions", "weights"))


_LENGTHS = st.tuples(st.integers(1, 8), st.integers(1, 8))


@settings(max_examples=150, deadline=None)
@given(lengths=st.lists(_LENGTHS, min_size=1, max_size=25), epochs=st.integers(1, 3), global_batch=st.integers(1, 9),
       row_length=st.integers(16, 24), row_multiple=st.integers(1, 4), seed=st.integers(0, 99))
def test_epochs_hold_examples_once(lengths, epochs, global_batch, row_length, row_multiple, seed):
  """Each holds every example once and whole."""
  # Unique tokens tell which example they come from.
  number = iter(range(1, 10**6))
  examples = [TokenizedExample([next(number) for _ in range(p)], [next(number) for _ in range(r)]) for p, r in lengths]
  batches = PackedBatches(examples, epochs=epochs, global_batch=global_batch, row_length=row_length, seed=seed,
                          row_multiple=row_multiple)
  by_tokens = {tuple(e.prompt + e.response): e for e in examples}
  assert batches.rows % row_multiple == 0
  assert batches.rows - batches.empty_rows > 0
  seen, order, padding = collections.Counter(), [], 0
  for step in range(len(batches)):
    batch = batches[step]
    assert {name: (a.shape, a.dtype) for name, a in batch.items()} == {
        name: ((batches.rows, row_length), np.float32 if name == "weights" else np.int32)
        for name in ("tokens", "positions", "segment_ids", "weights")}
    assert not batch["segment_ids"][batches.rows - batches.empty_rows:].any()
    result = list(segments(batch))
    for tokens, positions, weights in result:
      example = by_tokens[tuple(tokens)]
      assert positions == list(range(len(tokens)))
      assert weights == [0.0] * len(example.prompt) + [1.0] * len(example.response)
    assert batches.members(step) == sorted(examples.index(by_tokens[tuple(tokens)]) for tokens, _, _ in result)
    seen.update(tuple(tokens) for tokens, _, _ in result)
    order += [tuple(tokens) for tokens, _, _ in result]
    padding += (batch["segment_ids"] == 0).sum()
  assert seen == collections.Counter(dict.fromkeys(by_tokens, epochs))
  # Epochs do not overlap.
  assert all(len(set(order[e * len(examples):(e + 1) * len(examples)])) == len(examples) for e in range(epochs))
  assert batches.padding == pytest.approx(padding / (len(batches) * batches.rows * row_length))
  assert batches.per_step == epochs * len(examples) / len(batches)
  lengths = np.array([p + r for p, r in lengths])
  assert batches.tokens_per_step * len(batches) == pytest.approx(epochs * lengths.sum())
  assert batches.squares_per_step * len(batches) == pytest.approx(epochs * (lengths**2).sum())


def test_padding_and_step_sizes():
  """Padding is little, and steps have the requested size."""
  rng = np.random.default_rng(0)
  for shortest, longest, row_length in ((100, 400, 1024), (20, 60, 1024), (150, 600, 2048)):
    examples = [TokenizedExample([1] * 10, [2] * n) for n in rng.integers(shortest, longest, 8000) - 10]
    batches = pack(examples, global_batch=128, row_length=row_length)
    assert batches.padding < 0.03
    assert 128 * 0.87 < batches.per_step < 128 * 1.13


def test_packing_does_not_depend_on_the_mesh():
  """A mesh may add empty rows, but never changes the order."""
  examples = make_examples(200)
  plain = pack(examples, global_batch=40)
  assert plain.rows % 8 == 0
  for multiple in (1, 4, 16, 64):
    other = pack(examples, global_batch=40, row_multiple=multiple)
    assert (len(other), other.rows % multiple) == (len(plain), 0)
    for step in range(len(plain)):
      for name, rows in plain[step].items():
        np.testing.assert_array_equal(other[step][name][:plain.rows], rows)


def test_parts_of_a_batch_are_its_rows():
  batches = pack(make_examples(60), global_batch=20, row_multiple=8)
  for name, rows in batches[1].items():
    np.testing.assert_array_equal(np.concatenate([batches.part(1, 0, 3)[name], batches.part(1, 3, 8)[name]]), rows[:8])


def test_the_order_depends_on_seed_and_epoch():
  examples = make_examples(40)
  tokens = lambda seed, step: pack(examples, epochs=2, seed=seed)[step]["tokens"].tolist()
  steps = len(pack(examples))
  assert len(pack(examples, epochs=2)) in (2 * steps, 2 * steps - 1)
  assert tokens(0, 3) == tokens(0, 3)
  assert tokens(0, 0) != tokens(1, 0)
  assert tokens((0, 1), 0) != tokens((0, 2), 0)
  assert tokens(0, 0) != tokens(0, steps)  # about where the second epoch begins


def test_batches_do_not_depend_on_earlier_steps():
  batches = pack(make_examples(20))
  late = {name: array.copy() for name, array in batches[3].items()}
  for i in (0, 4, 3):
    batch = batches[i]
  jax.tree.map(np.testing.assert_array_equal, batch, late)
  batch["tokens"][:] = -1
  jax.tree.map(np.testing.assert_array_equal, batches[3], late)


def test_unpackable_examples_are_errors():
  with pytest.raises(ValueError, match="no example"):
    pack([])
  with pytest.raises(ValueError, match="example 1 has 17 tokens, a row holds 16"):
    pack([TokenizedExample([1], [2]), TokenizedExample([1] * 9, [2] * 8)])
  assert len(pack([TokenizedExample([1] * 8, [2] * 8)])) == 1


def test_no_loss_crosses_segments_of_empty_prompts():
  first, empty = TokenizedExample([1, 2], [3, 4]), TokenizedExample([], [5, 6])
  batch = pack([first, empty])[0]
  assert (batch["segment_ids"] > 0).sum(axis=1).max() == 6  # both segments in one row
  assert batch["weights"][:, 1:].sum() == 2 + 1  # 6 is predicted from 5, and nothing before 5


@jax.jit
def all_log_p(params, tokens: jax.Array) -> jax.Array:
  """Returns log p [T, V] of all next tokens of a sequence [T]."""
  row = jnp.arange(len(tokens))[None]
  logits = bind(CONFIG, params)(tokens[None], positions=row, segment_ids=jnp.ones_like(row), compute_dtype=jnp.float32)
  return jax.nn.log_softmax(logits[0])


def unpacked_loss(params, example: TokenizedExample) -> float:
  """Returns the sum of -log p over an example's response, without packing."""
  tokens = np.zeros(16, np.int32)
  tokens[:len(example.prompt + example.response)] = example.prompt + example.response
  log_p, begin = np.asarray(all_log_p(params, tokens), np.float64), len(example.prompt)
  return -sum(log_p[begin + i - 1, token] for i, token in enumerate(example.response))


@pytest.fixture(scope="module")
def params():
  weights = jax.tree.map(lambda p: p * 8 if p.ndim > 1 else p + 0.1, init_params(CONFIG, key=jax.random.key(0)))
  return jax.device_put(weights, replicated())  # far from a uniform distribution


DESCENT = optax.sgd(1.0)


def gradient_step(params, batch: Batch, step):
  """Runs a step of gradient descent; returns the change of the parameters, and the metrics."""
  mesh = sharding.make_mesh(data=1, fsdp=1)
  state = training_step.init_state(jax.tree.map(jnp.copy, params), DESCENT, mesh)
  state, metrics = step(state, jax.device_put(batch, jax.NamedSharding(mesh, sharding.BATCH)), 1.0)
  return jax.tree.map(lambda new, old: np.asarray(new) - np.asarray(old), state["params"], params), metrics


@pytest.fixture(scope="module")
def descent_step():
  return training_step.make_train_step(CONFIG, DESCENT, Computation(sharding.make_mesh(data=1, fsdp=1), jnp.float32))


@pytest.fixture(scope="module")
def whole(params, descent_step):
  """Returns examples, their single batch, and a gradient step on it."""
  examples = make_examples(9)
  batch = pack(examples, global_batch=9, row_multiple=8)[0]
  return examples, batch, *gradient_step(params, batch, descent_step)


def test_loss_is_the_mean_over_responses(params, whole):
  """The loss of packed rows is the mean over response tokens."""
  examples, batch, _, metrics = whole
  assert batch["segment_ids"].max() > 1
  count = sum(len(e.response) for e in examples)
  assert metrics["tokens"] == count
  assert metrics["loss"] == pytest.approx(sum(unpacked_loss(params, e) for e in examples) / count, rel=1e-5)


def test_split_batch_has_the_same_gradient(params, whole):
  """A batch in two parts gives the gradient of the whole."""
  _, batch, change, metrics = whole
  counts = batch["weights"][:, 1:].reshape(2, -1).sum(axis=1)
  assert counts[0] != counts[1]  # a mean of the parts' means would be another loss
  computation = Computation(sharding.make_mesh(data=1, fsdp=1), jnp.float32, accumulation=2)
  in_parts = training_step.make_train_step(CONFIG, DESCENT, computation)
  parts_change, parts_metrics = gradient_step(params, batch, in_parts)
  largest = max(np.abs(c).max() for c in jax.tree.leaves(change))
  assert largest > 0
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest), change, parts_change)
  for name, value in metrics.items():
    assert parts_metrics[name] == pytest.approx(float(value), rel=1e-5)
  norm = math.sqrt(sum(float((c.astype(np.float64)**2).sum()) for c in jax.tree.leaves(change)))
  assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)


def closed_form(kind: str, step: int, *, peak: float, total: int, warmup: int) -> float:
  if step < warmup:
    return peak * step / warmup
  done = min(1.0, (step - warmup) / max(1, total - warmup))
  return peak * {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[kind]


def torch_loss(model, examples: list[TokenizedExample]):
  """Returns the mean -log p over the response tokens of a batch, without packing."""
  torch = pytest.importorskip("torch")
  total, count = 0.0, 0
  for example in examples:
    ids = torch.tensor([example.prompt + example.response])
    begin = len(example.prompt)
    log_p = model(input_ids=ids).logits[0].log_softmax(-1)
    total -= log_p[begin - 1:-1].gather(-1, ids[0, begin:, None]).sum()
    count += len(example.response)
  return total / count


def test_ten_steps_equal_torch_adamw(checkpoint):
  torch = pytest.importorskip("torch")
  weight_decay, clip, peak, total_steps, warmup = 0.1, 0.5, 3e-3, 10, 3
  model, folder = checkpoint("qwen2-tied")
  config, params = hf.load(folder, place=lambda *_: replicated())
  examples = make_examples(20)
  batches = pack(examples, epochs=3, row_length=24)
  by_tokens = {tuple(e.prompt + e.response): e for e in examples}
  assert len(batches) >= total_steps

  schedule = optimization.make_schedule("cosine", peak=peak, total_steps=total_steps, warmup_ratio=warmup / total_steps)
  optimizer = optimization.make_optimizer(weight_decay=weight_decay, grad_clip=clip)
  mesh = sharding.make_mesh(data=1, fsdp=1)
  state = training_step.init_state(params, optimizer, mesh)
  step = training_step.make_train_step(config, optimizer, Computation(mesh, jnp.float32))
  first = {name: p.detach().clone() for name, p in model.named_parameters()}
  adamw = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=weight_decay)
  for i in range(total_steps):
    state, metrics = step(state, jax.device_put(batches[i], replicated()), float(schedule(i)))
    loss = torch_loss(model, [by_tokens[tuple(tokens)] for tokens, _, _ in segments(batches[i])])
    adamw.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    adamw.param_groups[0]["lr"] = closed_form("cosine", i, peak=peak, total=total_steps, warmup=warmup)
    adamw.step()
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert norm > clip

  names = hf.tensor_names(state["params"])
  actual = {}
  for leaf_names, leaf in zip(jax.tree.leaves(names, is_leaf=lambda n: isinstance(n, tuple)),
                              jax.tree.leaves(state["params"]), strict=True):
    actual |= {leaf_names: leaf} if isinstance(leaf_names, str) else dict(zip(leaf_names, leaf, strict=True))
  wanted = {name: p.detach() for name, p in model.named_parameters()}
  assert actual.keys() == wanted.keys()
  for name, p in wanted.items():
    change = (p - first[name]).norm().item()
    assert change > 1e-4  # all are trained
    assert np.linalg.norm(np.asarray(actual[name]) - p.numpy()) < 1e-4 * p.norm().item(), name
    assert np.linalg.norm(np.asarray(actual[name]) - p.numpy()) < 1e-2 * change, name


def test_all_rounds_compile_the_same_step(monkeypatch):
  """If batches have as many rows: it holds neither the learning rate nor the number of steps."""
  programs, jit_step = [], training_step.jit_step

  def jit_and_record(step, state):
    jitted = jit_step(step, state)
    return lambda *args: programs.append(jitted.lower(*args).as_text()) or jitted(*args)

  monkeypatch.setattr(training_step, "jit_step", jit_and_record)
  weights, rates = init_params(CONFIG, key=jax.random.key(0)), {}
  for epochs, peak in ((1, 1e-3), (2, 1e-4)):
    batches = pack([TokenizedExample([1] * 4, [2] * 4)] * 8, epochs=epochs)
    schedule = optimization.make_schedule("cosine", peak=peak, total_steps=len(batches), warmup_ratio=0.1)
    rates[epochs] = {}
    train(weights, batches, rates[epochs], schedule=schedule)
  assert len(programs) == 2 + 4
  assert len({*programs}) == 1
  assert max(r["learning_rate"] for r in rates[1].values()) == pytest.approx(1e-3)
  assert max(r["learning_rate"] for r in rates[2].values()) == pytest.approx(1e-4)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("total", "ratio", "warmup"), [
    (100, 0.03, 3), (100, 0.0, 0), (10, 0.01, 1), (47, 0.5, 24), (1, 0.0, 0), (1000, 0.9, 900)])
def test_schedules_equal_their_closed_forms(kind, total, ratio, warmup):
  schedule = optimization.make_schedule(kind, peak=2e-5, total_steps=total, warmup_ratio=ratio)
  steps = np.linspace(0, total + 2, 50).astype(np.int32)
  expected = [closed_form(kind, s, peak=2e-5, total=total, warmup=warmup) for s in steps.tolist()]
  np.testing.assert_allclose(schedule(steps), expected, rtol=1e-5, atol=1e-11)
  assert float(schedule(warmup)) == pytest.approx(2e-5)


def test_short_schedules_reach_the_peak():
  """The shortest training has a step at the peak."""
  for total in (1, 2, 3):
    schedule = optimization.make_schedule("cosine", peak=1.0, total_steps=total, warmup_ratio=0.9)
    assert max(float(schedule(s)) for s in range(total)) == 1


def test_an_unknown_schedule_is_an_error():
  with pytest.raises(KeyError):
    optimization.make_schedule("exponential", peak=1.0, total_steps=10, warmup_ratio=0.0)


@pytest.mark.parametrize(("clip", "scale"), [(0.0, 1.0), (1.0, 0.2), (100.0, 1.0)])
def test_gradients_are_clipped_by_their_global_norm(clip, scale):
  grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}  # norm 5
  optimizer = optimization.make_optimizer(weight_decay=0.0, grad_clip=clip)
  _, state = optimizer.update(grads, optimizer.init(grads), grads, learning_rate=1.0)
  moments = optax.tree_utils.tree_get(state, "mu")
  jax.tree.map(lambda m, g: np.testing.assert_allclose(m, 0.1 * scale * g, rtol=1e-6), moments, grads)
