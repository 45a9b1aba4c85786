"""The text before a model's answer: the paper's template (tables 11 and 12), or a model's chat template."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from imm_jax.errors import UserError, nearest
from imm_jax.tasks.base import Example

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

INSTRUCTION = "### Instruction:"
STEPS = "Let's think step by step."
RESPONSE = f"### Response: {STEPS}"
STYLES = ("paper", "chat")
_LIKE_EXAMPLES = " like given examples below:"


def build(question: str, *, header: str = "", examples: Sequence[Example] = (), style: str = "paper",
          tokenizer: "PreTrainedTokenizerBase | None" = None) -> str:
  """The text before a model's answer; every text is inserted as it is (braces and odd Unicode pass unharmed).

  Without examples it is the prompt of training. With examples the header's full stop gives way to "like given examples
  below:" in `paper`.

  Args:
    question: the question.
    header: a line that describes the task, or nothing; in a chat it begins the first message.
    examples: worked examples shown before the question, in a chat as earlier turns; training uses none.
    style: `paper`, its tables 11 and 12, with examples as `Question:` and `A:`; or `chat` for the tokenizer's chat
      template.
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
  shots = [f"Question: {e.question}\nA: {STEPS}\n{e.rationale}\n\n" for e in examples]
  header = header.rstrip(" .:") + _LIKE_EXAMPLES if header and shots else header
  return "".join([f"{header}\n\n" if header else "", *shots, f"{INSTRUCTION}\n{question}\n\n{RESPONSE}\n"])


def _chat(question: str, header: str, examples: Sequence[Example], tokenizer: "PreTrainedTokenizerBase | None") -> str:
  asked = [f"{q}\n\n{STEPS}" for q in (*(e.question for e in examples), question)]
  asked[0] = f"{header}\n\n{asked[0]}" if header else asked[0]
  turns = []
  for text, example in zip(asked, examples, strict=False):
    turns += [("user", text), ("assistant", example.rationale)]
  return chat([*turns, ("user", asked[-1])], tokenizer, needed_by="prompt style chat", otherwise="style paper")


def chat(turns: Sequence[tuple[str, str]], tokenizer: "PreTrainedTokenizerBase | None", *, needed_by: str,
         otherwise: str) -> str:
  """Turns in the tokenizer's chat template, up to where the model answers.

  Args:
    turns: (role, text), the last one the user's.
    tokenizer: of the model.
    needed_by: what asks for a chat, for the errors.
    otherwise: what needs none, for the errors.

  Raises:
    UserError: when the template is missing or refuses.
  """
  name = getattr(tokenizer, "name_or_path", "") or "the model"
  if getattr(tokenizer, "chat_template", None) is None:
    raise UserError(f"{name}: its tokenizer has no chat template, which {needed_by} needs; take an instruct model, or "
                    f"{otherwise}")
  try:
    return tokenizer.apply_chat_template([{"role": role, "content": text} for role, text in turns], tokenize=False,
                                         add_generation_prompt=True)
  except Exception as e:  # a template is a program of its own, which raises what it likes
    cause = str(e).strip().partition("\n")[0]
    raise UserError(f"{name}: its chat template refuses the prompt ({cause}); take {otherwise}") from e
