"""Writes the page that compares several runs."""

import html
import json
import os
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from imm_jax import files
from imm_jax.errors import join_items
from imm_jax.report import groups, page, side_by_side, writer
from imm_jax.report.groups import Group
from imm_jax.report.markup import Link, Markup, Section, Table
from imm_jax.report.results import Results
from imm_jax.report.samples import MAX_BYTES, Chunk, Packer
from imm_jax.runs import status as run_status


def write(runs: Sequence[Results], out: Path, *, extra: Callable[[Mapping[str, Results]], list[Section]] | None = None,
          ) -> None:
  """Writes index.html, figures and tables of the runs into a folder, which is replaced.

  Args:
    runs: two or more runs.
    out: the folder.
    extra: makes further sections from the runs by name.
  """
  runs_by_name = dict(zip(shorten_paths([run.root for run in runs]), runs, strict=True))
  chunks_by_run, problems = _pack_answers(runs_by_name)
  first, *others = make_sections(runs_by_name, chunks_by_run, out)
  parts = [first, *(extra(runs_by_name) if extra else []), *others]
  problems = [*(f"{name}: {problem}" for name, run in runs_by_name.items() for problem in run.problems), *problems]
  title = f"{len(runs)} runs"
  top = f'<h1>{title}</h1><p class="sentence">{html.escape(_summarize(groups.group_runs(runs_by_name)))}</p>'
  chunks = [chunk for run_chunks in chunks_by_run.values() for chunk in run_chunks]
  text = page.assemble_page(title, top, problems, parts, chunks, writer.Plots().svg(parts))
  with files.write_atomically(out) as folder:
    writer.write(folder, text, parts)


def shorten_paths(roots: Sequence[Path]) -> list[str]:
  """Shortens paths to the shortest suffixes of equal length that distinguish them.

  >>> shorten_paths([Path("/a/x/run"), Path("/a/y/run")]), shorten_paths([Path("/a/imm"), Path("/a/star")])
  (['x/run', 'y/run'], ['imm', 'star'])
  """
  full = [root.resolve().parts for root in roots]
  lengths = range(1, max(map(len, full)) + 1)
  candidates = ([str(Path(*parts[-length:])) for parts in full] for length in lengths)
  return next(ends for ends in candidates if len(set(ends)) == len(ends))


def make_sections(runs: Mapping[str, Results], chunks: Mapping[str, Sequence[Chunk]], out: Path) -> list[Section]:
  """Makes the sections of the page, except for the answers.

  Args:
    runs: runs by name.
    chunks: their packed answers.
    out: folder of the page, from which the runs' own pages are linked.
  """
  tables = [(name, part) for name, run in runs.items() for section in page.make_sections(run, chunks.get(name, ()))
            for part in section.parts if isinstance(part, Table)]

  def join(name: str, caption: str) -> list[Table]:
    """Joins the runs' tables of one name, with the run in the first column; empty if no run has one."""
    same_name = [(run, table) for run, table in tables if table.name == name]
    head = list(dict.fromkeys(column for _, table in same_name for column in table.head))
    rows = []
    for run, table in same_name:
      for row in table.rows:
        cells = dict(zip(table.head, row, strict=True))
        rows.append([run, *map(cells.get, head)])
    return [Table(name, caption, ["run", *head], rows)] if rows else []

  candidates = [*side_by_side.make_sections(runs, join), _runs_section(runs, out),
                _settings_section(runs, join("versions", "Versions"))]
  return [part for part in candidates if part.parts]


def _pack_answers(runs: Mapping[str, Results]) -> tuple[dict[str, list[Chunk]], list[str]]:
  """Packs the answers of each run, dividing the page's capacity evenly; returns them and a list of problems."""
  chunks_by_run, problems, left = {}, [], MAX_BYTES
  for i, (name, run) in enumerate(runs.items()):
    packer = Packer(name)
    chunks_by_run[name], run_problems = packer.chunks(run, max_bytes=left // (len(runs) - i))
    left -= packer.size
    problems += [f"{name}: {problem}" for problem in run_problems]
  return chunks_by_run, problems


def _summarize(grouped: Sequence[Group]) -> str:
  """Summarizes which runs lead, unless they have different tasks."""
  ends = [(group.label, end) for group in grouped if (end := side_by_side.summarize_end(group))]
  if not ends:
    return "No run has finished a round with scores of its base yet."
  if len({(run.id_task, run.ood_tasks) for group in grouped for run in group.runs.values()}) > 1:
    return "The runs differ in their tasks, so that none leads; their figures are below."
  rounds = sorted({end.rounds for _, end in ends})
  in_domain = {label: f"{end.in_domain[0]:.3f}" for label, end in ends}
  out = {label: f"{end.out_of_domain_change[0]:+.3f}".replace("-0.000", "+0.000") for label, end in ends
         if end.out_of_domain_change}
  summary = _describe_leaders(in_domain, "is highest in domain", "are highest in domain", out, "out of domain",
                              "against its base")
  if out:
    summary += "; " + _describe_leaders(out, "keeps most out of domain", "keep most out of domain", in_domain,
                                        "in domain", "")
  of_each = f" of each ({rounds[0]} to {rounds[-1]} rounds done)" if len(rounds) > 1 else ""
  return f"After the last round{of_each} {summary}."


def _describe_leaders(values: Mapping[str, str], one: str, several: str, others: Mapping[str, str], region: str,
                      suffix: str) -> str:
  """Describes who has the largest value, by its printed form, and if that is only one its value in `others`."""
  best = max(values.values(), key=float)
  leaders = [label for label, value in values.items() if value == best]
  detail = f"; {region} {others[leaders[0]]} {suffix}".rstrip() if len(leaders) == 1 and leaders[0] in others else ""
  return f"{join_items(leaders, ' and ')} {one if len(leaders) == 1 else several} ({best}{detail})"


def _runs_section(runs: Mapping[str, Results], out: Path) -> Section:
  """Makes the section on each run's progress, with links to their own pages."""
  rows = []
  for name, run in runs.items():
    status, own = run_status.read(run.root), run.root / "report/index.html"
    done = sum(stage in run.stages for stage in status.plan) if status.plan else len(run.stages)
    stages = f"{done} of {len(status.plan)}" if status.plan else str(done)
    href = urllib.parse.quote(os.path.relpath(own.resolve(), out.resolve()))
    rows.append([Link(name, href) if own.is_file() else name, groups.method_label(run), status.state or "unknown",
                 stages])
  return Section("runs", "The runs", [
      "A run's name links to its own page, as long as neither is moved.",
      Table("runs", "State of each run", ["run", "method", "state", "stages done"], rows)])


def _settings_section(runs: Mapping[str, Results], versions: Sequence[Table]) -> Section:
  """Makes the section on the settings in which the runs differ, versions, and each run's config."""
  flattened = {name: groups.flatten(run.config) for name, run in runs.items()}
  keys = sorted({key for config in flattened.values() for key in config})
  rows: list[list[Any]] = [[key, *(str(config.get(key, "")) for config in flattened.values())] for key in keys
                           if len({repr(config.get(key)) for config in flattened.values()}) > 1]
  configs = "".join(page.fold_text(f"The whole config of {name}", json.dumps(run.config, indent=1))
                    for name, run in runs.items())
  return Section("settings", "Config and versions", [
      *([Table("settings", "Settings that differ", ["key", *runs], rows)] if rows else [
          "The runs have the same settings."]), *versions, Markup(configs)])
