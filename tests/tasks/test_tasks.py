"""The generated tasks and the prompt template, against solvers that only read the question's text."""

import itertools
import re
from collections.abc import Callable

import pytest
from hypothesis import given, settings, strategies as st

from imm_jax import tasks
from imm_jax.tasks import answers, arithmetic, prompts
from imm_jax.tasks.base import Example

FAMILIES = ("stories", "groups", "compare", "price", "sequence", "choice")
COUNT = 300
_STEP = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)\.")
_APPLY: dict[str, Callable[[int, int], float]] = {
    "+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "/": lambda a, b: a / b}


def draw(family: str, *, split: str = "train", count: int = COUNT, seed: int = 7, **options: bool) -> list[Example]:
  return arithmetic.generate(family, split=split, count=count, seed=seed, **options)


def integers(text: str) -> list[int]:
  return [int(n) for n in re.findall(r"\d+", text)]


def steps(example: Example) -> list[tuple[int, str, int, int]]:
  return [(int(a), op, int(b), int(c)) for a, op, b, c in _STEP.findall(example.rationale)]


def solve_story(question: str) -> tuple[int, list[tuple[str, int]]]:
  """Replays a story: its start, and (verb, number) of each step."""
  first, *middle, last = re.split(r"(?<=[.?]) ", question)
  assert re.match(r"\w+ has|\w+ starts with|There are", first)
  assert re.fullmatch(r"How many \w+ (are left|does \w+ have now|are there in the end)\?", last)
  hero = re.match(r"(\w+) (?:has|starts)|.* of (\w+)\.", first)
  hero = hero[1] or hero[2]
  moves = []
  for sentence in middle:
    number, = integers(sentence)
    gain = re.fullmatch(
        rf"{hero} finds \d+ more\.|\w+ gives {hero} \d+ more\.|Then {hero} buys \d+\.|\d+ more are added\.", sentence)
    loss = re.fullmatch(
        rf"{hero} loses \d+\.|{hero} gives \d+ to \w+\.|Then {hero} sells \d+\.|\d+ are taken away\.", sentence)
    assert bool(gain) != bool(loss), sentence
    moves.append(("+" if gain else "-", number))
  return integers(first)[0], moves


def solve_groups(question: str) -> int:
  a, b = integers(question)
  if re.search(r"with \d+ \w+ in each\. How many|Each of \d+ .* holds \d+", question):
    return a * b
  assert re.search(r"puts \d+ \w+ into \d+ \w+\.|shares \d+ \w+ among \d+ friends\.", question)
  assert a % b == 0
  return a // b


def solve_compare(question: str) -> int:
  owned = {name: int(n) for name, n in re.findall(r"(\w+) owns (\d+)", question)}
  direction, asked, other = re.search(r"How many (more|fewer) \w+ does (\w+) own than (\w+)\?", question).groups()
  difference = owned[asked] - owned[other]
  return difference if direction == "more" else -difference


def solve_price(question: str) -> int:
  count_first = re.search(r"buys (\d+) \w+ at \$(\d+) each and some \w+ for \$(\d+)\.", question)
  price_first = re.search(r"costs \$(\d+)\. \w+ wants (\d+), and \w+ for \$(\d+)\.", question)
  a, b, more = map(int, (count_first or price_first).groups())
  return a * b + more


def solve_sequence(question: str) -> int:
  terms = [int(n) for n in re.search(r"(\d+(?:, \d+){3})", question)[1].split(", ")]
  difference, = {b - a for a, b in itertools.pairwise(terms)}
  return terms[-1] + difference


def solve_choice(question: str) -> str:
  options = {int(n): letter for letter, n in re.findall(r"\(([ABC])\) \w+ (\d+)", question)}
  assert len(options) == 3
  return options[max(options) if " most " in question else min(options)]


SOLVERS = {"groups": solve_groups, "compare": solve_compare, "price": solve_price, "sequence": solve_sequence,
           "choice": solve_choice}


def test_tasks_exclude_the_drill():
  """The tasks are the families without it."""
  assert tasks.NAMES[:len(FAMILIES)] == FAMILIES
  assert "drill" not in tasks.NAMES


@pytest.mark.parametrize("family", SOLVERS)
def test_the_answer_follows_from_the_question_alone(family):
  for example in draw(family, count=1000):
    assert str(SOLVERS[family](example.question)) == example.answer, example


def test_story_is_solved_independently():
  """A story that is told again gives its steps and its answer."""
  lengths = set()
  for example in draw("stories", count=1000):
    value, moves = solve_story(example.question)
    worked = []
    for op, number in moves:
      worked.append((value, op, number, int(_APPLY[op](value, number))))
      value = worked[-1][-1]
      assert 1 <= value <= arithmetic.MAX_VALUE
    assert steps(example) == worked
    assert example.answer == str(value)
    lengths.add(len(moves))
  assert lengths == {2, 3}


@pytest.mark.parametrize("family", [*FAMILIES, "drill"])
def test_rationale_steps_are_right(family):
  """Each of them, and the last gives the answer."""
  for example in draw(family, split="pretrain", count=1000, distinct=False):
    for a, op, b, c in steps(example):
      assert _APPLY[op](a, b) == c, example
    work, _, said = example.rationale.partition(" The answer is ")
    assert said == f"${example.answer}." if family == "price" else said == f"{example.answer}."
    if family == "choice":
      assert not steps(example)
      assert f"({example.answer}) {work.split('. ')[1].split(' has ')[0]} " in example.question
    else:
      assert len(_STEP.findall(work)) == work.count("="), example
      assert steps(example)[-1][-1] == int(example.answer)


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_use_known_numbers(family):
  """A step uses only numbers that were given or found."""
  for example in draw(family):
    known = set(integers(example.question))
    for a, _, b, c in steps(example):
      assert {a, b} <= known
      known.add(c)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_rationale_is_right(family):
  """A rationale is judged right, and any other answer wrong."""
  for example in draw(family, count=100):
    assert answers.verdict(example.rationale, example.answer, example.kind, strict=True).correct
    other = "ABC"["BCA".index(example.answer)] if family == "choice" else str(int(example.answer) + 1)
    assert not answers.verdict(example.rationale, other, example.kind, strict=True).correct


@pytest.mark.parametrize("family", FAMILIES)
def test_splits_share_no_question_over_many_seeds(family):
  found = {split: {e.question for seed in range(20) for e in draw(family, split=split, count=100, seed=seed)}
           for split in arithmetic.SPLITS}
  assert not found["train"] & found["test"]
  assert not found["train"] & found["pretrain"]
  assert not found["test"] & found["pretrain"]
  for split, questions in found.items():
    assert {arithmetic.assign_split(q) for q in questions} == {split}


def test_splits_take_their_shares_of_all_texts():
  share = {split: sum(arithmetic.assign_split(f"question {i}") == split for i in range(4000)) / 4000
           for split in arithmetic.SPLITS}
  assert share["test"] == pytest.approx(3 / 16, abs=0.03)
  assert share["train"] == pytest.approx(5 / 16, abs=0.03)
  assert share["pretrain"] == pytest.approx(8 / 16, abs=0.03)


@pytest.mark.parametrize("family", FAMILIES)
def test_short_draws_are_prefixes(family):
  """A shorter draw is the beginning of a longer one."""
  longer = draw(family, count=100)
  for count in (0, 1, 17, 99):
    assert draw(family, count=count) == longer[:count]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_draw_depends_on_its_arguments_only(family):
  assert draw(family) == draw(family)
  assert tasks.load(family, split="train", count=COUNT, seed=7) == draw(family)
  questions = lambda **options: [e.question for e in draw(family, **options)]
  assert questions() != questions(seed=8)
  assert questions() != questions(split="test")


@pytest.mark.parametrize("family", FAMILIES)
def test_questions_and_ids_of_a_draw_differ(family):
  examples = draw(family, split="test", count=600)
  assert len({e.question for e in examples}) == len(examples)
  assert len({e.id for e in examples}) == len(examples)


def test_ids_differ_over_families_splits_and_seeds():
  ids = [e.id for family in FAMILIES for split in arithmetic.SPLITS for seed in (0, 1)
         for e in draw(family, split=split, count=20, seed=seed)]
  assert len(set(ids)) == len(ids)


def test_repeats_occur_only_where_they_are_allowed():
  drills = draw("drill", split="pretrain", count=3000, distinct=False)
  assert len({e.question for e in drills}) < 3000
  with pytest.raises(ValueError, match="holds only about"):
    draw("drill", split="pretrain", count=3000)


def test_what_is_not_there_is_an_error():
  with pytest.raises(KeyError):
    draw("sums")
  with pytest.raises(ValueError, match="task 'storys': did you mean stories"):
    tasks.load("storys", split="train", count=1, seed=0)
  with pytest.raises(ValueError, match="task 'piqu': did you mean piqa"):
    tasks.load_choices("piqu")
  with pytest.raises(ValueError, match="say how many"):
    tasks.load("stories", split="train")
  with pytest.raises(ValueError, match=r"expected one of pretrain, train, test"):
    draw("stories", split="dev")
  with pytest.raises(ValueError, match="pre-training only"):
    draw("drill", split="train")


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(), family=st.sampled_from(FAMILIES), split=st.sampled_from(arithmetic.SPLITS))
def test_any_seed_gives_whole_examples(seed, family, split):
  for example in draw(family, split=split, count=3, seed=seed):
    assert example.question.endswith("?") or family == "choice"
    assert re.search(r"\. The answer is \$?[0-9A-C]+\.$", example.rationale)
    assert example.kind == ("choice" if family == "choice" else "number")


