"""The progress bar of sampling: tokens per second from the first steps on, and an estimate of the remaining tokens."""

from imm_jax.runtime import progress


class Progress:
  """Shows the progress of sampling in tokens; use as a context manager.

  Sample lengths are known only as samples end, and short ones end first. The mean length is therefore estimated for
  censored data, as the number of all tokens drawn over the number of ended samples, at most `max_tokens`.
  """

  def __init__(self, samples: int, max_tokens: int, label: str, *, quiet: bool = False):
    """Shows a bar for samples of at most `max_tokens` tokens each."""
    self._samples, self._max_tokens, self._ended, self._tokens = samples, max_tokens, 0, 0
    self._bar = progress.make_bar(None, label, "token", quiet=quiet)
    self.draw(0)

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *_: object) -> None:
    self._bar.close()

  def end(self, tokens: int) -> None:
    """Records the end of a sample of `tokens` tokens."""
    self._ended += 1
    self._tokens += tokens

  def draw(self, running_tokens: int) -> None:
    """Updates the bar; `running_tokens` is the number of tokens of samples that have not ended."""
    total = self._tokens + running_tokens
    self._bar.total = max(total, expected(self._samples, self._max_tokens, self._ended, total))
    self._bar.set_postfix(samples=f"{self._ended}/{self._samples}", refresh=False)
    # The count can decrease when a text is cut at a stop string.
    self._bar.update(max(0, total - self._bar.n))


def expected(samples: int, max_tokens: int, ended: int, total: int) -> int:
  """Estimates the total number of tokens of all samples.

  >>> expected(10, 200, 0, 320), expected(10, 200, 4, 320), expected(10, 200, 10, 700)
  (2000, 800, 700)
  """
  return round(samples * min(max_tokens, total / ended)) if ended else samples * max_tokens
