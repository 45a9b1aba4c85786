"""What a question is."""

from typing import NamedTuple


class Example(NamedTuple):
  """One question of a task.

  Attributes:
    id: unique in its task, stable over runs and sources; sampling keys are derived from it.
    question: the text the model is asked; in multiple choice it ends with the options.
    answer: the gold answer, bare (`42`, `\\frac{1}{2}`, `B`); empty where answers are not judged (mbpp).
    rationale: a worked answer that ends in `The answer is X`, or an empty string where there is none; for mbpp the
      program.
    kind: how answers are compared: `number`, `latex` or `choice`; empty where they are not.
  """

  id: str
  question: str
  answer: str
  rationale: str
  kind: str


class Choice(NamedTuple):
  """One question whose options are scored by their likelihood, in the form of lm-evaluation-harness.

  What acc_norm divides by is the number of characters of an option without its first, the space.

  Attributes:
    id: as the Example of the same question has it.
    contexts: the text before the options: one for all of them, or one for each.
    options: what is scored after its context, with the space before it.
    gold: the index of the right option.
    question: what a reader sees: the Example's question, which ends with the options.
  """

  id: str
  contexts: tuple[str, ...]
  options: tuple[str, ...]
  gold: int
  question: str