@pytest.mark.parametrize("family", [*FAMILIES, "drill"])
def test_the_embedded_tokenizer_keeps_every_text(tokenizer, family):
  examples = draw(family, split="pretrain", distinct=False)
  examples += [] if family == "drill" else draw(family, split="test")
  texts = [text for e in examples for text in (prompts.build_prompt(e.question), e.rationale)]
  encoded = tokenizer(texts)["input_ids"]
  assert tokenizer.batch_decode(encoded) == texts


def test_headers_are_one_token(tokenizer):
  """Prompts stay short."""
  for header in (prompts.INSTRUCTION, prompts.RESPONSE):
    assert len(tokenizer(header)["input_ids"]) == 1
  for family in FAMILIES:
    for e in draw(family, split="test"):
      ids = tokenizer(prompts.build_prompt(e.question))["input_ids"]
      assert ids[0] == tokenizer.convert_tokens_to_ids(prompts.INSTRUCTION)
      assert ids.count(tokenizer.convert_tokens_to_ids(prompts.RESPONSE)) == 1
      assert len(ids) <= 64
      assert len(tokenizer(e.rationale)["input_ids"]) < 40


def test_digits_are_tokens_of_their_own(tokenizer):
  assert [tokenizer.decode([t]) for t in tokenizer("17+5=22.")["input_ids"]] == ["1", "7", "+", "5", "=", "2", "2", "."]


