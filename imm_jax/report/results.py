"""Scores of a run, read from its record."""

from pathlib import Path
from typing import Any, NamedTuple

from imm_jax import files, rundir
from imm_jax.errors import UserError
from imm_jax.evaluation import Accuracy, accuracy


class Model(NamedTuple):
  """One evaluated model.

  Attributes:
    kind: `base`, or of a round `sft`, `merged`, or `merged 0.3`, a base weight of the sweep.
    round: -1 for the base.
    scores: greedy accuracy by task.
    sampled: by task, figures of its samples by name (`pass@4`, `majority@16`).
    skipped: by task, questions that do not fit in the model's context.
  """

  kind: str
  round: int
  scores: dict[str, Accuracy]
  sampled: dict[str, dict[str, Accuracy]]
  skipped: dict[str, int]

  @property
  def label(self) -> str:
    return "base" if self.kind == "base" else f"round {self.round} {self.kind}"


class Results(NamedTuple):
  """Everything a report shows.

  Attributes:
    method: of the run.
    id_task: the in-domain task.
    ood_tasks: the out-of-domain tasks.
    models: base first, then by round.
    data: for every round, how many answers were sampled, kept and dropped.
    config: as recorded.
  """

  method: str
  id_task: str
  ood_tasks: tuple[str, ...]
  models: tuple[Model, ...]
  data: tuple[dict[str, Any], ...]
  config: dict[str, Any]

  @classmethod
  def of(cls, root: Path) -> "Results":
    """Reads a run directory; stages that are not done are left out."""
    record = rundir.read_record(root)
    try:
      return cls._of(root, record)
    except (KeyError, TypeError, ValueError) as e:
      raise UserError(f"{root / 'run.json'}: damaged ({e!r}); remove it to run every stage again") from e

  @classmethod
  def _of(cls, root: Path, record: dict[str, Any]) -> "Results":
    stages = record["stages"]
    rounds = sorted({int(name.split("/")[0].removeprefix("round_")) for name in stages if name.startswith("round_")})
    places = [("base", -1, "base/eval")]
    for t in rounds:
      found = [name for name in stages if name.startswith(f"round_{t}/eval/sweep_")]
      places += [("sft", t, f"round_{t}/eval/sft"),
                 *((f"merged {name.partition('sweep_')[2]}", t, name) for name in sorted(found)),
                 ("merged", t, f"round_{t}/eval/merged")]
    models = []
    for kind, t, name in places:
      if name in stages:
        scores = {task: {metric: Accuracy(**score) for metric, score in found.items()}
                  for task, found in stages[name]["facts"]["scores"].items()}
        greedy = {task: found.pop("greedy") for task, found in scores.items()}
        models.append(Model(kind, t, greedy, {task: found for task, found in scores.items() if found},
                            stages[name]["facts"]["long_prompts"]))
    data = tuple({"round": t} | stages.get(f"round_{t}/samples.jsonl", {}).get("facts", {})
                 | stages.get(f"round_{t}/train.jsonl", {}).get("facts", {}) for t in rounds)
    config = files.read_json(root / "config.json")
    return cls(record["method"], record["tasks"]["id"], tuple(record["tasks"]["ood"]), tuple(models), data,
               config)

  def in_domain(self, model: Model) -> Accuracy:
    """Accuracy on the in-domain task."""
    return model.scores[self.id_task]

  def out_of_domain(self, model: Model) -> Accuracy:
    """Accuracy over the questions of all out-of-domain tasks together."""
    scores = [model.scores[task] for task in self.ood_tasks]
    return accuracy(sum(round(s.value * s.n) for s in scores), sum(s.n for s in scores))


def table(results: Results) -> str:
  """A table of accuracies: a line a model, a column a task, each with its 95 % interval."""
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
                    *_sampled(results), *skipped(results)])


def figure(a: Accuracy) -> str:
  """A figure with its interval."""
  return f"{a.value:.3f} [{a.low:.3f}, {a.high:.3f}]"


def skipped(results: Results) -> list[str]:
  """A line for each task of which questions were skipped."""
  return [f"{task}: {count} questions were skipped, for with an answer they do not fit in the model's context"
          for task, count in results.models[0].skipped.items()]


def _sampled(results: Results) -> list[str]:
  """Lines on pass@k and the majority vote, where answers were sampled."""
  return [f"{model.label}, {task}, n={next(iter(found.values())).n}: "
          + ", ".join(f"{name} {figure(a)}" for name, a in found.items())
          for model in results.models for task, found in model.sampled.items()]
