"""Formats the model card of a run's checkpoint, the README.md that the Hugging Face hub shows."""

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from imm_jax import config_keys
from imm_jax.merging import registry
from imm_jax.methods import METHODS, get_merge_method
from imm_jax.model import hub
from imm_jax.report.results import EvaluatedModel, Results
from imm_jax.tasks.catalogue import TASKS

PAPER = ("Superficial Self-Improved Reasoners Benefit from Model Merging", "https://arxiv.org/abs/2503.02103")
# Settings of the machine or of the run directory, which are no part of the method.
_OMITTED = ("mesh", "profile", "tracking", "sampler.vllm", "sft.state_dir")


def format_card(results: Results, stage: str, name: str) -> str:
  """Formats the model card of a checkpoint.

  Args:
    results: results of the run.
    stage: the checkpoint's path in the run directory, such as `round_2/merged`.
    name: name of the repository, ORG/NAME.

  Returns:
    YAML between two lines of `---`, then Markdown.
  """
  config = results.config
  head = {"library_name": "transformers", "pipeline_tag": "text-generation",
          "tags": ["imm_jax", "self-improvement", results.method, *["merge"] * stage.endswith("/merged")]}
  base = hub.strip_adapter(config["model"]).partition("@")[0]
  if not hub.is_local(config["model"]):
    head |= {"base_model": base, "base_model_relation": "merge" if stage.endswith("/merged") else "finetune"}
  if datasets := list(dict.fromkeys(_list_datasets(results))):
    head["datasets"] = datasets
  round_ = re.match(r"round_(\d+)/", stage)
  origin = f"round {int(round_[1])} (rounds 0 to {config['rounds'] - 1})" if round_ else "the run"
  command = "imm run --config=common --workdir=RUN"
  changed = _list_changed(config)
  lines = [f"# {name.partition('/')[2]}", "",
           f"`{stage}` of a run of [{PAPER[0]}]({PAPER[1]}) with imm_jax: the model after {origin}.", "",
           f"- Base model: `{config['model']}`",
           f"- Method: {_describe_method(results)}",
           f"- In domain: {results.id_task}; out of domain: {', '.join(results.ood_tasks) or 'none'}",
           f"- Software: {', '.join(f'{k} {v}' for k, v in sorted(results.facts.get('versions', {}).items()))}, on "
           f"{', '.join(sorted(set(results.facts.get('devices', []))))}", "",
           "## Scores", "", *_format_scores(results, stage), "",
           "## The same run again", "", "```", " \\\n    ".join([command, *(
               shlex.quote(f"--config.{key}={value}") for key, value in changed)]), "```", "",
           "<details><summary>All settings</summary>", "", "```json", json.dumps(config, indent=1, sort_keys=True),
           "```", "", "</details>", ""]
  return "---\n" + yaml.safe_dump(head, sort_keys=False, allow_unicode=True) + "---\n\n" + "\n".join(lines)


def select_models(results: Results, stage: str) -> list[EvaluatedModel]:
  """Returns the models whose scores are on the card: the base, this model, and the round's model after SFT."""
  return [model for model in results.models
          if _get_stage_path(model) in ("base", f"{stage.partition('/')[0]}/sft", stage)]


def is_evaluated(results: Results, stage: str) -> bool:
  """Returns whether the run has scores of a checkpoint."""
  return any(_get_stage_path(model) == stage for model in results.models)


def _describe_method(results: Results) -> str:
  """Describes the run's method, with the merging method if the config sets another than the method's own."""
  method, configured = METHODS[results.method], results.config.get("merge", {}).get("method", "")
  merge = get_merge_method(results.method, configured)
  if merge == method.merge:
    return f"`{results.method}`, {method.summary} ({method.source})"
  known = registry.METHODS.get(merge)  # None for a user's own method that this process has not registered
  reference = f" ({known.reference})" if known and known.reference else ""
  return f"`{results.method}`, merged by `{merge}`{f': {known.summary}' if known else ''}{reference}"


def _format_scores(results: Results, stage: str) -> list[str]:
  """Formats the scores of the models of `select_models` as a table."""
  models = select_models(results, stage)
  tasks = (results.id_task, *results.ood_tasks)
  rows = [["model", *tasks], ["---"] * (1 + len(tasks))]
  for model in models:
    rows.append([f"**{model.label}**" if _get_stage_path(model) == stage else model.label, *(
        f"{a.value:.3f} [{a.low:.3f}, {a.high:.3f}]" for a in (model.scores[task] for task in tasks))])
  counts = ", ".join(f"{task} {models[-1].scores[task].n}" for task in tasks)
  rules = sorted({stats.protocol_text for model in models for stats in model.answer_stats.values()})
  missing = [] if is_evaluated(results, stage) else ["**This model has not been evaluated**: the scores are those of "
                                                     "the models named.", ""]
  return missing + ["| " + " | ".join(row) + " |" for row in rows] + [
      "", f"Accuracy with its 95 % interval; questions: {counts}{f'; {chr(59).join(rules)}' if rules else ''}."]


def _get_stage_path(model: EvaluatedModel) -> str:
  """Returns the path of a model's checkpoint in the run directory; `base` for the base model."""
  if model.kind == "base":
    return "base"
  name = {"ema": "sft/ema"}.get(model.kind, model.kind.replace("merged ", "sweep/"))
  return f"round_{model.round}/{name}"


def _list_datasets(results: Results) -> Iterator[str]:
  """Yields the hub's name of the data set of the in-domain task, on which the model was trained, if it has one."""
  task = results.config["task"]
  published = TASKS[task["name"]].source.get("train", "") if task["name"] in TASKS else ""
  source = task.get("source") or published
  if source.startswith("hf:"):
    yield re.split("[@:]", source.removeprefix("hf:"))[0]


def _list_changed(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
  """Lists the settings that differ from their defaults, by key."""
  defaults = json.loads(json.dumps(config_keys.load_defaults().to_dict()))

  def walk(settings: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
      name = f"{prefix}{key}"
      if name in _OMITTED:
        continue
      if isinstance(value, Mapping):
        yield from walk(value, defaults.get(key, {}), f"{name}.")
      elif value != defaults.get(key, None):
        yield name, _to_tuple(value)

  return list(walk(config, defaults, ""))


def _to_tuple(value: Any) -> Any:
  """Converts lists to tuples, the form in which a command line takes them."""
  return tuple(map(_to_tuple, value)) if isinstance(value, list) else value
