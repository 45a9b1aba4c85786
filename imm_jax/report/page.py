"""Makes the page of one run."""

import html
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from imm_jax.formatting import format_duration
from imm_jax.report import figures
from imm_jax.report.figures import MODELS, Panel
from imm_jax.report.markup import Markup, Plot, Section, Table, render_page, render_section
from imm_jax.report.reading import COUNTS
from imm_jax.report.results import EvaluatedModel, Results, list_protocols, list_skipped
from imm_jax.report.samples import Chunk
from imm_jax.report.sections import differences, front, insides
from imm_jax.runs.status import Status
from imm_jax.statistics.accuracy import Accuracy

_RELOAD_S = 30
PASS_AT_K = ("pass@k: the share of questions of which one of k samples is right (unbiased estimate); majority: the "
             "most common answer is right.")
NO_MEMORY = "The devices did not say how much memory they held."


def make_sections(results: Results, chunks: Sequence[Chunk]) -> list[Section]:
  """Makes the sections of a run's page, except for its head and the samples."""
  candidates = [_accuracy_section(results), front.run_section(results), differences.make_section(results),
                _sampled_section(results), insides.layers_section(results), insides.diversity_section(results),
                insides.drift_section(results),
                _data_section(results), _stages_section(results, chunks), _config_section(results)]
  return [part for part in candidates if part.parts]


def render(results: Results, status: Status, parts: Sequence[Section], chunks: Sequence[Chunk], problems: Sequence[str],
           svgs: Mapping[str, Sequence[str]], *, written: str = "", renewed: bool = False) -> str:
  """Renders the page of a run as HTML.

  Args:
    results: results of the run.
    status: status of the run.
    parts: its sections from `make_sections`, and any others.
    chunks: its samples.
    problems: descriptions of missing or damaged data in addition to those in `results`.
    svgs: SVG of the plots by name, from `writer.Plots`.
    written: time of writing, for a run that is going on.
    renewed: whether the page will be written again.
  """
  name = f"{results.variant}: {results.root.resolve().name}"
  top = f"<h1>{html.escape(name)}</h1>{_render_status(results, status, written, renewed)}{_render_summary(results)}"
  return assemble_page(name, top, [*results.problems, *problems], parts, chunks, svgs,
                       reload_s=_RELOAD_S if renewed else 0)


def assemble_page(title: str, top: str, problems: Sequence[str], parts: Sequence[Section], chunks: Sequence[Chunk],
                  svgs: Mapping[str, Sequence[str]], *, reload_s: int = 0) -> str:
  """Assembles a page of one run or several; the answers come before the last section.

  Args:
    title: title in plain text.
    top: HTML of its head.
    problems: descriptions of missing or damaged data.
    parts: the sections.
    chunks: packed answers.
    svgs: SVG of the plots by name.
    reload_s: see `markup.render_page`.
  """
  if problems:
    items = "".join(f"<li>{html.escape(p)}</li>" for p in problems)
    top += f'<div class="problems" role="note"><strong>Missing or left out</strong><ul>{items}</ul></div>'
  links, texts = [(part.id, part.title) for part in parts], [render_section(part, svgs) for part in parts]
  if chunks:
    links.insert(-1, ("samples", "Answers"))
    texts.insert(-1, _render_browser(chunks))
  return render_page(title, top, texts, links, bottom=_render_answers(chunks), reload_s=reload_s)


def _render_browser(chunks: Sequence[Chunk]) -> str:
  """Renders the browser of the packed answers, whose code is in page.js."""
  text = importlib.resources.files("imm_jax.report").joinpath("browser.html").read_text(encoding="utf-8")
  return text.replace("COUNT", f"{sum(chunk.rows for chunk in chunks):,}")


def _render_answers(chunks: Sequence[Chunk]) -> str:
  """Renders the packed answers, for the end of the page."""
  return "".join(f'<script type="application/gzip+base64" class="chunk">{chunk.packed}</script>' for chunk in chunks)


def _render_status(results: Results, status: Status, written: str, renewed: bool) -> str:
  done = [name for name in status.plan if name in results.stages]
  stages = f"{len(done)} of {len(status.plan)} stages done" if status.plan else (
      f"{len(results.stages)} stages done of an unknown number")
  if not results.facts:
    stages = "the stages done are unknown"
  todo = next((name for name in status.plan if name not in results.stages), "")
  left = todo and (f"; {todo} is missing" if status.state == "finished" else f"; next {todo}")
  text = f"{status.state.capitalize()}: {stages}{left}" if status.state else stages
  refresh_note = f"the page looks for a newer one every {_RELOAD_S} s" if renewed else "this page stays as it is"
  text += f" (as of {written}; {refresh_note})" if written else ""
  text += f". {status.why}" if status.why else ""
  bar = f'<progress value="{len(done)}" max="{len(status.plan)}" aria-label="stages done"></progress> ' if todo else ""
  return f'<p class="status {html.escape(status.state)}">{bar}{html.escape(text)}</p>'


