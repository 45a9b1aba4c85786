"""The report of a run: written again after each stage, and by `python -m imm_jax.report`."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from imm_jax import distributed, files, status as run_status
from imm_jax.report import page, writer
from imm_jax.report.markup import Section
from imm_jax.report.results import Results
from imm_jax.report.samples import Packer
from imm_jax.status import Status

# Of a run's time that its figures and samples may take while it goes on.
_SHARE = 0.02


class Live:
  """Keeps WORKDIR/report up to date; use as a context manager around the stages. Process 0 alone writes.

  While the run goes on, index.html is written after each stage, its figures and samples as far as they have changed and
  only while that takes 2 % of the run's time; at the end the whole folder is.
  """

  def __init__(self, root: Path, plan: Sequence[str]):
    self._root, self._plan = root, tuple(plan)
    self._plots, self._packer = writer.Plots(), Packer()
    self._started, self._spent = time.monotonic(), 0.0
    self._chunks, self._problems = [], []
    self._warned = False

  def update(self, status: Status | None = None) -> None:
    """Writes the page as things stand; what goes wrong here is a warning, and the run goes on."""
    if not distributed.is_main():
      return
    began = time.monotonic()
    try:
      results = Results.of(self._root)
      heavy = status is None and self._spent <= _SHARE * (began - self._started)
      if heavy:
        self._chunks, self._problems = self._packer.chunks(results)
      parts = page.sections(results, self._chunks)
      drawn = self._plots.svg(parts, draw=heavy and bool(results.models))
      folder = self._root / "report"
      folder.mkdir(exist_ok=True)
      status = status or Status(self._plan, "running")
      with files.committed(folder / "index.html") as out:
        writer.write_page(out, page.write(results, status, parts, self._chunks, self._problems, drawn,
                                          written=_now(status), renewed=status.state == "running"))
    except Exception as e:  # a run of days does not end over its report
      if not self._warned:
        print(f"warning: the report could not be written ({e!r}); it is tried again after each stage", file=sys.stderr)
      self._warned = True
    self._spent += time.monotonic() - began

  def __enter__(self) -> "Live":
    self.update()
    return self

  def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
    if error is None and distributed.is_main():
      try:
        write(self._root, self._root / "report", status=Status(self._plan, "finished"), plots=self._plots,
              packer=self._packer)
      except Exception as e:  # as in `update`: the run is done, and its table is still to be printed
        print(f"warning: the report could not be written ({e!r}); `python -m imm_jax.report --workdirs={self._root}` "
              "writes it", file=sys.stderr)
    elif error is not None:
      self.update(Status(self._plan, *run_status.ended(error)))


def write(root: Path, out: Path, *, status: Status | None = None, extra: Sequence[Section] = (),
          plots: writer.Plots | None = None, packer: Packer | None = None) -> Results:
  """Writes the whole report of a run into a folder, which is replaced.

  Args:
    root: the run directory.
    out: the folder.
    status: where the run stands; without it, as found in the directory.
    extra: sections that stand after the run's first.
    plots: that hold what is drawn already.
    packer: that holds what is packed already.

  Returns:
    What was read.
  """
  results = Results.of(root)
  status = status or run_status.read(root)
  chunks, problems = (packer or Packer()).chunks(results)
  first, *others = page.sections(results, chunks)
  parts = [first, *extra, *others]
  drawn = (plots or writer.Plots()).svg(parts)
  with files.committed(out) as folder:
    writer.write(folder, page.write(results, status, parts, chunks, problems, drawn, written=_now(status)), parts)
  return results


def _now(status: Status) -> str:
  """The time, for the page of a run that goes on; of others a page does not depend on when it was written."""
  return time.strftime("%Y-%m-%d %H:%M:%S %Z") if status.state == "running" else ""
