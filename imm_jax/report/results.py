"""What came out of a run, read from its directory; what cannot be read is left out and named."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from imm_jax.errors import UserError
from imm_jax.evaluation import Accuracy, accuracy
from imm_jax.methods import METHODS
from imm_jax.report import reading
from imm_jax.report.reading import is_number

_METRIC = re.compile(r"(pass|majority)@[1-9]\d{0,8}|[A-Za-z]\w{0,60}")
_SAMPLED = re.compile(r"(pass|majority)@.*")


class Asked(NamedTuple):
  """How a task's greedy answers came: protocol, worked examples in a prompt, answers, their mean tokens, share cut."""

  name: str
  shots: int
  n: int
  mean_tokens: float
  cut: float

  @property
  def rule(self) -> str:
    """The protocol with its worked examples."""
    return f"protocol {self.name}, {self.shots} worked example{'s' * (self.shots != 1)}"


class Model(NamedTuple):
  """One evaluated model.

  Attributes:
    kind: `base`, or of a round `sft`, `ema`, `merged`, or `merged 0.3`, a base weight of the sweep.
    round: -1 for the base.
    scores: by task the figure that counts: accuracy of greedy answers, or of the likeliest options.
    sampled: by task, figures of its samples by name (`pass@4`, `majority@16`).
    skipped: by task, questions that do not fit in the model's context.
    asked: by task, how its figures came, where that is known.
    beside: by task, further figures by name (`acc_norm`).
    texts: by text, `nats_per_token` and `bits_per_byte`, each a value with its interval.
  """

  kind: str
  round: int
  scores: dict[str, Accuracy]
  sampled: dict[str, dict[str, Accuracy]]
  skipped: dict[str, int]
  asked: Mapping[str, Asked] = {}
  beside: Mapping[str, Mapping[str, Accuracy]] = {}
  texts: Mapping[str, Mapping[str, Mapping[str, float]]] = {}

  @property
  def label(self) -> str:
    return "base" if self.kind == "base" else f"round {self.round} {self.kind}"

  @property
  def folder(self) -> str:
    """Where its answers lie in the run directory."""
    kind = self.kind.replace("merged ", "sweep_")
    return "base/eval" if kind == "base" else f"round_{self.round}/eval/{kind}"


class Results(NamedTuple):
  """Everything a report shows, but for the samples.

  Attributes:
    root: the run directory.
    method: of the run.
    id_task: the in-domain task.
    ood_tasks: the out-of-domain tasks.
    models: base first, then by round.
    data: for every round, how many answers were sampled, kept and dropped.
    stages: run.json's entry of each finished stage, by name.
    memory: by stage, the most GiB that a device held, where it says.
    analysis: by round, the content of analysis.json.
    facts: what run.json says of the run as a whole: versions, devices.
    config: as recorded.
    problems: what is missing or damaged, a line each.
    drift: by round, the content of drift.json.
  """

  root: Path
  method: str
  id_task: str
  ood_tasks: tuple[str, ...]
  models: tuple[Model, ...]
  data: tuple[dict[str, Any], ...]
  stages: dict[str, dict[str, Any]]
  memory: dict[str, float]
  analysis: dict[int, dict[str, Any]]
  facts: dict[str, Any]
  config: dict[str, Any]
  problems: tuple[str, ...]
  drift: Mapping[int, Mapping[str, Any]] = {}

  @classmethod
  def of(cls, root: Path) -> "Results":
    """Reads a run directory; stages that are not done are left out.

    Raises:
      UserError: when it is no run directory.
    """
    if not is_run(root):
      raise UserError(f"{root}: is no run directory (it has no run.json, and no config.json of a run)")
    problems: list[str] = []
    config = reading.config(root / "config.json", problems)
    record = reading.record(root / "run.json", problems)
    stages = reading.stages(root, record, problems)
    method, id_task, ood_tasks = _what(record, config, problems)
    rounds = sorted({int(found[1]) for name in stages if (found := re.match(r"round_(\d+)/", name))})
    models = _models(stages, rounds, (id_task, *ood_tasks), problems) if isinstance(record.get("stages"), dict) else ()
    data = tuple({"round": t} | stages.get(f"round_{t}/samples.jsonl", {}).get("facts", {})
                 | stages.get(f"round_{t}/train.jsonl", {}).get("facts", {})
                 | {k: v for k, v in stages.get(f"round_{t}/sft", {}).get("facts", {}).items() if k == "dropped_long"}
                 for t in rounds if any(f"round_{t}/{file}.jsonl" in stages for file in ("samples", "train")))
    memory = reading.memory(root, any(name.endswith("/sft") for name in stages), problems) | {
        name: entry["memory_gib"] for name, entry in stages.items() if reading.is_number(entry.get("memory_gib"))}

    def measured(file: str, read: Callable[[Path, list[str]], dict[str, Any]]) -> dict[int, dict[str, Any]]:
      """By round, what a file holds; where nobody can say which stages are done, of all that are there."""
      paths = {t: root / f"round_{t}" / file for t in rounds
               if f"round_{t}/{file}" in stages or not isinstance(record.get("stages"), dict)}
      return {t: found for t, path in paths.items() if path.exists() and (found := read(path, problems))}

    analysis, drift = measured("analysis.json", reading.analysis), measured("drift.json", reading.drift)
    return cls(root, method, id_task, ood_tasks, models, data, stages, memory, analysis, record, config,
               tuple(problems), drift)

  def in_domain(self, model: Model) -> Accuracy:
    """Accuracy on the in-domain task."""
    return model.scores[self.id_task]

  def out_of_domain(self, model: Model) -> Accuracy:
    """Accuracy over the questions of all out-of-domain tasks together."""
    scores = [model.scores[task] for task in self.ood_tasks]
    return accuracy(sum(round(s.value * s.n) for s in scores), sum(s.n for s in scores))

  def handed_on(self) -> tuple[Model, ...]:
    """The base, and of each round the model that the next one starts from, or the merged one if none starts from it."""
    method = METHODS.get(self.method)  # a damaged run may have another
    handed_on = ("merged" if method.merge else method.hands_on.replace("tuned", "sft")) if method else "sft"
    return tuple(m for m in self.models if m.kind in ("base", handed_on))


