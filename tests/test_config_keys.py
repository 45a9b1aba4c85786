"""Wrong keys and types in a config file are one short line that names the key."""

from pathlib import Path

import pytest

from configs import common
from imm_jax import config_files
from imm_jax.config_keys import check_keys
from imm_jax.errors import UserError

# What a config file may do, and the message.
KEYS = {"c.sft.lr = 3": "'sft.lr'; did you mean sft.learning_rate?", "c.rouns = 3": "'rouns'; did you mean rounds?",
        "c['merge']['auto']['stepp'] = 1": "'merge.auto.stepp'; did you mean merge.auto.step?",
        "c.sft.base_weight = 0.3": "'sft.base_weight'; did you mean merge.base_weight?",
        "c.eval.zzzzzzz = 0": "'eval.zzzzzzz'; configs/common.py lists all keys"}
TYPES = {"c.sft.epochs = '3'": "config.sft.epochs='3': is a str; expected an int",
         "c.sft.epochs = 2.5": "config.sft.epochs=2.5: is a float; expected an int",
         "c.rounds = True": "config.rounds=True: is a bool; expected an int",
         "c.sft.learning_rate = None": "config.sft.learning_rate=None: is None; expected a float",
         "c.sft.ema = 'yes'": "config.sft.ema='yes': is a str; expected a bool",
         "c.sample.stop = 'abc'": "config.sample.stop='abc': is a str; expected a tuple",
         "c.eval.pass_at_k = 4": "config.eval.pass_at_k=4: is an int; expected a tuple",
         "c.eval.pass_at_k = (1, '2')": "config.eval.pass_at_k=(1, '2'): is a tuple of int and str; expected a",
         "c.eval.texts = (3,)": "config.eval.texts=(3,): is a tuple of int; expected a tuple of str",
         "c.sft = 3": "config.sft=3: is an int; expected "}
RIGHT = ("c.sft.learning_rate = 1", "c.task.ood = ['groups']", "c.merge.sweep = [0, 0.5]",
         "c.merge.base_weight = 'auto'", "c.merge.base_weight = [0.1, 0.9]", "c.merge.options.alpha = 1",
         "c.sample.temperatures = ((0.2,), (1,))")


def check(folder: Path, statement: str, block: str = "if True") -> None:
  file = folder / "mine.py"
  file.write_text(f"from configs import common\n\n\ndef get_config():\n  c = common.get_config()\n  {block}:\n"
                  f"    {statement}\n  return c\n")
  check_keys(config_files.load(str(file)))


@pytest.mark.parametrize("block", ["if True", "with c.unlocked()"], ids=["locked", "unlocked"])
@pytest.mark.parametrize(("statement", "expected"), KEYS.items(), ids=[*KEYS])
def test_wrong_keys_name_the_nearest(statement: str, expected: str, block: str, tmp_path: Path):
  with pytest.raises(UserError) as raised:
    check(tmp_path, statement, block)
  message = str(raised.value).replace(str(tmp_path), "")
  key, hint = expected.split("; ")
  assert key.strip("'") in message
  assert message.endswith(hint)
  assert "\n" not in message
  assert len(message) < 120


@pytest.mark.parametrize("block", ["if True", "with c.ignore_type()"], ids=["typed", "untyped"])
@pytest.mark.parametrize(("statement", "expected"), TYPES.items(), ids=[*TYPES])
def test_wrong_types_are_one_line(statement: str, expected: str, block: str, tmp_path: Path):
  with pytest.raises(UserError) as raised:
    check(tmp_path, statement, block)
  message = str(raised.value).replace(str(tmp_path), "")
  assert expected in message
  assert "\n" not in message
  assert len(message) < 130


def test_a_name_of_several_keys_lists_them(tmp_path: Path):
  """ml_collections does not say in which group it was."""
  with pytest.raises(UserError, match=r"config\.eval\.batch_size or config\.sample\.batch_size='5': is a str"):
    check(tmp_path, "c.sample.batch_size = '5'")


@pytest.mark.parametrize("block", ["if True", "with c.ignore_type()"], ids=["typed", "untyped"])
@pytest.mark.parametrize("statement", RIGHT)
def test_other_forms_of_values_are_taken(statement: str, block: str, tmp_path: Path):
  """Whole numbers for floats, lists for tuples, and all types of a key that has several."""
  check(tmp_path, statement, block)


def test_other_errors_of_a_file_stay_as_they_are(tmp_path: Path):
  with pytest.raises(UserError, match=r"mine\.py:\d+: cannot be loaded: ZeroDivisionError: division by zero"):
    check(tmp_path, "c.rounds = 1 / 0")


def test_the_defaults_have_their_own_types():
  check_keys(common.get_config())
