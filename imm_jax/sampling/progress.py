"""The progress bar of sampling: tokens a second from the first steps on, and an estimate of how many are to come."""

from imm_jax import progress


class Progress:
  """Counts tokens; use as a context manager.

  How long samples will be shows only as they end, and short ones end first. So the mean is that of lengths of which
  some are cut off by the present (all tokens drawn, over the samples that ended), at most `most`.
  """

  def __init__(self, samples: int, most: int, label: str, *, quiet: bool = False, ended: int = 0, tokens: int = 0):
    """Shows a bar of `samples` of at most `most` tokens each, of which some `ended` before, with so many `tokens`."""
    self._samples, self._most, self._ended, self._tokens = samples, most, ended, tokens
    self._bar = progress.bar(None, label, "token", quiet=quiet, initial=tokens)
    self.draw(0)

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *_: object) -> None:
    self._bar.close()

  def end(self, tokens: int) -> None:
    """Counts a sample that ended with so many tokens."""
    self._ended += 1
    self._tokens += tokens

  def draw(self, going: int) -> None:
    """Shows what has come, `going` tokens of samples that have not ended."""
    drawn = self._tokens + going
    self._bar.total = max(drawn, expected(self._samples, self._most, self._ended, drawn))
    self._bar.set_postfix(samples=f"{self._ended}/{self._samples}", refresh=False)
    # A text that was cut before its end takes tokens back.
    self._bar.update(max(0, drawn - self._bar.n))


def expected(samples: int, most: int, ended: int, drawn: int) -> int:
  """Tokens that all samples will probably have.

  >>> expected(10, 200, 0, 320), expected(10, 200, 4, 320), expected(10, 200, 10, 700)
  (2000, 800, 700)
  """
  return round(samples * min(most, drawn / ended)) if ended else samples * most
