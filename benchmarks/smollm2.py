"""A study of merging with a real pretrained model on real questions, in and out of domain.

    python benchmarks/smollm2.py --workdir=runs/smollm2
    python benchmarks/smollm2.py --workdir=runs/smollm2 --model=FOLDER --data=FOLDER --methods=star --seeds=1

Each method runs three rounds from SmolLM2-135M-Instruct (`configs/smollm2.py:study`), star and imm with --seeds seeds,
the others with one; shared stages are computed once. Linux only; one process per core, about 5 GiB each. A killed
benchmark resumes, and parts may run in any order (--methods, --seeds) or on several machines (--scores). At the end the
results so far are written to WORKDIR: scores.json, smollm2.png, smollm2_layers.png and report/, and tables are printed.

    python benchmarks/smollm2.py --workdir=runs/smollm2 --scores=benchmarks/smollm2.json --methods=

only makes tables and pictures of the runs in a file of scores.
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import side_by_side
import studies
from absl import app, flags

from imm_jax import analysis, files, methods
from imm_jax.errors import UserError, suggest
from imm_jax.report import Results, comparison, figures, results, writer
from imm_jax.runs import status
from imm_jax.statistics import model_comparison, paired_tests

Runs = Mapping[str, Mapping[str, Any]]  # METHOD_SEED -> figures of the run

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
  folder = Path(_MODEL.value)
  local, model = [], [f"--config.model={folder.resolve() if folder.is_dir() else folder}"] * bool(_MODEL.value)
  if _DATA.value:
    source = f"file:{Path(_DATA.value).resolve()}"
    ood = tuple(f"{name}={source}" for name in ("svamp", "arc_easy", "piqa", "sciq", "openbookqa", "boolq"))
    local = [f"--config.task.source={source}", f"--config.task.ood={ood}",
             f"--config.eval.texts=('tiny_shakespeare={source}/text/tinyshakespeare.txt',)"]
  return ["--config=configs/smollm2.py:study", *model, *local, *_OVERRIDES.value]


def collect_figures(run: Results) -> dict[str, Any]:
  """Collects all figures of a run, among them which questions each model that is handed on answers correctly.

  These are hexadecimal numbers whose bits, the highest first, are the questions in the order of their ids.
  """
  values = lambda scores: {task: score.value for task, score in scores.items()}
  handed_on = [model.label for model in run.list_round_results()]

  def of_model(model: results.EvaluatedModel) -> dict[str, Any]:
    drift = run.drift.get(model.round, {}).get("models", {}).get(model.kind, {})
    answers = {task: model_comparison.read_answers(run.root / model.folder / f"{task}.jsonl").scores["correct"]
               for task in model.scores} if model.label in handed_on else {}
    return {"in_domain": run.in_domain(model).value, "out_of_domain": run.out_of_domain(model).value,
            "scores": values(model.scores),
            "beside": {task: values(scores) for task, scores in model.other_scores.items()},
            "nats_per_token": {text: measures["nats_per_token"]["value"] for text, measures in model.texts.items()},
            "kl": {task: of_task["kl"] for task, of_task in drift.items()},
            "correct": {task: f"{int(''.join(str(int(of[id_])) for id_ in sorted(of)), 2):x}"
                        for task, of in answers.items()}}

  return {
      "models": {model.label: of_model(model) for model in run.models},
      "n": {task: score.n for task, score in run.models[0].scores.items()},
      "handed_on": handed_on,
      "finished": status.read(run.root).state == "finished",
      "data": list(run.data),
      "analysis": {str(t): _pick_analysis(of) for t, of in run.analysis.items()},
      "seconds": {name: entry.get("seconds") for name, entry in run.stages.items()},
      "memory_gib": max(run.memory.values(), default=None)}


def _pick_analysis(of_round: Mapping[str, Any]) -> dict[str, Any]:
  """Picks each layer's share of importance and of weight change, their rank correlation, and diversity of samples."""
  shares = lambda of: [round(share, 6) for share in analysis.shares(of["layers"])]
  return {"importance": shares(of_round["importance"]),
          "weight_change": {name: shares(of) for name, of in of_round["weight_change"].items()},
          "spearman": of_round["spearman"], "diversity": of_round.get("diversity")}  # gold answers are not sampled


