r"""A program that tells whether two LaTeX expressions are equal: `python equality.py`, started by `workers`.

Each line of standard input is a JSON list, gold answer and answer; each line of standard output is `true`, `false`, or
`null` if no verdict was reached because the comparison took too long or too much memory, or its process died. A first
line `ready` signals that input is accepted. The program ends with its input.

Comparison is done by math-verify (on SymPy), which may not terminate: `9^{9^{9^9}}` uses up all time and memory. So it
runs in a forked child under limits enforced by the kernel; a child that dies is replaced within milliseconds, since all
modules are already imported. This file imports nothing from the package, so that it starts fast and has no threads when
it forks.

How the text is processed (as read in math-verify 0.9, latex2sympy2_extended 1.11, SymPy 1.14): an ANTLR grammar parses
it, and SymPy objects are built from the tree. Two paths lead to Python's `eval`: math-verify's parser of plain
expressions, which is not used here, and every number, which `sympy.sympify` passes as text to `parse_expr`. That is
replaced by a parser of number literals. SymPy also generates and runs source itself: functions over exponents, which
depend only on the number of variables, and `lambdify`, in numerical solvers. An audit hook kills the child if any other
source is compiled, a process is started, a file is removed, or a connection is made.
"""

import ctypes
import json
import logging
import os
import re
import resource
import select
import signal
import sys
from typing import NoReturn

import sympy
from math_verify import LatexExtractionConfig, parse, verify
from sympy.parsing import sympy_parser

# Limits for one comparison in seconds of CPU time (usually 0.02) and, for busy machines, of wall time.
CPU_SECONDS, SECONDS = 1.0, 3.0
# Bytes of address space for a child.
MEMORY = 1 << 30
_BOXED = [LatexExtractionConfig(boxed_match_priority=0)]
_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,1000}(?:\.[0-9]{0,1000})?|\.[0-9]{1,1000})(?:[eE][+-]?[0-9]{1,3})?")
_REFUSED_EVENTS = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.remove", "os.rename", "pty.spawn",
                   "shutil.", "socket.", "subprocess.Popen")


def are_equal(gold: str, answer: str) -> bool:
  """Returns whether two expressions are equal; False if one cannot be parsed."""
  # math-verify's own time limits are signals that `except Exception` may swallow; the kernel's limits replace them.
  parse_boxed = lambda text: parse(rf"\boxed{{{text}}}", _BOXED, fallback_mode="no_fallback", parsing_timeout=None)
  golds, answers = parse_boxed(gold), parse_boxed(answer)
  return bool(golds and answers) and verify(golds, answers, timeout_seconds=None)


def main() -> None:
  """Answers the requests on standard input."""
  logging.disable(logging.CRITICAL)
  # Trigger SymPy's lazy imports while its own parser is in place, which some modules use to define their names.
  for gold, answer in (("(x-1)(x+1)", "x^2-1"), (r"\cot x", r"\frac{\cos x}{\sin x}"), ("1, 2", "2, x"),
                       ("(1,2)", "[0,1)"), ("x^2=4", "y=2x"), ("1<x<2", "(1,3)"),
                       (r"\begin{pmatrix}1\end{pmatrix}", "[x,1)"),
                       (r"\binom{n}{2}", r"\frac{n!}{2}"), (r"2\sqrt{2}", r"\sqrt{8}")):
    are_equal(gold, answer)
  sympy_parser.parse_expr = _parse_number
  child = _Child()
  print("ready", flush=True)
  for request in sys.stdin.buffer:
    reply = child.compare(request)
    if reply is None:
      child.end()
      child = _Child()
    print(json.dumps(reply), flush=True)
  child.end()


class _Child:
  """Runs a fork of this process that compares one pair at a time."""

  def __init__(self) -> None:
    requests, self.requests = os.pipe()
    self.replies, replies = os.pipe()
    self.pid = os.fork()
    if self.pid == 0:
      os.close(self.requests)
      os.close(self.replies)
      _run_child(requests, replies)
    os.close(requests)
    os.close(replies)

  def compare(self, request: bytes) -> bool | None:
    try:
      while request:
        request = request[os.write(self.requests, request):]
    except BrokenPipeError:
      return None
    # No request comes before the reply to the last one, so if stdin is readable it is at its end: the parent has died.
    ready, _, _ = select.select([self.replies, sys.stdin], [], [], SECONDS)
    return {b"1": True, b"0": False}.get(os.read(self.replies, 1)) if self.replies in ready else None

  def end(self) -> None:
    os.kill(self.pid, signal.SIGKILL)
    os.waitpid(self.pid, 0)
    os.close(self.requests)
    os.close(self.replies)


def _run_child(requests: int, replies: int) -> NoReturn:
  """Runs the child, which ends with its parent, or is killed by the kernel if it exceeds a limit."""
  if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
  resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
  signal.signal(signal.SIGPROF, signal.SIG_DFL)  # terminates the process
  sys.addaudithook(_audit)
  try:
    with open(requests, "rb") as lines:
      for request in lines:
        gold, answer = json.loads(request)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        try:
          reply = are_equal(gold, answer)
        except (Exception, RecursionError) as error:
          if isinstance(error, MemoryError):
            break
          reply = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        os.write(replies, b"1" if reply else b"0")
  finally:
    os._exit(0)


def _audit(event: str, args: tuple) -> None:
  if event == "compile":
    source, name = args[:2]
    if str(name).startswith("<") and not (isinstance(source, bytes) and source.startswith(b"def monomial_")):
      os._exit(1)
  elif event.startswith(_REFUSED_EVENTS):
    os._exit(1)


def _parse_number(text: str, *_: object, **__: object) -> sympy.Number:
  """Parses a number literal and nothing else; replaces SymPy's `parse_expr`."""
  if not _NUMBER.fullmatch(text):
    raise sympy.SympifyError(f"no number: {text[:100]!r}")
  return sympy.Integer(text) if text.lstrip("+-").isdecimal() else sympy.Float(text)


if __name__ == "__main__":
  main()