def is_run(root: Path) -> bool:
  """Whether a folder is a run directory, perhaps a damaged one; a checkpoint has a config.json, too."""
  return (root / "run.json").is_file() or any((root / name).is_dir() for name in ("base/eval", "round_0")) or (
      "method" in reading.json_object(root / "config.json", []))


def find(given: Sequence[str]) -> list[Path]:
  """The run directories that --workdirs names: each itself, or those that it holds.

  Raises:
    UserError: for a folder that is none and holds none, and for a run that is named twice.
  """
  roots: list[Path] = []
  for name in given:
    if not name:
      raise UserError(f"--workdirs={','.join(given)}: one of the names is empty; expected DIR,DIR,...")
    root = Path(name)
    if not root.is_dir():
      raise UserError(f"--workdirs: {name} is no folder")
    below = [root] if is_run(root) else [p for p in sorted(root.iterdir()) if p.is_dir() and is_run(p)]
    if not below:
      raise UserError(f"--workdirs: {name} is no run directory (it has no run.json, and no config.json of a run) and "
                      "holds none")
    roots += below
  if not roots:
    raise UserError("--workdirs: names no run directory")
  for i, root in enumerate(roots):
    if root.resolve() in [other.resolve() for other in roots[:i]]:
      raise UserError(f"--workdirs: {root} is given twice")
  return roots


def _what(record: Mapping[str, Any], config: Mapping[str, Any], problems: list[str],
          ) -> tuple[str, str, tuple[str, ...]]:
  """The method, the in-domain task and the others; of the config where run.json does not say."""
  task = config.get("task") if isinstance(config.get("task"), dict) else {}
  tasks = record.get("tasks") if isinstance(record.get("tasks"), dict) else {}
  id_task, ood = tasks.get("id", task.get("name")), tasks.get("ood", task.get("ood", ()))
  if not isinstance(id_task, str):
    problems.append("run.json and config.json: neither names the in-domain task")
  ood = [name.partition("=")[0] for name in ood if isinstance(name, str)] if isinstance(ood, list) else []
  return str(record.get("method", config.get("method", "unknown"))), str(id_task), tuple(ood)


def _models(stages: Mapping[str, Any], rounds: list[int], tasks: tuple[str, ...], problems: list[str],
            ) -> tuple[Model, ...]:
  places = [("base", -1, "base/eval")]
  for t in rounds:
    sweep = sorted(name for name in stages if name.startswith(f"round_{t}/eval/sweep_"))
    places += [("sft", t, f"round_{t}/eval/sft"), ("ema", t, f"round_{t}/eval/ema"),
               *((f"merged {name.partition('sweep_')[2]}", t, name) for name in sweep),
               ("merged", t, f"round_{t}/eval/merged")]
  models = []
  for kind, t, name in places:
    if name in stages:
      try:
        models.append(_model(kind, t, stages[name]["facts"], tasks))
      except (AttributeError, KeyError, TypeError, ValueError) as e:
        problems.append(f"run.json: the scores of {name} are damaged ({e!r})")
  untold = [model.label for model in models if not model.asked]
  if untold and len(untold) < len(models):
    problems.append(f"run.json: does not say by which protocol these were asked: {', '.join(untold)}")
  return tuple(models)


