"""Generates word problems, the tasks of the embedded model.

`stories` is the in-domain family (two or three additions and subtractions); the others are out of domain, with other
operations, wording and forms of answers. `drill` has bare facts for pre-training only. Every worked answer ends in
`The answer is X.`

Splits are disjoint by content, whatever the seed: the hash of a question's text decides which split may hold it, so a
question in one seed's training set cannot be in another seed's test set, nor in pre-training.
"""

import random
import zlib
from collections.abc import Callable

from imm_jax.tasks.base import Example

NAMES = ("Tom", "Ann", "Sam", "Mia", "Ben", "Eva", "Leo", "Zoe", "Max", "Amy", "Jack", "Lily")
ITEMS = ("apples", "pens", "books", "coins", "cards", "shells", "stamps", "eggs", "cups", "toys", "keys", "nuts")
BOXES = ("boxes", "bags", "jars", "trays")
# Shares of the hash space: 3/16 test, 5/16 train, the rest pre-training.
_BUCKET_SPLITS = ("test",) * 3 + ("train",) * 5 + ("pretrain",) * 8
SPLITS = ("pretrain", "train", "test")
MAX_VALUE = 60
_MAX_DISTINCT = 100_000


def assign_split(question: str) -> str:
  """Returns the only split that may hold this question text.

  >>> assign_split("What is 2 + 3 ?") in SPLITS
  True
  """
  return _BUCKET_SPLITS[zlib.crc32(question.encode()) % len(_BUCKET_SPLITS)]


def _draw_story(rng: random.Random) -> tuple[str, str, str]:
  """Draws a problem with two or three additions and subtractions."""
  name, other = rng.sample(NAMES, 2)
  item = rng.choice(ITEMS)
  value = rng.randint(5, 30)
  question = [rng.choice((f"{name} has {value} {item}.", f"{name} starts with {value} {item}.",
                          f"There are {value} {item} in the room of {name}."))]
  work = []
  for _ in range(rng.choice((2, 2, 3))):
    step = rng.randint(2, 12)
    if value - step < 1 or (value + step <= MAX_VALUE and rng.random() < 0.5):
      question.append(rng.choice((f"{name} finds {step} more.", f"{other} gives {name} {step} more.",
                                  f"Then {name} buys {step}.", f"{step} more are added.")))
      work.append(f"{value}+{step}={value + step}.")
      value += step
    else:
      question.append(rng.choice((f"{name} loses {step}.", f"{name} gives {step} to {other}.",
                                  f"Then {name} sells {step}.", f"{step} are taken away.")))
      work.append(f"{value}-{step}={value - step}.")
      value -= step
  question.append(rng.choice((f"How many {item} are left?", f"How many {item} does {name} have now?",
                              f"How many {item} are there in the end?")))
  return " ".join(question), " ".join(work), str(value)


def _draw_groups(rng: random.Random) -> tuple[str, str, str]:
  """Draws a problem with one multiplication or division."""
  a, b = rng.randint(2, 12), rng.randint(2, 5)
  if rng.random() < 0.5:
    a, b = b, a
  name, item, box = rng.choice(NAMES), rng.choice(ITEMS), rng.choice(BOXES)
  if rng.random() < 0.5:
    question = rng.choice((f"{name} has {a} {box} with {b} {item} in each. How many {item} is that?",
                           f"Each of {a} {box} of {name} holds {b} {item}. What is the total of {item}?"))
    return question, f"The total is {a}*{b}={a * b}.", str(a * b)
  question = rng.choice((f"{name} puts {a * b} {item} into {a} {box}. How many {item} are in each?",
                         f"{name} shares {a * b} {item} among {a} friends. How many {item} does each get?"))
  return question, f"Each share is {a * b}/{a}={b}.", str(b)


def _draw_comparison(rng: random.Random) -> tuple[str, str, str]:
  """Draws a problem about the difference between two people's numbers."""
  name, other = rng.sample(NAMES, 2)
  item = rng.choice(ITEMS)
  small = rng.randint(2, 12)
  large = small + rng.randint(2, 30)
  if rng.random() < 0.5:
    facts, query = f"{name} owns {large} {item} and {other} owns {small}.", f"more {item} does {name} own than {other}"
  else:
    facts, query = f"{other} owns {small} {item} and {name} owns {large}.", f"fewer {item} does {other} own than {name}"
  gap = large - small
  return f"{facts} How many {query}?", f"{name} owns more. The difference is {large}-{small}={gap}.", str(gap)


def _draw_price(rng: random.Random) -> tuple[str, str, str]:
  """Draws a problem about the price of a purchase: a product and a sum, the answer in dollars."""
  name = rng.choice(NAMES)
  item, extra = rng.sample(ITEMS, 2)
  count, price, more = rng.randint(2, 9), rng.randint(2, 5), rng.randint(2, 12)
  cost = count * price
  question = rng.choice((
      f"{name} buys {count} {item} at ${price} each and some {extra} for ${more}. How much does {name} pay?",
      f"One of the {item} costs ${price}. {name} wants {count}, and {extra} for ${more}. What is the price?"))
  total = cost + more
  return question, f"The {item} cost {count}*{price}={cost}. With {extra} {cost}+{more}={total}.", f"${total}"