def _render_summary(results: Results) -> str:
  models = results.list_round_results()
  if not models:
    return '<p class="sentence">No model was evaluated yet.</p>'
  first, last = models[0], models[-1]
  scores = [("in domain", results.id_task, results.in_domain)]
  if results.ood_tasks:
    scores.append(("out of domain", ", ".join(results.ood_tasks), results.out_of_domain))
  cards = []
  for where, tasks, score in scores:
    a, before = score(last), score(first)
    details = f"base {before.value:.3f} [{before.low:.3f}, {before.high:.3f}]"
    tuned = [m for m in results.models if (m.kind, m.round) == ("sft", last.round)]
    if last.kind == "merged" and tuned:
      details += f"; SFT before merging {score(tuned[0]).value:.3f}"
    cards.append((f"{where}: {tasks}", f"{a.value:.3f}", f"95 % interval {a.low:.3f} to {a.high:.3f}, n={a.n}",
                  details))
  if results.data:
    kept, sampled = (sum(row.get(key) or 0 for row in results.data) for key in ("kept", "samples"))
    cards.append(("answers trained on", f"{kept:,}", f"of {sampled:,} sampled" if sampled else "none was sampled", ""))
  cards.append(("time of all stages", format_duration(total_seconds(results)), f"on {describe_devices(results)}", ""))
  boxes = "".join(f'<div class="card"><span>{html.escape(a)}</span><b>{html.escape(b)}</b><span>{html.escape(c)}</span>'
                  f"<span>{html.escape(d)}</span></div>" for a, b, c, d in cards)
  return f'<p class="sentence">{html.escape(_summarize(results, first, last))}</p><div class="cards">{boxes}</div>'


def _summarize(results: Results, first: EvaluatedModel, last: EvaluatedModel) -> str:
  model = results.config.get("model", "the base")
  if Path(model).is_absolute():
    model = Path(model).name
  if first.kind != "base":
    return "The base model's scores are missing, so the change by the run is unknown."
  if last is first:
    return f"No round of {results.variant} on {model} is done yet; these are the base model's scores."
  done = f"{last.round + 1} round{'s' * (last.round > 0)} of {results.variant} on {model}"
  significant = {line.label: line.significant
                 for line in differences.compare_models(results, last, results, first).lines}
  parts = [_describe_change(results.in_domain(first), results.in_domain(last), f"in domain ({results.id_task})",
                            significant.get(results.id_task))]
  if results.ood_tasks:
    tasks = f"{len(results.ood_tasks)} task{'s' * (len(results.ood_tasks) > 1)}"
    parts.append(_describe_change(results.out_of_domain(first), results.out_of_domain(last), f"out of domain ({tasks})",
                                  significant.get(differences.POOLED if len(results.ood_tasks) > 1
                                                  else results.ood_tasks[0])))
  return f"After {done}, accuracy {' and '.join(parts)}."


def _describe_change(before: Accuracy, after: Accuracy, where: str, significant: bool | None) -> str:
  """Describes a change of accuracy; if its significance is unknown, values within the other's interval are no change.

  >>> _describe_change(Accuracy(0.4, 100, 0.31, 0.50), Accuracy(0.6, 100, 0.50, 0.69), "in domain", True)
  'in domain rose from 0.400 to 0.600'
  >>> _describe_change(Accuracy(0.98, 100, 0.93, 0.99), Accuracy(0.97, 100, 0.92, 0.99), "out of domain", False)
  'out of domain went from 0.980 to 0.970 (this may be chance)'
  >>> _describe_change(Accuracy(0.98, 100, 0.93, 0.99), Accuracy(0.97, 100, 0.92, 0.99), "out of domain", None)
  'out of domain stayed within its interval, 0.980 and 0.970'
  """
  if significant is False and f"{before.value:.3f}" == f"{after.value:.3f}":
    return f"{where} stayed at {after.value:.3f}"
  if significant is False:
    return f"{where} went from {before.value:.3f} to {after.value:.3f} (this may be chance)"
  if significant is None and (after.low <= before.value <= after.high or before.low <= after.value <= before.high):
    return f"{where} stayed within its interval, {before.value:.3f} and {after.value:.3f}"
  return f"{where} {'rose' if after.value > before.value else 'fell'} from {before.value:.3f} to {after.value:.3f}"


