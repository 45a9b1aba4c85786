"""The IMM loop over many seeds: does merging keep out-of-domain accuracy at little cost in domain?

    python benchmarks/seeds.py --workdir=runs/seeds --seeds=10
    python benchmarks/seeds.py --workdir=runs/seeds --seeds=10 --scores=benchmarks/seeds.json

Each run is the command of the README (`python -m imm_jax.main --config=configs/tiny.py`) with its own seed and method,
or with an intervention in `star`; the control `real` trains on gold answers instead of samples. Linux only (one process
per core, with taskset); a killed benchmark resumes. Prints Markdown tables with means and standard errors, also by
round; out-of-domain accuracy at equal in-domain accuracy, paired with imm by seed; and the changes of imm and star
relative to the base. WORKDIR/seeds.png plots accuracy by round, WORKDIR/front.png in-domain against out-of-domain
accuracy; WORKDIR/scores.json holds all scores. Runs whose scores stand in the file of --scores are not run again.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import side_by_side
import studies
from absl import app, flags

from imm_jax import files, methods
from imm_jax.report import Results, figures, writer
from imm_jax.report.sections import front
from imm_jax.statistics import paired_tests

_WORKDIR = flags.DEFINE_string("workdir", "runs/seeds", "Folder for the run directories.")
_SEEDS = flags.DEFINE_integer("seeds", 10, "Number of runs of each method.", lower_bound=2)
# Method -> flags of the command.
METHODS = {name: (f"--config.method={name}",) for name in methods.METHODS} | {
    name: ("--config.method=star", f"--config.sft.intervention={name}") for name in (
        "gradient_decay", "gradient_clipping", "weight_masking")} | {
            "auto": ("--config.method=imm", "--config.merge.base_weight=auto"),
            "lines": ("--config.method=lines", "--config.merge.base_weight=0"),  # as published: the last layer whole
            "imm_0.5": ("--config.method=imm", "--config.merge.base_weight=0.5"),
            "early_stopping": ("--config.method=star", "--config.sft.stop_share=0.1")}
_ENLARGED = 0.9  # accuracy out of domain from which the front is shown enlarged
_METHODS = flags.DEFINE_list("methods", list(METHODS), "Methods to compare.")
_SCORES = flags.DEFINE_string("scores", "", "A scores.json of earlier runs, on this machine or another, to go on from.")
_OVERRIDES = flags.DEFINE_multi_string("override", [], "A flag passed on to every run, such as --config.rounds=2.")


def scores_by_round(root: Path, method: str, seeds: Iterable[int]) -> dict[str, list[list[float]]]:
  """Reads ID and OOD accuracy [seeds, rounds + 1] of the base and of the model that each round hands on."""
  table: dict[str, list[list[float]]] = {"ID": [], "OOD": []}
  for seed in seeds:
    results = Results.read(root / f"{method}_{seed}")
    last_models = {m.round: m for m in results.models}  # the last model of a round is the one handed on
    models = [last_models[r] for r in sorted(last_models)]
    table["ID"].append([results.in_domain(m).value for m in models])
    table["OOD"].append([results.out_of_domain(m).value for m in models])
  return table


def tabulate_last(table: studies.Scores) -> str:
  """Tabulates the accuracy after the last round by method, and its change relative to the base."""
  first = next(iter(table.values()))
  seeds, rounds = first["ID"].shape[0], first["ID"].shape[1] - 1
  rows = [["base", f"{first['ID'][0, 0]:.3f}", f"{first['OOD'][0, 0]:.3f}", "", ""]]
  for method, scores in table.items():
    cells = [studies.format_mean(scores[d][:, -1]) for d in ("ID", "OOD")]
    rows.append([f"`{method}`", *cells, *(studies.format_mean(scores[d][:, -1] - scores[d][:, 0], "+")
                                          for d in ("ID", "OOD"))])
  return studies.format_table([f"{seeds} seeds, after {rounds} rounds", "ID", "OOD", "change in ID", "change in OOD"],
                              rows)


def measure_paths(table: studies.Scores) -> dict[str, dict[str, list[float | None]]]:
  """Measures the path of each method and seed from the base through each round's model.

  Returns:
    measure -> method -> value of each seed: OOD accuracy where the path reaches a part of star's gain in ID accuracy,
    None where it never does; and the area that the path dominates, from the base's ID accuracy and no OOD accuracy on.
  """
  paths = {name: [list(zip(*rows, strict=True)) for rows in zip(scores["ID"], scores["OOD"], strict=True)]
           for name, scores in table.items()}
  base, last = (float(table["star"]["ID"][:, t].mean()) for t in (0, -1))
  measures = {}
  for share, part in ((0.5, "half"), (0.75, "three quarters")):
    target = base + share * (last - base)
    measures[f"OOD at ID {target:.3f}, {part} of star's gain"] = {
        name: [front.interpolate_out(path, target) for path in of] for name, of in paths.items()}
  return measures | {"hypervolume": {
      name: [front.hypervolume(path, (path[0][0], 0.0)) for path in of] for name, of in paths.items()}}


def compare(values: Mapping[str, Sequence[float | None]], measure: str, reference: str) -> str:
  """Tabulates a measure by method, with the difference to a reference method paired by seed.

  The interval is the 95 % bootstrap interval; p is from the randomization test with Holm's correction over methods.
  """
  tests = {}
  for name in values.keys() - {reference}:
    pairs = [(a, b) for a, b in zip(values[name], values[reference], strict=True) if a is not None and b is not None]
    if len(pairs) > 1:
      tests[name] = paired_tests.compare_paired(*zip(*pairs, strict=True))
  corrected = dict(zip(tests, paired_tests.holm([test.p for test in tests.values()]), strict=True))
  rows = []
  for name, of_seeds in values.items():
    measured = [value for value in of_seeds if value is not None]
    test = tests.get(name)
    change = f"{test.value:+.3f} [{test.low:+.3f}, {test.high:+.3f}]" if test else ""
    rows.append([f"`{name}`", studies.format_mean(measured) if len(measured) > 1 else "", str(len(measured)), change,
                 f"{corrected[name]:.3f}" if test else ""])
  return studies.format_table([measure, "mean", "seeds", f"less `{reference}`'s", "p"], rows)


def style(name: str, i: int) -> tuple[str, str, str]:
  """Returns color, marker and dash of a method's line."""
  method = METHODS[name][0].removeprefix("--config.method=")
  return *figures.get_method_style(method, name), "-" if name == method else figures.get_dash(1 + i % 3)


