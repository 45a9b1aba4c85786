"""What ends a run with one line and no traceback, the exit codes, and what is said once."""

import difflib
import enum
import errno
import functools
import re
import sys
from collections.abc import Iterator, Sequence

# Of the items of a list in a message.
_MOST = 50


class UserError(Exception):
  """A mistake in the config, the files or the environment.

  The message says what was wrong, where (file, key, line), and what would be right. The command line tools
  print it as `error: ...` on stderr and exit with code 1 (`exit_code`); library callers catch it like any exception.
  """


class ResourceError(UserError):
  """No mistake, but a want of memory, of room on a disk or of a device; the same may work elsewhere or later."""


class LostError(UserError):
  """Another process of the run is gone; the same command, given to all of them, goes on."""


class PreemptedError(BaseException):
  """A run was told to stop (SIGTERM); the same command goes on from what is saved.

  As KeyboardInterrupt it is no Exception: it may come at any moment, and what goes on after errors must not swallow it.
  """


class Exit(enum.IntEnum):
  """How a command ends, for what supervises it: whether to try again, or to mend something first.

  docs/operations.md explains them. 69, 70 and 75 mean in sysexits.h what they mean here.
  """

  DONE = 0
  MISTAKE = 1  # of the user: flags, config, files; the same command fails again
  RESOURCES = 69  # memory, room on a disk, a device or an answer over the network is wanting
  BUG = 70  # with a traceback
  LOST = 75  # another process of the run is gone: try again
  INTERRUPTED = 130  # Ctrl-C, as of a process that SIGINT ended
  PREEMPTED = 143  # as of a process that SIGTERM ended


# How XLA and jax say that memory or a device is wanting.
_WANTING = re.compile(r"RESOURCE_EXHAUSTED|(?i:out of memory)|Unable to initialize backend")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM)


def exit_code(error: BaseException) -> Exit:
  """The code of a command that an error ends.

  >>> exit_code(UserError("no such file")), exit_code(OSError(errno.ENOSPC, "full")), exit_code(KeyError("x"))
  (<Exit.MISTAKE: 1>, <Exit.RESOURCES: 69>, <Exit.BUG: 70>)
  """
  if isinstance(error, KeyboardInterrupt):
    return Exit.INTERRUPTED
  if isinstance(error, PreemptedError):
    return Exit.PREEMPTED
  if isinstance(error, LostError):
    return Exit.LOST
  if any(map(_is_wanting, _causes(error))):
    return Exit.RESOURCES
  known = isinstance(error, UserError) or (isinstance(error, OSError) and error.filename is not None)
  return Exit.MISTAKE if known else Exit.BUG


def _is_wanting(error: BaseException) -> bool:
  if isinstance(error, OSError) and error.errno in _FULL:
    return True
  return isinstance(error, ResourceError | MemoryError | ConnectionError | TimeoutError) or (
      isinstance(error, RuntimeError) and _WANTING.search(str(error)) is not None)


def _causes(error: BaseException) -> Iterator[BaseException]:
  """An error, and what it was raised from."""
  cause: BaseException | None = error
  while cause is not None:
    yield cause
    cause = cause.__cause__


@functools.cache
def print_once(line: str) -> None:
  """Prints a line on stderr, unless this process has said it before."""
  print(line, file=sys.stderr)


def first_line(error: BaseException) -> str:
  """What an error of another program says, without what follows.

  >>> first_line(OSError("no network\\nmore")), first_line(TimeoutError())
  ('no network', 'TimeoutError')
  """
  return str(error).strip().partition("\n")[0] or type(error).__name__


def suggest(name: str, known: list[str]) -> str:
  """A hint for a mistyped name.

  >>> suggest("base_wieght", ["base_weight", "drop_rate"])
  'did you mean base_weight?'
  """
  close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
  return f"did you mean {close[0]}?" if close else f"expected one of: {', '.join(known)}"


def join_items(items: Sequence[str], separator: str = ", ") -> str:
  """All of them in one line, but for those past the fiftieth.

  >>> join_items(["a", "b"])
  'a, b'
  """
  more = f" and {len(items) - _MOST} more" if len(items) > _MOST else ""
  return separator.join(items[:_MOST]) + more
