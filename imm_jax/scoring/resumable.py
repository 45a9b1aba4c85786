"""Computes rows in parts that are saved when done, so that a killed run resumes after the last one."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from imm_jax import files
from imm_jax.files import Row
from imm_jax.runtime import distributed
from imm_jax.sampling.journal import Journal

Item = TypeVar("Item")


def compute_rows(items: Sequence[Item], make: Callable[[Sequence[Item], str], list[Row]], *, size: int,
                 journal: Path | None, settings: dict[str, Any], label: str) -> list[Row]:
  """Computes the rows of all items, in order, in every process.

  Which items run together does not depend on what is already done, so that rows are bitwise reproducible.

  Args:
    items: JSON-serializable items, the same in every process.
    make: function (items, label) -> rows of some items, called in every process; the label is for the progress bar.
    size: number of items in a part.
    journal: file that rows are written to, a part at a time; a call with the same items and settings resumes from it.
      None saves nothing.
    settings: everything else that determines the rows, such as the model's digest; used on process 0.
    label: text of the progress bar.
  """
  parts = [items[begin:begin + size] for begin in range(0, len(items), size)]
  header = {**settings, "size": size, "items": files.digest_json(items)}
  result: list[Row] = []
  with contextlib.ExitStack() as stack:
    saves = journal is not None and distributed.is_main()
    saved = stack.enter_context(contextlib.closing(Journal(journal, header, _rows))) if saves else None
    done = {int(number): rows for number, rows in distributed.broadcast(
        {str(number): rows for number, rows in saved.done.items()} if saved else {}).items()}
    for number, part in enumerate(parts):
      if number not in done:
        done[number] = make(part, f"{label} ({number + 1} of {len(parts)})" if len(parts) > 1 else label)
        if saved:
          saved.add(number, done[number])
      result += done[number]
  return result


def _rows(value: Any) -> list[Row]:
  return [dict(row) for row in value]
