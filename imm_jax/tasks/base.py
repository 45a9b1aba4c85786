"""What a question is."""

from typing import NamedTuple


class Example(NamedTuple):
  """One question of a task.

  Attributes:
    id: unique in its task, stable over runs and sources; sampling keys are derived from it.
    question: the text the model is asked; in multiple choice it ends with the options.
    answer: the gold answer, bare (`42`, `\\frac{1}{2}`, `B`); empty where answers are not judged (mbpp).
    rationale: a worked answer that ends in `The answer is X`, or an empty string where the task has none; for mbpp the
      program.
    kind: how answers are compared: `number`, `latex` or `choice`; empty where they are not.
  """

  id: str
  question: str
  answer: str
  rationale: str
  kind: str
