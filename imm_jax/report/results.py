"""Reads the results of a run from its directory, tolerating missing and damaged data."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from imm_jax.errors import UserError
from imm_jax.methods import METHODS
from imm_jax.report import reading
from imm_jax.statistics.accuracy import Accuracy, compute_accuracy

# Names of the scores of samples.
_SAMPLED = re.compile(r"(pass|majority)@[1-9]\d{0,8}")


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
    """Describes the protocol with its worked examples."""
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
    """Returns the folder of its answers in the run directory."""
    kind = self.kind.replace("merged ", "sweep_")
    return "base/eval" if kind == "base" else f"round_{self.round}/eval/{kind}"


class Results(NamedTuple):
  """Holds the results of a run: everything in its report except the samples.

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
    config, record = reading.read_config(root, problems), reading.read_record(root, problems)
    stages = reading.read_stages(root, record, problems)
    settings = config.get("task", {"name": "unknown", "ood": []})
    id_task, ood = (record["tasks"]["id"], record["tasks"]["ood"]) if record else (settings["name"], settings["ood"])
    tasks = (id_task, *(name.partition("=")[0] for name in ood))
    rounds = sorted({int(match[1]) for name in stages if (match := re.match(r"round_(\d+)/", name))})
    facts = {name: entry["facts"] for name, entry in stages.items()}
    data = tuple({"round": t} | facts.get(f"round_{t}/samples.jsonl", {}) | facts.get(f"round_{t}/train.jsonl", {})
                 | {k: v for k, v in facts.get(f"round_{t}/sft", {}).items() if k == "dropped_long"}
                 for t in rounds if any(f"round_{t}/{file}.jsonl" in stages for file in ("samples", "train")))
    memory = reading.read_memory(root, any(name.endswith("/sft") for name in stages), problems) | {
        name: entry["memory_gib"] for name, entry in stages.items() if entry.get("memory_gib") is not None}

    def measured(file: str, read: Callable[[Path, str, list[str]], dict[str, Any]]) -> dict[int, dict[str, Any]]:
      """Reads round -> content of a file of finished stages, or if these are unknown of all that exist."""
      names = {t: f"round_{t}/{file}" for t in rounds}
      return {t: content for t, name in names.items() if (name in stages or not record) and (root / name).exists()
              and (content := read(root, name, problems))}

    analysis, drift = measured("analysis.json", reading.read_analysis), measured("drift.json", reading.read_drift)
    models = _parse_models(facts, rounds, tasks, problems) if record else ()
    method = record.get("method", config.get("method", "unknown"))
    return cls(root, method, id_task, tasks[1:], models, data, stages, memory, analysis, record, config,
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
    """Returns the method's name, with the merging method where that is not the method's own."""
    merge = self.config.get("merge")
    own = merge.get("method") if isinstance(merge, dict) else ""
    return f"{self.method}, merged by {own}" if own else self.method

  def list_round_results(self) -> tuple[EvaluatedModel, ...]:
    """Returns the base and each round's result: the merged model, or without merging the one handed to the next round.
    """
    method = METHODS.get(self.method)  # a damaged run may have another
    kind = ("merged" if method.merge else method.next_model.replace("tuned", "sft")) if method else "sft"
    return tuple(m for m in self.models if m.kind in ("base", kind))


def is_run(root: Path) -> bool:
  """Returns whether a folder is a run directory, perhaps damaged; not just a checkpoint, which has a config.json too.
  """
  return (root / "run.json").is_file() or any((root / name).is_dir() for name in ("base/eval", "round_0")) or (
      bool(reading.read_config(root, [])))


def find_runs(given: Sequence[str] | None) -> list[Path]:
  """Finds the run directories named by --workdirs (or as arguments), or contained in a folder named there.

  Raises:
    UserError: for a folder that neither is nor contains a run directory, or a run that is named twice.
  """
  roots: list[Path] = []
  for name in given or ():
    if not name:
      raise UserError(f"--workdirs={','.join(given or ())}: one of the names is empty; expected DIR,DIR,...")
    root = Path(name)
    if not root.is_dir():
      hint = "; names without --workdirs= stand apart, DIR DIR" * ("," in name)
      raise UserError(f"--workdirs: {name} is no folder{hint}")
    if (root / "scores.json").is_file() and not is_run(root):
      raise UserError(f"--workdirs: {name} is no run directory but a result of imm evaluate; imm compare compares such")
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


def _parse_models(facts: Mapping[str, Mapping[str, Any]], rounds: Sequence[int], tasks: Sequence[str],
                  problems: list[str]) -> tuple[EvaluatedModel, ...]:
  specs = [("base", -1, "base/eval")]
  for t in rounds:
    sweep = sorted(name for name in facts if name.startswith(f"round_{t}/eval/sweep_"))
    specs += [("sft", t, f"round_{t}/eval/sft"), ("ema", t, f"round_{t}/eval/ema"),
              *((f"merged {name.partition('sweep_')[2]}", t, name) for name in sweep),
              ("merged", t, f"round_{t}/eval/merged")]
  models = tuple(_parse_model(kind, t, facts[name], tasks) for kind, t, name in specs if name in facts)
  unknown = [model.label for model in models if not model.answer_stats]
  if unknown and len(unknown) < len(models):
    problems.append(f"run.json: does not say by which protocol these were asked: {', '.join(unknown)}")
  return models


def _parse_model(kind: str, round_: int, facts: Mapping[str, Any], tasks: Sequence[str]) -> EvaluatedModel:
  def select(pattern: re.Pattern[str]) -> dict[str, dict[str, Accuracy]]:
    return {task: {name: Accuracy(**score) for name, score in facts["scores"][task].items() if pattern.fullmatch(name)}
            for task in tasks}

  # The main score is the first one that is not of samples; JSON preserves the order.
  counted, sampled = select(reading.COUNTED), select(_SAMPLED)
  main = {task: scores.pop(next(iter(scores))) for task, scores in counted.items()}
  others, samples = ({task: scores for task, scores in part.items() if scores} for part in (counted, sampled))
  protocols = facts.get("protocol")  # older runs have none
  stats = {task: AnswerStats(*(protocols[task][name] for name in AnswerStats._fields)) for task in tasks
           } if protocols else {}
  return EvaluatedModel(kind, round_, main, samples, facts.get("long_prompts") or {}, stats, others,
                        facts.get("texts") or {})


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
  stats_by_model = {m.label: [a for a in m.answer_stats.values() if a.mean_tokens and a.n] for m in results.models}
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
