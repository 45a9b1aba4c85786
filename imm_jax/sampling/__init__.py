"""Sampling: prompts in, completions out."""

from typing import NamedTuple


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
