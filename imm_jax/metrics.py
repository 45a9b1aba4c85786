"""Metrics of a run: `metrics.jsonl` (one JSON object a line) and TensorBoard."""

import json
import time
from pathlib import Path

from imm_jax import distributed, files


class StageMetrics:
  """Metrics of one stage; use as a context manager.

  A stage that is run again (after a kill, say) replaces what its earlier attempt logged from step `keep` on, so that
  the file holds every step once. Process 0 alone writes.
  """

  def __init__(self, root: Path, stage: str, *, keep: int = 0):
    self._stage = stage
    self._file = self._board = None
    if not distributed.is_main():
      return
    path = root / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    kept = [line for line in lines if _kept(line, stage, keep)]
    files.write_text(path, "".join(line + "\n" for line in kept))
    self._file = path.open("a", encoding="utf-8")
    folder = root / "tb" / stage.replace("/", "_")
    if not keep:
      files.remove(folder)
    from tensorboardX import SummaryWriter  # late: it imports torch where torch is installed, which takes seconds

    self._board = SummaryWriter(str(folder), purge_step=keep or None)

  def write(self, step: int, **values: float) -> None:
    """Logs the values of one step."""
    if self._file is None:
      return
    self._file.write(json.dumps({"stage": self._stage, "step": step, "time": round(time.time(), 3), **values}) + "\n")
    self._file.flush()
    for name, value in values.items():
      self._board.add_scalar(name, value, step)

  def __enter__(self) -> "StageMetrics":
    return self

  def __exit__(self, *_: object) -> None:
    if self._file is not None:
      self._file.close()
      self._board.close()


def _kept(line: str, stage: str, keep: int) -> bool:
  try:
    record = json.loads(line)
  except ValueError:  # the last line of a killed process
    return False
  return isinstance(record, dict) and (record.get("stage") != stage or record.get("step", keep) < keep)
