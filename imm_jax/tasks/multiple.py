"""The published records of multiple choice: each parser turns one into a Posed, or None without a usable gold.

What is scored by likelihood (contexts and options) is, to the letter, what lm-evaluation-harness 0.4 makes of the same
record; what is asked (the Example) lists the options by letter, with white space around texts taken away.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from imm_jax.tasks.base import Choice, Example
from imm_jax.tasks.fields import Record, raw_of, text_of, worked

LETTERS = "ABCDEFGH"
_QUOTED = re.compile(r"""'([^']*)'|"([^"]*)\"""")
_AGIEVAL = re.compile(r"(?P<passage>.*?)Q: (?P<question>.*?)\s*Answer Choices: \(A\).*", re.DOTALL)
_MATHQA_OPTION = re.compile(r"[a-d] \) (.*?), |e \) (.*)$")
_MMLU_FILE = re.compile(r"(?P<subject>\w+)_(?:dev|test|val)\.csv")
QUESTION = "Question: {}\nAnswer:"  # the commonest form of a context
_BRACKETED = re.compile(r"\[.*?\]")


class Posed(NamedTuple):
  """A question in both forms, without an id; no Choice where the options are not told apart."""

  example: Example
  choice: Choice | None


Parser = Callable[[Record], Posed | None]


def mathqa(record: Record) -> Posed | None:
  """MathQA: options in one string, of two forms; the rationale may stand in quotes.

  The options that are scored are cut as lm-evaluation-harness cuts them: at the first comma, and with what one record
  in 25 has around them (a quotation mark, a second letter).
  """
  found, problem = text_of(record, "options"), raw_of(record, "problem")
  options = split_options(found)
  scored = [(a or b).rstrip(" ,") for a, b in _MATHQA_OPTION.findall(found)]
  return lettered(text_of(record, "problem"), options, letter_of(record["correct"]),
                  str(record.get("rationale") or "").strip().strip('"'), context=QUESTION.format(problem),
                  scored=scored if len(scored) == len(options) else options)


def sat(options: str) -> Parser:
  """The parser of the 32 questions of May 2023, whose options are one string."""
  return lambda record: lettered(text_of(record, "question"), split_options(text_of(record, options)),
                                 letter_of(record["answer"]))


def agieval(record: Record) -> Posed | None:
  """AGIEval: some questions have a passage before them; the worked solution is none, for its form differs."""
  question = "\n".join(filter(None, (str(record.get("passage") or "").strip(), text_of(record, "question"))))
  return lettered(question, options_of(record["options"]), letter_of(record["label"]))


def agieval_query(record: Record) -> Posed | None:
  """AGIEval as the hub has it: passage, question and options in one prompt."""
  match = _AGIEVAL.fullmatch(text_of(record, "query"))
  if not match:
    raise ValueError("'query' is not of the form `Q: ... Answer Choices: (A)...`")
  question = "\n".join(filter(None, (match["passage"].strip(), match["question"].strip())))
  gold = record["gold"]
  gold = gold[0] if isinstance(gold, list) and gold else gold
  return lettered(question, options_of(record["choices"]), letter_of(gold))


def mmlu(record: Record) -> Posed | None:
  """MMLU: a list of choices, and the index (or letter) of the right one; the letters are what is scored."""
  return _mmlu(record, options_of(record["choices"]), record["choices"], record.get("subject") or record.get("type"))


def mmlu_csv(record: Record) -> Posed | None:
  """The same in columns; the name of the file says the subject."""
  found = _MMLU_FILE.fullmatch(str(record.get("file")))
  raw = [raw_of(record, f"choice{i}") for i in range(4)]
  return _mmlu(record, [text_of(record, f"choice{i}") for i in range(4)], raw, found and found["subject"])


def _mmlu(record: Record, options: Sequence[str], raw: Sequence[Any], subject: Any) -> Posed | None:
  about = "The following are multiple choice questions (with answers) about {}.\n\n".format(
      str(subject).replace("_", " ")) if subject else ""
  listed = "".join(f"\n{letter}. {option}" for letter, option in zip(LETTERS, raw, strict=False))
  question = text_of(record, "question")
  return lettered(question, options, letter_of(record["answer"]), context=f"{about}{question}{listed}\nAnswer:",
                  scored=LETTERS[:len(options)])


def arc(record: Record) -> Posed | None:
  """ARC: options with labels of their own (`A`, or `1`)."""
  options, gold = _labelled(record)
  return posed(text_of(record, "question"), options, gold, QUESTION.format(record["question"]))


