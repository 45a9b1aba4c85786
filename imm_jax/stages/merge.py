"""Merging of a round's tuned model with the base (eq. 5 to 7)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from imm_jax import files
from imm_jax.errors import UserError
from imm_jax.merging import masks, on_disk, registry
from imm_jax.merging.trees import Setting
from imm_jax.methods import get_method
from imm_jax.model import checkpoint_folder, hf, published
from imm_jax.runs.run import Checkpoint, Run, Stage
from imm_jax.runtime import distributed
from imm_jax.stages import analyze, devices, evaluate, fine_tune, likelihood, result_cache, synthesize
from imm_jax.stages.merge_settings import MergeSettings, get_settings
from imm_jax.stages.round_questions import list_round_keys, load_general, load_round
from imm_jax.stages.task_entries import get_tasks
from imm_jax.statistics import accuracy


class MergeInputs(NamedTuple):
  """Holds the inputs of a round's merge.

  Attributes:
    base: folder of the base model.
    start: folder of the model that the round started from.
    tuned: folders of the tuned models of earlier rounds (if the method merges several) and of this round.
    importance: file with the layers' importance, or None for equal shares.
    train: training data of the tuned model: if empty, the round hands on its initial model.
  """

  base: Path
  start: Path
  tuned: Sequence[Path]
  importance: Path | None
  train: Path | None = None

  @property
  def folders(self) -> dict[str, Any]:
    """Returns the models, as `MergeSettings.collect_models` takes them."""
    return {"base": self.base, "start": self.start, "tuned": self.tuned}


def build_stages(run: Run, start: Checkpoint, tuned: Checkpoint, train: str, round_: int) -> list[Stage]:
  """Builds the stages of a merge: importance, sweep and choice of the weight as needed, merge, and evaluation.

  Args:
    run: the run.
    start: the model that the round started from.
    tuned: the tuned model of the round.
    train: name of the stage that wrote the training data.
    round_: number of the round.
  """
  config, settings, here = run.config, get_settings(run.config), f"round_{round_}"
  result: list[Stage] = []
  several = registry.METHODS[settings.method].min_models > 1
  tuned = [*(run.model(f"round_{t}/sft") for t in range(round_) if several), tuned]
  inputs = [run.base.stage, start.stage, *(model.stage for model in tuned)]
  importance = f"{here}/importance.json" if settings.needs_importance else ""
  models = MergeInputs(run.base.folder, start.folder, [model.folder for model in tuned],
                       run.root / importance if importance else None, run.root / train)
  recorded = run.settings("seed") | {"merge": settings.to_json()}
  if importance:
    result.append(analyze.build_importance_stage(run, start, train, importance))
    inputs.append(importance)
  if config.merge.sweep:
    former = run.root / here / "sweep"
    result.append(Stage(f"{here}/sweep", tuple(inputs), recorded | run.settings("merge.sweep"),
                        f"base weights {config.merge.sweep}", lambda out, read: sweep(
                            config, models, round_, former, {**read, "settings": recorded, "round": round_}, out),
                        takes_over=True))
    result += [evaluate.build_stage(run, Checkpoint(run.root / here / "sweep" / f"{weight:g}", f"{here}/sweep"),
                                    f"{here}/eval/sweep_{weight:g}", round_) for weight in config.merge.sweep]
  chosen = None
  if config.merge.base_weight == "auto":
    name = f"{here}/base_weight.json"
    chosen = run.root / name
    counted = recorded | run.settings(*list_round_keys(get_tasks(config)), "merge.auto", *evaluate.ANSWERING)
    result.append(Stage(
        name, (*inputs, "train questions"), evaluate.pick_greedy(counted), _plan_choice(config.merge.auto),
        lambda out, _: choose_weight(config, models, round_, run.scratch(name), out), everywhere=True,
        scratch=str(run.scratch(name)), former_settings=counted))
    inputs.append(name)
  weight = run.settings("merge.base_weight") if settings.weighs else {}
  result.append(Stage(f"{here}/merged", tuple(inputs), recorded | weight,
                      _plan(settings, models, run.method.merge, config),
                      lambda out, _: merge(config, models, round_, chosen, out)))
  return [*result, evaluate.build_stage(run, run.model(f"{here}/merged"), f"{here}/eval/merged", round_)]


def _plan(settings: MergeSettings, models: MergeInputs, own: str, config: ml_collections.ConfigDict) -> str:
  """Describes a merge; `own` is the merging method of the run's method, which is not named again."""
  method = registry.METHODS[settings.method]
  if not settings.collect_models(**models.folders):
    return f"the tuned model, for {method.name} merges several"
  shown = "" if method.name == own else method.name
  weight = f"base_weight {config.merge.base_weight}{_describe_length(config)}" + settings.describe_strength(
      _setting(config.merge.base_weight)) if settings.weighs else ""
  thins = {"drop_rate", "densities"} & method.by_option.keys() - settings.options.keys()
  drops = f"drop_rate {settings.drop_rate}" + f" (densities {1 - settings.drop_rate:g})" * ("densities" in thins)
  return ", ".join(filter(None, (shown, weight, drops if thins else "", *(
      f"{option} {value}" for option, value in settings.options.items())))) or method.name


