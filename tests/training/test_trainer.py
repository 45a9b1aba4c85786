"""The trainer's reports, speed and profiles."""

import itertools
import json
import math
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from imm_jax.errors import UserError
from imm_jax.model.decoder import init_params
from imm_jax.training import optimization, step as training_step, throughput, trainer
from imm_jax.training.packing import PackedBatches, TokenizedExample
from tests.training.helpers import CONFIG, STEPS, make_batches, same, train

pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture
def losses(monkeypatch) -> list[float]:
  """Sets the losses of a training whose steps do nothing."""
  values: list[float] = []
  steps = itertools.count()

  def step(state, batch, learning_rate):
    return state, {"loss": jnp.float32(values[next(steps)]), "grad_norm": jnp.float32(2), "tokens": jnp.float32(3)}

  monkeypatch.setattr(trainer, "make_train_step", lambda *args, **options: step)
  return values


@pytest.mark.parametrize("log_every", [1, 4, 100])
def test_every_step_is_reported_once(params, losses, log_every):
  losses[:] = [0.5 * i for i in range(STEPS)]
  schedule = optimization.make_schedule("cosine", peak=1e-3, total_steps=STEPS, warmup_ratio=0.3)
  reports = {}
  trained = train(params, make_batches(), reports, schedule=schedule, log_every=log_every)
  assert same(trained.params, params)
  assert (trained.first_loss, trained.last_loss) == (0.0, 4.5)
  assert list(reports) == list(range(STEPS))
  for i, values in reports.items():
    assert all(type(value) is float for value in values.values())
    if i or log_every > 1:  # the first step compiles, and is not timed
      assert values.pop("tokens_per_s") > 0
      assert values["step_s"] > values["input_wait_s"] >= 0
    assert values.pop("learning_rate") == pytest.approx(float(schedule(i)))
    assert {name: values[name] for name in ("loss", "grad_norm", "tokens")} == {
        "loss": 0.5 * i, "grad_norm": 2.0, "tokens": 3.0}


@pytest.mark.parametrize(("value", "bad", "log_every"), [
    (math.nan, 0, 1), (math.nan, 9, 4), (math.inf, 5, 3), (-math.inf, 7, 100)])
def test_first_non_finite_loss_is_reported(params, losses, value, bad, log_every):
  """The report has its examples."""
  losses[:] = [1.0] * bad + [value] * (STEPS - bad)
  batches, reports = make_batches(), {}
  first = batches.members(bad)[0] + 1
  advice = "lower the learning rate" if bad else "look for weights of the model that are not finite"
  named = rf"^round 0: SFT: the loss is {value} at step {bad} .*on lines {first}, .*; {advice}"
  with pytest.raises(UserError, match=named):
    train(params, batches, reports, log_every=log_every)
  assert list(reports) == list(range(bad))


def test_a_thread_trains_without_signals(params):
  failures = []

  def work() -> None:
    try:
      train(params, make_batches())
    except BaseException as e:  # reraised by the test
      failures.append(e)

  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert failures == []


def test_profiles_open_in_perfetto_and_tensorboard(params, tmp_path: Path):
  train(params, make_batches(), profile=throughput.Profile("2:4", tmp_path))
  assert list(tmp_path.rglob("perfetto_trace.json.gz"))
  assert list(tmp_path.rglob("*.xplane.pb"))


def test_late_profile_is_noted_as_empty(params, tmp_path: Path, capfd):
  """It would begin after the last step."""
  train(params, make_batches(), profile=throughput.Profile("200:204", tmp_path))
  assert "config.profile=200:204: nothing was recorded" in capfd.readouterr().err
  assert not list(tmp_path.iterdir())


@pytest.mark.full
def test_flops_equal_those_that_xla_counts():
  """Compares with XLA's count for the compiled passes, which computes the whole square of attention."""
  config = CONFIG.__class__(**{**vars(CONFIG), "num_layers": 1, "hidden_size": 64, "intermediate_size": 128,
                               "head_dim": 32, "vocab_size": 256})
  example = TokenizedExample([1] * 32, [2] * 32)
  batches = PackedBatches([example] * 4, epochs=1, global_batch=4, row_length=64, seed=0)
  grad = jax.grad(lambda p, b: training_step.token_losses(config, p, b, compute_dtype=jnp.float32, chunk=64)[0])
  params = init_params(config, key=jax.random.key(0))
  counted = jax.jit(grad).lower(params, batches[0]).compile().cost_analysis()["flops"]
  needed = throughput.train_flops(config, tokens=batches.tokens_per_step, squares=batches.squares_per_step)
  square = needed - 6 * throughput.matmul_params(config) * 256
  assert square == 6 * 2 * 32 * 4 * 64**2
  # This kernel does not skip the half of the square that the causal mask hides.
  assert counted == pytest.approx(needed + square, rel=0.1)


def test_meter_measures_speed_and_mfu(monkeypatch):
  monkeypatch.setattr(throughput, "peak_flops", lambda kind: 1e9)
  batches = make_batches()
  meter = throughput.Meter(CONFIG, batches, devices=4)
  with meter.waiting():
    time.sleep(0.05)
  time.sleep(0.05)
  result = meter.read(2)
  assert 0.05 <= result["step_s"] < 0.2
  assert 0.025 <= result["input_wait_s"] < result["step_s"]
  assert result["tokens_per_s"] == pytest.approx(batches.tokens_per_step / result["step_s"])
  needed = throughput.train_flops(CONFIG, tokens=batches.tokens_per_step, squares=batches.squares_per_step)
  assert result["mfu"] == pytest.approx(needed / result["step_s"] / 4e9)
  assert json.dumps(result)


@pytest.mark.parametrize("steps", ["3", "3:3", "5:2", "a:b", "-1:4"])
def test_malformed_profile_windows_are_errors(steps: str):
  with pytest.raises(ValueError, match="expected first:end"):
    throughput.parse_window(steps)
