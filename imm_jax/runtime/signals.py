"""Ends the process within seconds after SIGTERM or Ctrl-C, whatever a command is doing.

Both signals raise an exception in the main thread, which ends servers and worker processes while it unwinds. If it is
raised in a callback whose exceptions the interpreter drops, the signal is sent again. Python only runs handlers when
the main thread returns from compiled code, so a second thread watches: a process that has not ended after `GRACE_S`, or
gets a second signal, is ended at once.
"""

import atexit
import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

from imm_jax.errors import PreemptedError

GRACE_S = 15.0
# Time limit for the last writes before a process is ended at once, since a pipe or a file system may block for ever.
_LAST_CALLS_S = 2.0
# Signals within this time count as one: `timeout` and others send the same signal to a process and to its group.
_SAME_SIGNAL_S = 1.0
_RESUMES = "repeat the command to resume"
_STARTS_ANEW = "repeat the command to start over"
_hint = _RESUMES
_last_calls: list[Callable[[str], None]] = []
_stop_requested = threading.Event()
_interrupt_lost = threading.Event()
_saving = threading.Event()


def install_handlers(*, resumes: bool = True) -> None:
  """Installs the handlers of SIGTERM and Ctrl-C that the module describes; call it once, in the main thread.

  Args:
    resumes: whether the same command resumes, which the message of a stop says.
  """
  global _hint
  _hint = _RESUMES if resumes else _STARTS_ANEW
  if threading.current_thread() is not threading.main_thread():  # Python allows handlers only there
    return
  read, write = os.pipe()
  os.set_blocking(write, False)
  signal.set_wakeup_fd(write, warn_on_full_buffer=False)
  signal.signal(signal.SIGTERM, _stop)
  if signal.getsignal(signal.SIGINT) is _end_at_once:
    signal.signal(signal.SIGINT, signal.default_int_handler)
  original = sys.unraisablehook

  def hook(dropped: "sys.UnraisableHookArgs") -> None:
    if isinstance(dropped.exc_value, PreemptedError | KeyboardInterrupt):
      _interrupt_lost.set()
    else:
      original(dropped)

  sys.unraisablehook = hook
  threading.Thread(target=_watch, args=(read,), daemon=True).start()
  atexit.register(_ignore_repeated)


def end_on_interrupt() -> None:
  """Has Ctrl-C end the process at once, with one line, until `install_handlers` is called.

  While modules are imported an exception would come out as the error of whichever is being imported. A SIGINT that is
  ignored, as in a job in the background, stays so.
  """
  if threading.current_thread() is threading.main_thread() and (
      signal.getsignal(signal.SIGINT) is signal.default_int_handler):
    signal.signal(signal.SIGINT, _end_at_once)


def resume_hint() -> str:
  """Returns what the same command does after this process was terminated by a signal."""
  return _hint


@contextlib.contextmanager
def allow_saving() -> Iterator[None]:
  """Suspends the time limit after SIGTERM for the length of a block that saves a training state."""
  _saving.set()
  try:
    yield
  finally:
    _saving.clear()


@contextlib.contextmanager
def call_before_exit(callback: Callable[[str], None]) -> Iterator[None]:
  """Registers, for the length of a block, a callback that gets the reason before the process is ended at once."""
  _last_calls.append(callback)
  try:
    yield
  finally:
    _last_calls.remove(callback)


def _end_at_once(*_: object) -> None:
  with contextlib.suppress(OSError):
    os.write(2, b"\ninterrupted\n")
  os._exit(128 + signal.SIGINT)


def _ignore_repeated() -> None:
  """Ignores SIGTERM while Python ends: it restores the default action, which would replace the exit code."""
  if _stop_requested.is_set():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _stop(*_: object) -> None:
  if not _stop_requested.is_set():
    _stop_requested.set()
    raise PreemptedError(f"terminated by SIGTERM; {_hint}")


def _watch(read: int) -> None:
  first, grace_start, code, num_resent = 0.0, 0.0, 0, 0
  while True:
    ready, _, _ = select.select([read], [], [], 0.2 if first else None)
    now = time.monotonic()
    for number in os.read(read, 64) if ready else b"":
      if number not in (signal.SIGTERM, signal.SIGINT):
        continue
      if num_resent:
        num_resent -= 1
      elif not first:
        first, grace_start, code = now, now, 128 + number
        if number == signal.SIGTERM:
          hint = "what is under way is finished or saved first" if _saving.is_set() else _hint
          # Printed in another thread, because this one has to go on if stderr blocks.
          threading.Thread(target=_print, args=(f"SIGTERM: stopping; {hint}",), daemon=True).start()
      elif now - first > _SAME_SIGNAL_S:
        _end(f"terminated by a second {signal.Signals(number).name}; {_hint}", 128 + number)
    if _interrupt_lost.is_set():
      _interrupt_lost.clear()
      ident = threading.main_thread().ident
      if code and ident:  # without a signal, the interrupt came from elsewhere and there is nothing to send again
        _stop_requested.clear()
        num_resent += 1
        signal.pthread_kill(ident, code - 128)
    if first and _saving.is_set() and code == 128 + signal.SIGTERM:
      grace_start = now
    if first and now - grace_start > GRACE_S:
      _end(f"terminated by {signal.Signals(code - 128).name} while it was busy; {_hint}", code)


def _end(reason: str, code: int) -> None:
  timer = threading.Timer(_LAST_CALLS_S, os._exit, (code,))
  timer.daemon = True
  timer.start()
  for callback in _last_calls:
    with contextlib.suppress(Exception):
      callback(reason)
  _print(reason)
  os._exit(code)


def _print(line: str) -> None:
  with contextlib.suppress(OSError, ValueError):  # stderr is a pipe without a reader, or closed
    print(f"\n{line}", file=sys.stderr, flush=True)
