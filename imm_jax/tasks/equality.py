r"""A process that says whether two LaTeX expressions are equal: `python equality.py`, run by `workers`.

Each line of standard input is a JSON list, gold answer and answer; each line of standard output is `true`, `false`, or
`null` where no verdict was reached: the comparison took too long or too much memory, or its process died. A first line
`ready` says that lines are read. It ends at the end of its input.

Comparing is math-verify's work (SymPy under it), and whether that ends depends on the text: `9^{9^{9^9}}` eats all time
and memory there is. So it runs in a forked child with limits that the kernel holds; a child that dies is forked again
in milliseconds, since everything is imported here. This file imports nothing of the package, so that it starts fast and
holds no thread when it forks.

What becomes of the text (read in math-verify 0.9, latex2sympy2_extended 1.11, SymPy 1.14): an ANTLR grammar parses it,
and SymPy objects are built from the tree. Two ways lead to Python's `eval`: math-verify's reader of plain expressions,
which is not used here, and every number, which goes as text through `sympy.sympify` to `parse_expr`. In its place
stands a reader of number literals. SymPy also writes source of its own and runs it: functions over exponents, which
depend on nothing but the number of variables, and `lambdify`, in numerical solvers. An audit hook ends the child
wherever any other source is compiled, a process is started, a file is removed, or a connection is made.
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

# Seconds of CPU for one comparison (usual: 0.02), and of the clock where the machine is busy.
CPU_SECONDS, SECONDS = 1.0, 3.0
# Bytes of address space for a child.
MEMORY = 1 << 30
_BOXED = [LatexExtractionConfig(boxed_match_priority=0)]
_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,1000}(?:\.[0-9]{0,1000})?|\.[0-9]{1,1000})(?:[eE][+-]?[0-9]{1,3})?")
_REFUSED = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.remove", "os.rename", "pty.spawn", "shutil.",
            "socket.", "subprocess.Popen")


def equal(gold: str, answer: str) -> bool:
  """Whether two expressions are equal; False where one cannot be read."""
  # Their time limits are signals in the main thread, and pass through `except Exception`: the kernel's serve instead.
  read = lambda text: parse(rf"\boxed{{{text}}}", _BOXED, fallback_mode="no_fallback", parsing_timeout=None)
  golds, answers = read(gold), read(answer)
  return bool(golds and answers) and verify(golds, answers, timeout_seconds=None)


def main() -> None:
  logging.disable(logging.CRITICAL)
  # What SymPy imports late, it imports here, with its own reader: some modules read their names with it.
  for gold, answer in (("(x-1)(x+1)", "x^2-1"), (r"\cot x", r"\frac{\cos x}{\sin x}"), ("1, 2", "2, x"),
                       ("(1,2)", "[0,1)"), ("x^2=4", "y=2x"), ("1<x<2", "(1,3)"),
                       (r"\begin{pmatrix}1\end{pmatrix}", "[x,1)"),
                       (r"\binom{n}{2}", r"\frac{n!}{2}"), (r"2\sqrt{2}", r"\sqrt{8}")):
    equal(gold, answer)
  sympy_parser.parse_expr = _read_number
  child = _Child()
  print("ready", flush=True)
  for line in sys.stdin.buffer:
    reply = child.ask(line)
    if reply is None:
      child.end()
      child = _Child()
    print(json.dumps(reply), flush=True)
  child.end()


class _Child:
  """A fork of this process that compares, one line at a time."""

  def __init__(self) -> None:
    questions, self.questions = os.pipe()
    self.replies, replies = os.pipe()
    self.pid = os.fork()
    if self.pid == 0:
      os.close(self.questions)
      os.close(self.replies)
      _compare(questions, replies)
    os.close(questions)
    os.close(replies)

  def ask(self, line: bytes) -> bool | None:
    try:
      while line:
        line = line[os.write(self.questions, line):]
    except BrokenPipeError:
      return None
    # Nothing comes in before the reply has gone out: what is there to read is the end, for the parent has died.
    ready, _, _ = select.select([self.replies, sys.stdin], [], [], SECONDS)
    return {b"1": True, b"0": False}.get(os.read(self.replies, 1)) if self.replies in ready else None

  def end(self) -> None:
    os.kill(self.pid, signal.SIGKILL)
    os.waitpid(self.pid, 0)
    os.close(self.questions)
    os.close(self.replies)


def _compare(questions: int, replies: int) -> NoReturn:
  """The child's life. It ends with its parent, and by the kernel's hand where a limit is passed."""
  if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
  resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
  signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which ends the process
  sys.addaudithook(_refuse)
  try:
    with open(questions, "rb") as lines:
      for line in lines:
        gold, answer = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        try:
          reply = equal(gold, answer)
        except (Exception, RecursionError) as error:
          if isinstance(error, MemoryError):
            break
          reply = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        os.write(replies, b"1" if reply else b"0")
  finally:
    os._exit(0)


def _refuse(event: str, args: tuple) -> None:
  if event == "compile":
    source, name = args[:2]
    if str(name).startswith("<") and not (isinstance(source, bytes) and source.startswith(b"def monomial_")):
      os._exit(1)
  elif event.startswith(_REFUSED):
    os._exit(1)


def _read_number(text: str, *_: object, **__: object) -> sympy.Number:
  """Stands where `parse_expr` stood: reads a number literal and nothing else."""
  if not _NUMBER.fullmatch(text):
    raise sympy.SympifyError(f"no number: {text[:100]!r}")
  return sympy.Integer(text) if text.lstrip("+-").isdecimal() else sympy.Float(text)


if __name__ == "__main__":
  main()
