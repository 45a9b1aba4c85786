"""Tests which differences between a run's models, or between runs, are statistically significant."""

from collections.abc import Mapping, Sequence

from imm_jax.errors import UserError
from imm_jax.report.markup import Difference, Section, Table
from imm_jax.report.results import EvaluatedModel, Results
from imm_jax.statistics import model_comparison
from imm_jax.statistics.model_comparison import Answers, Comparison

POOLED = "all out of domain"
_NOTE = ("The models of a line answered the same questions and are compared question by question: the difference in "
         "accuracy with its 95 % interval (paired bootstrap). A star marks a difference that is significant at 5 %: "
         "p of McNemar's test (mid-p), corrected by Holm over the columns of the line, not over the lines; so an "
         "interval without 0 may have no star. Other questions of the kind would show a significant difference, too; "
         "another seed of the run may not.")


def make_section(results: Results) -> Section:
  """Compares each round's models with the base, and the merged model with the tuned one it was merged from."""
  by_round = {(m.kind, m.round): m for m in results.models if m.kind in ("base", "sft", "merged")}
  pairs = [(by_round[kind, t], by_round[other]) for kind, t in by_round for other in (("base", -1), ("sft", t))
           if kind != "base" and other in by_round and other != (kind, t)]
  compared = [(a.label, b.label, compare_models(results, a, results, b)) for a, b in pairs]
  return Section("differences", "Which differences are significant", _make_parts(compared, results.ood_tasks, "model"))


def compare_runs(runs: Mapping[str, Results]) -> list[Table | str]:
  """Compares the last model that each run hands on with that of the first run."""
  last = [(name, run, run.list_round_results()[-1]) for name, run in runs.items() if run.list_round_results()]
  compared = [(f"{name}: {model.label}", f"{last[0][0]}: {last[0][2].label}", compare_models(run, model, *last[0][1:]))
              for name, run, model in last[1:]]
  return _make_parts(compared, [task for run in runs.values() for task in run.ood_tasks], "run", "runs_")


def compare_models(run: Results, model: EvaluatedModel, other_run: Results, other: EvaluatedModel) -> Comparison:
  """Compares one model with another; if their answers cannot be compared, the result has only notes."""
  first, second = _read_answers(run, model), _read_answers(other_run, other)
  notes = [note for _, more in (first, second) for note in more]
  pooled = {POOLED: run.ood_tasks} if run.ood_tasks == other_run.ood_tasks and len(run.ood_tasks) > 1 else {}
  try:
    comparison = model_comparison.compare(first[0], second[0], pooled=pooled)
  except UserError as e:
    return Comparison((), (*notes, f"not compared: {e}") if first[0] and second[0] else tuple(notes))
  return Comparison(comparison.lines, (*notes, *comparison.notes))


def _read_answers(run: Results, model: EvaluatedModel) -> tuple[dict[str, Answers], list[str]]:
  """Reads the answers of a model by task; returns them and notes on what cannot be read."""
  answers, notes = {}, []
  for task in (run.id_task, *run.ood_tasks):
    path = run.root / model.folder / f"{task}.jsonl"
    try:
      answers[task] = model_comparison.read_answers(path)
    except UserError as e:
      notes.append(f"not compared: {e}")
    except OSError as e:
      notes.append(f"not compared: {path} cannot be read ({e.strerror})")
  return answers, notes


def _make_parts(compared: Sequence[tuple[str, str, Comparison]], ood_tasks: Sequence[str], subject: str,
                prefix: str = "") -> list[Table | str]:
  """Makes the parts of a section: an explanation, the differences, the tests behind them, and notes."""
  labels = list(dict.fromkeys(line.label for *_, comparison in compared for line in comparison.lines))
  # Accuracies first: in domain, all out of domain, each task; then in the same order what is scored beside them.
  labels.sort(key=lambda label: (", " in label, label.partition(", ")[0] in (POOLED, *ood_tasks),
                                 label.partition(", ")[0] in ood_tasks))
  notes = list(dict.fromkeys(note for *_, comparison in compared for note in comparison.notes))
  rows = [[a, b, *({line.label: _to_cell(line) for line in comparison.lines}.get(label) for label in labels)]
          for a, b, comparison in compared if comparison.lines]
  tests = [[a, b, line.label, paired.n, paired.first, paired.second, _to_cell(line), paired.wins, paired.losses,
            paired.p, line.p, "yes" if line.significant else "no"]
           for a, b, comparison in compared for line in comparison.lines for paired in (line.paired,)]
  tables = [
      _NOTE,
      Table(f"{prefix}differences", f"Differences, {subject} less the other; * is significant at 5 %",
            [subject, "against", *labels], rows),
      Table(f"{prefix}tests", "The tests behind them", [
          subject, "against", "task", "questions", "this", "other", "difference", "only this right", "only other right",
          "p", "p (Holm)", "significant at 5 %"], tests)] if rows else []
  return [*tables, *notes]


def _to_cell(line: model_comparison.Line) -> Difference:
  paired = line.paired
  return Difference(paired.value, paired.n, paired.low, paired.high, line.significant)
