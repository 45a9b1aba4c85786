"""SIGTERM and Ctrl-C, answered within seconds whatever a command is doing.

Both raise an exception in the main thread, which ends servers and worker processes on its way out. Where it comes in a
callback of the interpreter, which loses it, it comes again. A thread watches, for Python's handlers wait as long as the
main thread compiles or computes: what has not ended after `GRACE_S`, or is told a second time, is ended at once.
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
# For what is said and written before a process is ended at once: a pipe or a file system may block for ever.
_LAST_CALLS_S = 2.0
# `timeout` and others send the same signal to a process and to its group.
_SAME_S = 1.0
RESUME_HINT = "the same command goes on after what was finished"
_last_calls: list[Callable[[str], None]] = []
_stop_requested = threading.Event()
_interrupt_lost = threading.Event()
_saving = threading.Event()


def install_handlers() -> None:
  """Has this process end by SIGTERM or Ctrl-C as described above, from here on; the main thread calls it once."""
  if threading.current_thread() is not threading.main_thread():  # only that one may handle signals
    return
  read, write = os.pipe()
  os.set_blocking(write, False)
  signal.set_wakeup_fd(write, warn_on_full_buffer=False)
  signal.signal(signal.SIGTERM, _stop)
  plain = sys.unraisablehook

  def hook(lost: "sys.UnraisableHookArgs") -> None:
    if isinstance(lost.exc_value, PreemptedError | KeyboardInterrupt):
      _interrupt_lost.set()
    else:
      plain(lost)

  sys.unraisablehook = hook
  threading.Thread(target=_watch, args=(read,), daemon=True).start()
  atexit.register(_ignore_repeated)


@contextlib.contextmanager
def saving() -> Iterator[None]:
  """For the length of a block, SIGTERM may take longer: a state is being saved."""
  _saving.set()
  try:
    yield
  finally:
    _saving.clear()


@contextlib.contextmanager
def before_forced_end(do: Callable[[str], None]) -> Iterator[None]:
  """For the length of a block: has `do` called, with the reason, before the process is ended at once."""
  _last_calls.append(do)
  try:
    yield
  finally:
    _last_calls.remove(do)


def _ignore_repeated() -> None:
  """Keeps a second SIGTERM from taking the place of the exit code while Python ends: it restores the default action."""
  if _stop_requested.is_set():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _stop(*_: object) -> None:
  if not _stop_requested.is_set():
    _stop_requested.set()
    raise PreemptedError(f"told to stop (SIGTERM); {RESUME_HINT}")


def _watch(read: int) -> None:
  first, since, code, again = 0.0, 0.0, 0, 0
  while True:
    ready, _, _ = select.select([read], [], [], 0.2 if first else None)
    now = time.monotonic()
    for number in os.read(read, 64) if ready else b"":
      if number not in (signal.SIGTERM, signal.SIGINT):
        continue
      if again:
        again -= 1
      elif not first:
        first, since, code = now, now, 128 + number
        if number == signal.SIGTERM:
          how = "what is under way is finished or saved first" if _saving.is_set() else RESUME_HINT
          # In a thread of its own: where stderr blocks, this one has to go on.
          threading.Thread(target=_say, args=(f"SIGTERM: stopping; {how}",), daemon=True).start()
      elif now - first > _SAME_S:
        _end(f"told to stop a second time; {RESUME_HINT}", 128 + number)
    if _interrupt_lost.is_set():
      _interrupt_lost.clear()
      if code:  # else an interrupt that no signal has brought, of which there is nothing to send again
        _stop_requested.clear()
        again += 1
        signal.pthread_kill(threading.main_thread().ident, code - 128)
    if first and _saving.is_set() and code == 128 + signal.SIGTERM:
      since = now
    if first and now - since > GRACE_S:
      _end(f"told to stop, and ended while it was busy; {RESUME_HINT}", code)


def _end(why: str, code: int) -> None:
  late = threading.Timer(_LAST_CALLS_S, os._exit, (code,))
  late.daemon = True
  late.start()
  for do in _last_calls:
    with contextlib.suppress(Exception):
      do(why)
  _say(why)
  os._exit(code)


def _say(line: str) -> None:
  with contextlib.suppress(OSError, ValueError):  # nobody reads it, or it is closed
    print(f"\n{line}", file=sys.stderr, flush=True)
