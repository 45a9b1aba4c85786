"""Chat prompts, through chat templates of real forms on a small tokenizer."""

from pathlib import Path

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from imm_jax.errors import UserError
from imm_jax.model.tokenization import encode_prompt
from imm_jax.tasks import prompts
from imm_jax.tasks.base import Example

# ChatML, as Qwen's; and one that begins with a BOS, as Llama's.
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
WITH_BOS = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
SHOTS = [Example("a", "What is 1+1?", "2", "1+1=2. The answer is 2", "number"),
         Example("b", "What is {2}+2?", "4", "The answer is 4", "number")]
STEPS = "\n\nLet's think step by step."


def bos_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> PreTrainedTokenizerFast:
  """The same with a BOS before every text that it encodes."""
  tokenizer.add_special_tokens({"bos_token": "<s>"})
  tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
      single="<s> $A", special_tokens=[("<s>", tokenizer.convert_tokens_to_ids("<s>"))])
  tokenizer.save_pretrained(folder)
  return PreTrainedTokenizerFast.from_pretrained(folder)


def test_chat_has_turns_for_examples(tokenizer):
  """It asks for the answer last."""
  tokenizer.chat_template = CHATML
  built = prompts.build_prompt("What is 3+3?", header="Solve.", examples=SHOTS, style="chat", tokenizer=tokenizer)
  assert built == (
      f"<|im_start|>user\nSolve.\n\nWhat is 1+1?{STEPS}<|im_end|>\n"
      "<|im_start|>assistant\n1+1=2. The answer is 2<|im_end|>\n"
      f"<|im_start|>user\nWhat is {{2}}+2?{STEPS}<|im_end|>\n"
      "<|im_start|>assistant\nThe answer is 4<|im_end|>\n"
      f"<|im_start|>user\nWhat is 3+3?{STEPS}<|im_end|>\n"
      "<|im_start|>assistant\n")
  assert prompts.build_prompt("Q?", style="chat", tokenizer=tokenizer) == (
      f"<|im_start|>user\nQ?{STEPS}<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("text", [
    "{{ bos_token }}", "{% if x %}", "{question}", "\\frac{1}{2} \\{a\\}", "%s", "é e\u0301 \u00a0", "\u202e\u200b",
    "😀", "a\x00b", "\r\n\t", "x\u2028y", "<b>&amp;</b>"])
def test_a_chat_keeps_braces_and_odd_unicode(text, tokenizer):
  tokenizer.chat_template = CHATML
  shot = Example("a", text, "2", text, "number")
  built = prompts.build_prompt(text, examples=[shot], style="chat", tokenizer=tokenizer)
  assert built.count(f"{text}{STEPS}") == 2
  assert f"assistant\n{text}<|im_end|>" in built


def test_bos_is_not_doubled(tokenizer, tmp_path):
  """The tokenizer adds one itself."""
  tokenizer = bos_tokenizer(tokenizer, tmp_path)
  tokenizer.chat_template = WITH_BOS
  built = prompts.build_prompt("Q?", style="chat", tokenizer=tokenizer)
  ids = encode_prompt(tokenizer, built)
  assert ids[0] == tokenizer.bos_token_id
  assert ids.count(tokenizer.bos_token_id) == 1
  assert ids == tokenizer(f"[user]Q?{STEPS}[assistant]")["input_ids"]


def test_a_bos_that_the_tokenizer_does_not_add_stays(tokenizer):
  tokenizer.add_special_tokens({"bos_token": "<s>"})
  tokenizer.chat_template = WITH_BOS
  built = prompts.build_prompt("Q?", style="chat", tokenizer=tokenizer)
  ids = encode_prompt(tokenizer, built)
  assert ids[0] == tokenizer.bos_token_id
  assert ids.count(tokenizer.bos_token_id) == 1
  assert built == f"<s>[user]Q?{STEPS}[assistant]"


def test_chat_style_needs_a_template(tokenizer):
  """Without one it is refused."""
  with pytest.raises(UserError, match="its tokenizer has no chat template, which prompt style chat needs; take an"):
    prompts.build_prompt("Q?", style="chat", tokenizer=tokenizer)
  with pytest.raises(UserError, match="no chat template"):
    prompts.build_prompt("Q?", style="chat")
  with pytest.raises(UserError, match="prompt style 'chatt': did you mean chat"):
    prompts.build_prompt("Q?", style="chatt")


@pytest.mark.parametrize("template", ["{{ raise_exception('roles must alternate\nmore') }}", "{% if %}"])
def test_a_chat_template_that_refuses_is_one_line(template, tokenizer):
  tokenizer.chat_template = template
  with pytest.raises(UserError, match="its chat template refuses the prompt") as raised:
    prompts.build_prompt("Q?", style="chat", tokenizer=tokenizer)
  assert "\n" not in str(raised.value)
