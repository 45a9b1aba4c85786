"""Writes the report of a run, after each of its stages and for `python -m imm_jax.report`."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from imm_jax import files, integrity
from imm_jax.report import page, writer
from imm_jax.report.markup import Section
from imm_jax.report.results import Results
from imm_jax.report.samples import Packer
from imm_jax.runs import status as run_status
from imm_jax.runs.status import Status
from imm_jax.runtime import distributed

# Share of a run's time that its figures and samples may take while it is running.
_MAX_TIME_SHARE = 0.02


class Live:
  """Keeps WORKDIR/report up to date; a context manager around the stages. Only process 0 writes.

  While the run is going on, index.html is written after each stage; figures and samples are updated if they have
  changed and as long as that takes no more than 2 % of the run's time. At the end the whole folder is written.
  """

  def __init__(self, root: Path, plan: Sequence[str]):
    self._root, self._plan = root, tuple(plan)
    self._plots, self._packer = writer.Plots(), Packer()
    self._started, self._spent = time.monotonic(), 0.0
    self._chunks, self._problems = [], []
    self._warned = False

  def update(self, status: Status | None = None) -> None:
    """Writes the page in its current state; errors are only printed as warnings."""
    if not distributed.is_main():
      return
    start = time.monotonic()
    try:
      results = Results.read(self._root)
      includes_figures = status is None and self._spent <= _MAX_TIME_SHARE * (start - self._started)
      if includes_figures:
        self._chunks, self._problems = self._packer.chunks(results)
      parts = page.make_sections(results, self._chunks)
      svgs = self._plots.svg(parts, draw=includes_figures and bool(results.models))
      folder = self._root / "report"
      folder.mkdir(exist_ok=True)
      status = status or Status(self._plan, "running")
      with integrity.rewritten(self._root, "report/index.html"), files.write_atomically(folder / "index.html") as out:
        writer.write_page(out, page.render(results, status, parts, self._chunks, self._problems, svgs,
                                           written=_timestamp(status), renewed=status.state == "running"))
    except Exception as e:  # a long run must not end because of its report
      if not self._warned:
        print(f"warning: the report could not be written ({e!r}); it is tried again after each stage", file=sys.stderr)
      self._warned = True
    self._spent += time.monotonic() - start

  def __enter__(self) -> "Live":
    self.update()
    return self

  def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
    if error is None and distributed.is_main():
      try:
        with integrity.rewritten(self._root, "report"):
          write(self._root, self._root / "report", status=Status(self._plan, "finished"), plots=self._plots,
                packer=self._packer)
      except Exception as e:  # as in `update`; the run is done, and its table is still to be printed
        print(f"warning: the report could not be written ({e!r}); `python -m imm_jax.report --workdirs={self._root}` "
              "writes it", file=sys.stderr)
    elif error is not None:
      self.update(Status(self._plan, *run_status.describe_end(error)))


def write(root: Path, out: Path, *, status: Status | None = None, extra: Sequence[Section] = (),
          plots: writer.Plots | None = None, packer: Packer | None = None) -> Results:
  """Writes the whole report of a run into a folder, which is replaced.

  Args:
    root: the run directory.
    out: the folder.
    status: status of the run; by default as recorded in the directory.
    extra: sections to insert after the first.
    plots: cache of plots.
    packer: cache of packed answers.

  Returns:
    The run's results.
  """
  results = Results.read(root)
  status = status or run_status.read(root)
  chunks, problems = (packer or Packer()).chunks(results)
  first, *others = page.make_sections(results, chunks)
  parts = [first, *extra, *others]
  svgs = (plots or writer.Plots()).svg(parts)
  with files.write_atomically(out) as folder:
    writer.write(folder, page.render(results, status, parts, chunks, problems, svgs, written=_timestamp(status)), parts)
  return results


def _timestamp(status: Status) -> str:
  """Returns the time for the page of a running run; pages of others do not depend on when they are written."""
  return time.strftime("%Y-%m-%d %H:%M:%S %Z") if status.state == "running" else ""
