"""Reads the results of a run from its directory, tolerating missing and damaged data."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from imm_jax.errors import UserError
from imm_jax.methods import METHODS
from imm_jax.report import reading
from imm_jax.report.reading import is_number
from imm_jax.statistics.accuracy import Accuracy, compute_accuracy

_METRIC = re.compile(r"(pass|majority)@[1-9]\d{0,8}|[A-Za-z]\w{0,60}")
_SAMPLED = re.compile(r"(pass|majority)@.*")


class AnswerStats(NamedTuple):
  """Holds statistics of a task's greedy answers.

  Attributes:
    name: name of the protocol.
    shots: number of worked examples in a prompt.
    n: number of answers.
    mean_tokens: their mean number of tokens.
    cut: share of answers that were cut off at the limit.
  """

  name: str
  shots: int
  n: int
  mean_tokens: float
  cut: float

  @property
  def protocol_text(self) -> str:
    """A description of the protocol with its worked examples."""
    return f"protocol {self.name}, {self.shots} worked example{'s' * (self.shots != 1)}"


class EvaluatedModel(NamedTuple):
  """Holds an evaluated model.

  Attributes:
    kind: `base`, or for a round `sft`, `ema`, `merged`, or `merged 0.3` for a base weight of the sweep.
    round: number of the round; -1 for the base.
    scores: task -> main score: accuracy of greedy answers, or of the most likely options.
    sampled: task -> name (`pass@4`, `majority@16`) -> score of its samples.
    skipped: task -> number of questions that do not fit in the model's context.
    answer_stats: task -> statistics of its greedy answers, if known.
    other_scores: task -> name (`acc_norm`) -> further score.
    texts: text -> `nats_per_token` and `bits_per_byte`, each a value with its interval.
  """

  kind: str
  round: int
  scores: dict[str, Accuracy]
  sampled: dict[str, dict[str, Accuracy]]
  skipped: dict[str, int]
  answer_stats: Mapping[str, AnswerStats] = {}
  other_scores: Mapping[str, Mapping[str, Accuracy]] = {}
  texts: Mapping[str, Mapping[str, Mapping[str, float]]] = {}

  @property
  def label(self) -> str:
    """Returns the model's name, such as `round 0 merged`."""
    return "base" if self.kind == "base" else f"round {self.round} {self.kind}"

  @property
  def folder(self) -> str:
    """Folder of its answers in the run directory."""
    kind = self.kind.replace("merged ", "sweep_")
    return "base/eval" if kind == "base" else f"round_{self.round}/eval/{kind}"


