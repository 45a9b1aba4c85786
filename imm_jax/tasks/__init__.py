"""Tasks by name: questions with gold answers.

`stories` and the other generated families stand in `arithmetic.py`.
"""

from imm_jax.tasks import arithmetic
from imm_jax.tasks.base import Example

NAMES = arithmetic.FAMILIES


def load(name: str, *, split: str, count: int, seed: int) -> list[Example]:
  """The first `count` questions of a task's `train` or `test` split, in the order of the seed.

  Raises:
    KeyError: for a name that is not in `NAMES`.
    ValueError: when the split holds fewer questions.

  >>> [e.kind for e in load("choice", split="test", count=2, seed=0)]
  ['choice', 'choice']
  """
  return arithmetic.generate(name, split=split, count=count, seed=seed)


def is_endless(name: str) -> bool:
  """Whether a task makes as many questions as it is asked for."""
  return name in arithmetic.FAMILIES
