"""Evaluation on tasks of lm-evaluation-harness, which runs them on this package's model."""

import collections
import contextlib
import functools
import importlib.metadata
import importlib.util
import math
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_collections
import numpy as np

from imm_jax import files
from imm_jax.errors import UserError, first_line, suggest
from imm_jax.model import checkpoint_folder
from imm_jax.runtime import distributed, hardware
from imm_jax.sampling import Completion
from imm_jax.stages.result_cache import ResultCache
from imm_jax.stages.task_entries import LM_EVAL, get_tasks
from imm_jax.statistics import accuracy

if TYPE_CHECKING:
  from imm_jax.scoring.harness import HarnessLM

# The primary metric of a task is the first of these that it has.
_PRIMARY = ("acc", "exact_match", "pass@1", "acc_norm", "f1")


def check_lm_eval_tasks(config: ml_collections.ConfigDict) -> None:
  """Raises UserError if lm_eval is not installed, or does not know one of the config's tasks."""
  names = get_tasks(config).lm_eval
  if not names:
    return
  if importlib.util.find_spec("lm_eval") is None:
    raise UserError(f"config.task.ood has {LM_EVAL}{names[0]}, and lm-evaluation-harness is not installed: "
                    "pip install -e '.[harness]'")
  known = _manager(config.eval.lm_eval.path).all_tasks
  for name in names:
    if "=" in name:
      raise UserError(f"config.task.ood has {LM_EVAL}{name}: tasks of lm_eval take no source; its own YAML "
                      "file says where a task's data are (config.eval.lm_eval.path)")
    if name not in known:
      raise UserError(f"config.task.ood has {LM_EVAL}{name}, which lm_eval does not know: "
                      f"{_nearest(name, known)} (its list: `lm_eval ls "
                      "tasks`; your own YAML files: config.eval.lm_eval.path)")


def load(config: ml_collections.ConfigDict) -> None:
  """Loads the lm_eval tasks of a config with their data, so that unavailable ones are reported early.

  Raises:
    UserError: for the first task that cannot be loaded.
  """
  for name in get_tasks(config).lm_eval:
    with _as_user_error("config.task.ood", name):
      _manager(config.eval.lm_eval.path).load([name])


def measure(config: ml_collections.ConfigDict, model: Path, scratch: Path, cache: ResultCache, label: str,
            ) -> dict[str, Any]:
  """Runs the lm_eval tasks of a config, and writes <entry>.jsonl, one row per document, unless `cache` has it.

  A group of tasks, such as `mmlu`, is one task here, over all documents of its parts. `scratch` is a folder for partial
  results, from which a killed evaluation resumes.

  Returns:
    `scores`: for each entry its metrics, the primary one first; `protocol`: as `evaluate.describe_protocol`;
    `texts`: empty.

  Raises:
    UserError: for a task that lm_eval cannot load, or that has no usable metric (see `_metrics`).
  """
  settings, scores, protocol = config.eval.lm_eval, {}, {}
  own = Path(settings.path) if settings.path else None
  common = {"model": checkpoint_folder.digest(model), "dtype": config.sample.compute_dtype, "seed": config.seed,
            "limit": config.task.eval_questions, "few_shot": settings.few_shot, "chat": settings.chat,
            "lm_eval": importlib.metadata.version("lm_eval"), "own tasks": files.digest(own) if own else "",
            } if distributed.is_main() else {}
  load = functools.cache(lambda: _open(config, model, scratch))
  for name in get_tasks(config).lm_eval:
    entry = f"{LM_EVAL}{name}"
    _, facts = cache.obtain(entry, common | {"task": name}, lambda name=name: _run(config, load(), name, label),
                           label=label)
    scores[entry], protocol[entry] = facts["scores"], facts["protocol"]
  return {"scores": scores, "protocol": protocol, "texts": {}}


def _open(config: ml_collections.ConfigDict, model: Path, scratch: Path) -> "HarnessLM":
  from imm_jax.scoring.harness import HarnessLM  # lazy: it takes seconds, and most runs have no such task

  mesh = config.mesh
  return HarnessLM(str(model), dtype=hardware.compute_dtype(config.sample.compute_dtype),
                   batch_size=config.eval.batch_size, data=mesh.data, fsdp=mesh.fsdp, tensor=mesh.tensor,
                   seed=config.seed, scratch=scratch)


