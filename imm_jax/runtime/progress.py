"""Shows progress bars."""

import sys

import jax
from tqdm import tqdm


def make_bar(total: int | None, label: str, unit: str, *, quiet: bool = False, **options: object) -> tqdm:
  """Creates a progress bar on process 0: redrawn every second on a terminal, every 30 seconds elsewhere.

  TQDM_DISABLE=1 in the environment hides all bars.

  Args:
    total: number of items, or None if unknown.
    label: text before the bar.
    unit: name of an item.
    quiet: whether to hide this bar.
    **options: passed on to `tqdm`.
  """
  hidden = {"disable": True} if quiet or jax.process_index() != 0 else {}
  return tqdm(total=total, desc=label, unit=unit, mininterval=1.0 if sys.stderr.isatty() else 30.0, **hidden, **options)
