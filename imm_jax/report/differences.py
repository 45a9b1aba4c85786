"""Which of the differences between a run's models, or between runs, are real."""

from collections.abc import Mapping, Sequence

from imm_jax import against
from imm_jax.against import Answers, Comparison
from imm_jax.errors import UserError
from imm_jax.report.markup import Difference, Section, Table
from imm_jax.report.results import Model, Results

POOLED = "all out of domain"
_HOW = ("The models of a line answered the same questions and are compared question by question: the difference in "
        "accuracy with its 95 % interval (paired bootstrap). A star marks a difference that is real at 5 %: p of "
        "McNemar's test (mid-p), corrected by Holm over the columns of the line, not over the lines; so an interval "
        "that leaves 0 out may have none. Real is what other questions of the kind would show, too; another seed of "
        "the run may show something else.")


def section(results: Results) -> Section:
  """Of a run: each round's models against the base, and what is merged against what it was merged from."""
  by_round = {(m.kind, m.round): m for m in results.models if m.kind in ("base", "sft", "merged")}
  pairs = [(by_round[kind, t], by_round[other]) for kind, t in by_round for other in (("base", -1), ("sft", t))
           if kind != "base" and other in by_round and other != (kind, t)]
  found = [(a.label, b.label, of_models(results, a, results, b)) for a, b in pairs]
  return Section("differences", "Which differences are real", _parts(found, results.ood_tasks, "model"))


def of_runs(runs: Mapping[str, Results]) -> list[Table | str]:
  """Of several: the model that each hands on last against that of the first run."""
  last = [(name, run, run.handed_on()[-1]) for name, run in runs.items() if run.handed_on()]
  found = [(f"{name}: {model.label}", f"{last[0][0]}: {last[0][2].label}", of_models(run, model, *last[0][1:]))
           for name, run, model in last[1:]]
  return _parts(found, [task for run in runs.values() for task in run.ood_tasks], "run", "runs_")


def of_models(run: Results, model: Model, other_run: Results, other: Model) -> Comparison:
  """One model against another; without lines where their answers cannot be compared, which its notes explain."""
  first, second = (_answers(*of) for of in ((run, model), (other_run, other)))
  notes = [note for _, more in (first, second) for note in more]
  pooled = {POOLED: run.ood_tasks} if run.ood_tasks == other_run.ood_tasks and len(run.ood_tasks) > 1 else {}
  try:
    found = against.compare(first[0], second[0], pooled=pooled)
  except UserError as e:
    return Comparison((), (*notes, f"not compared: {e}") if first[0] and second[0] else tuple(notes))
  return Comparison(found.lines, (*notes, *found.notes))


def _answers(run: Results, model: Model) -> tuple[dict[str, Answers], list[str]]:
  """The answers of a model by task, and what cannot be read."""
  found, notes = {}, []
  for task in (run.id_task, *run.ood_tasks):
    path = run.root / model.folder / f"{task}.jsonl"
    try:
      found[task] = against.read(path)
    except UserError as e:
      notes.append(f"not compared: {e}")
    except OSError as e:
      notes.append(f"not compared: {path} cannot be read ({e.strerror})")
  return found, notes


def _parts(found: Sequence[tuple[str, str, Comparison]], ood_tasks: Sequence[str], what: str, prefix: str = "",
           ) -> list[Table | str]:
  """What is said of these pairs: how to read it, the differences, the tests behind them, and what was left out."""
  labels = list(dict.fromkeys(line.label for *_, of in found for line in of.lines))
  labels.sort(key=lambda label: (label.partition(",")[0] in ood_tasks, label != POOLED and label in ood_tasks))
  notes = list(dict.fromkeys(note for *_, of in found for note in of.notes))
  rows = [[a, b, *({line.label: _cell(line) for line in of.lines}.get(label) for label in labels)]
          for a, b, of in found if of.lines]
  tests = [[a, b, line.label, d.n, d.first, d.second, _cell(line), d.wins, d.losses, d.p, line.p,
            "yes" if line.real else "no"] for a, b, of in found for line in of.lines for d in (line.paired,)]
  tables = [
      _HOW,
      Table(f"{prefix}differences", f"Differences, {what} less the other; * is real", [what, "against", *labels], rows),
      Table(f"{prefix}tests", "The tests behind them", [
          what, "against", "task", "questions", "this", "other", "difference", "only this right", "only other right",
          "p", "p (Holm)", "real at 5 %"], tests)] if rows else []
  return [*tables, *notes]


def _cell(line: against.Line) -> Difference:
  d = line.paired
  return Difference(d.value, d.n, d.low, d.high, line.real)
