"""What ends a run with one line and no traceback, and what is said once."""

import difflib
import functools
import sys
from collections.abc import Sequence

# Of the items of a list in a message.
_MOST = 50


class UserError(Exception):
  """A mistake in the config, the files or the environment.

  The message says what was wrong, where (file, key, line), and what would be right. The command line
  tools print it as `error: ...` on stderr and exit with code 1; library callers catch it like any exception.
  """


class PreemptedError(BaseException):
  """A run was told to stop (SIGTERM); the same command goes on from what is saved.

  As KeyboardInterrupt it is no Exception: it may come at any moment, and what goes on after errors must not swallow it.
  """


@functools.cache
def say_once(line: str) -> None:
  """Prints a line on stderr, unless this process has said it before."""
  print(line, file=sys.stderr)


def first_line(error: BaseException) -> str:
  """What an error of another program says, without what follows.

  >>> first_line(OSError("no network\\nmore")), first_line(TimeoutError())
  ('no network', 'TimeoutError')
  """
  return str(error).strip().partition("\n")[0] or type(error).__name__


def nearest(name: str, known: list[str]) -> str:
  """A hint for a mistyped name.

  >>> nearest("base_wieght", ["base_weight", "drop_rate"])
  'did you mean base_weight?'
  """
  close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
  return f"did you mean {close[0]}?" if close else f"expected one of: {', '.join(known)}"


def listed(items: Sequence[str], separator: str = ", ") -> str:
  """All of them in one line, but for those past the fiftieth.

  >>> listed(["a", "b"])
  'a, b'
  """
  more = f" and {len(items) - _MOST} more" if len(items) > _MOST else ""
  return separator.join(items[:_MOST]) + more
