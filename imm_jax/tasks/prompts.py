"""The text before a model's answer: the paper's template (appendix A.1), or the chat template of an instruct model."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from imm_jax.errors import UserError, nearest
from imm_jax.tasks.base import Example

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

INSTRUCTION = "### Instruction:"
_STEPS = "Let's think step by step."
RESPONSE = f"### Response: {_STEPS}"
STYLES = ("plain", "chat")


def build(question: str, *, header: str = "", examples: Sequence[Example] = (), style: str = "plain",
          tokenizer: "PreTrainedTokenizerBase | None" = None) -> str:
  """The text before a model's answer; every text is inserted as it is (braces and odd Unicode pass unharmed).

  Args:
    question: the question.
    header: a line that describes the task, or nothing; in a chat it begins the first message.
    examples: worked examples shown before the question, in a chat as earlier turns; training and evaluation use none.
    style: `plain`, or `chat` for the tokenizer's chat template.
    tokenizer: of the model, for `chat`. A BOS that the template writes stays in the text: `encode_prompt` adds none
      to such a text.

  Raises:
    UserError: for an unknown style, or a tokenizer whose chat template is missing or refuses.

  >>> print(build("What is 1 + 1?"))
  ### Instruction:
  What is 1 + 1?
  <BLANKLINE>
  ### Response: Let's think step by step.
  <BLANKLINE>
  """
  if style not in STYLES:
    raise UserError(f"prompt style {style!r}: {nearest(style, list(STYLES))}")
  if style == "chat":
    return _chat(question, header, examples, tokenizer)
  parts = [f"{header}\n\n"] if header else []
  for example in examples:
    parts.append(f"{INSTRUCTION}\n{example.question}\n\n{RESPONSE}\n{example.rationale}\n\n")
  parts.append(f"{INSTRUCTION}\n{question}\n\n{RESPONSE}\n")
  return "".join(parts)


def _chat(question: str, header: str, examples: Sequence[Example], tokenizer: "PreTrainedTokenizerBase | None") -> str:
  name = getattr(tokenizer, "name_or_path", "") or "the model"
  if getattr(tokenizer, "chat_template", None) is None:
    raise UserError(f"{name}: its tokenizer has no chat template, which prompt style chat needs; take an instruct "
                    "model, or style plain")
  asked = [f"{q}\n\n{_STEPS}" for q in (*(e.question for e in examples), question)]
  asked[0] = f"{header}\n\n{asked[0]}" if header else asked[0]
  turns = []
  for text, example in zip(asked, examples, strict=False):
    turns += [{"role": "user", "content": text}, {"role": "assistant", "content": example.rationale}]
  turns.append({"role": "user", "content": asked[-1]})
  try:
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
  except Exception as e:  # a template is a program of its own, which raises what it likes
    cause = str(e).strip().partition("\n")[0]
    raise UserError(f"{name}: its chat template refuses the prompt ({cause}); take style plain") from e
