"""The trainer: its reports, its states on disk, and how it stops."""

import itertools
import json
import math
import os
import resource
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from imm_jax.errors import PreemptedError, UserError
from imm_jax.model import sharding
from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import init_params
from imm_jax.training import step as training_step, throughput, trainer
from imm_jax.training.checkpoints import Checkpoints, check_folder
from imm_jax.training.packing import PackedBatches, TokenizedExample

CONFIG = ModelConfig(vocab_size=61, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=1,
                     head_dim=8, rope_theta=100.0, rms_norm_eps=1e-5, tie_embeddings=False, qkv_bias=True)
POISON = 60  # examples do not hold it
STEPS = 10
IDENTITY = {"start": "a", "train": "b"}


def make_batches(*, poisoned_step: int | None = None) -> PackedBatches:
  """Ten steps."""
  rng = np.random.default_rng(0)
  draw = lambda count: rng.integers(1, POISON, count).tolist()
  examples = [TokenizedExample(draw(n), draw(8 - n)) for n in rng.integers(1, 8, 40)]
  batches = PackedBatches(examples, epochs=1, global_batch=4, row_length=16, seed=0)
  assert len(batches) == STEPS
  if poisoned_step is not None:
    examples[batches.members(poisoned_step)[0]].prompt[0] = POISON
  return batches


@pytest.fixture(scope="module")
def params():
  return init_params(CONFIG, key=jax.random.key(0))


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
  """All trainings here run the same step, so that it compiles once."""
  mesh = sharding.make_mesh(data=1, fsdp=1)
  schedule = optax.constant_schedule(1e-3)
  optimizer = training_step.make_optimizer(schedule, weight_decay=0.0, grad_clip=1.0)
  step = training_step.make_train_step(CONFIG, optimizer, compute_dtype=jnp.float32, mesh=mesh)
  patch = pytest.MonkeyPatch()
  patch.setattr(trainer, "make_train_step", lambda *args, **options: step)
  yield
  patch.undo()


def train(params, batches: PackedBatches, reports: dict[int, dict[str, float]] | None = None, **options):
  def report(step: int, **values: float) -> None:
    assert reports is None or step not in reports
    (reports if reports is not None else {})[step] = values

  options = {"schedule": optax.constant_schedule(1e-3), "log_every": 1, **options}
  return trainer.train(
      CONFIG, lambda: jax.tree.map(jnp.copy, params), batches, weight_decay=0.0, grad_clip=1.0, accumulation=1,
      remat="none", compute_dtype=jnp.float32, mesh=sharding.make_mesh(data=1, fsdp=1), report=report,
      label="round 0: SFT", **options)


def states(folder: Path, *, every: int = 3, keep: int = 2, **identity: str) -> Checkpoints:
  return Checkpoints(folder / "states", save_interval=every, max_to_keep=keep, identity=IDENTITY | identity)


def saved(folder: Path) -> list[int]:
  return sorted(int(p.name) for p in (folder / "states").iterdir() if p.name.isdigit())


def same(a, b) -> bool:
  return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.fixture
def losses(monkeypatch) -> list[float]:
  """The losses that training will see: steps do nothing else."""
  values: list[float] = []
  steps = itertools.count()

  def step(state, batch):
    return state, {"loss": jnp.float32(values[next(steps)]), "grad_norm": jnp.float32(2), "tokens": jnp.float32(3)}

  monkeypatch.setattr(trainer, "make_train_step", lambda *args, **options: step)
  return values


@pytest.mark.parametrize("log_every", [1, 4, 100])
def test_every_step_is_reported_once_whatever_the_interval(params, losses, log_every):
  losses[:] = [0.5 * i for i in range(STEPS)]
  schedule = training_step.make_schedule("cosine", peak=1e-3, total_steps=STEPS, warmup_ratio=0.3)
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
def test_the_first_loss_that_is_not_finite_is_named_with_its_examples(params, losses, value, bad, log_every):
  losses[:] = [1.0] * bad + [value] * (STEPS - bad)
  batches, reports = make_batches(), {}
  first = batches.members(bad)[0] + 1
  advice = "lower the learning rate" if bad else "look for weights of the model that are not finite"
  named = rf"^round 0: SFT: the loss is {value} at step {bad} .*on lines {first}, .*; {advice}"
  with pytest.raises(UserError, match=named):
    train(params, batches, reports, log_every=log_every)
  assert list(reports) == list(range(bad))