def split(runs: Runs) -> dict[str, dict[int, Mapping[str, Any]]]:
  """Splits runs by method and seed, those that have come as far as the most advanced ones."""
  rounds = max(len(run["handed_on"]) for run in runs.values())
  order = {method: i for i, method in enumerate(METHODS)}
  by_method: dict[str, dict[int, Mapping[str, Any]]] = {}
  for name in sorted(runs, key=lambda name: order.get(name.rpartition("_")[0], len(order))):
    method, _, seed = name.rpartition("_")
    if len(runs[name]["handed_on"]) == rounds:
      by_method.setdefault(method, {})[int(seed)] = runs[name]
  return by_method


def tabulate_last(by_method: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> str:
  """Tabulates the last model of each method: mean over seeds, with the standard error if there are several."""
  first = next(iter(next(iter(by_method.values())).values()))
  id_task, *ood = first["n"]
  base = first["models"]["base"]
  head = ["", "seeds", id_task, "out of domain", *ood, *(f"{text}, nats a token" for text in base["nats_per_token"]),
          "KL in domain"]
  rows = {"base": [base]} | {f"`{method}`": [run["models"][run["handed_on"][-1]] for run in seeds.values()]
                             for method, seeds in by_method.items()}
  cells = lambda models: [
      [m["in_domain"] for m in models], [m["out_of_domain"] for m in models],
      *([m["scores"][task] for m in models] for task in ood),
      *([m["nats_per_token"][text] for m in models] for text in base["nats_per_token"]),
      [m["kl"][id_task] for m in models if m["kl"]]]
  return studies.format_table(head, [[name, str(len(models)), *(
      studies.format_mean(values) if values else "" for values in cells(models))] for name, models in rows.items()])


def compare_answers(by_method: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> str:
  """Tabulates the differences of last models to the base, star and imm: paired by question, means over common seeds.

  The interval is the 95 % bootstrap interval over questions; a star is p < 0.05 after Holm over the columns of a line.
  """
  counts = next(iter(next(iter(by_method.values())).values()))["n"]
  id_task, *ood = counts
  columns = {id_task: [id_task], "out of domain": ood, **{task: [task] for task in ood}}

  def read_scores(models: Iterable[Mapping[str, Any]], tasks: Sequence[str]) -> np.ndarray:
    """Returns the share of models that answer each question of the tasks correctly, [questions]."""
    return np.mean([np.concatenate([_read_bits(m["correct"][task], counts[task]) for task in tasks])
                    for m in models], 0)

  last = {method: {seed: run["models"][run["handed_on"][-1]] for seed, run in seeds.items()}
          for method, seeds in by_method.items()}
  last["base"] = {seed: run["models"]["base"] for seeds in by_method.values() for seed, run in seeds.items()}
  rows = []
  for other, left_out in {"base": (), "star": ("star",), "imm": ("star", "imm")}.items():
    for method in by_method:
      seeds = last[method].keys() & last.get(other, {}).keys()
      if method in left_out or not seeds:
        continue
      pairs = [paired_tests.compare_paired(*(read_scores([last[name][seed] for seed in seeds], tasks)
                                             for name in (method, other))) for tasks in columns.values()]
      corrected = paired_tests.holm([pair.p for pair in pairs])
      rows.append([f"`{method}` less {other if other == 'base' else f'`{other}`'}", str(len(seeds)), *(
          f"{pair.value:+.3f} [{pair.low:+.3f}, {pair.high:+.3f}]" + "*" * paired_tests.is_significant(p)
          for pair, p in zip(pairs, corrected, strict=True))])
  return studies.format_table(["last model", "seeds", *columns], rows)


def _read_bits(digits: str, count: int) -> np.ndarray:
  return np.array([int(bit) for bit in f"{int(digits, 16):0{count}b}"], np.float64)


def tabulate_rounds(by_method: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> str:
  """Tabulates samples, their diversity, and the rank correlation of importance and weight change by round."""
  rounds = range(len(next(iter(next(iter(by_method.values())).values()))["handed_on"]) - 1)
  measures = {  # None where a run has none: gold answers are not sampled
      "% right": lambda run, t: (100 * run["data"][t]["correct"] / run["data"][t]["samples"]
                                 if t < len(run["data"]) and run["data"][t].get("samples") else None),
      "trained on": lambda run, t: run["data"][t].get("kept") if t < len(run["data"]) else None,
      "distinct answers": lambda run, t: _get_analysis(run, t, "diversity", "distinct_answers"),
      "entropy": lambda run, t: _get_analysis(run, t, "diversity", "token_entropy"),
      "Spearman": lambda run, t: _get_analysis(run, t, "spearman")}

  def format_values(name: str, seeds: Mapping[int, Mapping[str, Any]], t: int) -> str:
    values = [value for run in seeds.values() if (value := measures[name](run, t)) is not None]
    digits = {"trained on": 0, "% right": 1}.get(name, 2)
    return f"{np.mean(values):.{digits}f}" if values else ""

  head = ["by round", *(f"{name} {t + 1}" for name in measures for t in rounds)]
  rows = [[f"`{method}`", *(format_values(name, seeds, t) for name in measures for t in rounds)]
          for method, seeds in by_method.items()]
  return studies.format_table(head, rows)


def _get_analysis(run: Mapping[str, Any], t: int, *path: str) -> Any:
  value = run["analysis"].get(str(t))
  for key in path:
    value = value and value.get(key)
  return value


def tabulate_costs(runs: Runs, by_method: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> str:
  """Tabulates the median seconds of each kind of stage, the hours of a run of each method, and its peak memory.

  A stage that runs share counts once among the stages, and in every run that has it.
  """
  stages = {(stage, seconds) for run in runs.values() for stage, seconds in run["seconds"].items() if seconds}
  by_kind: dict[str, list[float]] = {}
  for stage, seconds in sorted(stages):
    kind = stage.partition("/")[2] if stage.startswith("round_") else stage
    by_kind.setdefault("evaluation of a model" if "eval" in kind else kind, []).append(seconds)
  rows = [[f"{kind}, seconds", f"{median:.0f}"] for kind, values in by_kind.items()
          if (median := np.median(values)) >= 1]
  for method, seeds in by_method.items():
    hours = np.median([sum(filter(None, run["seconds"].values())) for run in seeds.values()]) / 3600
    rows.append([f"a run of `{method}`, hours", f"{hours:.1f}"])
  peak = max(run["memory_gib"] or 0 for run in runs.values())
  return studies.format_table(["stage or run", "median"], [*rows, ["peak memory of a run, GiB", f"{peak:.2f}"]])


def plot(by_method: Mapping[str, Mapping[int, Mapping[str, Any]]], folder: Path) -> None:
  """Plots accuracy by round and the front (smollm2.png), and importance against weight change (smollm2_layers.png)."""
  scores = tabulate_scores(by_method)
  style = lambda name, i: (*figures.get_method_style(name), "-")
  span = lambda panel: panel._replace(shares=False, span=None)
  writer.save(figures.draw(*studies.make_rounds(scores, style, shares=False), span(studies.make_front(scores, style))),
              folder, "smollm2")
  if panels := make_layers(by_method):
    writer.save(figures.draw(*panels), folder, "smollm2_layers")


def tabulate_scores(by_method: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> dict[str, dict[str, np.ndarray]]:
  """Returns the accuracy of the models that rounds hand on as a table of scores (see `studies`)."""
  return {method: {domain: np.array([[run["models"][label][key] for label in run["handed_on"]]
                                     for run in seeds.values()])
                   for domain, key in (("ID", "in_domain"), ("OOD", "out_of_domain"))}
          for method, seeds in by_method.items()}


def make_layers(by_method: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> list[figures.Panel]:
  """Makes panels of each layer's share of importance, and of weight change by star and imm, means of the last round.

  Methods whose last round has not been analyzed are left out, and panels without any method.
  """
  panels = []
  for title, *path in (("importance by layer", "importance"), ("weight change by SFT", "weight_change", "sft")):
    curves = []
    for name in ("star", "imm"):
      shares = [of_run for run in by_method.get(name, {}).values()
                if (of_run := _get_analysis(run, len(run["handed_on"]) - 2, *path))]
      if shares:
        values = 100 * np.mean(shares, 0)
        curves.append(figures.round_line(dict(enumerate(values.tolist())), name, figures.get_method_style(name)))
    panels += [figures.Panel(title, "layer", "% of all layers", tuple(curves), named=True)] * bool(curves)
  return panels


def read_scores(path: Path) -> dict[str, Any]:
  """Reads a file of scores.

  Raises:
    UserError: when it cannot be read or holds no such scores, or the answers of a run do not add up to its scores.
  """
  try:
    runs = json.loads(path.read_text())
    for name, run in runs.items():
      method, _, seed = name.rpartition("_")
      if not (method and seed.isdecimal() and isinstance(run["finished"], bool) and run["models"] and run["n"]):
        raise ValueError(f"{name}: expected METHOD_SEED and the figures of a run")
      for label in run["handed_on"]:
        for task, digits in run["models"][label]["correct"].items():
          share = int(digits, 16).bit_count() / run["n"][task]
          if abs(share - run["models"][label]["scores"][task]) > 1e-9 or int(digits, 16) >> run["n"][task]:
            raise ValueError(f"{name}, {label}, {task}: the answers do not add up to the score")
  except (OSError, ValueError, KeyError, AttributeError, TypeError) as e:
    raise UserError(f"--scores={path}: is no file of scores: {type(e).__name__} {e}") from e
  return runs


def collect(root: Path, earlier: Runs | None = None) -> None:
  """Writes scores.json and the report for all runs with scores, and prints and plots the most advanced ones.

  Args:
    root: work directory.
    earlier: figures of runs that were done elsewhere, by name; they count, but the report leaves them out.
  """
  folders = [path for path in sorted((root / "runs").glob("*")) if results.is_run(path) and path.suffix != ".part"]
  runs = [run for path in folders if len((run := Results.read(path)).models) > 1]
  collected = dict(earlier or {})
  for run in runs:
    figures_of_run = collect_figures(run)
    before = collected.get(run.root.name)
    progress = lambda of: (of["finished"], len(of["handed_on"]))
    if before is None or progress(figures_of_run) >= progress(before):
      collected[run.root.name] = figures_of_run
  if not collected:
    return
  root.mkdir(parents=True, exist_ok=True)
  files.write_json(root / "scores.json", collected)
  if len(runs) > 1:
    comparison.write(runs, root / "report")
  by_method = split(collected)
  if behind := sorted(collected.keys() - {f"{name}_{seed}" for name, seeds in by_method.items() for seed in seeds}):
    print(f"left out of the tables, since others have come further: {', '.join(behind)}", file=sys.stderr)
  print(tabulate_last(by_method), studies.tabulate_by_round(tabulate_scores(by_method)), compare_answers(by_method),
        tabulate_rounds(by_method), tabulate_costs(collected, by_method), sep="\n\n")
  plot(by_method, root)


def main(_: list[str]) -> None:
  try:
    for name in _METHODS.value:
      if name not in methods.METHODS:
        raise UserError(f"--methods={name}: {suggest(name, [*methods.METHODS])}")
    earlier = read_scores(Path(_SCORES.value)) if _SCORES.value else {}
  except UserError as e:
    raise SystemExit(f"error: {e}") from e
  root = Path(_WORKDIR.value).resolve()
  runs = {name: [f"--config.method={name}"] for name in _METHODS.value}
  seeds = {name: _SEEDS.value if name in _SEEDED else 1 for name in runs}
  try:
    side_by_side.run_all(runs, seeds, root / "runs", command(), processes=_PROCESSES.value,
                         done=[name for name, run in earlier.items() if run["finished"]])
  finally:
    collect(root, earlier)


if __name__ == "__main__":
  app.run(main)
