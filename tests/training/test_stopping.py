"""Early stopping, and resumed trainings with additions, which must give the same bits."""

import os
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from imm_jax.errors import PreemptedError, UserError
from imm_jax.stages import fine_tune
from imm_jax.training import lora, step as training, stopping, trainer
from imm_jax.training.additions import PLAIN, Additions
from imm_jax.training.computation import Computation
from imm_jax.training.lora import Lora
from imm_jax.training.optimization import Optimization
from imm_jax.training.packing import PackedBatches
from imm_jax.training.reporting import Reporting
from imm_jax.training.states import Checkpoints
from tests.training import test_interventions as i, test_step as t

EXAMPLES = t.make_examples(30)
HELD_OUT = t.pack(t.make_examples(9, seed=1), global_batch=9)
ADDITIONS = {"anchored": Additions(kl=0.5, l2_sp=0.1, ema=0.9), "lora": Additions(lora=Lora(2, 4.0))}


def batches() -> PackedBatches:
  """Returns batches of four epochs of two and a half steps."""
  built = t.pack(EXAMPLES, global_batch=12, epochs=4)
  assert (len(built), built.epoch_ends) == (10, [3, 5, 8, 10])
  return built


@pytest.fixture(scope="module")
def steps() -> dict:
  """Caches compiled steps for all trainings here."""
  return {}


@pytest.fixture
def train(steps: dict, monkeypatch: pytest.MonkeyPatch):
  """Returns a function that runs a training and returns its result and its reports."""
  make = trainer.make_train_step
  rate = optax.constant_schedule(1e-2)

  def run(additions: Additions, *, held_out: PackedBatches | None = HELD_OUT, on_report=lambda step: None,
          checkpoints: Checkpoints | None = None, fresh: bool = True):
    mesh, reports = i.make_mesh(), []
    monkeypatch.setattr(trainer, "make_train_step", lambda *args, **options: steps.setdefault(
        additions, make(*args, **options)))

    def load() -> dict:
      assert fresh, "the first weights are read again"
      return lora.init(t.CONFIG, additions.lora, mesh, key=jax.random.key(5)) if additions.lora else i.make_params(mesh)

    def frozen() -> dict:
      given = jax.tree.map(lambda leaf: leaf * 0.9, i.make_params(mesh))
      return {"base" if additions.lora else "anchor": given} if additions != PLAIN else {}

    def report(step: int, **values: float) -> None:
      reports.append((step, values))
      on_report(step)

    return trainer.train(
        t.CONFIG, load, batches(), Optimization(rate, 0.1, 1.0, additions=additions), Computation(mesh, jnp.float32),
        Reporting(report, "SFT", log_every=1), load_frozen=frozen, held_out=held_out,
        checkpoints=checkpoints), reports

  return run


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
  """Replaces the held-out losses measured after each epoch."""
  values: list[float] = []
  monkeypatch.setattr(stopping.EarlyStopping, "_loss", lambda self, *_: values[len(self.losses)])
  return values


def states(folder: Path, every: int = 100) -> Checkpoints:
  return Checkpoints(folder, save_interval=every, max_to_keep=2, identity={})


def same(a, b) -> bool:
  return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b))


def test_training_stops_at_a_worse_epoch(train, losses):
  """It stops at the first one, with the best weights."""
  losses[:] = [3.0, 2.0, 2.0, 2.5]
  (ended, _), (shorter, reports) = train(PLAIN), (None, None)
  assert (ended.steps, ended.held_out) == (10, (3.0, 2.0, 2.0, 2.5))
  losses[:] = [3.0, 2.0, 2.5, 1.0]  # it never comes to the last
  shorter, reports = train(PLAIN)
  assert (shorter.steps, shorter.held_out) == (8, (3.0, 2.0, 2.5))
  assert [step for step, values in reports if "held_out_loss" in values] == [2, 4, 7]
  assert same(ended.params, shorter.params)  # of the second epoch
  losses[:] = [4.0, 3.0, 2.0, 1.0]
  whole, _ = train(PLAIN)
  assert whole.steps == 10
  plain, _ = train(PLAIN, held_out=None)
  assert same(whole.params, plain.params)  # held-out data do not affect the training
  assert not same(whole.params, ended.params)
  assert plain.held_out == ()


