"""Runs a config from Python."""

import copy
import functools
import os
from pathlib import Path
from typing import Any

import ml_collections

from imm_jax import config_checks, config_files, config_keys, experiments, loop
from imm_jax.errors import UserError
from imm_jax.report import Results


def run(config: str | os.PathLike[str] | ml_collections.ConfigDict, *, workdir: str | os.PathLike[str],
        rerun: bool = False, **changes: Any) -> Results:
  """Runs a config: rounds of sampling, filtering, SFT, merging and evaluation; resumes where an earlier call stopped.

  The same as `imm run --config=CONFIG --workdir=WORKDIR`.

  Args:
    config: a name (`tiny`, `qwen:1.5b,task=math`), a config file, or settings, which are left as they are.
    workdir: the run directory; made if missing.
    rerun: where settings were changed: run again what depends on that, even samples and training that are done.
    **changes: settings by name; `**{"sft.epochs": 1}` for those with a dot. configs/common.py lists all.

  Returns:
    The results that the report shows: `models`, base first, each with a `label` and, by task, `scores` (`value`, `low`,
    `high`, `n`). The run directory holds the checkpoints, `round_0/merged` and so on.

  Raises:
    UserError: for a setting that does not exist or cannot work, and as the command does.

  >>> import imm_jax
  >>> imm_jax.run("tiny", workdir="runs/tiny", runds=1)
  Traceback (most recent call last):
  imm_jax.errors.UserError: runds is no setting: did you mean rounds?
  """
  settings: ml_collections.ConfigDict = copy.deepcopy(config) if isinstance(
      config, ml_collections.ConfigDict) else config_files.load(os.fspath(config))
  if experiments.is_experiment(settings):
    raise UserError("run: the config holds several runs, which `imm run` does; give the config of one")
  known = config_files.list_keys(settings)
  for key, value in changes.items():
    if key not in known:
      inner = next((name for name in known if name.startswith(f"{key}.")), "")
      raise UserError(f"{key} is a group of settings; give one of them, such as {inner}" if inner else
                      f"{key} is no setting: {config_keys.suggest_key(key)}")
    try:
      settings.update_from_flattened_dict({key: value})
    except (TypeError, ValueError) as e:
      kind = type(functools.reduce(lambda at, part: at[part], key.split("."), settings)).__name__
      raise UserError(f"{key}={value!r}: expected a value of type {kind}") from e
  config_checks.validate(settings)
  loop.run(settings, os.fspath(workdir), rerun=rerun)
  return Results.read(Path(workdir))