def _describe_length(config: ml_collections.ConfigDict) -> str:
  """Says so if the base weight is a list that has not a number for each layer."""
  weight = config.merge.base_weight
  model = published.find_config(config.model) if isinstance(weight, tuple | list) else None
  return f" interpolated to {model.num_layers} layers" if model and len(weight) != model.num_layers else ""


def _plan_choice(auto: ml_collections.ConfigDict) -> str:
  groups = f", up to {2 * auto.groups} more by groups of layers" if auto.groups else ""
  return f"{len(auto.weights)} base weights{groups}, on {1 + len(auto.general)} x {auto.questions} held-out questions"


def merge(config: ml_collections.ConfigDict, models: MergeInputs, round_: int, weight_file: Path | None, out: Path,
          ) -> dict[str, Any]:
  """Writes the merged HF checkpoint, with the base weight of the config or the one chosen by `choose_weight`."""
  skipped = models.train and not models.train.stat().st_size  # data.skip_empty
  if skipped and get_method(config).next_model == "merged":  # otherwise the tuned model equals the start and is merged
    fine_tune.copy(models.start, out)
    return {"skipped": True}
  weight = files.read_json(weight_file)["base_weight"] if weight_file else _setting(config.merge.base_weight)
  settings = get_settings(config)
  _merge(settings, models, (config.seed, round_), [(weight, out)])
  if "drop_rate" not in registry.METHODS[settings.method].by_option:
    return {"method": settings.method} | ({"base_weight": weight} if settings.weighs else {})
  return {"base_weight": weight, "drop_rate": settings.drop_rate}


def sweep(config: ml_collections.ConfigDict, models: MergeInputs, round_: int, former: Path,
          inputs: Mapping[str, Any], out: Path) -> dict[str, Any]:
  """Writes a checkpoint for each weight of `config.merge.sweep`, reading the models once.

  Those that the sweep before, in the folder `former`, merged from the same `inputs` are taken over.
  """
  out.mkdir()
  weights = config.merge.sweep
  keys = {f"{weight:g}": result_cache.digest_key({"inputs": inputs, "weight": weight}) for weight in weights}
  new = [(weight, out / name) for weight, (name, key) in zip(weights, keys.items(), strict=True)
         if not result_cache.take_folder(former / name, out / name, key)]
  if new:
    _merge(get_settings(config), models, (config.seed, round_), new)
  if len(new) < len(weights):
    merged = ", ".join(out.name for _, out in new)
    print(f"{former.parent.name}/sweep: merged with {merged or 'no new weight'}, the others are taken over", flush=True)
  result_cache.record(out, keys, {})
  return {"base_weights": list(weights)}