class Results(NamedTuple):
  """Results of a run: everything in its report except the samples.

  Attributes:
    root: the run directory.
    method: the run's method.
    id_task: the in-domain task.
    ood_tasks: the out-of-domain tasks.
    models: the evaluated models, base first, then by round.
    data: numbers of answers sampled, kept and dropped in every round.
    stages: name -> entry in run.json of each finished stage.
    memory: stage -> peak GiB of a device, if known.
    analysis: round -> content of analysis.json.
    facts: content of run.json: versions, devices and others.
    config: the recorded config.
    problems: descriptions of missing or damaged data.
    drift: round -> content of drift.json.
  """

  root: Path
  method: str
  id_task: str
  ood_tasks: tuple[str, ...]
  models: tuple[EvaluatedModel, ...]
  data: tuple[dict[str, Any], ...]
  stages: dict[str, dict[str, Any]]
  memory: dict[str, float]
  analysis: dict[int, dict[str, Any]]
  facts: dict[str, Any]
  config: dict[str, Any]
  problems: tuple[str, ...]
  drift: Mapping[int, Mapping[str, Any]] = {}

  @classmethod
  def read(cls, root: Path) -> "Results":
    """Reads a run directory, ignoring unfinished stages.

    Raises:
      UserError: if it is no run directory.
    """
    if not is_run(root):
      raise UserError(f"{root}: is no run directory (it has no run.json, and no config.json of a run)")
    problems: list[str] = []
    config = reading.read_config(root / "config.json", problems)
    record = reading.read_record(root / "run.json", problems)
    stages = reading.read_stages(root, record, problems)
    method, id_task, ood_tasks = _read_tasks(record, config, problems)
    rounds = sorted({int(match[1]) for name in stages if (match := re.match(r"round_(\d+)/", name))})
    has_stages = isinstance(record.get("stages"), dict)
    models = _read_models(stages, rounds, (id_task, *ood_tasks), problems) if has_stages else ()
    data = tuple({"round": t} | stages.get(f"round_{t}/samples.jsonl", {}).get("facts", {})
                 | stages.get(f"round_{t}/train.jsonl", {}).get("facts", {})
                 | {k: v for k, v in stages.get(f"round_{t}/sft", {}).get("facts", {}).items() if k == "dropped_long"}
                 for t in rounds if any(f"round_{t}/{file}.jsonl" in stages for file in ("samples", "train")))
    memory = reading.read_memory(root, any(name.endswith("/sft") for name in stages), problems) | {
        name: entry["memory_gib"] for name, entry in stages.items() if reading.is_number(entry.get("memory_gib"))}

    def measured(file: str, read: Callable[[Path, list[str]], dict[str, Any]]) -> dict[int, dict[str, Any]]:
      """Reads round -> content of a file of finished stages, or if these are unknown of all that exist."""
      paths = {t: root / f"round_{t}" / file for t in rounds
               if f"round_{t}/{file}" in stages or not isinstance(record.get("stages"), dict)}
      return {t: content for t, path in paths.items() if path.exists() and (content := read(path, problems))}

    analysis, drift = measured("analysis.json", reading.read_analysis), measured("drift.json", reading.read_drift)
    return cls(root, method, id_task, ood_tasks, models, data, stages, memory, analysis, record, config,
               tuple(problems), drift)

  def in_domain(self, model: EvaluatedModel) -> Accuracy:
    """Returns a model's accuracy on the in-domain task."""
    return model.scores[self.id_task]

  def out_of_domain(self, model: EvaluatedModel) -> Accuracy:
    """Returns a model's accuracy on the pooled questions of all out-of-domain tasks."""
    scores = [model.scores[task] for task in self.ood_tasks]
    return compute_accuracy(sum(round(s.value * s.n) for s in scores), sum(s.n for s in scores))

  @property
  def variant(self) -> str:
    """The method's name, with the merging method where that is not the method's own."""
    merge = self.config.get("merge")
    own = merge.get("method") if isinstance(merge, dict) else ""
    return f"{self.method}, merged by {own}" if own else self.method

  def handed_on(self) -> tuple[EvaluatedModel, ...]:
    """Returns the base and each round's result: the merged model, or without merging the one handed to the next round.
    """
    method = METHODS.get(self.method)  # a damaged run may have another
    handed_on = ("merged" if method.merge else method.hands_on.replace("tuned", "sft")) if method else "sft"
    return tuple(m for m in self.models if m.kind in ("base", handed_on))


def is_run(root: Path) -> bool:
  """Returns whether a folder is a run directory, perhaps damaged; not just a checkpoint, which has a config.json too.
  """
  return (root / "run.json").is_file() or any((root / name).is_dir() for name in ("base/eval", "round_0")) or (
      "method" in reading.read_json_object(root / "config.json", []))


def find_runs(given: Sequence[str] | None) -> list[Path]:
  """Finds the run directories named by --workdirs (or as arguments), or contained in a folder named there.

  Raises:
    UserError: for a folder that neither is nor contains a run directory, or a run that is named twice.
  """
  roots: list[Path] = []
  for name in given or ():
    if not name:
      raise UserError(f"--workdirs={','.join(given)}: one of the names is empty; expected DIR,DIR,...")
    root = Path(name)
    if not root.is_dir():
      raise UserError(f"--workdirs: {name} is no folder")
    runs = [root] if is_run(root) else [p for p in sorted(root.iterdir()) if p.is_dir() and is_run(p)]
    if not runs:
      raise UserError(f"--workdirs: {name} is no run directory (it has no run.json, and no config.json of a run) and "
                      "holds none")
    roots += runs
  if not roots:
    raise UserError("--workdirs: names no run directory; expected: DIR DIR ...")
  for i, root in enumerate(roots):
    if root.resolve() in [other.resolve() for other in roots[:i]]:
      raise UserError(f"--workdirs: {root} is given twice")
  return roots


