"""Which questions a run asks, and which worked examples its prompts show."""

import functools
import hashlib
import json
from typing import NamedTuple

import ml_collections

from imm_jax import tasks
from imm_jax.errors import UserError, say_once
from imm_jax.tasks.base import Example

# Test questions are part of a task and the same in every run, as those of a published data set are.
_TEST_SEED = 0


class Questions(NamedTuple):
  """Questions of the in-domain train split; no question is in two of the three.

  Attributes:
    shots: worked examples of the prompt.
    held_out: what `merge.base_weight=auto` is chosen on.
    asked: of a round.
  """

  shots: list[Example]
  held_out: list[Example]
  asked: list[Example]


def of_round(config: ml_collections.ConfigDict, round_: int) -> Questions:
  """The questions of a round.

  Raises:
    ValueError: when the task has too few.
  """
  shots, count = config.prompt.few_shot, config.task.questions_per_round
  before = shots + (config.merge.auto.questions if config.merge.base_weight == "auto" else 0)
  if tasks.is_endless(config.task.name):
    pool = load(config, config.task.name, split="train", count=before + (round_ + 1) * count if count else None)
    asked = pool[before + round_ * count:]
  else:
    pool = load(config, config.task.name, split="train")
    rest = pool[before:]
    if not rest or count > len(rest):
      raise ValueError(f"{config.task.name} has {len(pool)} train questions, of which {before} are set apart; "
                       f"{max(1, count)} are asked for in a round")
    # Round after round from where the one before has ended, and again from the beginning.
    asked = [rest[i % len(rest)] for i in range(round_ * count, (round_ + 1) * count)] if count else rest
  return Questions(pool[:shots], pool[shots:before], asked)


def of_tests(config: ml_collections.ConfigDict) -> dict[str, list[Example]]:
  """The test questions of every task by its name, the in-domain one first: all that there are, where that is fewer than
  `task.eval_questions`, which is told once on stderr."""
  limit, found = config.task.eval_questions or None, {}
  for entry in (config.task.name, *config.task.ood):
    name = name_of(entry)
    examples = load(config, entry, split="test", count=limit if tasks.is_endless(name) else None)[:limit]
    if limit and len(examples) < limit:
      say_once(f"note: task {name} has {len(examples)} test questions, and all of them are asked "
               f"(config.task.eval_questions={limit})")
    found[name] = examples
  return found


def load(config: ml_collections.ConfigDict, entry: str, *, split: str, count: int | None = None) -> list[Example]:
  """Questions of a task, by its entry in the config: `NAME` or `NAME=SOURCE`.

  Raises:
    ValueError: when there are fewer than `count`.
  """
  name, _, source = entry.partition("=")
  if count is None and tasks.is_endless(name):
    raise ValueError(f"{name} makes as many questions as it is asked for: expected 1 or more")
  if name == config.task.name:
    source = source or config.task.source
  seed = _TEST_SEED if split == "test" else config.seed
  try:
    return list(_load(name, split, count, seed, source, tuple(sorted(config.task.fields.items())), config.task.kind))
  except UserError as e:
    raise UserError(str(e) if str(e).startswith("task ") else f"task {name}: {e}") from e


def counts(config: ml_collections.ConfigDict) -> tuple[int, int]:
  """How many questions a round asks and how many the tests hold; by the published sizes where they would have to be
  downloaded."""

  asked = _size(config, config.task.name, "train", config.task.questions_per_round)
  return asked, sum(count_tests(config))


def count_tests(config: ml_collections.ConfigDict) -> list[int]:
  """How many test questions each task is asked, as in `counts`; 0 for all of a number that is not known."""
  return [_size(config, entry, "test", config.task.eval_questions) for entry in (config.task.name, *config.task.ood)]


def _size(config: ml_collections.ConfigDict, entry: str, split: str, limit: int) -> int:
  name = name_of(entry)
  if tasks.is_endless(name):
    return limit
  # Nobody knows how many a custom task of the hub has.
  known = (tasks.published_size(name, split) or limit) if is_remote(config, entry) else len(
      load(config, entry, split=split))
  return min(limit, known) if limit else known


def digests(config: ml_collections.ConfigDict) -> dict[str, str]:
  """What the questions are, by split: of those that are read, not made; a source may change between two starts."""
  found = {}
  for split, entries in (("train", (config.task.name,)), ("test", (config.task.name, *config.task.ood))):
    entries = [e for e in entries if not tasks.is_endless(name_of(e)) and split in tasks.splits(name_of(e))]
    known = [(e.id, e.answer, e.rationale) for entry in entries for e in load(config, entry, split=split)]
    found[f"{split} questions"] = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]
  return found


def is_remote(config: ml_collections.ConfigDict, entry: str) -> bool:
  """Whether a task's questions come over the network."""
  name, _, source = entry.partition("=")
  source = source or (config.task.source if name == config.task.name else "")
  return not tasks.is_endless(name) and not source.startswith("file:")


def name_of(entry: str) -> str:
  """The task that an entry of the config names.

  >>> name_of("svamp=file:data/SVAMP.json")
  'svamp'
  """
  return entry.partition("=")[0]


@functools.lru_cache(maxsize=64)
def _load(name: str, split: str, count: int | None, seed: int, source: str,
          fields: tuple[tuple[str, str], ...], kind: str) -> list[Example]:
  options = {"fields": dict(fields), "kind": kind} if name == "custom" else {}
  return tasks.load(name, split=split, count=count, seed=seed, source=source, **options)