def _run(config: ml_collections.ConfigDict, lm: "HarnessLM", name: str, label: str,
         ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
  """Runs a task of lm_eval; returns its rows, and its `scores` and `protocol` as in `measure`."""
  import lm_eval

  settings, entry = config.eval.lm_eval, f"{LM_EVAL}{name}"
  with _as_user_error(label, name):
    results = lm_eval.simple_evaluate(
        lm, tasks=[name], task_manager=_manager(settings.path), limit=config.task.eval_questions or None,
        bootstrap_iters=0, num_fewshot=None if settings.few_shot < 0 else settings.few_shot,
        apply_chat_template=settings.chat, random_seed=config.seed, numpy_random_seed=config.seed,
        torch_random_seed=config.seed, fewshot_random_seed=config.seed, log_samples=True, verbosity=None)
  rows = _rows(results["samples"], lm.completions)
  metrics = _metrics(rows, entry, _non_scores(results))
  for row in rows:
    value = row["metrics"][metrics[0]]
    row["correct"] = bool(value) if value in (0.0, 1.0) else value
  shots = sorted({n for n in results["n-shot"].values() if isinstance(n, int)}) or [0]
  parts = "" if len(shots) == 1 else f", {shots[0]} to {shots[-1]} examples by part"
  return rows, {
      "scores": {metric: accuracy.compute_mean([row["metrics"][metric] for row in rows])._asdict()
                 for metric in metrics},
      "protocol": {"name": f"lm_eval {lm_eval.__version__}{parts}", "shots": shots[-1], "n": len(rows),
                   "mean_tokens": round(sum(row["tokens"] for row in rows) / len(rows), 2),
                   "cut": round(sum(row["finish"] == "length" for row in rows) / len(rows), 4)}}


@contextlib.contextmanager
def _as_user_error(where: str, task: str) -> Iterator[None]:
  """Converts exceptions of lm_eval, the hub or a task's own code to a UserError."""
  try:
    yield
  except UserError:
    raise
  except Exception as e:
    raise UserError(f"{where}: lm_eval cannot run {task} ({first_line(e)})") from e


@functools.lru_cache(maxsize=2)  # it reads ten thousand files
def _manager(path: str) -> Any:
  from lm_eval.tasks import TaskManager

  if path and not Path(path).is_dir():
    raise UserError(f"config.eval.lm_eval.path={path}: no such folder; expected one with YAML files of tasks")
  return TaskManager(include_path=path or None)


def _nearest(name: str, known: Sequence[str]) -> str:
  close = suggest(name, [*known])
  return close if close.startswith("did you mean") else f"{len(known):,} tasks have other names"


def _rows(samples: Mapping[str, Sequence[Mapping[str, Any]]], completions: Mapping[tuple[str, str], Completion],
          ) -> list[dict[str, Any]]:
  """Converts lm_eval's samples to a row per document, whose `metrics` are lm_eval's numeric metrics of it.

  `text` is the first answer as generated, and `span` the output of the first filter; for multiple choice both are the
  most likely option. Metrics of other filters have the filter's name as a suffix.
  """
  rows: dict[str, dict[str, Any]] = {}
  for task, task_samples in samples.items():
    for sample in task_samples:
      name, first = f"{task}/{sample['doc_id']}", task_samples[0].get("filter")
      metrics = {_metric_name(metric, sample.get("filter"), first): value for metric, value in _numbers(sample).items()}
      if name in rows:
        rows[name]["metrics"] |= metrics
        continue
      arguments = [list(values.values()) for values in sample["arguments"].values()] if isinstance(
          sample["arguments"], dict) else list(sample["arguments"])
      answers, context = [resp[0] for resp in sample["resps"]], str(arguments[0][0])
      row = {"id": name, "question": context, "gold": str(sample["target"]), "kind": "lm_eval"}
      if isinstance(answers[0], str):
        completion = completions.get((context, answers[0]), Completion(answers[0], 0, "stop"))
        row |= {"text": answers[0], "tokens": completion.num_tokens, "finish": completion.finish,
                "span": str(sample["filtered_resps"][0])}
      else:
        logprobs = [float(answer[0]) if isinstance(answer, tuple | list) else float(answer) for answer in answers]
        best = str(arguments[max(range(len(logprobs)), key=logprobs.__getitem__)][-1])
        row |= {"text": best, "tokens": 0, "finish": "stop", "span": best, "logprobs": logprobs}
      rows[name] = row | {"metrics": metrics}
  return list(rows.values())


def _numbers(sample: Mapping[str, Any]) -> dict[str, float]:
  """Returns the numeric metrics of a document; others are inputs to aggregations of lm_eval."""
  return {metric: float(sample[metric]) for metric in sample.get("metrics", ())
          if isinstance(sample[metric], int | float | np.number | np.bool_)}


def _metric_name(metric: str, filter_: str | None, first: str | None) -> str:
  """Names a metric: metrics of all filters except a task's first have the filter's name as a suffix."""
  return metric if filter_ == first else f"{metric}_" + re.sub(r"\W", "_", str(filter_))


def _non_scores(results: Mapping[str, Any]) -> set[str]:
  """Returns the metrics that are no scores: lower is better, or lm_eval's aggregate is not the mean over documents."""
  result = set()
  for task, task_samples in results["samples"].items():
    values: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    for sample in task_samples:
      for metric, value in _numbers(sample).items():
        values[metric, str(sample.get("filter"))].append(value)
    for (metric, filter_), metric_values in values.items():
      aggregate = results["results"][task].get(f"{metric},{filter_}")
      if results["higher_is_better"].get(task, {}).get(metric) is False or not isinstance(aggregate, int | float) or (
          not math.isclose(aggregate, math.fsum(metric_values) / len(metric_values), rel_tol=1e-6, abs_tol=1e-9)):
        result.add(_metric_name(metric, filter_, task_samples[0].get("filter")))
  return result


def _metrics(rows: Sequence[Mapping[str, Any]], entry: str, excluded: Container[str]) -> list[str]:
  """Returns the metrics that are scores (every document has a value from 0 to 1, higher is better), primary first."""
  metrics = list(rows[0]["metrics"]) if rows else []
  names = [name for name in metrics if name not in excluded and all(
      0 <= row["metrics"].get(name, -1) <= 1 for row in rows)]
  if not names:
    others = f" (it has {', '.join(metrics)})" if metrics else ""
    raise UserError(f"{entry}: has no figure of each document from 0 to 1 of which more is better and whose mean is "
                    f"the task's{others}; such a task is for lm_eval's own command, python -m imm_jax.harness")
  return sorted(names, key=lambda name: _PRIMARY.index(name) if name in _PRIMARY else len(_PRIMARY))