@pytest.mark.parametrize("log_every", [1, 4])
def test_the_last_good_state_outlives_a_loss_that_is_not_finite(params, log_every, tmp_path: Path):
  bad = 5
  table = params["embed_tokens"]["weight"]
  poisoned = params | {"embed_tokens": {"weight": table.at[POISON].set(jnp.nan)}}
  kept = {}
  with states(tmp_path, every=100) as checkpoints:
    with pytest.raises(UserError, match=rf"the loss is nan at step {bad} .*kept in {tmp_path}"):
      train(poisoned, make_batches(poisoned_step=bad), checkpoints=checkpoints, log_every=log_every)
    assert saved(tmp_path) == [bad]
    like = training_step.abstract_state(CONFIG, training_step.make_optimizer(
        optax.constant_schedule(1e-3), weight_decay=0.0, grad_clip=1.0), sharding.make_mesh(data=1, fsdp=1))
    kept = checkpoints.restore(bad, {name: like[name] for name in ("params", "opt_state")})["params"]
  with states(tmp_path / "other", every=bad) as checkpoints, pytest.raises(UserError):
    train(poisoned, make_batches(poisoned_step=bad), checkpoints=checkpoints, log_every=1)
  with states(tmp_path / "other") as checkpoints:
    want = checkpoints.restore(bad, {name: like[name] for name in ("params", "opt_state")})["params"]
  good = jnp.arange(CONFIG.vocab_size) != POISON
  finite = lambda tree: tree | {"embed_tokens": {"weight": tree["embed_tokens"]["weight"][good]}}
  assert same(finite(kept), finite(want))
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(finite(kept)))
  assert not same(finite(kept), finite(poisoned))


@pytest.mark.parametrize("stop_after", [1, 4, 9])
def test_training_that_is_told_to_stop_goes_on_to_the_same_bits(params, stop_after, tmp_path: Path):
  whole_reports, reports = {}, {}
  whole = train(params, make_batches(), whole_reports)

  def stop(step: int, **values: float) -> None:
    if step == stop_after - 1:
      os.kill(os.getpid(), signal.SIGTERM)

  # The signal comes with the report of a step, so the step after it is the last.
  with states(tmp_path) as checkpoints, pytest.raises(PreemptedError, match=f"after step {stop_after + 1} of {STEPS}"):
    train_with(params, stop, checkpoints)
  assert saved(tmp_path)[-1] == stop_after + 1
  assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
  with states(tmp_path) as checkpoints:
    resumed = train(params, make_batches(), reports, checkpoints=checkpoints)
  assert list(reports) == list(range(stop_after + 1, STEPS))
  assert same(resumed.params, whole.params)
  assert (resumed.first_loss, resumed.last_loss) == (whole.first_loss, whole.last_loss)
  assert [reports[i]["loss"] for i in reports] == [whole_reports[i]["loss"] for i in reports]


def train_with(params, report, checkpoints: Checkpoints):
  return trainer.train(
      CONFIG, lambda: jax.tree.map(jnp.copy, params), make_batches(), weight_decay=0.0, grad_clip=1.0, accumulation=1,
      remat="none", compute_dtype=jnp.float32, mesh=sharding.make_mesh(data=1, fsdp=1), report=report, label="SFT",
      schedule=optax.constant_schedule(1e-3), log_every=1, checkpoints=checkpoints)