def test_prompt_order():
  """A prompt has header, examples, question and response in this order."""
  shots = [Example("a", "What is 1+1?", "2", "1+1=2. The answer is 2.", "number"),
           Example("b", "What is 2+2?", "4", "2+2=4. The answer is 4.", "number")]
  # Tables 11 and 12 of the paper.
  header = "Below is an instruction that describes a task. Write a response that appropriately completes the request"
  assert prompts.build_prompt("What is 3+3?", header=f"{header}.", examples=shots) == (
      f"{header} like given examples below:\n\n"
      "Question: What is 1+1?\nA: Let's think step by step.\n1+1=2. The answer is 2.\n\n"
      "Question: What is 2+2?\nA: Let's think step by step.\n2+2=4. The answer is 4.\n\n"
      "### Instruction:\nWhat is 3+3?\n\n### Response: Let's think step by step.\n")
  assert prompts.build_prompt("What is 3+3?", header=f"{header}.") == (  # of training and evaluation
      f"{header}.\n\n### Instruction:\nWhat is 3+3?\n\n### Response: Let's think step by step.\n")


@pytest.mark.parametrize("text", [
    "{}", "{question}", "{0}", "{{x}}", "%s %(a)d", "$x {y", "\\frac{1}{2}", "\\n\\1\\g<0>", "é e\u0301 \u00a0",
    "\u202e\u200b", "😀\U0001f468\u200d\U0001f469", "a\x00b", "\ud800", "\r\n\t", " lead and trail ", "",
    "### Response: no"])
def test_a_prompt_keeps_braces_and_odd_unicode(text):
  shot = Example("a", text, "2", text, "number")
  ask = f"### Instruction:\n{text}\n\n### Response: Let's think step by step.\n"
  assert prompts.build_prompt(text, header=text) == (f"{text}\n\n" if text else "") + ask
  assert prompts.build_prompt(text, examples=[shot]) == (
      f"Question: {text}\nA: Let's think step by step.\n{text}\n\n{ask}")


@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_a_prompt_keeps_any_question(text):
  assert prompts.build_prompt(text) == f"### Instruction:\n{text}\n\n### Response: Let's think step by step.\n"