def openbookqa(record: Record) -> Posed | None:
  """OpenBookQA: a stem that an option ends."""
  options, gold = _labelled(record)
  return posed(text_of(record, "question_stem"), options, gold, record["question_stem"])


def piqa(record: Record) -> Posed | None:
  """PIQA: a goal, and two ways to it."""
  options = [raw_of(record, "sol1"), raw_of(record, "sol2")]
  return posed(text_of(record, "goal"), options, _index(record["label"]), QUESTION.format(record["goal"]))


def sciq(record: Record) -> Posed | None:
  """SciQ: a text that may be empty, a question, and the right option last."""
  options = [raw_of(record, name) for name in ("distractor1", "distractor2", "distractor3", "correct_answer")]
  support = raw_of(record, "support").lstrip()
  return posed(f"{support.rstrip()}\n{text_of(record, 'question')}".lstrip(), options, 3,
               f"{support}\n{QUESTION.format(record['question'])}")


def boolq(gold: str) -> Parser:
  """The parser of BoolQ: a passage, a question without its mark, and under this name whether the answer is yes."""
  def parse(record: Record) -> Posed | None:
    passage, question = raw_of(record, "passage"), text_of(record, "question")
    return posed(f"{passage.strip()}\n{question}?", ["no", "yes"], _index(record[gold]),
                 f"{passage}\n{QUESTION.format(record['question'] + '?')}")

  return parse


def siqa(record: Record) -> Posed | None:
  """Social IQa: a situation, a question, three answers; the label counts from 1."""
  context, question = text_of(record, "context"), text_of(record, "question")
  label = _index(record["label"])
  return posed(f"{context} {question}", [raw_of(record, f"answer{letter}") for letter in "abc"],
               label - 1 if label else None, f"Q: {record['context']} {record['question']}\nA:")


def winogrande(record: Record) -> Posed | None:
  """WinoGrande: a sentence with a gap; what follows the gap is scored after each filling of it."""
  gold = _index(record["answer"])
  return _gap(raw_of(record, "sentence"), [raw_of(record, "option1"), raw_of(record, "option2")],
              gold - 1 if gold else None)


def hellaswag(record: Record) -> Posed | None:
  """HellaSwag: the beginning of a scene and its endings, both without the marks of the site that they are of."""
  context = f"{raw_of(record, 'activity_label')}: {raw_of(record, 'ctx_a')} {raw_of(record, 'ctx_b').capitalize()}"
  endings = record["endings"]
  return posed(_unmarked_scene(context), [_unmarked_scene(str(e)) for e in _several(endings)], _index(record["label"]),
               _unmarked_scene(context))


def derived(form: str) -> Parser:
  """The parser of records with `question`, `choices` (a list) and `answer` (an index from 0).

  Args:
    form: of the context, with `{}` for the question.
  """
  return lambda record: posed(text_of(record, "question"), _several(record["choices"]), _index(record["answer"]),
                              form.format(record["question"]))


def derived_boolq(record: Record) -> Posed | None:
  """BoolQ in that form: without its passage, with options true and false."""
  names = [str(option).strip().lower() for option in _several(record["choices"])]
  if sorted(names) != ["false", "true"]:
    raise ValueError(f"{record['choices']!r} are not true and false")
  gold, question = _index(record["answer"]), text_of(record, "question").rstrip("?")
  return posed(f"{question}?", ["no", "yes"], None if gold is None else int(names[gold] == "true"),
               QUESTION.format(f"{question}?"))


def derived_winogrande(record: Record) -> Posed | None:
  """WinoGrande in that form."""
  return _gap(text_of(record, "question"), _several(record["choices"]), _index(record["answer"]))


def _gap(sentence: str, options: Sequence[str], gold: int | None) -> Posed | None:
  before, gap, after = sentence.partition("_")
  if not gap:
    raise ValueError(f"{sentence[:80]!r} has no gap `_`")
  return posed(sentence.strip(), options, gold, [before + str(option) for option in options],
               scored=[after.strip()] * len(options))


def _labelled(record: Record) -> tuple[list[str], int | None]:
  """Options, and the index of the one whose label is the key; None for a key that is not told."""
  choices, key = record["choices"], str(record["answerkey"] or "").strip()
  if not isinstance(choices, Mapping) or not choices.keys() >= {"text", "label"}:
    raise ValueError(f"'choices' is {str(choices)[:80]}; expected lists `text` and `label`")
  labels = [str(label) for label in choices["label"]]
  if key and key not in labels:
    raise ValueError(f"the gold {key!r} is none of the options {', '.join(labels)}")
  return _several(choices["text"]), labels.index(key) if key else None


