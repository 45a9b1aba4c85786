"""The trainer's states on disk: saving, restoring, errors, and resumed trainings."""

import errno
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
import pytest

from imm_jax.errors import PreemptedError, ResourceError, UserError
from imm_jax.model import sharding
from imm_jax.model.decoder import init_params
from imm_jax.training import optimization, step as training_step
from imm_jax.training.states import Checkpoints, check_folder
from tests.training.helpers import CONFIG, POISON, STEPS, make_batches, same, train, train_with

pytestmark = pytest.mark.usefixtures("compiled_once")

IDENTITY = {"start": "a", "train": "b"}


def states(folder: Path, *, every: int = 3, keep: int = 2, **identity: str) -> Checkpoints:
  return Checkpoints(folder / "states", save_interval=every, max_to_keep=keep, identity=IDENTITY | identity)


def saved(folder: Path) -> list[int]:
  return sorted(int(p.name) for p in (folder / "states").iterdir() if p.name.isdigit())


@pytest.mark.full
@pytest.mark.parametrize("log_every", [1, 4])
def test_last_good_state_survives(params, log_every, tmp_path: Path):
  """A loss that is not finite does not replace it."""
  bad = 5
  table = params["embed_tokens"]["weight"]
  poisoned = params | {"embed_tokens": {"weight": table.at[POISON].set(jnp.nan)}}
  kept = {}
  with states(tmp_path, every=100) as checkpoints:
    with pytest.raises(UserError, match=rf"the loss is nan at step {bad} .*kept in {tmp_path}"):
      train(poisoned, make_batches(poisoned_step=bad), checkpoints=checkpoints, log_every=log_every)
    assert saved(tmp_path) == [bad]
    like = training_step.abstract_state(CONFIG, optimization.make_optimizer(
        weight_decay=0.0, grad_clip=1.0), sharding.make_mesh(data=1, fsdp=1))
    kept = checkpoints.restore(bad, {name: like[name] for name in ("params", "opt_state")})["params"]
  with states(tmp_path / "other", every=bad) as checkpoints, pytest.raises(UserError):
    train(poisoned, make_batches(poisoned_step=bad), checkpoints=checkpoints, log_every=1)
  with states(tmp_path / "other") as checkpoints:
    expected = checkpoints.restore(bad, {name: like[name] for name in ("params", "opt_state")})["params"]
  good = jnp.arange(CONFIG.vocab_size) != POISON
  finite = lambda tree: tree | {"embed_tokens": {"weight": tree["embed_tokens"]["weight"][good]}}
  assert same(finite(kept), finite(expected))
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(finite(kept)))
  assert not same(finite(kept), finite(poisoned))


@pytest.mark.parametrize("stop_after", [1, 4, 9])
def test_preempted_training_repeats_its_bits(params, stop_after, tmp_path: Path):
  """A preempted training resumes to the same bits."""
  whole_reports, reports = {}, {}
  whole = train(params, make_batches(), whole_reports)

  def stop(step: int, **values: float) -> None:
    if step == stop_after - 1:
      os.kill(os.getpid(), signal.SIGTERM)

  # The signal arrives with the report of a step, so the next step is the last.
  with states(tmp_path) as checkpoints, pytest.raises(PreemptedError, match=f"after step {stop_after + 1} of {STEPS}"):
    train_with(params, stop, make_batches(), checkpoints=checkpoints)
  assert saved(tmp_path)[-1] == stop_after + 1
  assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
  with states(tmp_path) as checkpoints:
    resumed = train(params, make_batches(), reports, checkpoints=checkpoints)
  assert list(reports) == list(range(stop_after + 1, STEPS))
  assert same(resumed.params, whole.params)
  assert (resumed.first_loss, resumed.last_loss) == (whole.first_loss, whole.last_loss)
  assert [reports[i]["loss"] for i in reports] == [whole_reports[i]["loss"] for i in reports]


def test_background_saves_match_their_step(params, tmp_path: Path):
  """Checks that training may donate buffers while they are being written."""
  with states(tmp_path, every=1, keep=STEPS) as checkpoints:
    train(params, make_batches(), checkpoints=checkpoints)
  assert saved(tmp_path) == list(range(1, STEPS))
  whole = train(params, make_batches())
  for step in (1, 5, 9):
    shutil.copytree(tmp_path / "states" / str(step), tmp_path / f"copy-{step}" / "states" / str(step))
    with states(tmp_path / f"copy-{step}") as checkpoints:
      assert checkpoints.step == step
      assert same(train(params, make_batches(), checkpoints=checkpoints).params, whole.params)


def test_only_max_to_keep_states_are_kept(params, tmp_path: Path):
  with states(tmp_path, every=2, keep=2) as checkpoints:
    train(params, make_batches(), checkpoints=checkpoints)
  assert saved(tmp_path) == [6, 8]


def test_a_state_of_another_training_is_refused(params, tmp_path: Path):
  with states(tmp_path) as checkpoints:
    train(params, make_batches(), checkpoints=checkpoints)
  with states(tmp_path, start="another") as checkpoints, pytest.raises(
      UserError, match=r"states: holds the training state of something else \(start differ\)"):
    train(params, make_batches(), checkpoints=checkpoints)
  assert saved(tmp_path) == [6, 9]


