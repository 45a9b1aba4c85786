"""The progress bar of sampling: tokens per second from the first steps on, and an estimate of the remaining tokens."""

from imm_jax import progress


class Progress:
  """Shows the progress of sampling in tokens; use as a context manager.

  Sample lengths are known only as samples end, and short ones end first. The mean length is therefore estimated for
  censored data, as the number of all tokens drawn over the number of ended samples, at most `most`.
  """

  def __init__(self, samples: int, most: int, label: str, *, quiet: bool = False, ended: int = 0, tokens: int = 0):
    """Shows a bar for `samples` of at most `most` tokens, of which `ended` with `tokens` in total are already done."""
    self._samples, self._most, self._ended, self._tokens = samples, most, ended, tokens
    self._bar = progress.bar(None, label, "token", quiet=quiet, initial=tokens)
    self.draw(0)

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *_: object) -> None:
    self._bar.close()

  def end(self, tokens: int) -> None:
    """Records the end of a sample of `tokens` tokens."""
    self._ended += 1
    self._tokens += tokens

  def draw(self, going: int) -> None:
    """Updates the bar; `going` is the number of tokens of samples that have not ended."""
    drawn = self._tokens + going
    self._bar.total = max(drawn, expected(self._samples, self._most, self._ended, drawn))
    self._bar.set_postfix(samples=f"{self._ended}/{self._samples}", refresh=False)
    # The count can decrease when a text is cut at a stop string.
    self._bar.update(max(0, drawn - self._bar.n))


def expected(samples: int, most: int, ended: int, drawn: int) -> int:
  """Estimates the total number of tokens of all samples.

  >>> expected(10, 200, 0, 320), expected(10, 200, 4, 320), expected(10, 200, 10, 700)
  (2000, 800, 700)
  """
  return round(samples * min(most, drawn / ended)) if ended else samples * most
