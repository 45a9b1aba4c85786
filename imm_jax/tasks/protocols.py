r"""Evaluation protocols by name: the prompt of a test question and the extraction of its answer, for comparable scores.

| `eval.protocol` | the rule of | examples | prompt | tokens |
|---|---|---|---|---|
| `paper` | the paper's published code | 0 | that of training, as `prompt.style` has it | 512 |
| `harness` | math-evaluation-harness, prompt type `cot` | 8; 4 of LaTeX or letters | `Question: ... Answer:` | 1024 |
| `qwen` | Qwen2.5-Math's evaluation, prompt type `qwen25-math-cot` | 0 | chat, the answer in `\boxed{}` | 2048 |

Only the rules of those projects are implemented: examples come from train splits or a file
(`stages.worked_examples.load_shots`).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from imm_jax.tasks import answers, latex, prompts
from imm_jax.tasks.base import Example
from imm_jax.tasks.registry import TASKS

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

# (question, worked examples, the model's tokenizer) -> prompt
Prompt = Callable[[Example, Sequence[Example], "PreTrainedTokenizerBase | None"], str]
BOXED = r"Please reason step by step, and put your final answer within \boxed{}."
_OPTIONS = re.compile(r"\n\(([A-H])\) ")
_STATED_LETTER = re.compile(r"answer is \(?([a-e])\)?")


class Protocol(NamedTuple):
  """Holds the rules by which a task's questions are asked and judged.

  Attributes:
    name: name in `eval.protocol`.
    source: the publication of the rules.
    few_shot: number of worked examples in a prompt.
    prompt: builds the text before an answer.
    stop: strings at which an answer ends.
    chat: whether prompts need the tokenizer's chat template.
    read: (answer, kind of the gold) -> text to be judged by `answers.verdict`.
  """

  name: str
  source: str
  few_shot: int
  prompt: Prompt
  stop: tuple[str, ...]
  chat: bool
  read: Callable[[str, str], str]


class ProtocolSettings(NamedTuple):
  """Holds the settings of a config on how test questions are asked.

  Attributes:
    name: name of the protocol.
    few_shot: number of worked examples in a prompt; -1 for the protocol's own.
    max_new_tokens: largest number of tokens of an answer; -1 for the limit of the protocol's own code.
    header: header of the prompts of training; it, `style` and `stop` are for protocol `paper`, which asks like these.
    style: style of the prompts of training.
    stop: strings at which a sample for training ends.
  """

  name: str
  few_shot: int = -1
  max_new_tokens: int = -1
  header: str = ""
  style: str = "paper"
  stop: tuple[str, ...] = ()

  @property
  def token_limit(self) -> int:
    """The largest number of tokens of an answer.

    >>> ProtocolSettings("harness").token_limit, ProtocolSettings("harness", max_new_tokens=40).token_limit
    (1024, 40)
    """
    return _MAX_NEW_TOKENS[self.name] if self.max_new_tokens < 0 else self.max_new_tokens


def get_protocol(settings: ProtocolSettings, task: str, kind: str = "") -> Protocol:
  """Returns the protocol for a task.

  Args:
    settings: what the config says.
    task: name of the task.
    kind: kind of its answers, for task `custom`; by default that of the task.

  >>> [get_protocol(ProtocolSettings("harness"), task).few_shot for task in ("gsm8k", "math")]
  [8, 4]
  """
  protocol = _PROTOCOLS[settings.name](settings, task, kind or answer_kind(task))
  return protocol if settings.few_shot < 0 else protocol._replace(few_shot=settings.few_shot)


def answer_kind(task: str) -> str:
  """Returns the kind of (most of) a task's answers: `number`, `latex` or `choice`."""
  return TASKS[task].kind if task in TASKS else "choice" if task == "choice" else "number"


def make_training_prompt(settings: ProtocolSettings) -> Prompt:
  """Returns the function that builds the prompts of training, which in sampling have worked examples."""
  return lambda example, shots, tokenizer: prompts.build_prompt(
      example.question, header=settings.header, examples=shots, style=settings.style, tokenizer=tokenizer)


def _paper(settings: ProtocolSettings, _task: str, _kind: str) -> Protocol:
  return Protocol("paper", "the paper's published code: zero-shot, greedy", 0, make_training_prompt(settings),
                  settings.stop, settings.style == "chat", lambda text, kind: text)


