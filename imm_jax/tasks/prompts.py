"""The prompt template (the paper's appendix A.1): header, worked examples, instruction, response."""

from collections.abc import Sequence

from imm_jax.tasks.base import Example

INSTRUCTION = "### Instruction:"
RESPONSE = "### Response: Let's think step by step."


def build(question: str, *, header: str = "", examples: Sequence[Example] = ()) -> str:
  """The text before a model's answer.

  Args:
    question: the question; it is inserted as it is (braces and odd Unicode pass unharmed).
    header: a line that describes the task, or nothing.
    examples: worked examples shown before the question; training and evaluation use none.

  >>> print(build("What is 1 + 1?"))
  ### Instruction:
  What is 1 + 1?
  <BLANKLINE>
  ### Response: Let's think step by step.
  <BLANKLINE>
  """
  parts = [f"{header}\n\n"] if header else []
  for example in examples:
    parts.append(f"{INSTRUCTION}\n{example.question}\n\n{RESPONSE}\n{example.rationale}\n\n")
  parts.append(f"{INSTRUCTION}\n{question}\n\n{RESPONSE}\n")
  return "".join(parts)