def _accuracy_section(results: Results) -> Section:
  if not results.models:
    return Section("accuracy", "Accuracy by round", [])
  names = {"in domain": results.id_task} | ({"out of domain": f"{len(results.ood_tasks)} tasks"}
                                            if results.ood_tasks else {})
  panels = []
  for (where, tasks), score in zip(names.items(), (results.in_domain, results.out_of_domain), strict=False):
    lines = [figures.accuracy_line(label, (color, marker), [m.round + 1 for m in models], [score(m) for m in models])
             for kind, (color, marker, label) in MODELS.items()
             if (models := [m for m in results.models if m.kind == kind])]
    base = [score(m).value for m in results.models if m.kind == "base"]
    panels.append(Panel(f"{where}: {tasks}", "rounds done", "accuracy", tuple(lines), level=base[0] if base else None,
                        shares=True))
  tasks = (results.id_task, *results.ood_tasks)
  pooled = ["all out of domain"] if len(results.ood_tasks) > 1 else []
  rows = [[m.label, results.in_domain(m), *([results.out_of_domain(m)] if pooled else []),
           *(m.scores[t] for t in results.ood_tasks)] for m in results.models]
  counts = [f"{t}, n={results.models[0].scores[t].n}" for t in tasks]
  head = ["model", counts[0], *pooled, *counts[1:]]
  return Section("accuracy", "Accuracy by round", [
      f"Accuracy with 95 % intervals (Wilson){''.join(f'; {rule}' for rule in list_protocols(results))}. "
      f"In domain is {results.id_task}; the dotted line is the base model.", *list_skipped(results),
      Plot("accuracy", f"Accuracy of the base model, after SFT and after merging by round, {' and '.join(names)}; the "
           "table below has the values", figures.draw, tuple(panels)),
      Table("accuracy", "Accuracy", head, rows), *_other_scores_table(results), *_texts_table(results),
      *_protocols_table(results)])


def _other_scores_table(results: Results) -> list[Table]:
  """Makes a table of further scores of tasks that have several, such as acc_norm."""
  rows = [[m.label, task, name, a] for m in results.models for task, scores in m.other_scores.items()
          for name, a in scores.items()]
  return [Table("beside", "Further figures", ["model", "task", "figure", "value"], rows)] if rows else []


def _texts_table(results: Results) -> list[Table]:
  """Makes a table of the likelihood of texts."""
  rows = [[m.label, text, *(Accuracy(**measures[name], n=measures["n"])
                            for name in ("nats_per_token", "bits_per_byte"))]
          for m in results.models for text, measures in m.texts.items()]
  return [Table("texts", "Likelihood of texts (lower is better), with its 95 % interval over passages",
                ["model", "text", "nats per token", "bits per byte"], rows)] if rows else []


def _protocols_table(results: Results) -> list[Table]:
  """Makes a table of the protocols and lengths of greedy answers, if known."""
  rows = [[m.label, task, a.name, a.shots, a.n, a.mean_tokens, 100 * a.cut]
          for m in results.models for task, a in m.answer_stats.items()]
  head = ["model", "task", "protocol", "worked examples", "answers", "mean tokens", "cut at the limit, %"]
  return [Table("protocol", "Protocols and lengths of answers", head, rows)] if rows else []


def _sampled_section(results: Results) -> Section:
  """Makes the section on pass@k and majority vote, if answers were sampled."""
  if not any(m.sampled for m in results.models):
    return Section("sampled", "Several samples a question", [])
  names = list(dict.fromkeys(name for m in results.models for scores in m.sampled.values() for name in scores))
  rows = [[m.label, task, *(scores.get(name) for name in names)]
          for m in results.models for task, scores in m.sampled.items()]
  last = max(m.round for m in results.models)
  rounds = f"after round {last}" if last >= 0 else "base"
  lines = []
  for m in results.models:
    curve = get_pass_at_k(m, results.id_task)
    if m.kind in MODELS and m.round in (-1, last) and curve:
      color, marker, label = MODELS[m.kind]
      lines.append(figures.accuracy_line(label, (color, marker), list(curve), list(curve.values())))
  plot = [Plot("pass_at_k", "pass@k over k of the base model and of the last round's models; the table below has the "
               "values", figures.draw, (Panel(f"{results.id_task}, {rounds}", "k (samples)", "pass@k",
                                              tuple(lines), log2=True, shares=True),))] if lines else []
  evaluation = results.config.get("eval", {})
  return Section("sampled", "Several samples a question", [
      f"{PASS_AT_K} Of each question {evaluation.get('num_samples', '?')} samples at temperature "
      f"{evaluation.get('temperature', '?')}.",
      *plot, Table("pass_at_k", "pass@k and majority vote", ["model", "task", *names], rows)])


