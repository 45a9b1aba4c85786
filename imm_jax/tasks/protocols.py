r"""Protocols of evaluation by name: how a test question is asked and its answer read, so that scores can be compared.

| `eval.protocol` | the rule of | examples | prompt | tokens |
|---|---|---|---|---|
| `paper` | the paper's published code | 0 | that of training, as `prompt.style` has it | 512 |
| `harness` | math-evaluation-harness, prompt type `cot` | 8; 4 of LaTeX or letters | `Question: ... Answer:` | 1024 |
| `qwen` | Qwen2.5-Math's evaluation, prompt type `qwen25-math-cot` | 0 | chat, the answer in `\boxed{}` | 2048 |

Of the others' work only the rules are here: examples come from train splits or a file (`stages.questions.shots_of`).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import ml_collections

from imm_jax.tasks import answers, latex, prompts
from imm_jax.tasks.base import Example
from imm_jax.tasks.registry import TASKS

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

# The prompt of (question, worked examples, the model's tokenizer).
Prompt = Callable[[Example, Sequence[Example], "PreTrainedTokenizerBase | None"], str]
BOXED = r"Please reason step by step, and put your final answer within \boxed{}."
_OPTIONS = re.compile(r"\n\(([A-H])\) ")
_STATED_LETTER = re.compile(r"answer is \(?([a-e])\)?")


class Protocol(NamedTuple):
  """How the questions of a task are asked and judged.

  Attributes:
    name: in `eval.protocol`.
    source: where its rule is published.
    few_shot: worked examples in a prompt.
    prompt: the text before an answer.
    stop: strings that an answer ends before.
    chat: whether prompts need the tokenizer's chat template.
    read: what of (an answer, the kind of the gold one) is judged, by `answers.verdict`.
  """

  name: str
  source: str
  few_shot: int
  prompt: Prompt
  stop: tuple[str, ...]
  chat: bool
  read: Callable[[str, str], str]


def of(config: ml_collections.ConfigDict, task: str) -> Protocol:
  """The protocol of a config for a task, by the task's name.

  >>> from configs import tiny
  >>> of(tiny.get_config(), "groups").few_shot
  0
  """
  found = _PROTOCOLS[config.eval.protocol](config, task)
  return found if config.eval.few_shot < 0 else found._replace(few_shot=config.eval.few_shot)


def max_new_tokens(config: ml_collections.ConfigDict) -> int:
  """How long an answer in evaluation may be: `eval.max_new_tokens`, or with -1 what the protocol's own code allows.

  >>> from configs import qwen
  >>> config = qwen.get_config()
  >>> config.eval.protocol = "harness"
  >>> max_new_tokens(config)
  1024
  """
  given = config.eval.max_new_tokens
  return _MAX_NEW_TOKENS[config.eval.protocol] if given < 0 else given


def kind_of(config: ml_collections.ConfigDict, task: str) -> str:
  """The kind of (most of) a task's answers: `number`, `latex` or `choice`."""
  if task == "custom":
    return config.task.kind
  return TASKS[task].kind if task in TASKS else "choice" if task == "choice" else "number"


def _paper(config: ml_collections.ConfigDict, _: str) -> Protocol:
  settings = config.prompt
  prompt = lambda asked, shots, tokenizer: prompts.build(
      asked.question, header=settings.header, examples=shots, style=settings.style, tokenizer=tokenizer)
  return Protocol("paper", "the paper's published code: zero-shot, greedy", 0, prompt, tuple(config.sample.stop),
                  settings.style == "chat", lambda text, kind: text)


