"""A study of merging with a real pretrained model on real questions, in and out of domain.

    python benchmarks/smollm2.py --workdir=runs/smollm2
    python benchmarks/smollm2.py --workdir=runs/smollm2 --model=FOLDER --data=FOLDER --methods=star --seeds=1

Each method runs three rounds from SmolLM2-135M-Instruct (`configs/smollm2.py:study`), star and imm with --seeds seeds,
the others with one; shared stages are computed once. Linux only; one process per core, about 4.5 GiB each. A killed
benchmark resumes, and parts may run in any order (--methods, --seeds) or on several machines (--scores). At the end the
results so far are written to WORKDIR/scores.json (all scores) and WORKDIR/report (plots), and a table is printed.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import side_by_side
from absl import app, flags

from imm_jax import files
from imm_jax.report import Results, compare, groups, results
from imm_jax.runs import status

METHODS = ("star", "imm", "iimm", "wise_ft", "kl", "real")
_SEEDED = ("star", "imm")  # methods with --seeds seeds
_WORKDIR = flags.DEFINE_string("workdir", "runs/smollm2", "Folder for all outputs.")
_MODEL = flags.DEFINE_string("model", "", "Folder of the model; empty for the hub's.")
_DATA = flags.DEFINE_string("data", "", "Folder of data sets as published; empty for the published sources.")
_METHODS = flags.DEFINE_list("methods", list(METHODS), "Methods to run.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Number of runs of star and imm.", lower_bound=1)
_SCORES = flags.DEFINE_string("scores", "", "A scores.json of earlier runs; finished ones are not run again.")
_PROCESSES = flags.DEFINE_integer("processes", 0, "Maximum number of processes; 0 for one per core.", lower_bound=0)
_OVERRIDES = flags.DEFINE_multi_string("override", [], "A flag passed on to every run, such as --config.rounds=2.")


def command() -> list[str]:
  """Returns the flags of all runs."""
  local, model = [], [f"--config.model={_MODEL.value}"] * bool(_MODEL.value)
  if _DATA.value:
    source = f"file:{Path(_DATA.value).resolve()}"
    ood = tuple(f"{name}={source}" for name in ("svamp", "arc_easy", "piqa", "sciq", "openbookqa", "boolq"))
    local = [f"--config.task.source={source}", f"--config.task.ood={ood}",
             f"--config.eval.texts=('tiny_shakespeare={source}/text/tinyshakespeare.txt',)"]
  return ["--config=configs/smollm2.py:study", *model, *local, *_OVERRIDES.value]


def collect_figures(run: Results) -> dict[str, Any]:
  """Collects all figures of a run: scores, nats per token and KL of each model, seconds of stages, and memory."""
  values = lambda scores: {task: score.value for task, score in scores.items()}

  def of_model(model: results.EvaluatedModel) -> dict[str, Any]:
    drift = run.drift.get(model.round, {}).get("models", {}).get(model.kind, {})
    return {"in_domain": run.in_domain(model).value, "out_of_domain": run.out_of_domain(model).value,
            "scores": values(model.scores),
            "beside": {task: values(figures) for task, figures in model.other_scores.items()},
            "nats_per_token": {text: figures["nats_per_token"]["value"] for text, figures in model.texts.items()},
            "kl": {task: of_task["kl"] for task, of_task in drift.items()}}

  return {
      "models": {model.label: of_model(model) for model in run.models},
      "n": {task: score.n for task, score in run.models[0].scores.items()},
      "handed_on": [model.label for model in run.handed_on()],
      "finished": status.read(run.root).state == "finished",
      "data": list(run.data),
      "seconds": {name: entry.get("seconds") for name, entry in run.stages.items()},
      "memory_gib": max(run.memory.values(), default=None)}


def markdown(figures: dict[str, dict[str, Any]]) -> str:
  """Tabulates the last model of each method: mean over seeds, with the standard error if there are several."""
  first = next(iter(figures.values()))
  id_task, *ood = first["n"]
  texts = list(next(iter(first["models"].values()))["nats_per_token"])
  heads = ["", "seeds", id_task, "out of domain", *ood, *(f"{text}, nats a token" for text in texts), "KL in domain"]
  lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
  rows = {"base": [next(iter(first["models"].values()))]}
  for name, run in figures.items():
    rows.setdefault(f"`{name.rpartition('_')[0]}`", []).append(run["models"][run["handed_on"][-1]])
  for name, models in rows.items():
    columns = [[m["in_domain"] for m in models], [m["out_of_domain"] for m in models],
               *([m["scores"][task] for m in models] for task in ood),
               *([m["nats_per_token"][text] for m in models] for text in texts),
               [m["kl"][id_task] for m in models if m["kl"]]]
    lines.append(f"| {name} | {len(models)} | {' | '.join(map(_mean, columns))} |")
  return "\n".join(lines)


def _mean(values: list[float]) -> str:
  if not values:
    return ""
  mean, error = groups.mean_and_error(values) if len(values) > 1 else (values[0], None)
  return f"{mean:.3f}" if error is None else f"{mean:.3f} ± {error:.3f}"


def collect(root: Path, earlier: Mapping[str, Any] | None = None) -> None:
  """Writes scores.json and the report for all runs with scores, and prints a table of the most advanced ones.

  Args:
    root: work directory.
    earlier: figures of runs that were done elsewhere, by name; they count, but the report leaves them out.
  """
  folders = [path for path in sorted((root / "runs").glob("*")) if results.is_run(path) and path.suffix != ".part"]
  runs = [run for path in folders if len((run := Results.read(path)).models) > 1]
  figures = dict(earlier or {}) | {run.root.name: collect_figures(run) for run in runs}
  if not figures:
    return
  files.write_json(root / "scores.json", figures)
  if len(runs) > 1:
    compare.write(runs, root / "report")
  rounds = max(len(run["handed_on"]) for run in figures.values())
  print(markdown({name: run for name, run in figures.items() if len(run["handed_on"]) == rounds}))


def main(_: list[str]) -> None:
  root = Path(_WORKDIR.value).resolve()
  methods = {name: [f"--config.method={name}"] for name in _METHODS.value}
  seeds = {name: _SEEDS.value if name in _SEEDED else 1 for name in methods}
  earlier = json.loads(Path(_SCORES.value).read_text()) if _SCORES.value else {}
  try:
    side_by_side.run_all(methods, seeds, root / "runs", command(), processes=_PROCESSES.value,
                         done=[name for name, run in earlier.items() if run["finished"]])
  finally:
    collect(root, earlier)


if __name__ == "__main__":
  app.run(main)
