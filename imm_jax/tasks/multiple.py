"""Parsers of multiple-choice records: each converts one to a Question, or None without a usable gold.

The contexts and options to be scored by likelihood are exactly those that lm-evaluation-harness 0.4 makes of the same
record; the Example lists the options by letter, with surrounding white space stripped.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from imm_jax.tasks.base import Choice, Example
from imm_jax.tasks.fields import Record, get_raw_text, get_text, make_example

LETTERS = "ABCDEFGH"
_QUOTED = re.compile(r"""'([^']*)'|"([^"]*)\"""")
_AGIEVAL = re.compile(r"(?P<passage>.*?)Q: (?P<question>.*?)\s*Answer Choices: \(A\).*", re.DOTALL)
_MATHQA_OPTION = re.compile(r"[a-d] \) (.*?), |e \) (.*)$")
_MMLU_FILE = re.compile(r"(?P<subject>\w+)_(?:dev|test|val)\.csv")
QUESTION = "Question: {}\nAnswer:"  # the most common context
_BRACKETED = re.compile(r"\[.*?\]")


class Question(NamedTuple):
  """Holds a question in both forms, without an id; `choice` is None if the options cannot be separated."""

  example: Example
  choice: Choice | None


Parser = Callable[[Record], Question | None]


def parse_mathqa(record: Record) -> Question | None:
  """Parses MathQA, with all options in one string of two possible forms; the rationale may be quoted.

  The scored options are split as lm-evaluation-harness splits them: at the first comma, and with the extra characters
  that one record in 25 has (a quotation mark, a second letter).
  """
  text, problem = get_text(record, "options"), get_raw_text(record, "problem")
  options = split_options(text)
  scored = [(a or b).rstrip(" ,") for a, b in _MATHQA_OPTION.findall(text)]
  return from_letter(get_text(record, "problem"), options, parse_letter(record["correct"]),
                     str(record.get("rationale") or "").strip().strip('"'), context=QUESTION.format(problem),
                     scored=scored if len(scored) == len(options) else options)


def sat_parser(options: str) -> Parser:
  """Returns a parser of the 32 SAT questions of May 2023, whose options are one string in this field."""
  return lambda record: from_letter(get_text(record, "question"), split_options(get_text(record, options)),
                                    parse_letter(record["answer"]))


def parse_agieval(record: Record) -> Question | None:
  """Parses AGIEval, with an optional passage; its worked solutions, of another form, are not used."""
  question = "\n".join(filter(None, (str(record.get("passage") or "").strip(), get_text(record, "question"))))
  return from_letter(question, parse_options(record["options"]), parse_letter(record["label"]))


def parse_agieval_query(record: Record) -> Question | None:
  """Parses AGIEval as on the hub: passage, question and options in one prompt."""
  match = _AGIEVAL.fullmatch(get_text(record, "query"))
  if not match:
    raise ValueError("'query' is not of the form `Q: ... Answer Choices: (A)...`")
  question = "\n".join(filter(None, (match["passage"].strip(), match["question"].strip())))
  gold = record["gold"]
  gold = gold[0] if isinstance(gold, list) and gold else gold
  return from_letter(question, parse_options(record["choices"]), parse_letter(gold))


def parse_mmlu(record: Record) -> Question | None:
  """Parses MMLU: a list of choices, and the index (or letter) of the right one; the letters are scored."""
  return _from_mmlu(record, parse_options(record["choices"]), record["choices"],
                    record.get("subject") or record.get("type"))


def parse_mmlu_csv(record: Record) -> Question | None:
  """Parses MMLU's csv files, with choices in columns and the subject in the file's name."""
  match = _MMLU_FILE.fullmatch(str(record.get("file")))
  raw = [get_raw_text(record, f"choice{i}") for i in range(4)]
  return _from_mmlu(record, [get_text(record, f"choice{i}") for i in range(4)], raw, match and match["subject"])


def _from_mmlu(record: Record, options: Sequence[str], raw: Sequence[Any], subject: Any) -> Question | None:
  preamble = "The following are multiple choice questions (with answers) about {}.\n\n".format(
      str(subject).replace("_", " ")) if subject else ""
  listed = "".join(f"\n{letter}. {option}" for letter, option in zip(LETTERS, raw, strict=False))
  question = get_text(record, "question")
  return from_letter(question, options, parse_letter(record["answer"]),
                     context=f"{preamble}{question}{listed}\nAnswer:", scored=LETTERS[:len(options)])


def parse_arc(record: Record) -> Question | None:
  """Parses ARC, whose options have labels (`A`, or `1`)."""
  options, gold = _parse_labels(record)
  return from_index(get_text(record, "question"), options, gold, QUESTION.format(record["question"]))


