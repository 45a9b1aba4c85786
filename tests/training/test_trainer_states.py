"""The trainer's states on disk: what they hold, what is read and written of them, and how training goes on from one."""

import json
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from imm_jax.errors import PreemptedError, UserError
from imm_jax.model import sharding
from imm_jax.model.decoder import init_params
from imm_jax.training import step as training_step, trainer
from imm_jax.training.checkpoints import Checkpoints, check_folder
from tests.training.test_trainer import CONFIG, POISON, STEPS, compiled_once, make_batches, params, same, train  # noqa: F401

IDENTITY = {"start": "a", "train": "b"}


def states(folder: Path, *, every: int = 3, keep: int = 2, **identity: str) -> Checkpoints:
  return Checkpoints(folder / "states", save_interval=every, max_to_keep=keep, identity=IDENTITY | identity)


def saved(folder: Path) -> list[int]:
  return sorted(int(p.name) for p in (folder / "states").iterdir() if p.name.isdigit())


@pytest.mark.full
@pytest.mark.parametrize("log_every", [1, 4])
def test_the_last_good_state_outlives_a_loss_that_is_not_finite(params, log_every, tmp_path: Path):  # noqa: F811
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
def test_training_that_is_told_to_stop_goes_on_to_the_same_bits(params, stop_after, tmp_path: Path):  # noqa: F811
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


def train_with(params, report, checkpoints: Checkpoints):  # noqa: F811
  return trainer.train(
      CONFIG, lambda: jax.tree.map(jnp.copy, params), make_batches(), weight_decay=0.0, grad_clip=1.0, accumulation=1,
      remat="none", compute_dtype=jnp.float32, mesh=sharding.make_mesh(data=1, fsdp=1), report=report, label="SFT",
      schedule=optax.constant_schedule(1e-3), log_every=1, checkpoints=checkpoints)


def test_states_in_the_background_hold_the_step_they_were_taken_at(params, tmp_path: Path):  # noqa: F811
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


def test_no_more_states_are_kept_than_asked_for(params, tmp_path: Path):  # noqa: F811
  with states(tmp_path, every=2, keep=2) as checkpoints:
    train(params, make_batches(), checkpoints=checkpoints)
  assert saved(tmp_path) == [6, 8]


def test_a_state_of_something_else_is_refused(params, tmp_path: Path):  # noqa: F811
  with states(tmp_path) as checkpoints:
    train(params, make_batches(), checkpoints=checkpoints)
  with states(tmp_path, start="another") as checkpoints, pytest.raises(
      UserError, match=r"states: holds the training state of something else \(start differ\)"):
    train(params, make_batches(), checkpoints=checkpoints)
  assert saved(tmp_path) == [6, 9]


DAMAGES = ("another model", "about", "state", "state/ocdbt.process_0")


def _read_what_cannot_be_read(folder: Path) -> None:
  """Resumes from a state that fits no longer, for each reason; leaves what was said."""
  params = init_params(CONFIG, key=jax.random.key(0))  # noqa: F811
  said = {}
  with states(folder / "whole") as checkpoints:
    train(params, make_batches(), checkpoints=checkpoints)
  for i, damage in enumerate(DAMAGES):
    here = Path(shutil.copytree(folder / "whole", folder / str(i)))
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


def test_a_killed_save_leaves_the_state_before_it(params, tmp_path: Path):  # noqa: F811
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


def test_states_are_never_kept_among_other_things(tmp_path: Path):
  (tmp_path / "run.json").touch()
  with pytest.raises(UserError, match=r"holds run\.json, which is no training state"):
    Checkpoints(tmp_path, save_interval=1, max_to_keep=1, identity={})


@pytest.mark.parametrize("folder", ["bad://x", "/proc/x"])
def test_a_folder_for_states_that_cannot_be_written_is_one_line(folder: str):
  with pytest.raises(UserError, match="training states cannot be written there"):
    check_folder(folder)


if __name__ == "__main__":
  {"save": _fill_the_disk, "read": _read_what_cannot_be_read}[sys.argv[2]](Path(sys.argv[1]))