def _harness(_settings: ProtocolSettings, task: str, kind: str) -> Protocol:
  ask = "Question: {}\nAnswer:{}" if kind == "number" else "Problem:\n{}\nSolution:{}"
  gap = " " if kind == "number" else "\n"  # before a worked answer

  def question(e: Example) -> str:
    text = e.question[:1].upper() + e.question[1:] if task == "mathqa" else e.question
    listed = _inline_options(text, "\nWhat of the following is the right choice? Explain your answer.\n",
                             " " if task.startswith("sat_math") else ", ")
    return _add_yes_or_no(listed, e.answer)

  def prompt(example: Example, shots: Sequence[Example], _: object) -> str:
    shots_text = "\n\n\n".join(_fill_template(ask, question(e), gap + e.rationale) for e in shots).strip()
    return (f"{shots_text}\n\n\n" if shots_text else "") + _fill_template(ask, question(example), "")

  return Protocol("harness",
                  "github.com/GAIR-NLP/math-evaluation-harness at 8e2c3cc: utils.py, parser.py, math_eval.py",
                  8 if kind == "number" else 4, prompt, ("</s>", "\n\nQuestion:", "\n\nProblem:"), chat=False,
                  read=_read_harness_answer)


def _qwen(_settings: ProtocolSettings, _task: str, _kind: str) -> Protocol:
  question = lambda e: _add_yes_or_no(_inline_options(e.question, "\nAnswer Choices: ", " "), e.answer)

  def prompt(example: Example, shots: Sequence[Example], tokenizer: "PreTrainedTokenizerBase | None") -> str:
    shots_text = [f"{question(e)}\n{e.rationale}" for e in shots]  # in one turn, as there
    return prompts.build_chat([("system", BOXED), ("user", "\n\n".join([*shots_text, question(example)]))], tokenizer,
                              needed_by="eval.protocol=qwen", alternative="eval.protocol=paper or harness")

  return Protocol("qwen", "github.com/QwenLM/Qwen2.5-Math at a45202b: evaluation/utils.py, parser.py, math_eval.py", 0,
                  prompt, ("</s>", "<|im_end|>", "<|endoftext|>"), True, _read_last_box)


_PROTOCOLS: Mapping[str, Callable[[ProtocolSettings, str, str], Protocol]] = {
    "paper": _paper, "harness": _harness, "qwen": _qwen}
_MAX_NEW_TOKENS = {"paper": 512, "harness": 1024, "qwen": 2048}
NAMES = tuple(_PROTOCOLS)


def _fill_template(template: str, question: str, answer: str) -> str:
  """Fills a template with two texts verbatim, whatever braces they contain."""
  before, between, after = template.split("{}")
  return before + question + between + answer + after


def _inline_options(question: str, lead: str, joint: str) -> str:
  """Joins a question's final lines `(A) ...`, if it has such, to one line after `lead`."""
  starts = list(_OPTIONS.finditer(question))
  last = max((i for i, start in enumerate(starts) if start[1] == "A"), default=len(starts))
  starts = starts[last:]
  if len(starts) < 2 or [start[1] for start in starts] != list("ABCDEFGH"[:len(starts)]):
    return question
  ends = [start.start() for start in starts[1:]] + [len(question)]
  options = [question[start.start() + 1:end] for start, end in zip(starts, ends, strict=True)]
  return question[:starts[0].start()] + lead + joint.join(options)


def _add_yes_or_no(question: str, gold: str) -> str:
  """Appends "(True or False)" or "(Yes or No)" if the gold is one of these words, as both evaluations do."""
  for words in ("True or False", "Yes or No"):
    if gold.lower() in words.lower().split(" or "):
      return f"{question} ({words})"
  return question


def _read_last_box(text: str, _: str) -> str:
  r"""Returns the last box, whatever follows it, or the text itself if it has none.

  >>> _read_last_box(r"So \boxed{7}. The answer is 8.", "number"), _read_last_box("The answer is 8.", "number")
  ('\\boxed{7}', 'The answer is 8.')
  """
  boxed = latex.find_last_boxed(answers.before_next_question(text))
  return text if boxed is None else rf"\boxed{{{boxed.inside}}}"


def _read_harness_answer(text: str, kind: str) -> str:
  """Extracts an answer as the harness does: the first letter called the answer or choice; otherwise the last box."""
  if kind == "choice":
    match = _STATED_LETTER.search(text.partition("Problem:")[0].replace("choice is", "answer is").lower())
    return f"The answer is ({match[1].upper()})." if match else ""
  inside, end, _ = text.partition("final answer is $")[2].partition("$. I hope")  # of the form of Minerva's examples
  return rf"\boxed{{{inside.strip()}}}" if end else _read_last_box(text, kind)