def test_held_out_loss_is_a_token_mean(train):
  """It is the mean over answer tokens."""
  ended, reports = train(PLAIN)
  loss = lambda params: training.token_losses(t.CONFIG, params, batch, compute_dtype=jnp.float32)
  total = count = 0.0
  for number in range(len(HELD_OUT)):
    batch = HELD_OUT[number]
    result, numbers = jax.jit(loss)(ended.params)
    total, count = total + float(result), count + float(numbers["tokens"])
  assert min(ended.held_out) == pytest.approx(total / count, rel=1e-6)
  assert [values["held_out_loss"] for _, values in reports if "held_out_loss" in values] == list(ended.held_out)


@pytest.mark.full
@pytest.mark.parametrize("kind", ADDITIONS)
def test_a_resumed_training_gives_the_same_bits(train, losses, kind: str, tmp_path: Path):
  """Stops at several steps: within an epoch, at the end of one, and at the end of the best one."""
  losses[:] = [3.0, 2.0, 2.5]
  additions = ADDITIONS[kind]
  whole, whole_reports = train(additions)
  assert (whole.steps, (whole.average is not None)) == (8, additions.ema > 0)

  def stop(at: int):
    return lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == at else None

  for at in (0, 1, 3, 5):
    folder = tmp_path / str(at)
    with states(folder) as checkpoints, pytest.raises(PreemptedError):
      train(additions, on_report=stop(at), checkpoints=checkpoints)
    with states(folder) as checkpoints:
      began = checkpoints.step
      resumed, reports = train(additions, checkpoints=checkpoints, fresh=False)
    assert began in (at + 1, at + 2)
    assert resumed.held_out == whole.held_out
    assert same(resumed.params, whole.params)
    assert resumed.average is None or same(resumed.average, whole.average)
    assert timeless(reports, began) == timeless(whole_reports, began)


def timeless(reports: list, first: int) -> list:
  """Returns the reports from a step on, without those that depend on time."""
  return [(step, {name: value for name, value in values.items() if not name.endswith(("_s", "mfu"))})
          for step, values in reports if step >= first]


def test_held_out_answers_stay_together():
  """All answers to a question are held out together."""
  rows = [{"question": f"q{n % 10}", "response": str(n)} for n in range(40)]
  seen, held = fine_tune.hold_out(rows, 0.3, (0, 1), source="train.jsonl")
  asked = lambda indices: {rows[index]["question"] for index in indices}
  assert sorted(seen + held) == list(range(40))
  assert (len(asked(held)), len(held)) == (3, 12)
  assert not asked(seen) & asked(held)
  assert fine_tune.hold_out(rows, 0.3, (0, 1), source="")[1] == held
  assert fine_tune.hold_out(rows, 0.3, (0, 2), source="")[1] != held
  assert fine_tune.hold_out(rows, 0.0, 0, source="") == (list(range(40)), [])
  assert [len(asked(part)) for part in fine_tune.hold_out(rows, 0.99, 0, source="")] == [1, 9]
  assert [len(asked(part)) for part in fine_tune.hold_out(rows, 0.01, 0, source="")] == [9, 1]
  with pytest.raises(UserError, match=r"^train\.jsonl: has answers to 1 question; config\.sft\.stop_share=0\.5 needs"):
    fine_tune.hold_out(rows[:1], 0.5, 0, source="train.jsonl")


def test_epochs_end_with_the_step_of_their_last_row():
  for epochs, global_batch in ((1, 4), (3, 12), (4, 30), (2, 1)):
    built = t.pack(EXAMPLES, epochs=epochs, global_batch=global_batch)
    seen, ends = 0, []
    for step in range(len(built)):
      before, seen = seen, seen + len(built.members(step))
      ends += [step + 1] * (seen // len(EXAMPLES) - before // len(EXAMPLES))
    assert built.epoch_ends == ends