def plot(table: studies.Scores, folder: Path) -> None:
  """Plots accuracy by round (seeds.png), and in domain against out of domain (front.png), each also as SVG.

  The second panel of front.png enlarges what keeps most of the base's OOD accuracy.
  """
  writer.save(figures.draw(*studies.make_rounds(table, style)), folder, "seeds")
  panel = studies.make_front(table, style)
  kept = tuple(line._replace(x=line.x[:n + 1], y=line.y[:n + 1]) for line in panel.lines
               if (n := sum(y >= _ENLARGED for y in line.y)))
  enlarged = panel._replace(title=f"the same, above {_ENLARGED}", lines=kept, shares=False, span=(_ENLARGED, 1.0))
  writer.save(figures.draw(panel, enlarged), folder, "front")


def write_results(scores: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
  """Writes plots of the scores of `scores_by_round` by method, and prints their tables."""
  table = {method: {domain: np.array(v) for domain, v in of.items()} for method, of in scores.items()}
  plot(table, folder)
  print(tabulate_last(table), studies.tabulate_by_round(table), sep="\n\n")
  if "star" in table:
    for measure, values in measure_paths(table).items():
      print("", compare(values, measure, "imm" if "imm" in table else "star"), sep="\n")
  if {"star", "imm"} <= table.keys():
    gain, change = ({m: float((table[m][d][:, -1] - table[m][d][:, 0]).mean()) for m in ("star", "imm")}
                    for d in ("ID", "OOD"))
    print(f"\nstar gains {gain['star']:+.3f} in domain (wanted +0.08 or more: {gain['star'] >= 0.08}) and changes by "
          f"{change['star']:+.3f} out of domain (wanted -0.10 or less: {change['star'] <= -0.10})")
    share = f"{gain['imm'] / gain['star']:.0%}" if gain["star"] > 0 else "none"
    print(f"imm changes by {change['imm']:+.3f} out of domain (wanted -0.02 or more: {change['imm'] >= -0.02}), keeps "
          f"{share} of star's gain (wanted 75 %: {gain['imm'] >= 0.75 * gain['star']})")


def main(_: list[str]) -> None:
  root = Path(_WORKDIR.value).resolve()
  root.mkdir(parents=True, exist_ok=True)
  earlier = json.loads(Path(_SCORES.value).read_text()) if _SCORES.value else {}
  counts = {method: min(len(of["ID"]), _SEEDS.value) for method, of in earlier.items()}
  side_by_side.run_all({name: METHODS[name] for name in _METHODS.value}, dict.fromkeys(_METHODS.value, _SEEDS.value),
                       root, ["--config=configs/tiny.py", *_OVERRIDES.value],
                       done={f"{method}_{seed}" for method, count in counts.items() for seed in range(count)})
  scores = {}
  for method in _METHODS.value:
    count = counts.get(method, 0)
    later = scores_by_round(root, method, range(count, _SEEDS.value))
    scores[method] = {domain: [*earlier[method][domain][:count], *rows] if count else rows
                      for domain, rows in later.items()}
  files.write_json(root / "scores.json", scores)
  write_results(scores, root)


if __name__ == "__main__":
  app.run(main)
