"""A run as a value: its settings, its folder and the models that it begins with."""

from pathlib import Path
from typing import Any, NamedTuple

import ml_collections

from imm_jax import methods
from imm_jax.config import HOW, idle


class Model(NamedTuple):
  """A checkpoint of a run.

  Attributes:
    folder: where it is.
    stage: the stage that writes it, or the name of an input that none writes (`base`, `teacher`).
  """

  folder: Path
  stage: str


class Run(NamedTuple):
  """A run.

  Attributes:
    config: its settings.
    root: the run directory.
    base: the base model.
    teacher: the model that samples, or None for the one that the round before has handed on.
  """

  config: ml_collections.ConfigDict
  root: Path
  base: Model
  teacher: Model | None = None

  @property
  def method(self) -> methods.Method:
    """The record of the run's method."""
    return methods.method_of(self.config)

  @property
  def merge_method(self) -> str:
    """The merging method of each round; empty for none."""
    return methods.merge_method(self.config)

  @property
  def samples_answers(self) -> bool:
    """Whether answers are sampled to train on."""
    return methods.samples_answers(self.config)

  def model(self, stage: str) -> Model:
    """The checkpoint that a stage writes."""
    return Model(self.root / stage, stage)

  def settings(self, *keys: str) -> dict[str, Any]:
    """See `pick`."""
    return pick(self.config, *keys)

  def scratch(self, stage: str) -> Path:
    """The folder for what a stage has sampled so far, beside its output."""
    return (self.root / stage).with_name(f".{Path(stage).name}.sampling")


def pick(config: ml_collections.ConfigDict, *keys: str) -> dict[str, Any]:
  """Some of the settings (`sft`, `sample.stop`), without those that do not change what comes out."""
  settings, picked, left_out = config.to_dict(), {}, {*HOW, *idle(config)}
  for key in keys:
    value: Any = settings
    for part in key.split("."):
      value = value[part]
    picked[key] = {k: v for k, v in value.items() if f"{key}.{k}" not in left_out} if isinstance(value, dict) else value
  return picked
