"""Checks the keys of a config and the types of their values, and reads values by key."""

import difflib
import functools
import re
from collections.abc import Callable
from typing import Any

import ml_collections

from imm_jax import config_files
from imm_jax.errors import UserError

# Tuples whose items may be of another type than those of the default, or whose default is empty.
_ITEMS: dict[str, type | None] = {"merge.sweep": float, "sample.temperatures": None}


@functools.cache
def load_defaults() -> ml_collections.ConfigDict:
  """Returns the config of configs/common.py; not to be changed."""
  return config_files.load(str(config_files.FOLDER / "common.py"))


def check_keys(config: ml_collections.ConfigDict) -> None:
  """Raises UserError if the keys, or the types of the values, are not those of configs/common.py.

  ml_collections reports no mistake if a config file unlocks its config, ignores types or builds a config from scratch.
  """
  _check_group(config, load_defaults(), "")


def _check_group(group: ml_collections.ConfigDict, default: ml_collections.ConfigDict, prefix: str) -> None:
  for key in sorted({*group} ^ {*default}):
    raise UserError(f"the config has {prefix}{key}, which is no setting: {suggest_key(f'{prefix}{key}')}"
                    if key in group else f"the config has no key {prefix}{key}; is --config the right file?")
  for key, value in default.items():
    if isinstance(value, ml_collections.ConfigDict):
      if not isinstance(group[key], ml_collections.ConfigDict):
        raise UserError(describe_mismatch(f"{prefix}{key}", group[key]))
      _check_group(group[key], value, f"{prefix}{key}.")
    elif default.get_type(key) is not object:  # otherwise it may have several types, and has a check of its own
      _check_type(f"{prefix}{key}", group[key], value)


def _check_type(key: str, value: Any, default: Any) -> None:
  """Raises UserError unless a value has the type of its default; ints will do for floats, and lists for tuples."""
  item_type = _get_item_type(key, default)
  if not _is_a(value, type(default)) or (item_type and not all(_is_a(item, item_type) for item in value)):
    raise UserError(describe_mismatch(key, value))


def _is_a(value: Any, kind: type) -> bool:
  accepted = {float: (int, float), tuple: (tuple, list)}.get(kind, (kind,))
  return isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))


def _get_item_type(key: str, default: Any) -> type | None:
  """Returns the type of the items of a tuple; None if it is no tuple, or they may have several types."""
  return _ITEMS.get(key, type(default[0]) if default else str) if isinstance(default, tuple) else None


def describe_mismatch(key: str, value: Any) -> str:
  """Returns the line about a value whose type is not that of the key's default.

  >>> describe_mismatch("eval.pass_at_k", (1, "2"))
  "config.eval.pass_at_k=(1, '2'): is a tuple of int and str; expected a tuple of int"
  >>> describe_mismatch("teacher", None)
  'config.teacher=None: is None; expected a str'
  """
  default = get_value(load_defaults(), key)
  given, expected = _describe_type(value), _describe_type(default)
  if isinstance(value, tuple | list):
    given += f" of {' and '.join(sorted({type(item).__name__ for item in value}))}" * bool(value)
  if isinstance(default, ml_collections.ConfigDict):
    expected = f"settings, such as config.{key}.{next(iter(default))}"
  elif items := _get_item_type(key, default):
    expected += f" of {items.__name__}"
  return f"config.{key}={value!r}: is {given}; expected {expected}"


def _describe_type(value: Any) -> str:
  return "None" if value is None else _with_article(type(value).__name__)


def _with_article(name: str) -> str:
  return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def suggest_key(key: str) -> str:
  """Returns a hint for an unknown key: the nearest one of its group, or else of all.

  >>> suggest_key("sft.lr"), suggest_key("sft.rounds")
  ('did you mean sft.learning_rate?', 'did you mean rounds?')
  >>> suggest_key("wheels")
  'configs/common.py lists all keys'
  """
  known = config_files.list_keys(load_defaults())
  group, _, name = key.rpartition(".")
  if elsewhere := [k for k in known if k.rpartition(".")[2] == name]:
    return f"did you mean {elsewhere[0]}?"
  for keys in ([k for k in known if k.rpartition(".")[0] == group], known):
    names = [k.rpartition(".")[2] for k in keys]
    initials = ["".join(word[0] for word in n.split("_")) for n in names]
    if name in initials:
      return f"did you mean {keys[initials.index(name)]}?"
    if close := difflib.get_close_matches(name, names, n=1):
      return f"did you mean {keys[names.index(close[0])]}?"
  return "configs/common.py lists all keys"


def explain(error: Exception) -> str:
  """Explains in one line what ml_collections says of a wrong key or value in a file; empty for other errors."""
  if match := re.search(r'Key "(.*?)" does not exist and cannot be added.*?fields present: (.*)', str(error), re.S):
    # It does not say which group it was, but which keys the group has.
    present = set(re.findall(r"'(\w+)\\?': ", match[2]))
    group = max(_list_groups(), key=lambda prefix: len(present.intersection(_list_names(prefix))))
    key = f"{group}{match[1]}"
    return f"the config has no key {key!r}; {suggest_key(key)}"
  if match := re.search(r"override field '(.*?)' .*?\. (.*) is of original type <class '(.*?)'> and cannot be casted "
                        r"to type <class '(.*?)'>", str(error), re.S):
    name, value, kind, wanted = match.groups()
    # Nor does it say which group's key it was, if several have one of this name.
    keys = " or config.".join(f"{group}{name}" for group in _list_groups() if name in _list_names(group)) or name
    value = repr(value) if kind == "str" else value
    return (f"config.{keys}={value}: is {_with_article(kind.rpartition('.')[2])}; "
            f"expected {_with_article(wanted.rpartition('.')[2])}")
  return ""


def _list_groups() -> list[str]:
  """Lists the prefixes of all groups of settings, such as `merge.auto.`; the whole config's is empty."""
  parts = [key.split(".")[:-1] for key in config_files.list_keys(load_defaults())]
  return list(dict.fromkeys("".join(f"{part}." for part in p[:n]) for p in parts for n in range(len(p) + 1)))


def _list_names(prefix: str) -> list[str]:
  """Lists the names of the keys of a group."""
  return [*(get_value(load_defaults(), prefix[:-1]) if prefix else load_defaults())]


def get_value(config: ml_collections.ConfigDict, key: str) -> Any:
  """Returns the value at a key such as `sft.epochs`."""
  for part in key.split("."):
    if part not in config:
      raise UserError(f"the config has no key {key}; is --config the right file?")
    config = config[part]
  return config


def require(config: ml_collections.ConfigDict, key: str, check: Callable[[Any], bool], expected: str) -> None:
  """Raises UserError, ending in `expected`, unless the value at a key such as `sft.epochs` passes the check."""
  value = get_value(config, key)
  if not check(value):
    raise UserError(f"config.{key}={value}: {expected}")