def _model(kind: str, round_: int, facts: Mapping[str, Any], tasks: tuple[str, ...]) -> Model:
  scores = {task: {metric: _score(score) for metric, score in found.items()} for task, found in facts["scores"].items()}
  scores = {task: {name: score for name, score in found.items() if _METRIC.fullmatch(name)}
            for task, found in scores.items()}
  # The first that no samples were drawn for counts; json keeps the order.
  first = {}
  for task in tasks:
    counts = [name for name in scores[task] if not _SAMPLED.fullmatch(name)]
    if not counts:
      raise KeyError(f"{task} has no figure that counts")
    first[task] = scores[task].pop(counts[0])
  asked = {task: _asked(facts["protocol"][task]) for task in tasks} if "protocol" in facts else {}  # in older runs none
  parts = [{task: chosen for task, found in scores.items() if (chosen := {
      name: score for name, score in found.items() if bool(_SAMPLED.fullmatch(name)) == sampled})}
           for sampled in (True, False)]
  texts = {text: {name: _span(found[name]) for name in ("nats_per_token", "bits_per_byte")}
           for text, found in facts.get("texts", {}).items()}
  return Model(kind, round_, first, parts[0], dict(facts.get("long_prompts", {})), asked, parts[1], texts)


def _span(found: Mapping[str, Any]) -> dict[str, float]:
  span = {name: found[name] for name in ("value", "low", "high")}
  if not (all(map(is_number, span.values())) and span["value"] >= 0 and span["low"] <= span["value"] <= span["high"]):
    raise ValueError(f"{found} is no figure with its interval")
  return span


def _asked(found: Mapping[str, Any]) -> Asked:
  asked = Asked(*(found[name] for name in Asked._fields))
  known = isinstance(asked.name, str) and all(map(is_number, asked[1:]))
  if not (known and min(asked[1:]) >= 0 and asked.n > 0 and asked.cut <= 1):
    raise ValueError(f"{found} is no protocol")
  return asked


def _score(found: Mapping[str, Any]) -> Accuracy:
  score = Accuracy(**found)
  whole = isinstance(score.n, int) and is_number(score.n) and score.n > 0
  if not (whole and all(map(is_number, score)) and 0 <= score.low <= score.value <= score.high <= 1):
    raise ValueError(f"{found} is no accuracy")
  return score


def table(results: Results) -> str:
  """A table of accuracies: a line a model, a column a task, each with its 95 % interval."""
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
    lines.append([model.label, *map(figure, figures)])
  widths = [max(len(row[i]) for row in lines) for i in range(len(lines[0]))]
  text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in lines]
  return "\n".join([f"accuracy, method {results.method}; ID is {results.id_task}; brackets are 95 % intervals", *text,
                    *_beside(results), *_texts(results), *_sampled(results), *rules(results), *_lengths(results),
                    *skipped(results)])


def _beside(results: Results) -> list[str]:
  """A line for each task with further figures: those of all models."""
  tasks = dict.fromkeys(task for model in results.models for task in model.beside)
  return [f"{task}: " + "; ".join(f"{model.label} {', '.join(f'{n} {figure(a)}' for n, a in found.items())}"
                                  for model in results.models if (found := model.beside.get(task)))
          for task in tasks]


def _texts(results: Results) -> list[str]:
  """A line for each model and text."""
  return [f"{model.label}, text {text}: {spans['nats_per_token']['value']:.4f} "
          f"[{spans['nats_per_token']['low']:.4f}, {spans['nats_per_token']['high']:.4f}] nats a token, "
          f"{spans['bits_per_byte']['value']:.4f} bits a byte"
          for model in results.models for text, spans in model.texts.items()]


def figure(a: Accuracy) -> str:
  """A figure with its interval."""
  return f"{a.value:.3f} [{a.low:.3f}, {a.high:.3f}]"


def rules(results: Results) -> list[str]:
  """A line for each way in which test questions were asked."""
  tasks: dict[str, list[str]] = {}
  for task, asked in (results.models[0].asked if results.models else {}).items():
    tasks.setdefault(asked.rule, []).append(task)
  return [f"{rule}: {', '.join(names)}" for rule, names in tasks.items()]


def _lengths(results: Results) -> list[str]:
  """A line for each model: how long its greedy answers were, over all tasks."""
  found = {m.label: [a for a in m.asked.values() if a.mean_tokens] for m in results.models}
  return [f"{label}: {sum(a.mean_tokens * a.n for a in of) / sum(a.n for a in of):.1f} tokens an answer, "
          f"{sum(a.cut * a.n for a in of) / sum(a.n for a in of):.1%} of {sum(a.n for a in of)} cut at "
          "eval.max_new_tokens" for label, of in found.items() if of]


def skipped(results: Results) -> list[str]:
  """A line for each task of which questions were skipped."""
  return [f"{task}: {count} questions were skipped, for with an answer they do not fit in the model's context"
          for model in results.models[:1] for task, count in model.skipped.items()]


def _sampled(results: Results) -> list[str]:
  """Lines on pass@k and the majority vote, where answers were sampled."""
  return [f"{model.label}, {task}, n={next(iter(found.values())).n}: "
          + ", ".join(f"{name} {figure(a)}" for name, a in found.items())
          for model in results.models for task, found in model.sampled.items()]
