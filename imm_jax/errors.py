"""Errors that end a command with one line and no traceback, the exit codes, and helpers for messages."""

import difflib
import enum
import errno
import functools
import re
import sys
from collections.abc import Iterator, Sequence

# Number of items that a message lists.
_MAX_ITEMS = 50


class UserError(Exception):
  """Reports a mistake in the config, the files or the environment.

  The message says what is wrong, where (file, key, line), and what would be right. Commands print it as `error: ...` on
  stderr and exit with the code that `exit_code` gives; callers of the package catch it like any exception.
  """


class ResourceError(UserError):
  """Reports a lack of memory, disk space, a device or a network; the same command may work elsewhere or later."""


class LostError(UserError):
  """Reports that another process of the run ended; the same command, given to all processes, continues the run."""


class PreemptedError(BaseException):
  """Ends a run after SIGTERM; the same command continues it from what is saved.

  Like KeyboardInterrupt it is no Exception: it may be raised anywhere, and code that goes on after an Exception must
  not catch it.
  """


class Exit(enum.IntEnum):
  """Lists the exit codes of the commands, from which a supervisor learns whether to try again.

  docs/operations.md explains them. 69, 70 and 75 have the meaning that sysexits.h gives them.
  """

  DONE = 0
  MISTAKE = 1  # the user's, in flags, config or files; the same command fails again
  UNCHECKED = 2  # nothing that could be checked is wrong, but some files could not
  RESOURCES = 69  # a lack of memory, disk space, a device or a network
  BUG = 70  # a defect of the program; printed with its traceback
  LOST = 75  # another process of the run ended: try again
  INTERRUPTED = 130  # Ctrl-C; the code of a process that SIGINT ends
  PREEMPTED = 143  # the code of a process that SIGTERM ends


# Messages of XLA and jax that mean a lack of memory or of a device.
_LACKING = re.compile(r"RESOURCE_EXHAUSTED|(?i:out of memory)|Unable to initialize backend")
_LACKING_ERRNO = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM)


def exit_code(error: BaseException) -> Exit:
  """Returns the exit code of a command that an error ends.

  >>> exit_code(UserError("no such file")), exit_code(OSError(errno.ENOSPC, "full")), exit_code(KeyError("x"))
  (<Exit.MISTAKE: 1>, <Exit.RESOURCES: 69>, <Exit.BUG: 70>)
  """
  if isinstance(error, KeyboardInterrupt):
    return Exit.INTERRUPTED
  if isinstance(error, PreemptedError):
    return Exit.PREEMPTED
  if isinstance(error, LostError):
    return Exit.LOST
  if any(map(_is_lack, _causes(error))):
    return Exit.RESOURCES
  known = isinstance(error, UserError) or (isinstance(error, OSError) and error.filename is not None)
  return Exit.MISTAKE if known else Exit.BUG


def _is_lack(error: BaseException) -> bool:
  """Returns whether an error means a lack of memory, disk space, a device or a network."""
  if isinstance(error, OSError) and error.errno in _LACKING_ERRNO:
    return True
  return isinstance(error, ResourceError | MemoryError | ConnectionError | TimeoutError) or (
      isinstance(error, RuntimeError) and _LACKING.search(str(error)) is not None)


def _causes(error: BaseException) -> Iterator[BaseException]:
  """Yields an error and those that it was raised from."""
  cause: BaseException | None = error
  while cause is not None:
    yield cause
    cause = cause.__cause__


@functools.cache
def print_once(line: str) -> None:
  """Prints a line on stderr, unless this process has printed it before."""
  print(line, file=sys.stderr)


def first_line(error: BaseException) -> str:
  """Returns the first line of an error's message, or the error's type if the message is empty.

  >>> first_line(OSError("no network\\nmore")), first_line(TimeoutError())
  ('no network', 'TimeoutError')
  """
  return str(error).strip().partition("\n")[0] or type(error).__name__


def suggest(name: str, known: Sequence[str]) -> str:
  """Returns a hint for a mistyped name: the most similar of the known names, or all of them.

  >>> suggest("base_wieght", ["base_weight", "drop_rate"])
  'did you mean base_weight?'
  """
  close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
  return f"did you mean {close[0]}?" if close else f"expected one of: {', '.join(known)}"


def join_items(items: Sequence[str], separator: str = ", ") -> str:
  """Joins the items of a message into one line; counts those after the fiftieth instead of listing them.

  >>> join_items(["a", "b"])
  'a, b'
  """
  more = f" and {len(items) - _MAX_ITEMS} more" if len(items) > _MAX_ITEMS else ""
  return separator.join(items[:_MAX_ITEMS]) + more
