"""What no run can start from is refused in one line, before anything is spent."""

import subprocess
import sys

import ml_collections
import pytest

from configs import common, tiny
from imm_jax import config_checks
from imm_jax.errors import UserError
from imm_jax.runs.run import list_idle_keys
from tests import REPO
from tests.runs.helpers import SMALL


def run(key: str, value: object) -> ml_collections.ConfigDict:
  config = common.get_config()
  config.update_from_flattened_dict({key: value})
  return config


@pytest.mark.parametrize(("key", "value", "expected"), [
    ("method", "imn", "did you mean imm?"),
    ("method", "linear", "config.method='linear': is a merge; config.merge.method=linear puts it in a method that"),
    ("merge.drop_rate", float("nan"), "drop_rate=nan"),
    ("merge.base_weight", 1.5, "base_weight=1.5: expected a number from 0 to 1"),
    ("rounds", 0, "config.rounds=0: expected 1 or more"), ("sample.stop", ("",), "not empty"),
    ("task.eval_questions", 1_000_000, "eval_questions=1000000"), ("profile", "3", "expected first:end"),
    ("sft.save_interval", 0, "save_interval=0: expected 1 or more"),
    ("task.name", "svamp", "has no train split; expected one of"), ("task.name", "mbpp", "config.task.name has 'mbpp'"),
    ("task.ood", ("gsm9k",), "did you mean gsm8k"),
    ("task.ood", ("custom",), "only the in-domain task"), ("task.questions_per_round", 0, "expected 1 or more"),
    ("prompt.style", "chatty", "did you mean chat"), ("merge.base_weight", "automatic", "a list of them over the"),
    ("merge.base_weight", [], "a list of them over"), ("merge.base_weight", [0.1, 2.0], "a list of them over"),
    ("merge.sweep", (0.3, 0.3), "expected different numbers"), ("merge.sweep", (1.3,), "expected different numbers"),
    ("eval.pass_at_k", (0,), "expected whole numbers"), ("data.real_fraction", 1.5, "expected a share"),
    ("data.with_real", True, "is for method=data_accumulation"), ("sft.top_share", 0.0, "more than 0 and at most 1"),
    ("task.source", "file:/x", "has no source; for questions of your own add --config.task.name=custom"),
    ("task.ood", ("groups=file:/x",), "groups is generated"),
    ("task.fields.question", "q", "is for task custom"), ("merge.auto.step", 0.0, "more than 0"),
    ("merge.sweep", (0.12345671, 0.12345672), "expected different numbers"),
    ("sft.intervention", "decay", "config.sft.intervention='decay'"), ("sft.max_norm", 0.0, "expected a number > 0"),
    ("sft.kl_weight", 0.0, "expected a number > 0"), ("sft.l2_sp_weight", float("inf"), "expected a number > 0"),
    ("sft.ema_decay", 1.0, "more than 0 and less than 1"), ("sft.stop_share", 1.0, "0 or more and less than 1"),
    ("sft.lora_rank", 0, "expected 1 or more"), ("sft.lora_alpha", -1.0, "expected a number > 0"),
    ("sample.temperatures", (), "one or more numbers"), ("sample.temperatures", ((0.2,), 0.4), "such a tuple for each"),
    ("sample.temperatures", ((0.2,), ()), "such a tuple for each"),
    ("sample.temperatures", ((0.2,), (-1.0,)), "such a tuple for each"),
    ("sample.temperatures", ((0.2,),) * 4, "has 4 tuples, config.rounds=3")])
def test_a_value_that_cannot_work_is_one_line(key, value, expected):
  with pytest.raises(UserError) as raised:
    config_checks.validate(run(key, value))
  assert expected in str(raised.value)
  assert "\n" not in str(raised.value)


def test_contradictions_are_one_line():
  """Values that contradict each other are named in one line."""
  config = run("method", "real")
  config.teacher = "tiny"
  with pytest.raises(UserError, match="method=real trains only on worked answers"):
    config_checks.validate(config)
  config = run("merge.base_weight", "auto")
  config.method = "star"
  with pytest.raises(UserError, match="method=star merges nothing"):
    config_checks.validate(config)
  for key, value in (("sft.intervention", "weight_masking"), ("sft.export", "float32")):
    config = run(key, value)
    config.method = "lora"
    with pytest.raises(UserError, match=rf"config\.{key}={value}: .*method=lora"):
      config_checks.validate(config)
  config = run("eval.num_samples", 8)
  config.eval.pass_at_k = (16,)
  with pytest.raises(UserError, match=r"all are more than eval\.num_samples=8"):
    config_checks.validate(config)
  for general in (("stories",), ("groups", "groups")):
    config = run("merge.auto.general", general)
    config.merge.base_weight = "auto"
    with pytest.raises(UserError, match="expected different tasks, and not the in-domain one"):
      config_checks.validate(config)
  config = run("merge.base_weight", "auto")
  config.merge.auto.general = ()
  with pytest.raises(UserError, match=r"needs one or more of merge\.auto\.weights"):
    config_checks.validate(config)