def test_states_in_the_background_hold_the_step_they_were_taken_at(params, tmp_path: Path):
  """Training donates the buffers that are being written."""
  with states(tmp_path, every=1, keep=STEPS) as checkpoints:
    train(params, make_batches(), checkpoints=checkpoints)
  assert saved(tmp_path) == list(range(1, STEPS))
  whole = train(params, make_batches())
  for step in (1, 5, 9):
    shutil.copytree(tmp_path / "states" / str(step), tmp_path / f"copy-{step}" / "states" / str(step))
    with states(tmp_path / f"copy-{step}") as checkpoints:
      assert checkpoints.step == step
      assert same(train(params, make_batches(), checkpoints=checkpoints).params, whole.params)


def test_no_more_states_are_kept_than_asked_for(params, tmp_path: Path):
  with states(tmp_path, every=2, keep=2) as checkpoints:
    train(params, make_batches(), checkpoints=checkpoints)
  assert saved(tmp_path) == [6, 8]


def test_a_state_of_something_else_is_refused(params, tmp_path: Path):
  with states(tmp_path) as checkpoints:
    train(params, make_batches(), checkpoints=checkpoints)
  with states(tmp_path, start="another") as checkpoints, pytest.raises(
      UserError, match=r"states: holds the training state of something else \(start differ\)"):
    train(params, make_batches(), checkpoints=checkpoints)
  assert saved(tmp_path) == [6, 9]


DAMAGES = ("another model", "about", "state", "state/ocdbt.process_0")


def _read_what_cannot_be_read(folder: Path) -> None:
  """Resumes from a state that fits no longer, for each reason; leaves what was said."""
  params = init_params(CONFIG, key=jax.random.key(0))
  said = {}
  for i, damage in enumerate(DAMAGES):
    here = folder / str(i)
    with states(here) as checkpoints:
      train(params, make_batches(), checkpoints=checkpoints)
    if damage == "another model":
      other = CONFIG.__class__(**{**vars(CONFIG), "hidden_size": 24})
      resume = lambda checkpoints, other=other: trainer.train(
          other, lambda: None, make_batches(), weight_decay=0.0, grad_clip=1.0, accumulation=1, remat="none",
          compute_dtype=jnp.float32, mesh=sharding.make_mesh(data=1, fsdp=1), report=lambda *a, **b: None, label="SFT",
          schedule=optax.constant_schedule(1e-3), log_every=1, checkpoints=checkpoints)
    else:
      resume = lambda checkpoints: train(params, make_batches(), checkpoints=checkpoints)
      damaged = here / "states" / "9" / damage
      if "/" in damage:
        shutil.rmtree(damaged)
      for file in damaged.rglob("*"):
        if file.is_file():
          file.write_bytes(b"damaged")
    try:
      with states(here) as checkpoints:
        resume(checkpoints)
    except UserError as e:
      said[damage] = str(e)
  (folder / "said.json").write_text(json.dumps(said))


def test_a_state_that_cannot_be_read_is_named_in_one_line(run_on_devices, tmp_path: Path):
  """In a process of its own: tensorstore calls back into a loop that orbax has closed when a read breaks off."""
  run_on_devices(__file__, tmp_path, "read", devices=1)
  said = json.loads((tmp_path / "said.json").read_text())
  assert sorted(said) == sorted(DAMAGES)
  for text in said.values():
    assert "states/9: this training state cannot be read" in text
    assert "\n" not in text


def test_a_killed_save_leaves_the_state_before_it(params, tmp_path: Path):
  with states(tmp_path) as checkpoints:
    train(params, make_batches(), checkpoints=checkpoints)
  (tmp_path / "states" / "12.orbax-checkpoint-tmp").mkdir()
  (tmp_path / "states" / "12.orbax-checkpoint-tmp" / "half").write_bytes(b"half")
  with states(tmp_path) as checkpoints:
    assert checkpoints.step == 9
    assert same(train(params, make_batches(), checkpoints=checkpoints).params, train(params, make_batches()).params)