def parse_openbookqa(record: Record) -> Question | None:
  """Parses OpenBookQA, a stem that an option completes."""
  options, gold = _parse_labels(record)
  return from_index(get_text(record, "question_stem"), options, gold, record["question_stem"])


def parse_piqa(record: Record) -> Question | None:
  """Parses PIQA, a goal and two solutions."""
  options = [get_raw_text(record, "sol1"), get_raw_text(record, "sol2")]
  return from_index(get_text(record, "goal"), options, _parse_index(record["label"]), QUESTION.format(record["goal"]))


def parse_sciq(record: Record) -> Question | None:
  """Parses SciQ: a supporting text, which may be empty, a question, and the right option last."""
  options = [get_raw_text(record, name) for name in ("distractor1", "distractor2", "distractor3", "correct_answer")]
  support = get_raw_text(record, "support").lstrip()
  return from_index(f"{support.rstrip()}\n{get_text(record, 'question')}".lstrip(), options, 3,
                    f"{support}\n{QUESTION.format(record['question'])}")


def boolq_parser(gold: str) -> Parser:
  """Returns a parser of BoolQ: a passage, a question without question mark, and in field `gold` whether it is yes."""
  def parse(record: Record) -> Question | None:
    passage, question = get_raw_text(record, "passage"), get_text(record, "question")
    return from_index(f"{passage.strip()}\n{question}?", ["no", "yes"], _parse_index(record[gold]),
                      f"{passage}\n{QUESTION.format(record['question'] + '?')}")

  return parse


def parse_siqa(record: Record) -> Question | None:
  """Parses Social IQa: a situation, a question, three answers; the label counts from 1."""
  context, question = get_text(record, "context"), get_text(record, "question")
  label = _parse_index(record["label"])
  return from_index(f"{context} {question}", [get_raw_text(record, f"answer{letter}") for letter in "abc"],
                    label - 1 if label else None, f"Q: {record['context']} {record['question']}\nA:")


def parse_winogrande(record: Record) -> Question | None:
  """Parses WinoGrande, a sentence with a gap; the text after the gap is scored for each way to fill it."""
  gold = _parse_index(record["answer"])
  return _from_gap(get_raw_text(record, "sentence"), [get_raw_text(record, "option1"), get_raw_text(record, "option2")],
                   gold - 1 if gold else None)


def parse_hellaswag(record: Record) -> Question | None:
  """Parses HellaSwag: the beginning of a scene and its endings, both without WikiHow's markup."""
  activity, start, end = (get_raw_text(record, name) for name in ("activity_label", "ctx_a", "ctx_b"))
  context = _clean_wikihow(f"{activity}: {start} {end.capitalize()}")
  endings = [_clean_wikihow(ending) for ending in _check_options(record["endings"])]
  return from_index(context, endings, _parse_index(record["label"]), context)


def derived_parser(template: str) -> Parser:
  """Returns a parser of records with `question`, `choices` (a list) and `answer` (an index from 0).

  Args:
    template: of the context, with `{}` for the question.
  """
  return lambda record: from_index(get_text(record, "question"), _check_options(record["choices"]),
                                   _parse_index(record["answer"]), template.format(record["question"]))


def parse_derived_boolq(record: Record) -> Question | None:
  """Parses BoolQ in the form of `derived_parser`: without its passage, with options true and false."""
  names = [str(option).strip().lower() for option in _check_options(record["choices"])]
  if sorted(names) != ["false", "true"]:
    raise ValueError(f"{record['choices']!r} are not true and false")
  gold, question = _parse_index(record["answer"]), get_text(record, "question").rstrip("?")
  return from_index(f"{question}?", ["no", "yes"], None if gold is None else int(names[gold] == "true"),
                    QUESTION.format(f"{question}?"))


def parse_derived_winogrande(record: Record) -> Question | None:
  """Parses WinoGrande in the form of `derived_parser`."""
  return _from_gap(get_text(record, "question"), _check_options(record["choices"]), _parse_index(record["answer"]))


def _from_gap(sentence: str, options: Sequence[str], gold: int | None) -> Question | None:
  prefix, gap, suffix = sentence.partition("_")
  if not gap:
    raise ValueError(f"{sentence[:80]!r} has no gap `_`")
  return from_index(sentence.strip(), options, gold, [prefix + str(option) for option in options],
                    scored=[suffix.strip()] * len(options))


def _parse_labels(record: Record) -> tuple[list[str], int | None]:
  """Returns the options, and the index of the one whose label is the key; None for an undisclosed key."""
  choices, key = record["choices"], str(record["answerkey"] or "").strip()
  if not isinstance(choices, Mapping) or not choices.keys() >= {"text", "label"}:
    raise ValueError(f"'choices' is {str(choices)[:80]}; expected lists `text` and `label`")
  labels = [str(label) for label in choices["label"]]
  if key and key not in labels:
    raise ValueError(f"the gold {key!r} is none of the options {', '.join(labels)}")
  return _check_options(choices["text"]), labels.index(key) if key else None