def choose_weight(config: ml_collections.ConfigDict, models: MergeInputs, round_: int, scratch: Path, out: Path,
                  ) -> dict[str, Any]:
  """Tries base weights on held-out questions and writes the best, with all scores, to base_weight.json.

  The score of a weight is the mean of two accuracies, both measured as in evaluation (with `eval.protocol`, or by
  likelihood): on questions of the in-domain train split that no prompt and no round uses, and on questions of the train
  splits of `merge.auto.general`. Ties go to the larger weight, which is nearer to the base. With `merge.auto.groups`
  the layers are then split into that many groups, and from the first to the last group the weight is moved up or down
  by `merge.auto.step` if that improves the score. `scratch` is a folder, shared by all processes, for merged models.
  """
  auto, tasks = config.merge.auto, get_tasks(config)
  by_likelihood = [entry for entry in tasks.general if entry.measure == "choices"]
  answered = [("in_domain", tasks.in_domain, load_round(tasks, round_).held_out), *(
      ("general", entry, load_general(tasks, entry)) for entry in tasks.general if entry not in by_likelihood)]
  trials: list[dict[str, Any]] = []

  def score(weight: Setting) -> float:
    trial = scratch / f"model_{len(trials)}"  # a new path each time, because remote servers may cache a path
    if distributed.is_main():
      files.remove(trial)
      scratch.mkdir(parents=True, exist_ok=True)
      _merge(get_settings(config), models, (config.seed, round_), [(weight, trial)])
    distributed.barrier("merged on trial")
    label = f"round {round_}: base weight {len(trials) + 1}"
    rows: dict[str, list[dict[str, Any]]] = {"in_domain": [], "general": []}
    protocol: dict[str, dict[str, Any]] = {}
    with synthesize.open_sampler(config, trial, config.eval.batch_size, scratch) as sampler:
      for name, entry, examples in answered:
        answers, _ = evaluate.answer_greedily(tasks, trial, sampler, entry, examples, label=f"{label}, {entry.name}")
        rows[name] += answers
        if distributed.is_main():
          protocol[entry.name] = evaluate.describe_protocol(tasks, entry, answers)
    del sampler  # frees its weights before others are loaded for scoring
    if by_likelihood:
      for task, answers in devices.call(config, likelihood.score_train, config, trial, by_likelihood, tasks.held_out,
                                        label).items():
        rows["general"] += answers
        protocol[task] = likelihood.describe_protocol(answers)
    accuracies = {name: accuracy.compute_accuracy(sum(r["correct"] for r in group), len(group))
                  for name, group in rows.items()} if distributed.is_main() else {}
    value = distributed.broadcast(sum(a.value for a in accuracies.values()) / 2)
    if distributed.is_main() and trials:
      files.remove(scratch / f"model_{len(trials) - 1}")
    trials.append({"base_weight": weight, "score": value, **{name: a._asdict() for name, a in accuracies.items()},
                   "protocol": protocol})
    return value

  scores = {weight: score(weight) for weight in sorted(auto.weights)}
  layers = hf.read_config(models.base).num_layers
  groups = min(auto.groups, layers)
  uniform = best = max(scores, key=lambda weight: (scores[weight], weight))
  highest, chosen = scores[uniform], [uniform] * groups
  for group in range(groups):
    for step in (auto.step, -auto.step):
      weights = [*chosen]
      weights[group] = round(min(1.0, max(0.0, chosen[group] + step)), 6)
      setting = _by_layer(weights, uniform, layers)
      if weights != chosen and (value := score(setting)) > highest:
        highest, chosen, best = value, weights, setting
        break
  if distributed.is_main():
    files.write_json(out, {"base_weight": best, "score": highest, "tried": trials})
  return {"base_weight": best, "score": highest, "tried": len(trials)}


def _by_layer(weights: Sequence[float], other: float, layers: int) -> dict[str, float]:
  """Returns a setting with a weight for each group of layers (of about equal sizes), and `other` for the rest.

  >>> _by_layer([0.3, 0.7], 0.5, 4)
  {'layers\\\\.(0|1)\\\\.': 0.3, 'layers\\\\.(2|3)\\\\.': 0.7, '.*': 0.5}
  """
  groups = [group.tolist() for group in np.array_split(np.arange(layers), len(weights)) if len(group)]
  return {rf"layers\.({'|'.join(map(str, group))})\.": weight
          for group, weight in zip(groups, weights, strict=False)} | {".*": other}


def _merge(settings: MergeSettings, models: MergeInputs, seeds: tuple[int, int],
           outputs: Sequence[tuple[Setting, Path]]) -> None:
  """Merges with each weight in one pass over the models; all outputs drop the same entries, drawn with the run's seed
  and the round's number (`seeds`)."""
  key = jax.random.fold_in(jax.random.key(seeds[0]), seeds[1])
  inputs = settings.collect_models(**models.folders)
  options = {out: settings.collect_options(weight, models.importance) if inputs else {} for weight, out in outputs}
  try:
    on_disk.merge_folders(settings.method if inputs else "passthrough", inputs or {"models[0]": models.tuned[-1]},
                          options, key=np.asarray(masks.key_words(key)))
  except ValueError as e:
    raise UserError(f"config.merge.method={settings.method}: {e}") from e
  for _, out in outputs:
    checkpoint_folder.copy_side_files(models.base, out)


def _setting(value: Any) -> Setting:
  """Converts a setting of the config to plain Python."""
  return value.to_dict() if isinstance(value, ml_collections.ConfigDict) else value
