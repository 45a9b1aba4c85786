"""The page of several runs side by side."""

import html
import json
import os
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from imm_jax import files, status as run_status
from imm_jax.errors import listed
from imm_jax.report import groups, page, side_by_side, writer
from imm_jax.report.groups import Group
from imm_jax.report.markup import Link, Markup, Section, Table
from imm_jax.report.results import Results
from imm_jax.report.samples import MOST_BYTES, Chunk, Packer


def write(runs: Sequence[Results], out: Path, *, extra: Callable[[Mapping[str, Results]], list[Section]] | None = None,
          ) -> None:
  """Writes index.html, figures and tables of the runs into a folder, which is replaced.

  Args:
    runs: two or more.
    out: the folder.
    extra: makes further sections of the runs, by name.
  """
  named = dict(zip(names([run.root for run in runs]), runs, strict=True))
  packed, problems = _packed(named)
  first, *others = sections(named, packed, out)
  parts = [first, *(extra(named) if extra else []), *others]
  problems = [*(f"{name}: {problem}" for name, run in named.items() for problem in run.problems), *problems]
  title = f"{len(runs)} runs"
  top = f'<h1>{title}</h1><p class="sentence">{html.escape(_sentence(groups.group(named)))}</p>'
  chunks = [chunk for of_run in packed.values() for chunk in of_run]
  text = page.assemble(title, top, problems, parts, chunks, writer.Plots().svg(parts))
  with files.committed(out) as folder:
    writer.write(folder, text, parts)


def names(roots: Sequence[Path]) -> list[str]:
  """The shortest ends of the paths, no two of which are equal, that tell them apart.

  >>> names([Path("/a/x/run"), Path("/a/y/run")]), names([Path("/a/imm"), Path("/a/star")])
  (['x/run', 'y/run'], ['imm', 'star'])
  """
  full = [root.resolve().parts for root in roots]
  lengths = range(1, max(map(len, full)) + 1)
  found = ([str(Path(*parts[-length:])) for parts in full] for length in lengths)
  return next(ends for ends in found if len(set(ends)) == len(ends))


def sections(runs: Mapping[str, Results], packed: Mapping[str, Sequence[Chunk]], out: Path) -> list[Section]:
  """What stands on the page of these runs, but for their answers.

  Args:
    runs: by name.
    packed: their answers.
    out: the folder of the page, from where links to the runs' own pages go.
  """
  tables = [(name, part) for name, run in runs.items() for section in page.sections(run, packed.get(name, ()))
            for part in section.parts if isinstance(part, Table)]

  def join(name: str, caption: str) -> list[Table]:
    """The tables of one name as one, with the run in the first column; none where no run has one."""
    found = [(run, table) for run, table in tables if table.name == name]
    head = list(dict.fromkeys(column for _, table in found for column in table.head))
    rows = []
    for run, table in found:
      for row in table.rows:
        cells = dict(zip(table.head, row, strict=True))
        rows.append([run, *map(cells.get, head)])
    return [Table(name, caption, ["run", *head], rows)] if rows else []

  found = [*side_by_side.sections(runs, join), _runs(runs, out),
           _settings(runs, join("versions", "Versions"))]
  return [part for part in found if part.parts]


def _packed(runs: Mapping[str, Results]) -> tuple[dict[str, list[Chunk]], list[str]]:
  """The answers of each run, which share the page's room evenly, and what is missing or left out, a line each."""
  found, problems, left = {}, [], MOST_BYTES
  for i, (name, run) in enumerate(runs.items()):
    packer = Packer(name)
    found[name], of_run = packer.chunks(run, most_bytes=left // (len(runs) - i))
    left -= packer.size
    problems += [f"{name}: {problem}" for problem in of_run]
  return found, problems


def _sentence(found: Sequence[Group]) -> str:
  """Who leads; nobody where the runs answer different questions."""
  ends = [(group.label, end) for group in found if (end := side_by_side.end(group))]
  if not ends:
    return "No run has finished a round with scores of its base yet."
  if len({(run.id_task, run.ood_tasks) for group in found for run in group.runs.values()}) > 1:
    return "The runs differ in their tasks, so that none leads; their figures are below."
  rounds = sorted({end.rounds for _, end in ends})
  into = {label: f"{end.into[0]:.3f}" for label, end in ends}
  out = {label: f"{end.out_change[0]:+.3f}".replace("-0.000", "+0.000") for label, end in ends if end.out_change}
  said = _lead(into, "is highest in domain", "are highest in domain", out, "out of domain", "against its base")
  if out:
    said += "; " + _lead(out, "keeps most out of domain", "keep most out of domain", into, "in domain", "")
  of_each = f" of each ({rounds[0]} to {rounds[-1]} rounds done)" if len(rounds) > 1 else ""
  return f"After the last round{of_each} {said}."


def _lead(shown: Mapping[str, str], one: str, several: str, others: Mapping[str, str], where: str, beside: str) -> str:
  """Who has the greatest number, as it is shown, and where it is one what it has in the `others`."""
  best = max(shown.values(), key=float)
  leaders = [label for label, value in shown.items() if value == best]
  also = f"; {where} {others[leaders[0]]} {beside}".rstrip() if len(leaders) == 1 and leaders[0] in others else ""
  return f"{listed(leaders, ' and ')} {one if len(leaders) == 1 else several} ({best}{also})"


def _runs(runs: Mapping[str, Results], out: Path) -> Section:
  """Where each run stands, and where its own page is."""
  rows = []
  for name, run in runs.items():
    status, own = run_status.read(run.root), run.root / "report/index.html"
    done = sum(stage in run.stages for stage in status.plan) if status.plan else len(run.stages)
    stages = f"{done} of {len(status.plan)}" if status.plan else str(done)
    href = urllib.parse.quote(os.path.relpath(own.resolve(), out.resolve()))
    rows.append([Link(name, href) if own.is_file() else name, groups.method(run), status.state or "unknown", stages])
  return Section("runs", "The runs", [
      "A run's name leads to its own page, as long as both stay where they are.",
      Table("runs", "Where each run stands", ["run", "method", "state", "stages done"], rows)])


def _settings(runs: Mapping[str, Results], versions: Sequence[Table]) -> Section:
  """Settings in which the runs differ, versions, and each run's config."""
  flat = {name: groups.flat(run.config) for name, run in runs.items()}
  keys = sorted({key for config in flat.values() for key in config})
  rows: list[list[Any]] = [[key, *(str(config.get(key, "")) for config in flat.values())] for key in keys
                           if len({repr(config.get(key)) for config in flat.values()}) > 1]
  configs = "".join(page.details(f"The whole config of {name}", json.dumps(run.config, indent=1))
                    for name, run in runs.items())
  return Section("settings", "Config and versions", [
      *([Table("settings", "Settings that differ", ["key", *runs], rows)] if rows else [
          "The runs have the same settings."]), *versions, Markup(configs)])