def get_pass_at_k(model: EvaluatedModel, task: str) -> dict[int, Accuracy]:
  """Returns k -> pass@k of a model on a task."""
  return {int(name[5:]): a for name, a in model.sampled.get(task, {}).items() if name.startswith("pass@")}


def _data_section(results: Results) -> Section:
  keys = [key for key in COUNTS if any(row.get(key) for row in results.data)]
  rows = [[row["round"], *(row.get(key) or 0 for key in keys)] for row in results.data]
  return Section("data", "Answers kept and dropped", [Table(
      "data", "Answers by round", ["round", *(COUNTS[key] for key in keys)], rows)] if rows else [])


def _stages_section(results: Results, chunks: Sequence[Chunk]) -> Section:
  tokens: dict[str, int] = {}
  whole = {chunk.name for chunk in chunks}
  for chunk in chunks:
    name = chunk.name.rpartition("/")[0] if "/eval/" in chunk.name else chunk.name
    tokens[name] = tokens.get(name, 0) + chunk.tokens
  rows, longest = [], max([entry.get("seconds", 0) for entry in results.stages.values()], default=0)
  for name, entry in sorted(results.stages.items(), key=lambda item: _stage_order(item[0])):
    duration = entry.get("seconds", 0)
    answers = (results.root / name).glob("*.jsonl") if "eval" in name else ()
    shown = all(str(path.relative_to(results.root)) in whole for path in answers)  # otherwise tokens are unknown
    done = entry["facts"].get("tokens") or (tokens.get(name) if shown else None)
    speed = done / duration if done and duration else None
    rows.append([name, duration, done, speed, entry.get("bytes") or None,
                 *([results.memory.get(name)] if results.memory else [])])
  meters = "".join(f'<div><span>{html.escape(row[0])}</span><meter min="0" max="{longest:g}" value="{row[1]:g}">'
                   f"{row[1]:g} s</meter><span>{row[1]:,.1f} s</span></div>" for row in rows)
  return Section("stages", "Time, tokens and memory by stage", [
      Markup(f'<div class="meters">{meters}</div>'),
      *([NO_MEMORY] * (not results.memory)),
      Table("stages", "Stages; tokens are those sampled or trained on", [
          "stage", "seconds", "tokens", "tokens/s", "bytes written",
          *(["peak memory of a device, GiB"] if results.memory else [])], rows)] if rows else [])


def _stage_order(name: str) -> tuple[int, int, str]:
  """Returns a sort key that orders stages as in a run."""
  head, _, rest = name.partition("/")
  rest = rest if not rest.startswith("eval/sweep_") else "eval/sweep"
  if head == "few_shot.jsonl":
    return -2, 0, name
  kinds = ["samples.jsonl", "train.jsonl", "sft", "eval/sft", "eval/ema", "importance.json", "sweep",
           "base_weight.json", "merged", "eval/merged", "eval/sweep", "analysis.json", "drift.json"]
  number = head.removeprefix("round_")
  return int(number) if number.isdigit() else -1, kinds.index(rest) if rest in kinds else len(kinds), name


def total_seconds(results: Results) -> float:
  """Sums the seconds of all stages of a run."""
  return sum(entry.get("seconds", 0) for entry in results.stages.values())


def describe_devices(results: Results) -> str:
  """Describes the number and kind of a run's devices."""
  names = results.facts.get("devices")
  return f"{len(names)} x {names[0]}" if names else "unknown devices"


def _config_section(results: Results) -> Section:
  rows = [[name, str(version)] for name, version in sorted(results.facts.get("versions", {}).items())]
  return Section("config", "Config and versions", [
      *([Table("versions", f"Versions; devices: {describe_devices(results)}", ["package", "version"], rows)]
        if rows else []),
      Markup(fold_text("The whole config", json.dumps(results.config, indent=1)))])


def fold_text(summary: str, text: str) -> str:
  """Renders a folded text as HTML."""
  return f"<details><summary>{html.escape(summary)}</summary><pre>{html.escape(text)}</pre></details>"
