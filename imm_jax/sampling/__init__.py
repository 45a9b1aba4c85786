"""Sampling of completions.

Each engine is a package that implements `Sampler`: `native/`, this package's decoder on the training devices, and
`vllm/`. Shared code: `completions.py` turns drawn tokens into completions, `journal.py` saves results as they arrive,
`engines.py` maps `config.sampler.kind` to engines.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol


class Prompt(NamedTuple):
  """Holds a text to continue.

  Attributes:
    id: determines the random keys of its samples, together with the seed and the sample number (natively through its
      CRC-32, which two ids share by chance with probability 2^-32).
    text: the text.
    ids: the text's token ids; empty to tokenize it with `encode_prompt`.
  """

  id: str
  text: str
  ids: tuple[int, ...] = ()


class Completion(NamedTuple):
  """Holds one sampled continuation.

  Attributes:
    text: the text without the end-of-text token, cut before a stop string.
    num_tokens: number of generated tokens, including the end-of-text token.
    finish: `stop` (end-of-text token or stop string) or `length`.
  """

  text: str
  num_tokens: int
  finish: str


class Sampler(Protocol):
  """Samples from one model: a checkpoint folder, or (native sampler only) parameters in memory."""

  def generate(self, prompts: Sequence[Prompt], *, max_new_tokens: int, num_samples: int = 1,
               temperatures: Sequence[float] = (0.0,), top_p: float = 1.0, stop: Sequence[str] = (), seed: int = 0,
               label: str = "sample", journal: Path | None = None) -> list[list[Completion]]:
    """Samples `num_samples` completions of every prompt.

    Args:
      prompts: prompts to continue; those with equal ids do not get independent samples.
      max_new_tokens: maximum number of tokens per sample.
      num_samples: completions per prompt.
      temperatures: sample j uses `temperatures[j % len(temperatures)]`; 0 is greedy.
      top_p: probability mass of nucleus sampling.
      stop: a completion ends before the first of these strings; special tokens are matched by their text, such as
        `<|im_end|>`, alone or with other text.
      seed: seed of all samples.
      label: text of the progress bar.
      journal: file that samples are written to as they arrive; a call with the same arguments resumes from it.

    Returns:
      The completions of each prompt, in order; with several processes that share a journal, only on process 0.

    Raises:
      ValueError: for an empty prompt, or an argument out of range.
      UserError: for a prompt with a token id outside of the embedding, or when an engine cannot continue.
    """
