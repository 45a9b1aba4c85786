"""A run: its config, its directory, the models that it starts from, and the stages that it consists of."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections

from imm_jax import methods
from imm_jax.training import interventions

# Config keys that change how a run is computed and not its result, so that they may differ between two starts of it.
# data.skip_empty is one of them because it only decides whether a round with nothing to train on ends the run.
RUNTIME_KEYS = ("data.skip_empty", "eval.batch_size", "mesh", "profile", "sample.batch_size", "sampler.attention",
                "sampler.vllm", "sft.accumulation", "sft.attention", "sft.log_every", "sft.max_to_keep", "sft.remat",
                "sft.save_interval", "sft.state_dir", "tracking")


class Checkpoint(NamedTuple):
  """Holds a checkpoint of a run.

  Attributes:
    folder: the checkpoint folder.
    stage: name of the stage that writes it, or of an input that no stage writes (`base`, `teacher`).
  """

  folder: Path
  stage: str


class Run(NamedTuple):
  """Holds what defines a run.

  Attributes:
    config: its settings.
    root: the run directory.
    base: the base model.
    teacher: the model that samples, or None for the one that the previous round handed on.
  """

  config: ml_collections.ConfigDict
  root: Path
  base: Checkpoint
  teacher: Checkpoint | None = None

  @property
  def method(self) -> methods.Method:
    """Returns the record of the run's method."""
    return methods.get_method(self.config)

  @property
  def merge_method(self) -> str:
    """Returns the name of each round's merging method; empty if nothing is merged."""
    return methods.get_merge_method(self.config.method, self.config.merge.method)

  @property
  def samples_answers(self) -> bool:
    """Returns whether answers are sampled to train on."""
    return methods.is_sampling(self.config)

  def model(self, stage: str) -> Checkpoint:
    """Returns the checkpoint that a stage writes."""
    return Checkpoint(self.root / stage, stage)

  def get_next_start(self, round_: int) -> Checkpoint:
    """Returns the checkpoint that the next round starts from and samples with."""
    name = self.method.next_folder
    return Checkpoint(self.root / f"round_{round_}" / name, f"round_{round_}/{name.partition('/')[0]}")

  def settings(self, *keys: str) -> dict[str, Any]:
    """Returns some settings by key; see `pick`."""
    return pick(self.config, *keys)

  def scratch(self, stage: str) -> Path:
    """Returns the folder, beside a stage's output, that keeps its samples until it is done."""
    return (self.root / stage).with_name(f".{Path(stage).name}.sampling")


@dataclasses.dataclass(frozen=True)
class Stage:
  """Describes one step of a run.

  Attributes:
    name: path of its output, a file or a folder, relative to the run directory.
    needs: names of the stages whose output it reads, and of external inputs (see `RunDir.run`).
    settings: everything else that its output depends on, in JSON types.
    plan: a line about its work for `--dry_run`.
    make: a function (output path, digests of the inputs by name) that writes the output and returns facts to record,
      such as counts and scores.
    everywhere: whether all processes call `make`; otherwise only process 0 does.
    scratch: a folder, possibly in a bucket, that is removed when the stage is done; empty for none.
    costly: whether a changed config may replace its output only with `--rerun`.
    summarize: turns its facts into a line for the user; an empty one is not printed.
    former_settings: the settings that earlier versions counted, with some that have no effect; None for the same.
    takes_over: whether it takes over, when run again, what is unchanged in its earlier output.
  """

  name: str
  needs: tuple[str, ...]
  settings: Mapping[str, Any]
  plan: str
  make: Callable[[Path, Mapping[str, str | None]], dict[str, Any]]
  everywhere: bool = False
  scratch: str = ""
  costly: bool = False
  summarize: Callable[[dict[str, Any]], str] = lambda facts: ""
  former_settings: Mapping[str, Any] | None = None
  takes_over: bool = False


def pick(config: ml_collections.ConfigDict, *keys: str) -> dict[str, Any]:
  """Returns some settings by key (`sft`, `sample.stop`), without those that cannot change a stage's output."""
  settings, picked, omitted = config.to_dict(), {}, {*RUNTIME_KEYS, *list_unused_keys(config)}
  for key in keys:
    value: Any = settings
    for part in key.split("."):
      value = value[part]
    picked[key] = {k: v for k, v in value.items() if f"{key}.{k}" not in omitted} if isinstance(value, dict) else value
  return picked


def list_unused_keys(config: ml_collections.ConfigDict) -> set[str]:
  """Lists the keys that have no effect with the other settings as they are.

  They are left out of the stages' settings, so that a run made before such a key existed is still up to date.
  """
  sft, used = config.sft, _dependent_keys(config)
  used |= {"sft.ema": sft.ema, "sft.stop_share": sft.stop_share > 0, "sft.export": sft.export != "model",
           "merge.method": config.merge.method, "data.skip_empty": config.data.skip_empty,
           "analysis.drift": config.analysis.drift, "eval.passages": config.eval.passages, "tracking": config.tracking}
  return {key for key, value in used.items() if not value}


def list_idle_keys(config: ml_collections.ConfigDict, keys: Iterable[str]) -> list[str]:
  """Lists those of the given keys whose values have no effect, because of the method or of another key."""
  # Evaluation reads sample.stop and sample.compute_dtype, too.
  used = _dependent_keys(config) | dict.fromkeys(
      (f"sample.{key}" for key in ("num_samples", "max_new_tokens", "batch_size", "temperatures", "top_p")),
      methods.is_sampling(config))
  used |= dict.fromkeys(("eval.pass_at_k", "eval.temperature", "eval.top_p"), config.eval.num_samples > 0)
  sections = {"merge.": bool(methods.get_method(config).merge), "merge.auto.": config.merge.base_weight == "auto"}
  return [key for key in keys if not used.get(key, True) or any(
      key.startswith(section) and not effective for section, effective in sections.items())]


def _dependent_keys(config: ml_collections.ConfigDict) -> dict[str, bool]:
  """Returns for each key whose effect depends on the method, or on another key, whether it has one."""
  method, sft = methods.get_method(config), config.sft
  return {**{f"sft.{name}_weight": name == method.anchor for name in methods.ANCHORS},
          "sft.lora_rank": method.lora, "sft.lora_alpha": method.lora, "sft.ema_decay": methods.keeps_average(config),
          "data.mixture_share": method.data == "mixture", "data.with_real": method.data == "accumulation",
          **{f"sft.{setting}": sft.intervention == name for name, setting in interventions.SETTINGS.items()}}