def _read_tasks(record: Mapping[str, Any], config: Mapping[str, Any], problems: list[str],
          ) -> tuple[str, str, tuple[str, ...]]:
  """Returns method, in-domain task and other tasks from run.json, or else from the config."""
  task = config.get("task") if isinstance(config.get("task"), dict) else {}
  tasks = record.get("tasks") if isinstance(record.get("tasks"), dict) else {}
  id_task, ood = tasks.get("id", task.get("name")), tasks.get("ood", task.get("ood", ()))
  if not isinstance(id_task, str):
    problems.append("run.json and config.json: neither names the in-domain task")
  ood = [name.partition("=")[0] for name in ood if isinstance(name, str)] if isinstance(ood, list) else []
  return str(record.get("method", config.get("method", "unknown"))), str(id_task), tuple(ood)


def _read_models(stages: Mapping[str, Any], rounds: list[int], tasks: tuple[str, ...], problems: list[str],
            ) -> tuple[EvaluatedModel, ...]:
  specs = [("base", -1, "base/eval")]
  for t in rounds:
    sweep = sorted(name for name in stages if name.startswith(f"round_{t}/eval/sweep_"))
    specs += [("sft", t, f"round_{t}/eval/sft"), ("ema", t, f"round_{t}/eval/ema"),
              *((f"merged {name.partition('sweep_')[2]}", t, name) for name in sweep),
              ("merged", t, f"round_{t}/eval/merged")]
  models = []
  for kind, t, name in specs:
    if name in stages:
      try:
        models.append(_parse_model(kind, t, stages[name]["facts"], tasks))
      except (AttributeError, KeyError, TypeError, ValueError) as e:
        problems.append(f"run.json: the scores of {name} are damaged ({e!r})")
  unknown = [model.label for model in models if not model.answer_stats]
  if unknown and len(unknown) < len(models):
    problems.append(f"run.json: does not say by which protocol these were asked: {', '.join(unknown)}")
  return tuple(models)


def _parse_model(kind: str, round_: int, facts: Mapping[str, Any], tasks: tuple[str, ...]) -> EvaluatedModel:
  scores = {task: {metric: _parse_accuracy(score) for metric, score in by_metric.items()}
            for task, by_metric in facts["scores"].items()}
  scores = {task: {name: score for name, score in by_metric.items() if _METRIC.fullmatch(name)}
            for task, by_metric in scores.items()}
  # The main score is the first one that is not of samples; JSON preserves the order.
  first = {}
  for task in tasks:
    counts = [name for name in scores[task] if not _SAMPLED.fullmatch(name)]
    if not counts:
      raise KeyError(f"{task} has no figure that counts")
    first[task] = scores[task].pop(counts[0])
  protocols = facts.get("protocol")  # older runs have none
  stats = {task: _parse_answer_stats(protocols[task]) for task in tasks} if protocols is not None else {}
  parts = [{task: chosen for task, by_metric in scores.items() if (chosen := {
      name: score for name, score in by_metric.items() if bool(_SAMPLED.fullmatch(name)) == sampled})}
           for sampled in (True, False)]
  texts = {text: {name: _parse_interval(spans[name]) for name in ("nats_per_token", "bits_per_byte")}
           for text, spans in facts.get("texts", {}).items()}
  return EvaluatedModel(kind, round_, first, parts[0], dict(facts.get("long_prompts", {})), stats, parts[1], texts)


def _parse_interval(raw: Mapping[str, Any]) -> dict[str, float]:
  span = {name: raw[name] for name in ("value", "low", "high")}
  if not (all(map(is_number, span.values())) and span["value"] >= 0 and span["low"] <= span["value"] <= span["high"]):
    raise ValueError(f"{raw} is no figure with its interval")
  return span


def _parse_answer_stats(raw: Mapping[str, Any]) -> AnswerStats:
  stats = AnswerStats(*(raw[name] for name in AnswerStats._fields))
  known = isinstance(stats.name, str) and all(map(is_number, stats[1:]))
  if not (known and min(stats[1:]) >= 0 and stats.n > 0 and stats.cut <= 1):
    raise ValueError(f"{raw} is no protocol")
  return stats


