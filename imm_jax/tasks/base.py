"""What a question is."""

from typing import NamedTuple


class Example(NamedTuple):
  """One question of a task.

  Attributes:
    id: unique in its task, stable over runs; sampling keys are derived from it.
    question: the text the model is asked.
    answer: the gold answer, bare (`42`, `B`).
    rationale: a worked answer that ends in `The answer is X`, or an empty string where the task has none.
    kind: how answers are compared: `number` or `choice`.
  """

  id: str
  question: str
  answer: str
  rationale: str
  kind: str