@pytest.mark.parametrize(("key", "value"), [("few_shot", 5), ("shots_file", "mine.jsonl")])
def test_shots_need_a_task_that_is_answered(key: str, value: object):
  """Options are scored without, so that a score with five of them would be one with none."""
  config = run(f"eval.{key}", value)
  config.task.name, config.task.ood, config.eval.by_likelihood = "arc_easy", ("piqa",), ("arc_easy",)
  with pytest.raises(UserError, match=rf"config\.eval\.{key}={value}: arc_easy, piqa are scored by the likelihood"):
    config_checks.validate(config, trains=False)
  config.task.name, config.task.ood, config.eval.by_likelihood = "custom", (), ("custom",)
  config.task.source, config.task.kind, config.task.fields.choices = "file:own.jsonl", "choice", "options"
  with pytest.raises(UserError, match=rf"{value}: custom is .*; leave it out, or config\.eval\.by_likelihood"):
    config_checks.validate(config, trains=False)


@pytest.mark.full
def test_what_cannot_be_asked_shows_before_the_run(environment, tmp_path):
  """The embedded model has 256 positions and no chat template."""
  for flag, expected in (("--config.eval.max_new_tokens=250", "task stories: none of 8 prompts leaves room for "
                          "config.eval.max_new_tokens=250 in the 256 positions"),
                         ("--config.prompt.few_shot=8", "lower config.sample.max_new_tokens or config.prompt.few_shot"),
                         ("--config.prompt.style=chat", "has no chat template")):
    done = subprocess.run([sys.executable, "-m", "imm_jax.main", "--config=configs/tiny.py", *SMALL, flag,
                           f"--workdir={tmp_path / 'run'}"], cwd=REPO, env=environment, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 1
    assert expected in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("change", "message"), [
    ({"task.name": "gsm8k=file:DIR"}, "expected only the name; .*--config.task.name=gsm8k --config.task.source=file"),
    ({"task.name": "custom"}, "needs config.task.source=file:PATH"),
    ({"task.name": "gsm8k", "task.source": "/data/gsm8k"}, "config.task.source: source '/data/gsm8k': expected hf:ID"),
    ({"task.ood": ("svamp=fil:x",)}, "config.task.ood: source 'fil:x': expected hf:ID"),
    ({"prompt.header": "half \ud83d of a pair"}, "is no valid text"),
])
def test_task_errors_need_no_data(change, message):
  """What no run can start from is refused without a look at the questions."""
  config = tiny.get_config()
  config.update_from_flattened_dict(change)
  with pytest.raises(UserError, match=message):
    config_checks.validate(config, downloads=False)


@pytest.mark.parametrize(("slip", "message"), [
    ({"merge": {"base_wieght": 0.3}}, "merge.base_wieght, which is no setting: did you mean merge.base_weight?"),
    ({"extra": 1}, "has extra, which is no setting"), ({"sft": {"ema": None}}, "has no key sft.ema"),
    ({"data": None}, "has no key data")])
def test_new_configs_are_checked_too(slip: dict, message: str):
  """Keys of a config that was made anew are checked, too."""
  made = tiny.get_config().to_dict()
  for key, value in slip.items():
    inner = made.setdefault(key, {}) if isinstance(value, dict) else made
    for name, new in (value if isinstance(value, dict) else slip).items():
      if new is None:
        del inner[name]
      else:
        inner[name] = new
  with pytest.raises(UserError, match=message):
    config_checks.validate(ml_collections.ConfigDict(made))


@pytest.mark.parametrize(("settings", "idle"), [
    ({"method": "star", "merge.base_weight": 0.3, "sft.epochs": 2}, ["merge.base_weight"]),
    ({"method": "star", "sft.kl_weight": 0.3, "sft.lora_rank": 4}, ["sft.kl_weight", "sft.lora_rank"]),
    ({"method": "kl", "sft.kl_weight": 0.3, "merge.auto.step": 0.2}, ["merge.auto.step"]),
    ({"method": "real", "sample.top_p": 0.9, "sample.compute_dtype": "float32"}, ["sample.top_p"]),
    ({"method": "iimm", "merge.base_weight": 0.3, "sft.intervention": "none"}, [])],
    ids=["merge", "penalties", "auto", "samples", "none"])
def test_keys_without_an_effect_are_listed(settings, idle):
  config = tiny.get_config()
  config.update_from_flattened_dict(settings)
  assert list_idle_keys(config, settings) == idle


@pytest.mark.full
def test_a_setting_without_an_effect_is_noted(tmp_path):
  done = subprocess.run([sys.executable, "-m", "imm_jax.main", "--config=configs/tiny.py", "--dry_run",
                         f"--workdir={tmp_path / 'run'}", "--config.merge.method=model_stock",
                         "--config.merge.base_weight=0.3"], cwd=REPO, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert "note: --config.merge.base_weight: no effect with method=imm, merge.method=model_stock" in done.stderr
