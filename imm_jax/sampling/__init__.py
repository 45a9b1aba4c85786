"""Sampling: prompts in, completions out.

Engines fulfil `Sampler`, a package each: `native/`, this package's decoder on the devices that train, and `vllm/`. What
they share lies here: `completions.py` says what of the drawn tokens is a completion, `journal.py` keeps what has come,
`engines.py` names the engines for `config.sampler.kind`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol


class Prompt(NamedTuple):
  """A text to continue.

  Attributes:
    id: decides the random keys of its samples, with the seed and the sample's number.
    text: what is continued.
    ids: the token ids of the text, where they are not those that `encode_prompt` gives.
  """

  id: str
  text: str
  ids: tuple[int, ...] = ()


class Completion(NamedTuple):
  """One sampled continuation.

  Attributes:
    text: without the end-of-text token, cut before a stop string.
    num_tokens: that were generated, the end-of-text token included.
    finish: `stop` (end-of-text token or stop string) or `length`.
  """

  text: str
  num_tokens: int
  finish: str


class Sampler(Protocol):
  """What samples from one model: a checkpoint folder, or for the native one parameters in memory."""

  def generate(self, prompts: Sequence[Prompt], *, max_new_tokens: int, num_samples: int = 1,
               temperatures: Sequence[float] = (0.0,), top_p: float = 1.0, stop: Sequence[str] = (), seed: int = 0,
               label: str = "sample", journal: Path | None = None) -> list[list[Completion]]:
    """Samples `num_samples` completions of every prompt.

    Args:
      prompts: ids must differ where independent samples are wanted.
      max_new_tokens: at most this many a sample.
      num_samples: completions of each prompt.
      temperatures: sample j runs at `temperatures[j % len(temperatures)]`; 0 is greedy.
      top_p: sample from the smallest set of tokens that holds this much probability.
      stop: a completion ends before the first of these strings; a special token counts as the text that it stands
        for, such as `<|im_end|>`, alone or with other text.
      seed: of all samples.
      label: what the progress bar says.
      journal: a file that gets the samples as they come; a call with the same arguments goes on from it.

    Returns:
      For each prompt, in order, its completions; on process 0 alone where several processes share a journal.

    Raises:
      ValueError: for a prompt without a token, or an argument out of range.
      UserError: for a prompt with a token that the embedding has no row of, or when an engine cannot go on.
    """