DAMAGES = ("another model", "about", "state", "state/ocdbt.process_0")


def _resume_from_damaged_states(folder: Path) -> None:
  """Resumes from a state damaged in each way; writes the errors to a file."""
  params = init_params(CONFIG, key=jax.random.key(0))
  message = {}
  with states(folder / "whole") as checkpoints:
    train(params, make_batches(), checkpoints=checkpoints)
  for i, damage in enumerate(DAMAGES):
    here = Path(shutil.copytree(folder / "whole", folder / str(i)))
    if damage == "another model":
      other = CONFIG.__class__(**{**vars(CONFIG), "hidden_size": 24})
      resume = lambda checkpoints, other=other: train_with(
          None, lambda *a, **b: None, make_batches(), config=other, checkpoints=checkpoints)
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
      message[damage] = str(e)
  (folder / "said.json").write_text(json.dumps(message))


@pytest.mark.full
def test_an_unreadable_state_is_reported_in_one_line(run_on_devices, tmp_path: Path):
  """Runs in a child process, because an aborted read leaves tensorstore callbacks to a closed event loop."""
  run_on_devices(__file__, tmp_path, "read", devices=1)
  message = json.loads((tmp_path / "said.json").read_text())
  assert sorted(message) == sorted(DAMAGES)
  for text in message.values():
    assert "states/9: this training state cannot be read" in text
    assert "\n" not in text


def test_a_killed_save_leaves_the_previous_state(params, tmp_path: Path):
  with states(tmp_path) as checkpoints:
    train(params, make_batches(), checkpoints=checkpoints)
  (tmp_path / "states" / "12.orbax-checkpoint-tmp").mkdir()
  (tmp_path / "states" / "12.orbax-checkpoint-tmp" / "half").write_bytes(b"half")
  with states(tmp_path) as checkpoints:
    assert checkpoints.step == 9
    assert same(train(params, make_batches(), checkpoints=checkpoints).params, train(params, make_batches()).params)


def _fill_the_disk(folder: Path) -> None:
  """Trains with a limit on file sizes from step 5 on; writes the error to a file."""
  signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  with states(folder, every=4) as checkpoints:

    def report(step: int, **values: float) -> None:
      if step == 5:
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    try:
      train_with(init_params(CONFIG, key=jax.random.key(0)), report, make_batches(), checkpoints=checkpoints)
      checkpoints.wait()
    except UserError as e:
      (folder / "said").write_text(str(e))


@pytest.mark.full
def test_full_disk_keeps_the_previous_state(run_on_devices, tmp_path: Path):
  """Runs in a child process, because orbax leaves unawaited coroutines behind."""
  run_on_devices(__file__, tmp_path, "save", devices=1)
  message = (tmp_path / "said").read_text()
  assert "training state cannot be written" in message
  assert "\n" not in message
  assert saved(tmp_path) == [4]


def test_a_state_of_another_version_is_not_read(tmp_path: Path):
  """An optimizer with one counter more has other leaves; a model of another size other shapes."""
  with states(tmp_path) as checkpoints:
    checkpoints.save(3, {"w": jnp.ones(2), "count": jnp.int32(3)}, input={}, first_loss=1.0, last_loss=1.0)
    checkpoints.wait()
    for like, said in (({"w": jnp.ones(2)}, "another version of imm_jax has written it.*; remove .*states to start"),
                       ({"w": jnp.ones(3), "count": jnp.int32(3)}, "its tensors have other shapes")):
      with pytest.raises(UserError, match=said):
        checkpoints.restore(3, like)


@pytest.mark.parametrize(("error", "lacks"), [
    (OSError(errno.ENOSPC, "No space left"), True), (PermissionError(errno.EACCES, "Permission denied"), False),
    (ValueError("write failed [os_error_code='28']"), True), (ImportError("No module named 'gcsfs'"), False)])
def test_only_want_of_space_can_be_tried_again(tmp_path: Path, error: Exception, lacks: bool):
  def fail() -> None:
    raise error

  with states(tmp_path) as checkpoints, pytest.raises(UserError) as raised:
    checkpoints._run_write(fail)
  assert isinstance(raised.value, ResourceError) is lacks
  assert ("make room" if lacks else "make it writable") in str(raised.value)


def test_an_unwritable_folder_is_reported_early(tmp_path: Path):
  (tmp_path / "states").write_text("a file")
  with pytest.raises(UserError, match="training states cannot be written there"):
    states(tmp_path)


def test_a_folder_with_other_files_is_refused(tmp_path: Path):
  (tmp_path / "run.json").touch()
  with pytest.raises(UserError, match=r"holds run\.json, which is no training state"):
    Checkpoints(tmp_path, save_interval=1, max_to_keep=1, identity={})


@pytest.mark.parametrize("folder", ["bad://x", "/proc/x"])
def test_unwritable_folder_is_one_line(folder: str):
  """States cannot be saved in it."""
  with pytest.raises(UserError, match="training states cannot be written there"):
    check_folder(folder)


if __name__ == "__main__":
  {"save": _fill_the_disk, "read": _resume_from_damaged_states}[sys.argv[2]](Path(sys.argv[1]))
