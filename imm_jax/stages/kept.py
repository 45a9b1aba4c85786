"""Rows of a measure in parts, each of which is kept when it is done: a run that was killed goes on after the last."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from imm_jax import distributed
from imm_jax.sampling.journal import Journal

Row = dict[str, Any]
Item = TypeVar("Item")


def rows(items: Sequence[Item], make: Callable[[Sequence[Item], str], list[Row]], *, size: int, journal: Path | None,
         settings: dict[str, Any], label: str) -> list[Row]:
  """The rows of all items, in order, in every process.

  Which items run together does not depend on what is done already, so the rows have the same bits.

  Args:
    items: what json can write, the same in every process.
    make: gives the rows of some items, in every process; the second argument is for the progress bar.
    size: items of a part.
    journal: a file that gets the rows, a part at a time; a call with the same items and settings goes on from it. None
      keeps nothing.
    settings: what decides the rows beside the items, such as the model's digest; they count on process 0.
    label: what the progress bar says.
  """
  parts = [items[begin:begin + size] for begin in range(0, len(items), size)]
  header = {**settings, "size": size, "items": hashlib.sha256(json.dumps(items).encode()).hexdigest()}
  result: list[Row] = []
  with contextlib.ExitStack() as stack:
    keeps = journal is not None and distributed.is_main()
    kept = stack.enter_context(contextlib.closing(Journal(journal, header, _rows))) if keeps else None
    done = {int(number): of for number, of in distributed.from_main(
        {str(number): of for number, of in kept.done.items()} if kept else {}).items()}
    for number, part in enumerate(parts):
      if number not in done:
        done[number] = make(part, f"{label} ({number + 1} of {len(parts)})" if len(parts) > 1 else label)
        if kept:
          kept.add(number, done[number])
      result += done[number]
  return result


def _rows(value: Any) -> list[Row]:
  return [dict(row) for row in value]
