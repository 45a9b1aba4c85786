"""The progress bar of every long piece of work."""

import sys

import jax
from tqdm import tqdm


def bar(total: int | None, label: str, unit: str, *, quiet: bool = False, **options: object) -> tqdm:
  """A bar on the first process: drawn every second on a terminal, a line now and then in a log file.

  TQDM_DISABLE=1 in the environment hides all of them.
  """
  hidden = {"disable": True} if quiet or jax.process_index() != 0 else {}
  return tqdm(total=total, desc=label, unit=unit, mininterval=1.0 if sys.stderr.isatty() else 30.0, **hidden, **options)