def _clean_wikihow(text: str) -> str:
  """Removes WikiHow's markup: `[title]` ends a sentence, other tags are dropped, double spaces are halved once."""
  return _BRACKETED.sub("", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _parse_index(gold: Any) -> int | None:
  """Parses an index given as a number, text or bool; None for an empty one and for -1, which mark undisclosed golds."""
  if gold is None or str(gold).strip() in ("", "-1"):
    return None
  if isinstance(gold, int):
    return int(gold)
  if not str(gold).strip().isdecimal():
    raise ValueError(f"the gold {gold!r} is no index of an option")
  return int(str(gold))


def split_options(text: str) -> list[str]:
  """Splits options in one string: `A) 4 B) 5`, `A. 4 B. 5`, `a ) 4 , b ) 5` or `['a ) 4', 'b ) 5']`.

  Letters must come in order, so that an option may itself contain `A)`.

  >>> split_options("A) f(A) B) f(B) + 1 C) none")
  ['f(A)', 'f(B) + 1', 'none']
  >>> split_options("['a ) 4 , 5', 'b ) 6']")
  ['4 , 5', '6']
  """
  if text.startswith("[") and text.endswith("]"):
    return parse_options([a or b for a, b in _QUOTED.findall(text)])
  starts: list[re.Match[str]] = []
  for letter in LETTERS:
    marker = re.compile(rf"(?:^|(?<=[\s,])){letter}\s?[).]\s*", re.IGNORECASE)
    match = marker.search(text, starts[-1].end() if starts else 0)
    if not match:
      break
    starts.append(match)
  if not starts:
    raise ValueError(f"{text[:80]!r} holds no options `A) ... B) ...`")
  ends = [match.start() for match in starts[1:]] + [len(text)]
  return parse_options([text[match.end():end].rstrip(" ,") for match, end in zip(starts, ends, strict=True)])


def parse_options(values: Any) -> list[str]:
  """Returns the options of a list without their letters."""
  return [_strip_letter(value.strip(), letter) for value, letter in zip(_check_options(values), LETTERS, strict=False)]


def _check_options(values: Any) -> list[str]:
  if not isinstance(values, Sequence) or isinstance(values, str) or not 2 <= len(values) <= len(LETTERS):
    raise ValueError(f"{str(values)[:80]!r} is no list of 2 to {len(LETTERS)} options")
  return [str(value) for value in values]


def _strip_letter(option: str, letter: str) -> str:
  """Strips an option's own letter, as in `(A)2` or `a ) 4`."""
  return re.sub(rf"^(?:\({letter}\)|{letter}\s?\))\s*", "", option, flags=re.IGNORECASE)


def parse_letter(gold: Any) -> str | None:
  """Parses an index from 0, or a letter in any form, to a letter; None if there is none."""
  gold = "" if gold is None else str(gold).strip()
  if gold.isdecimal() and int(gold) < len(LETTERS):
    return LETTERS[int(gold)]
  return gold.strip("().").upper() or None


def from_letter(question: str, options: Sequence[str], letter: str | None, rationale: str = "", *, context: str = "",
                scored: Sequence[str] = ()) -> Question | None:
  """Makes a question from the letter of the right option; without `options` it has no form to be scored."""
  if letter and (len(letter) != 1 or letter not in LETTERS[:len(options) or None]):
    raise ValueError(f"the gold {letter!r} is none of the {len(options)} options")
  if not options:
    example = make_example(question, letter, rationale, "choice")
    return Question(example, None) if example else None
  return from_index(question, options, LETTERS.index(letter) if letter else None, context or QUESTION.format(question),
                    scored=scored, rationale=rationale)


def from_index(question: str, options: Sequence[str], gold: int | None, context: str | Sequence[str], *,
               scored: Sequence[str] = (), rationale: str = "") -> Question | None:
  """Makes both forms of a multiple-choice question.

  Args:
    question: the question; in the Example it is followed by a line for each option.
    options: texts of the options.
    gold: index of the right option, or None.
    context: text before the scored options, or one for each.
    scored: texts to score, if not those of the options.
    rationale: a worked answer.
  """
  if gold is None:
    return None
  if not 0 <= gold < len(options):
    raise ValueError(f"the gold {gold!r} is none of the {len(options)} options")
  listed = "".join(f"\n({mark}) {option.strip()}" for mark, option in zip(LETTERS, options, strict=False))
  example = make_example(question + listed, LETTERS[gold], rationale, "choice")
  if example is None:
    return None
  contexts = (context,) if isinstance(context, str) else tuple(context)
  return Question(example, Choice("", contexts, tuple(f" {option}" for option in scored or options), gold,
                                  example.question))