def _unmarked_scene(text: str) -> str:
  """A text without WikiHow's marks: `[title]` ends a sentence, others go; one pass takes double spaces away."""
  return _BRACKETED.sub("", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _index(gold: Any) -> int | None:
  """The index that a number, text or truth value says; None for an empty one and for -1: those golds are not told."""
  if gold is None or str(gold).strip() in ("", "-1"):
    return None
  if isinstance(gold, int):
    return int(gold)
  if not str(gold).strip().isdecimal():
    raise ValueError(f"the gold {gold!r} is no index of an option")
  return int(str(gold))


def split_options(text: str) -> list[str]:
  """The options of one string: `A) 4 B) 5`, `A. 4 B. 5`, `a ) 4 , b ) 5` or `['a ) 4', 'b ) 5']`.

  Letters count in their order only, so that an option may hold an `A)` of its own.

  >>> split_options("A) f(A) B) f(B) + 1 C) none")
  ['f(A)', 'f(B) + 1', 'none']
  >>> split_options("['a ) 4 , 5', 'b ) 6']")
  ['4 , 5', '6']
  """
  if text.startswith("[") and text.endswith("]"):
    return options_of([a or b for a, b in _QUOTED.findall(text)])
  starts = []
  for letter in LETTERS:
    marker = re.compile(rf"(?:^|(?<=[\s,])){letter}\s?[).]\s*", re.IGNORECASE)
    found = marker.search(text, starts[-1].end() if starts else 0)
    if not found:
      break
    starts.append(found)
  if not starts:
    raise ValueError(f"{text[:80]!r} holds no options `A) ... B) ...`")
  ends = [found.start() for found in starts[1:]] + [len(text)]
  return options_of([text[found.end():end].rstrip(" ,") for found, end in zip(starts, ends, strict=True)])


def options_of(values: Any) -> list[str]:
  """The options of a list, without letters of their own."""
  return [_unmarked(value.strip(), letter) for value, letter in zip(_several(values), LETTERS, strict=False)]


def _several(values: Any) -> list[str]:
  if not isinstance(values, Sequence) or isinstance(values, str) or not 2 <= len(values) <= len(LETTERS):
    raise ValueError(f"{str(values)[:80]!r} is no list of 2 to {len(LETTERS)} options")
  return [str(value) for value in values]


def _unmarked(option: str, letter: str) -> str:
  """An option without its own letter: `(A)2`, `a ) 4`."""
  return re.sub(rf"^(?:\({letter}\)|{letter}\s?\))\s*", "", option, flags=re.IGNORECASE)


def letter_of(gold: Any) -> str | None:
  """The letter of an index from 0, or of a letter in any form; None where there is none."""
  gold = "" if gold is None else str(gold).strip()
  if gold.isdecimal() and int(gold) < len(LETTERS):
    return LETTERS[int(gold)]
  return gold.strip("().").upper() or None


def lettered(question: str, options: Sequence[str], letter: str | None, rationale: str = "", *, context: str = "",
             scored: Sequence[str] = ()) -> Posed | None:
  """As `posed`, of the letter of the right option; without options those that the question names are not scored."""
  if letter and (len(letter) != 1 or letter not in LETTERS[:len(options) or None]):
    raise ValueError(f"the gold {letter!r} is none of the {len(options)} options")
  if not options:
    example = worked(question, letter, rationale, "choice")
    return Posed(example, None) if example else None
  return posed(question, options, LETTERS.index(letter) if letter else None, context or QUESTION.format(question),
               scored=scored, rationale=rationale)


def posed(question: str, options: Sequence[str], gold: int | None, context: str | Sequence[str], *,
          scored: Sequence[str] = (), rationale: str = "") -> Posed | None:
  """The two forms of multiple choice.

  Args:
    question: what is asked; in the Example a line for each option follows.
    options: their texts.
    gold: the index of the right one, or None.
    context: what is before the options where they are scored, or that for each of them.
    scored: what is scored, where it is not the options' texts.
    rationale: a worked answer.
  """
  if gold is None:
    return None
  if not 0 <= gold < len(options):
    raise ValueError(f"the gold {gold!r} is none of the {len(options)} options")
  listed = "".join(f"\n({mark}) {option.strip()}" for mark, option in zip(LETTERS, options, strict=False))
  example = worked(question + listed, LETTERS[gold], rationale, "choice")
  contexts = (context,) if isinstance(context, str) else tuple(context)
  return Posed(example, Choice("", contexts, tuple(f" {option}" for option in scored or options), gold,
                               example.question))