def _parse_accuracy(raw: Mapping[str, Any]) -> Accuracy:
  score = Accuracy(**raw)
  whole = isinstance(score.n, int) and is_number(score.n) and score.n > 0
  if not (whole and all(map(is_number, score)) and 0 <= score.low <= score.value <= score.high <= 1):
    raise ValueError(f"{raw} is no accuracy")
  return score


def format_table(results: Results) -> str:
  """Formats a table of accuracies with 95 % intervals, a line for each model and a column for each task."""
  if not results.models:
    return "no model was evaluated yet"
  first = results.models[0]
  heads = {"ID": results.in_domain(first).n}
  if results.ood_tasks:
    heads |= {"OOD": results.out_of_domain(first).n} | {task: first.scores[task].n for task in results.ood_tasks}
  lines = [["", *(f"{name}, n={n}" for name, n in heads.items())]]
  for model in results.models:
    figures = [results.in_domain(model), *([results.out_of_domain(model)] if results.ood_tasks else []),
               *(model.scores[task] for task in results.ood_tasks)]
    lines.append([model.label, *map(format_accuracy, figures)])
  widths = [max(len(row[i]) for row in lines) for i in range(len(lines[0]))]
  text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in lines]
  return "\n".join([f"accuracy, method {results.variant}; ID is {results.id_task}; brackets are 95 % intervals", *text,
                    *_format_other_scores(results), *_format_texts(results), *_format_sampled(results),
                    *list_protocols(results), *_format_lengths(results), *list_skipped(results)])


def _format_other_scores(results: Results) -> list[str]:
  """Formats a line for each task that has further scores."""
  tasks = dict.fromkeys(task for model in results.models for task in model.other_scores)
  return [f"{task}: " + "; ".join(f"{model.label} {', '.join(f'{n} {format_accuracy(a)}' for n, a in scores.items())}"
                                  for model in results.models if (scores := model.other_scores.get(task)))
          for task in tasks]


def _format_texts(results: Results) -> list[str]:
  """Formats a line for each model and text."""
  return [f"{model.label}, text {text}: {spans['nats_per_token']['value']:.4f} "
          f"[{spans['nats_per_token']['low']:.4f}, {spans['nats_per_token']['high']:.4f}] nats a token, "
          f"{spans['bits_per_byte']['value']:.4f} bits a byte"
          for model in results.models for text, spans in model.texts.items()]


def format_accuracy(a: Accuracy) -> str:
  """Formats an accuracy with its interval."""
  return f"{a.value:.3f} [{a.low:.3f}, {a.high:.3f}]"


def list_protocols(results: Results) -> list[str]:
  """Formats a line for each protocol with its tasks."""
  tasks: dict[str, list[str]] = {}
  for task, stats in (results.models[0].answer_stats if results.models else {}).items():
    tasks.setdefault(stats.protocol_text, []).append(task)
  return [f"{rule}: {', '.join(names)}" for rule, names in tasks.items()]


def _format_lengths(results: Results) -> list[str]:
  """Formats a line for each model on the lengths of its greedy answers over all tasks."""
  stats_by_model = {m.label: [a for a in m.answer_stats.values() if a.mean_tokens] for m in results.models}
  return [f"{label}: {sum(a.mean_tokens * a.n for a in stats) / sum(a.n for a in stats):.1f} tokens an answer, "
          f"{sum(a.cut * a.n for a in stats) / sum(a.n for a in stats):.1%} of {sum(a.n for a in stats)} cut at "
          "eval.max_new_tokens" for label, stats in stats_by_model.items() if stats]


def list_skipped(results: Results) -> list[str]:
  """Formats a line for each task with skipped questions."""
  return [f"{task}: {count} questions were skipped, for with an answer they do not fit in the model's context"
          for model in results.models[:1] for task, count in model.skipped.items()]


def _format_sampled(results: Results) -> list[str]:
  """Formats lines on pass@k and majority votes, if answers were sampled."""
  return [f"{model.label}, {task}, n={next(iter(scores.values())).n}: "
          + ", ".join(f"{name} {format_accuracy(a)}" for name, a in scores.items())
          for model in results.models for task, scores in model.sampled.items()]
