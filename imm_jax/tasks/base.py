"""The records of questions."""

from typing import NamedTuple


class Example(NamedTuple):
  """Holds one question of a task.

  Attributes:
    id: unique in its task, stable across runs and sources; sampling keys are derived from it.
    question: text of the question; in multiple choice it ends with the options.
    answer: the bare gold answer (`42`, `\\frac{1}{2}`, `B`); empty if answers are not judged (mbpp).
    rationale: a worked answer that ends in `The answer is X`, or an empty string if there is none; for mbpp the
      program.
    kind: how answers are compared: `number`, `latex` or `choice`; empty if they are not.
  """

  id: str
  question: str
  answer: str
  rationale: str
  kind: str


class Choice(NamedTuple):
  """Holds one question whose options are scored by their likelihood, in the form of lm-evaluation-harness.

  acc_norm divides by the number of characters of an option without the leading space.

  Attributes:
    id: the id of the Example of the same question.
    contexts: the text before the options: one for all of them, or one for each.
    options: texts to score after their context, with a leading space.
    gold: index of the right option.
    question: the Example's question, which ends with the options, for readers.
  """

  id: str
  contexts: tuple[str, ...]
  options: tuple[str, ...]
  gold: int
  question: str