def _draw_sequence(rng: random.Random) -> tuple[str, str, str]:
  """Draws a problem about the next number of an arithmetic sequence."""
  name = rng.choice(NAMES)
  if rng.random() < 0.3:
    step = rng.randint(2, 9)
    last = rng.randint(step + 1, 12)
    terms = [last + i * step for i in (3, 2, 1, 0)]
    work, answer = f"The steps go down by {terms[2]}-{last}={step}. Next is {last}-{step}={last - step}.", last - step
  else:
    start, step = rng.randint(2, 12), rng.randint(2, 12)
    terms = [start + i * step for i in range(4)]
    last = terms[-1]
    work = f"The steps go up by {terms[1]}-{start}={step}. Next is {last}+{step}={last + step}."
    answer = last + step
  listed = ", ".join(map(str, terms))
  question = rng.choice((f"{name} writes {listed}. What number comes next?",
                         f"What number comes next in the list of {name}: {listed}?"))
  return question, work, str(answer)


def _draw_choice(rng: random.Random) -> tuple[str, str, str]:
  """Draws a multiple-choice problem: who has the most or the fewest."""
  people = rng.sample(NAMES, 3)
  counts = rng.sample(range(2, 50), 3)
  item = rng.choice(ITEMS)
  most = rng.random() < 0.5
  winner = counts.index(max(counts) if most else min(counts))
  options = " ".join(f"({letter}) {name} {count}" for letter, name, count in zip("ABC", people, counts, strict=True))
  word = "most" if most else "fewest"
  question = rng.choice((f"Who has the {word} {item}? {options}", f"Pick the one with the {word} {item}. {options}"))
  return question, f"{counts[winner]} is the {word}. {people[winner]} has {counts[winner]}.", "ABC"[winner]


def _draw_fact(rng: random.Random) -> tuple[str, str, str]:
  """Draws one bare fact of the kinds that the families use."""
  operator = rng.choice("+-*/")
  if operator == "+":
    b = rng.randint(2, 12)
    a = rng.randint(1, MAX_VALUE - b)
    value = a + b
  elif operator == "-":
    b = rng.randint(2, 12)
    value = rng.randint(1, MAX_VALUE - b)
    a = b + value
  else:
    a, b = rng.randint(2, 12), rng.randint(2, 5)
    if rng.random() < 0.5:
      a, b = b, a
    value = a * b
    if operator == "/":
      a, value = value, a
  return f"{a}{operator}{b}=?", f"{a}{operator}{b}={value}.", str(value)


_FAMILIES: dict[str, tuple[str, Callable[[random.Random], tuple[str, str, str]]]] = {
    "stories": ("number", _draw_story),
    "groups": ("number", _draw_groups),
    "compare": ("number", _draw_comparison),
    "price": ("number", _draw_price),
    "sequence": ("number", _draw_sequence),
    "choice": ("choice", _draw_choice),
    "drill": ("number", _draw_fact),
}
FAMILIES = tuple(name for name in _FAMILIES if name != "drill")


def generate(family: str, *, split: str, count: int, seed: int, distinct: bool = True) -> list[Example]:
  """Draws `count` questions of one family and split, deterministically from the arguments.

  Args:
    family: a name in `FAMILIES`, or `drill`.
    split: `pretrain`, `train` or `test`.
    count: number of questions; the first n of a longer draw are the draw of n.
    seed: seed of the draw.
    distinct: whether to exclude repeated questions, which occur in small families and long pre-training.

  Raises:
    KeyError: for an unknown family.
    ValueError: for an unknown split, or if the family holds too few distinct questions.

  >>> example = generate("stories", split="test", count=1, seed=0)[0]
  >>> example.rationale.endswith(f"The answer is {example.answer}.")
  True
  """
  kind, draw = _FAMILIES[family]
  if split not in SPLITS:
    raise ValueError(f"split={split!r}: expected one of {', '.join(SPLITS)}")
  if distinct and count > _MAX_DISTINCT:
    raise ValueError(f"{count} questions were asked for, a generated task gives at most {_MAX_DISTINCT} distinct ones")
  if family == "drill" and split != "pretrain":
    raise ValueError("drill holds bare facts for pre-training only")
  rng = random.Random(f"{family}/{split}/{seed}")
  examples: list[Example] = []
  seen, misses = set[str](), 0
  while len(examples) < count:
    question, work, answer = draw(rng)
    if (family != "drill" and assign_split(question) != split) or (distinct and question in seen):
      misses += 1
      if misses > 10_000 + 100 * count:
        raise ValueError(f"{family}/{split} holds only about {len(seen)} distinct questions, {count} were asked for")
      continue
    seen.add(question)
    examples.append(Example(id=f"{family}/{split}/{seed}/{len(examples)}", question=question,
                            answer=answer.lstrip("$"), rationale=f"{work} The answer is {answer}.", kind=kind))
  return examples
