"""Checks the keys of a config and the types of their values, and reads values by key."""

from collections.abc import Callable
from typing import Any

import ml_collections

from imm_jax import config_files
from imm_jax.errors import UserError, suggest


def check_keys(config: ml_collections.ConfigDict) -> None:
  """Raises UserError if the keys are not those of configs/common.py.

  ml_collections reports no mistake if a config file unlocks its config or builds one from scratch.
  """
  default = config_files.load(str(config_files.FOLDER / "common.py"))

  def check(group: ml_collections.ConfigDict, default: ml_collections.ConfigDict, prefix: str) -> None:
    for key in sorted({*group} ^ {*default}):
      raise UserError(f"the config has {prefix}{key}, which is no setting: {suggest(key, [*default])}"
                      if key in group else f"the config has no key {prefix}{key}; is --config the right file?")
    for key, value in default.items():
      if isinstance(value, ml_collections.ConfigDict):
        if not isinstance(group[key], ml_collections.ConfigDict):
          raise UserError(f"config.{prefix}{key}={group[key]!r}: expected the settings {', '.join(value)}")
        check(group[key], value, f"{prefix}{key}.")

  check(config, default, "")


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
