"""Builds prompts from the paper's template (tables 11 and 12) or a model's chat template."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from imm_jax.errors import UserError, first_line, suggest
from imm_jax.tasks.base import Example

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

INSTRUCTION = "### Instruction:"
STEPS = "Let's think step by step."
RESPONSE = f"### Response: {STEPS}"
STYLES = ("paper", "chat")
_LIKE_EXAMPLES = " like given examples below:"


def build_prompt(question: str, *, header: str = "", examples: Sequence[Example] = (), style: str = "paper",
                 tokenizer: "PreTrainedTokenizerBase | None" = None) -> str:
  """Builds the text before a model's answer; all texts are inserted verbatim (braces and odd Unicode are safe).

  Without examples it is the prompt of training. With examples, the style `paper` replaces the header's full stop by
  "like given examples below:".

  Args:
    question: the question.
    header: a line that describes the task, or nothing; in a chat it begins the first message.
    examples: worked examples shown before the question, in a chat as earlier turns; training uses none.
    style: `paper`, its tables 11 and 12, with examples as `Question:` and `A:`; or `chat` for the tokenizer's chat
      template.
    tokenizer: the model's tokenizer, for `chat`. A BOS that the template writes remains in the text; `encode_prompt`
      does not add a second one.

  Raises:
    UserError: for an unknown style, or a chat template that is missing or raises an error.

  >>> print(build_prompt("What is 1 + 1?"))
  ### Instruction:
  What is 1 + 1?
  <BLANKLINE>
  ### Response: Let's think step by step.
  <BLANKLINE>
  """
  if style not in STYLES:
    raise UserError(f"prompt style {style!r}: {suggest(style, list(STYLES))}")
  if style == "chat":
    return _build_chat(question, header, examples, tokenizer)
  shots = [f"Question: {e.question}\nA: {STEPS}\n{e.rationale}\n\n" for e in examples]
  header = header.rstrip(" .:") + _LIKE_EXAMPLES if header and shots else header
  return "".join([f"{header}\n\n" if header else "", *shots, f"{INSTRUCTION}\n{question}\n\n{RESPONSE}\n"])


def _build_chat(question: str, header: str, examples: Sequence[Example],
                tokenizer: "PreTrainedTokenizerBase | None") -> str:
  user_turns = [f"{q}\n\n{STEPS}" for q in (*(e.question for e in examples), question)]
  user_turns[0] = f"{header}\n\n{user_turns[0]}" if header else user_turns[0]
  turns = []
  for text, example in zip(user_turns, examples, strict=False):
    turns += [("user", text), ("assistant", example.rationale)]
  return build_chat([*turns, ("user", user_turns[-1])], tokenizer, needed_by="prompt style chat",
                    alternative="style paper")


def build_chat(turns: Sequence[tuple[str, str]], tokenizer: "PreTrainedTokenizerBase | None", *, needed_by: str,
               alternative: str) -> str:
  """Formats turns with the tokenizer's chat template, up to the model's answer.

  Args:
    turns: (role, text) pairs; the last one is the user's.
    tokenizer: the model's tokenizer.
    needed_by: the setting that requires a chat template, for errors.
    alternative: a setting that does not, for errors.

  Raises:
    UserError: if the template is missing or raises an error.
  """
  name = getattr(tokenizer, "name_or_path", "") or "the model"
  if tokenizer is None or getattr(tokenizer, "chat_template", None) is None:
    raise UserError(f"{name}: its tokenizer has no chat template, which {needed_by} needs; take an instruct model, or "
                    f"{alternative}")
  try:
    return str(tokenizer.apply_chat_template([{"role": role, "content": text} for role, text in turns], tokenize=False,
                                             add_generation_prompt=True))
  except Exception as e:  # templates may raise any exception
    raise UserError(f"{name}: its chat template refuses the prompt ({first_line(e)}); take {alternative}") from e
