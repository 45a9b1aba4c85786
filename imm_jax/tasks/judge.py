"""Judges answers in batches such that no model output can hang, crash or slow the run.

Extracting answers and judging numbers and letters takes time linear in the text and is done here. Whether two LaTeX
expressions are mathematically equal is decided by worker processes.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Self

from imm_jax.tasks import answers
from imm_jax.tasks.workers import Workers


class Judge:
  """Judges answers with the help of worker processes, which are started on first use.

  >>> with Judge(workers=1) as judge:
  ...   [v.correct for v in judge.verdicts([("The answer is 7.", "7", "number"),
  ...                                       (r"So \\boxed{2\\sqrt{2}}.", r"\\sqrt{8}", "latex")], strict=True)]
  [True, True]
  """

  def __init__(self, *, workers: int | None = None) -> None:
    """Initializes the judge with a number of worker processes; see `Workers`."""
    self._workers = Workers(workers)

  def verdicts(self, items: Iterable[tuple[str, str, str]], *, strict: bool) -> list[answers.Verdict]:
    """Judges many (text, gold, kind) by `answers.verdict`, in order.

    Raises:
      UserError: if the worker processes cannot start.
      ValueError: for an unknown kind, or a gold answer that is not of its kind.
    """
    judge_item = lambda item: answers.verdict(*item, strict=strict, equal=self._workers.equal)
    with ThreadPoolExecutor(self._workers.count) as pool:
      try:
        return list(pool.map(judge_item, items))
      except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise

  def close(self) -> None:
    """Stops the worker processes."""
    self._workers.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()
