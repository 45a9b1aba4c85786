"""`index.html`: one page that works from disk, with the curves and the tables."""

import html
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING

from imm_jax.report.results import Results, figure, skipped

if TYPE_CHECKING:
  from matplotlib.figure import Figure

# Okabe-Ito: told apart by colour-blind readers; markers differ as well, for print.
_STYLES = {"base": ("#000000", "s"), "sft": ("#D55E00", "o"), "merged": ("#0072B2", "^")}
_NAMES = {"base": "base model", "sft": "after SFT", "merged": "after merging"}

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}svg{width:100%;height:auto}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .75rem;text-align:right;border-bottom:1px solid #ddd;white-space:nowrap}
th:first-child,td:first-child{text-align:left}small{color:#555}
pre{background:#f5f5f5;padding:1rem;overflow-x:auto;font-size:.85rem}
"""


def write(results: Results, out: Path) -> None:
  """Writes index.html and accuracy.png into a new folder; the same results give the same bytes."""
  import matplotlib  # late: only the last step of a run needs it

  out.mkdir(parents=True)
  figure = _curves(results)
  figure.savefig(out / "accuracy.png", dpi=150, metadata={"Software": None})
  image = io.StringIO()
  with matplotlib.rc_context({"svg.hashsalt": "imm_jax", "svg.fonttype": "none"}):
    figure.savefig(image, format="svg", metadata={"Date": None, "Creator": None})
  svg = image.getvalue()
  (out / "index.html").write_text(_page(results, svg[svg.index("<svg"):]))


def _curves(results: Results) -> "Figure":
  """ID and OOD accuracy by round, with 95 % intervals."""
  from matplotlib.figure import Figure
  from matplotlib.ticker import MaxNLocator

  panels = [(f"in domain: {results.id_task}", results.in_domain)]
  if results.ood_tasks:
    panels.append((f"out of domain: {len(results.ood_tasks)} tasks", results.out_of_domain))
  figure = Figure(figsize=(4.6 * len(panels), 3.6), layout="constrained")
  for axes, (title, score) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
    for kind, (colour, marker) in _STYLES.items():
      points = [(m.round + 1, score(m)) for m in results.models if m.kind == kind]
      if points:
        rounds, scores = zip(*points, strict=True)
        values = [s.value for s in scores]
        error = [[s.value - s.low for s in scores], [s.high - s.value for s in scores]]
        axes.errorbar(rounds, values, yerr=error, color=colour, marker=marker, capsize=3, label=_NAMES[kind])
        if kind == "base":
          axes.axhline(values[0], color=colour, linestyle=":", linewidth=1)
    axes.set(title=title, xlabel="rounds done", ylabel="accuracy", ylim=(-0.02, 1.02))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
  return figure


def _page(results: Results, svg: str) -> str:
  first, last = results.models[0], results.models[-1]
  sentences = [f"ID {results.in_domain(first).value:.3f} → {results.in_domain(last).value:.3f}"]
  if results.ood_tasks:
    sentences.append(f"OOD {results.out_of_domain(first).value:.3f} → {results.out_of_domain(last).value:.3f}")
  tasks = (results.id_task, *results.ood_tasks)
  scores = _table(["model", *(f"{task}, n={first.scores[task].n}" for task in tasks)], [
      [m.label, *(f"{m.scores[t].value:.3f} <small>[{m.scores[t].low:.3f}, {m.scores[t].high:.3f}]</small>"
                  for t in tasks)] for m in results.models])
  keys = sorted({key for row in results.data for key in row} - {"round"})
  data = _table(["round", *keys], [[str(row["round"]), *(str(row.get(k, "")) for k in keys)] for row in results.data])
  return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>imm_jax: {html.escape(results.method)}</title><style>{_STYLE}</style></head><body>
<h1>{html.escape(results.method)}, base → {html.escape(last.label)}: {"; ".join(sentences)}</h1>
{svg}
<h2>Accuracy</h2>
<p>Greedy, zero-shot; 95 % intervals (Wilson). {html.escape(". ".join(skipped(results)))}</p>
<div class="scroll">{scores}</div>
{_samples(results)}
<h2>Training data</h2><div class="scroll">{data}</div>
<h2>Config</h2><pre>{html.escape(json.dumps(results.config, indent=1))}</pre>
</body></html>
"""


def _samples(results: Results) -> str:
  """pass@k and majority vote, where answers were sampled."""
  names = list(dict.fromkeys(name for m in results.models for found in m.sampled.values() for name in found))
  rows = [[html.escape(f"{m.label}, {task}"), *(figure(found[name]) for name in names)]
          for m in results.models for task, found in m.sampled.items()]
  return f'<h2>Sampled answers</h2><div class="scroll">{_table(["model", *names], rows)}</div>' if rows else ""


def _table(head: list[str], rows: list[list[str]]) -> str:
  cells = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
  return f"<table><tr>{''.join(f'<th>{html.escape(h)}</th>' for h in head)}</tr>{cells}</table>"