def _harness(config: ml_collections.ConfigDict, task: str) -> Protocol:
  kind = kind_of(config, task)
  ask = "Question: {}\nAnswer:{}" if kind == "number" else "Problem:\n{}\nSolution:{}"
  gap = " " if kind == "number" else "\n"  # before a worked answer

  def question(e: Example) -> str:
    text = e.question[:1].upper() + e.question[1:] if task == "mathqa" else e.question
    listed = _with_options(text, "\nWhat of the following is the right choice? Explain your answer.\n",
                           " " if task.startswith("sat_math") else ", ")
    return _yes_or_no(listed, e.answer)

  def prompt(asked: Example, shots: Sequence[Example], _: object) -> str:
    shown = "\n\n\n".join(_fill(ask, question(e), gap + e.rationale) for e in shots).strip()
    return (f"{shown}\n\n\n" if shown else "") + _fill(ask, question(asked), "")

  return Protocol("harness",
                  "github.com/GAIR-NLP/math-evaluation-harness at 8e2c3cc: utils.py, parser.py, math_eval.py",
                  8 if kind == "number" else 4, prompt, ("</s>", "\n\nQuestion:", "\n\nProblem:"), chat=False,
                  read=_harness_reads)


def _qwen(config: ml_collections.ConfigDict, _: str) -> Protocol:
  question = lambda e: _yes_or_no(_with_options(e.question, "\nAnswer Choices: ", " "), e.answer)

  def prompt(asked: Example, shots: Sequence[Example], tokenizer: "PreTrainedTokenizerBase | None") -> str:
    shown = [f"{question(e)}\n{e.rationale}" for e in shots]  # in one turn, as there
    return prompts.chat([("system", BOXED), ("user", "\n\n".join([*shown, question(asked)]))], tokenizer,
                        needed_by="eval.protocol=qwen", otherwise="eval.protocol=paper or harness")

  return Protocol("qwen", "github.com/QwenLM/Qwen2.5-Math at a45202b: evaluation/utils.py, parser.py, math_eval.py", 0,
                  prompt, ("</s>", "<|im_end|>", "<|endoftext|>"), True, _last_box)


_PROTOCOLS: Mapping[str, Callable[[ml_collections.ConfigDict, str], Protocol]] = {
    "paper": _paper, "harness": _harness, "qwen": _qwen}
_MAX_NEW_TOKENS = {"paper": 512, "harness": 1024, "qwen": 2048}
NAMES = tuple(_PROTOCOLS)


def _fill(form: str, question: str, answer: str) -> str:
  """The form with both texts as they are, whatever braces they hold."""
  before, between, after = form.split("{}")
  return before + question + between + answer + after


def _with_options(question: str, lead: str, joint: str) -> str:
  """A question whose lines `(A) ...` at the end, where it has such, stand in one line after `lead`."""
  starts = list(_OPTIONS.finditer(question))
  last = max((i for i, found in enumerate(starts) if found[1] == "A"), default=len(starts))
  starts = starts[last:]
  if len(starts) < 2 or [found[1] for found in starts] != list("ABCDEFGH"[:len(starts)]):
    return question
  ends = [found.start() for found in starts[1:]] + [len(question)]
  options = [question[found.start() + 1:end] for found, end in zip(starts, ends, strict=True)]
  return question[:starts[0].start()] + lead + joint.join(options)


def _yes_or_no(question: str, gold: str) -> str:
  """Says so where the answer is a word of two; both evaluations look at the gold answer for it."""
  for words in ("True or False", "Yes or No"):
    if gold.lower() in words.lower().split(" or "):
      return f"{question} ({words})"
  return question


def _last_box(text: str, _: str) -> str:
  r"""The last box, whatever follows it; the text itself where it has none.

  >>> _last_box(r"So \boxed{7}. The answer is 8.", "number"), _last_box("The answer is 8.", "number")
  ('\\boxed{7}', 'The answer is 8.')
  """
  boxed = latex.find_last_boxed(answers.before_next_question(text))
  return text if boxed is None else rf"\boxed{{{boxed.inside}}}"


def _harness_reads(text: str, kind: str) -> str:
  """Of letters the first that is said to be the answer or the choice, and none but such; else a box comes first."""
  if kind == "choice":
    said = _STATED_LETTER.search(text.partition("Problem:")[0].replace("choice is", "answer is").lower())
    return f"The answer is ({said[1].upper()})." if said else ""
  inside, end, _ = text.partition("final answer is $")[2].partition("$. I hope")  # of the form of Minerva's examples
  return rf"\boxed{{{inside.strip()}}}" if end else _last_box(text, kind)