def _fill_the_disk(folder: Path) -> None:
  """Trains while files can grow no longer, from step 5 on; leaves what was said."""
  signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  with states(folder, every=4) as checkpoints:

    def report(step: int, **values: float) -> None:
      if step == 5:
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    try:
      train_with(init_params(CONFIG, key=jax.random.key(0)), report, checkpoints)
      checkpoints.wait()
    except UserError as e:
      (folder / "said").write_text(str(e))


def test_a_full_disk_while_saving_is_one_line_and_keeps_the_state_before(run_on_devices, tmp_path: Path):
  """In a process of its own: orbax leaves coroutines behind that nobody awaits."""
  run_on_devices(__file__, tmp_path, "save", devices=1)
  said = (tmp_path / "said").read_text()
  assert "training state cannot be written" in said
  assert "\n" not in said
  assert saved(tmp_path) == [4]


def test_where_nothing_can_be_written_is_said_at_once(tmp_path: Path):
  (tmp_path / "states").write_text("a file")
  with pytest.raises(UserError, match="training states cannot be written there"):
    states(tmp_path)


def test_a_thread_trains_without_signals(params):
  failures = []

  def work() -> None:
    try:
      train(params, make_batches())
    except BaseException as e:  # told to the test
      failures.append(e)

  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert failures == []


def test_profile_records_what_perfetto_and_tensorboard_open(params, tmp_path: Path):
  train(params, make_batches(), profile=throughput.Profile("2:4", tmp_path))
  assert list(tmp_path.rglob("perfetto_trace.json.gz"))
  assert list(tmp_path.rglob("*.xplane.pb"))


def test_states_are_never_kept_among_other_things(tmp_path: Path):
  (tmp_path / "run.json").touch()
  with pytest.raises(UserError, match=r"holds run\.json, which is no training state"):
    Checkpoints(tmp_path, save_interval=1, max_to_keep=1, identity={})


@pytest.mark.parametrize("folder", ["bad://x", "/proc/x"])
def test_a_folder_for_states_that_cannot_be_written_is_one_line(folder: str):
  with pytest.raises(UserError, match="training states cannot be written there"):
    check_folder(folder)


def test_a_profile_beyond_the_last_step_says_that_nothing_was_recorded(params, tmp_path: Path, capfd):
  train(params, make_batches(), profile=throughput.Profile("200:204", tmp_path))
  assert "config.profile=200:204: nothing was recorded" in capfd.readouterr().err
  assert not list(tmp_path.iterdir())


def test_flops_of_a_step_are_those_of_its_products():
  """Against the operations that XLA counts in the compiled forward and backward pass, attention's square in full."""
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
  # A causal mask saves half of the square where the kernel skips it; this one does not.
  assert counted == pytest.approx(needed + square, rel=0.1)


def test_meter_reads_time_and_share_of_the_peak(monkeypatch):
  monkeypatch.setattr(throughput, "peak_flops", lambda kind: 1e9)
  batches = make_batches()
  meter = throughput.Meter(CONFIG, batches, devices=4)
  with meter.waiting():
    time.sleep(0.05)
  time.sleep(0.05)
  found = meter.read(2)
  assert 0.05 <= found["step_s"] < 0.2
  assert 0.025 <= found["input_wait_s"] < found["step_s"]
  assert found["tokens_per_s"] == pytest.approx(batches.tokens_per_step / found["step_s"])
  needed = throughput.train_flops(CONFIG, tokens=batches.tokens_per_step, squares=batches.squares_per_step)
  assert found["mfu"] == pytest.approx(needed / found["step_s"] / 4e9)
  assert json.dumps(found)


@pytest.mark.parametrize("steps", ["3", "3:3", "5:2", "a:b", "-1:4"])
def test_a_profile_window_that_is_none_is_an_error(steps: str):
  with pytest.raises(ValueError, match="expected first:end"):
    throughput.window(steps)


if __name__ == "__main__":
  {"save": _fill_the_disk, "read": _read_what_cannot_be_read}[sys.argv[2]](Path(sys.argv[1]))
