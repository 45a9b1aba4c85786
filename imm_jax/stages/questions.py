"""Which questions a run asks, and which worked examples its prompts show, in sampling and in evaluation."""

import functools
import hashlib
import json
from typing import Any, NamedTuple

import ml_collections

from imm_jax import tasks
from imm_jax.errors import UserError, say_once
from imm_jax.tasks import protocols, shots
from imm_jax.tasks.base import Choice, Example

# Before the name of a task of lm-evaluation-harness.
LM_EVAL = "lm_eval:"
# Test questions are part of a task and the same in every run, as those of a published data set are.
_TEST_SEED = 0


class Questions(NamedTuple):
  """Questions of the in-domain train split; no question is in two of the three.

  Attributes:
    shots: worked examples of the prompt, fewer than the config asks for where the task has fewer.
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
  few, shown, count = config.prompt.few_shot, shown_in_evaluation(config), config.task.questions_per_round
  shown = max(few, shown)
  held_out = config.merge.auto.questions if config.merge.base_weight == "auto" else 0
  if tasks.is_generated(config.task.name):
    before = shown + held_out
    pool = _train(config, config.task.name, before + (round_ + 1) * count if count else None)
    return Questions(pool[:few], pool[shown:before], pool[before + round_ * count:])
  pool = _train(config, config.task.name)
  apart = [i for i, e in enumerate(pool) if e.rationale][:shown]
  others = [e for i, e in enumerate(pool) if i not in set(apart)]
  rest = others[held_out:]
  if not rest or count > len(rest):
    raise ValueError(f"{config.task.name} has {len(pool)} train questions, of which {len(pool) - len(rest)} are set "
                     f"apart; {max(1, count)} are asked for in a round")
  # Round after round from where the one before has ended, and again from the beginning.
  asked = [rest[i % len(rest)] for i in range(round_ * count, (round_ + 1) * count)] if count else rest
  return Questions([pool[i] for i in apart[:few]], others[:held_out], asked)


def settings_of_round(config: ml_collections.ConfigDict) -> tuple[str, ...]:
  """The keys of a config that decide which questions a round asks; not those shown in evaluation or held out."""
  held_out = ("merge.auto.questions",) if config.merge.base_weight == "auto" else ()
  shown = ("eval.protocol", "eval.few_shot", "eval.shots_file") if shown_in_evaluation(config) else ()
  task = (f"task.{key}" for key in ("name", "source", "fields", "kind", "questions_per_round"))
  return "seed", *task, "prompt", *held_out, *shown


def count_worked(config: ml_collections.ConfigDict) -> tuple[int, int]:
  """How many of the in-domain task's train questions have a worked answer, and of how many; it is a real task."""
  pool = load(config, config.task.name, split="train")
  return sum(bool(e.rationale) for e in pool), len(pool)


def shown_in_evaluation(config: ml_collections.ConfigDict) -> int:
  """How many worked examples `eval.protocol` shows for the in-domain task."""
  return protocols.get_protocol(config, config.task.name).few_shot


def shots_of(config: ml_collections.ConfigDict, entry: str) -> list[Example]:
  """The worked examples that `eval.protocol` shows before a task's test questions.

  They are rows of `eval.shots_file` where it has any for the task, else the first of the task's own train split, else
  of the in-domain task's, where its answers are of the same kind. Neither a round nor `merge.auto` asks them.

  Raises:
    UserError: when there are too few, or one is a test question.
  """
  name, file = name_of(entry), config.eval.shots_file
  if measure_of(config, entry) != "answer":
    return []
  count, kind = protocols.get_protocol(config, name).few_shot, protocols.answer_kind(config, name)
  if not count:
    return []
  places = [file] if file and shots.read_examples(file, name, kind) else [
      source for source in dict.fromkeys((entry, config.task.name))
      if "train" in tasks.splits(name_of(source)) and protocols.answer_kind(config, name_of(source)) == kind]
  found: dict[str, list[Example]] = {}
  for place in places:
    pool = shots.read_examples(file, name, kind) if place == file else _train(
        config, place, count if tasks.is_generated(name_of(place)) else None)
    # The in-domain task's first ones are set apart in `of_round`.
    found[place] = [e for e in pool if e.rationale][:count]
  place = max(found, key=lambda place: len(found[place]), default="")
  asks = f"config.eval.protocol={config.eval.protocol} shows {count} worked example{'s' * (count > 1)}"
  if not found.get(place):
    raise UserError(f"{asks}, and task {name} has none: they come from its train split, or from the in-domain task's "
                    f"where that has answers of its kind ({kind}); give --config.eval.shots_file=FILE.jsonl, rows with "
                    "question, answer and rationale, or --config.eval.few_shot=0")
  if len(found[place]) < count:
    where = file if place == file else f"the train split of {name_of(place)}"
    raise UserError(f"{asks}, and {where} has {len(found[place])} for task {name}; give more in "
                    f"--config.eval.shots_file, or --config.eval.few_shot={len(found[place])}")
  if place != entry:
    limit = config.task.eval_questions if tasks.is_generated(name) else None
    tests = {_unspaced(e.question) for e in load(config, entry, split="test", count=limit)}
    for e in found[place]:
      if _unspaced(e.question) in tests:
        raise UserError(f"{e.id}: {e.question[:60]!r} is a test question of {name}, so it is no worked example for it; "
                        "give others in --config.eval.shots_file")
  return found[place]


def general(config: ml_collections.ConfigDict, entry: str) -> list[Example]:
  """What `merge.base_weight=auto` asks of a task of `merge.auto.general`: of its train split, none that is shown.

  Raises:
    ValueError: when there are too few.
  """
  count, shown = config.merge.auto.questions, {_unspaced(e.question) for e in shots_of(config, entry)}
  pool = load(config, entry, split="train", count=count + len(shown) if tasks.is_generated(name_of(entry)) else None)
  found = [e for e in pool if _unspaced(e.question) not in shown][:count]
  if len(found) < count:
    raise ValueError(f"{name_of(entry)}/train holds {len(found)} questions, {count} were asked for")
  return found


def _train(config: ml_collections.ConfigDict, entry: str, count: int | None = None) -> list[Example]:
  """Train questions, without those that `eval.shots_file` shows."""
  file = config.eval.shots_file
  shown = {_unspaced(question) for question in shots.read_questions(file)} if file else ()
  found = load(config, entry, split="train", count=None if count is None else count + len(shown))
  return [e for e in found if _unspaced(e.question) not in shown][:count]


def _unspaced(question: str) -> str:
  """What makes two questions the same: what they say, however that is spaced."""
  return "".join(question.split())


def of_tests(config: ml_collections.ConfigDict) -> dict[str, list[Example]]:
  """The test questions of every task by its name, the in-domain one first: all that there are, where that is fewer than
  `task.eval_questions`, which is told once on stderr."""
  limit, found = config.task.eval_questions or None, {}
  for entry in own(config):
    name = name_of(entry)
    examples = load(config, entry, split="test", count=limit if tasks.is_generated(name) else None)[:limit]
    if limit and len(examples) < limit:
      say_once(f"note: task {name} has {len(examples)} test questions, and all of them are asked "
               f"(config.task.eval_questions={limit})")
    found[name] = examples
  return found


def drift_questions(config: ml_collections.ConfigDict) -> int:
  """How many test questions of a task a round's models are compared with the base on, at most; 0 for no comparison."""
  return min(config.analysis.drift, config.task.eval_questions or config.analysis.drift)


def choices_of_tests(config: ml_collections.ConfigDict) -> dict[str, list[Choice]]:
  """The same questions of those tasks whose options are scored by likelihood, by its name."""
  return {name_of(entry): choices(config, entry, split="test", count=config.task.eval_questions)
          for entry in own(config) if measure_of(config, entry) == "choices"}


def choices(config: ml_collections.ConfigDict, entry: str, *, split: str, count: int) -> list[Choice]:
  """The first questions of a task with options to score, all of them where there are fewer or `count` is 0."""
  name = name_of(entry)
  try:
    return tasks.load_choices(name, split=split, seed=_seed_of(config, split),
                              source=source_of(config, entry))[:count or None]
  except UserError as e:
    raise UserError(str(e) if str(e).startswith("task ") else f"task {name}: {e}") from e


def scores_texts(config: ml_collections.ConfigDict) -> bool:
  """Whether an evaluation scores options or texts by likelihood."""
  return bool(config.eval.texts) or any(measure_of(config, entry) == "choices" for entry in own(config))


def texts_of(config: ml_collections.ConfigDict) -> dict[str, list[str]]:
  """Passages of each text of `eval.texts`, by its name."""
  found = {}
  for entry in config.eval.texts:
    name, _, source = entry.partition("=")
    found[name] = tasks.load_text("" if source else name, source=source, count=count_passages(config) or None)
  return found


def count_passages(config: ml_collections.ConfigDict) -> int:
  """How many passages of a text are scored, at most; 0 for all of them."""
  return config.eval.passages or config.task.eval_questions


def own(config: ml_collections.ConfigDict) -> tuple[str, ...]:
  """The entries of all tasks whose questions are read here: all but lm_eval's."""
  return tuple(e for e in (config.task.name, *config.task.ood) if measure_of(config, e) != "lm_eval")


def lm_eval_tasks(config: ml_collections.ConfigDict) -> list[str]:
  """The names of lm_eval's tasks among `task.ood`."""
  return [entry.removeprefix(LM_EVAL) for entry in config.task.ood if measure_of(config, entry) == "lm_eval"]


def measure_of(config: ml_collections.ConfigDict, entry: str) -> str:
  """How a task is measured: `answer` (generated, judged), `choices` (the likelihood of options) or `lm_eval`.

  >>> from configs import tiny
  >>> [measure_of(tiny.get_config(), entry) for entry in ("piqa", "svamp=file:DIR", "lm_eval:piqa")]
  ['choices', 'answer', 'lm_eval']
  """
  name = name_of(entry)
  if name.startswith(LM_EVAL):
    return "lm_eval"
  if name in config.eval.by_likelihood:
    return "choices"
  return "answer" if name == config.task.name else tasks.default_measure(name)  # the in-domain task is sampled


def load(config: ml_collections.ConfigDict, entry: str, *, split: str, count: int | None = None) -> list[Example]:
  """Questions of a task, by its entry in the config: `NAME` or `NAME=SOURCE`.

  Raises:
    ValueError: when there are fewer than `count`.
  """
  name = name_of(entry)
  if count is None and tasks.is_generated(name):
    raise ValueError(f"{name} makes as many questions as it is asked for: expected 1 or more")
  seed = _seed_of(config, split)
  try:
    described = _described(config, name)
    return list(_load(name, split, count, seed, source_of(config, entry), tuple(sorted(described["fields"].items())),
                      described["kind"]))
  except UserError as e:
    raise UserError(str(e) if str(e).startswith("task ") else f"task {name}: {e}") from e


def _seed_of(config: ml_collections.ConfigDict, split: str) -> int:
  return _TEST_SEED if split == "test" else config.seed


def counts(config: ml_collections.ConfigDict) -> tuple[int, int]:
  """How many questions a round asks, and how many tests are to be answered; by the published sizes where they would
  have to be downloaded."""
  asked = _size(config, config.task.name, "train", config.task.questions_per_round)
  return asked, sum(n for entry, n in zip(own(config), count_tests(config), strict=True)
                    if measure_of(config, entry) == "answer")


def count_tests(config: ml_collections.ConfigDict) -> list[int]:
  """How many test questions each entry of `own` is asked, as in `counts`; 0 for all of a number that is not known."""
  return [_size(config, entry, "test", config.task.eval_questions) for entry in own(config)]


def describe_tests(config: ml_collections.ConfigDict) -> str:
  """A line on how many test questions of each task are asked, and of how many; by the published sizes as in `counts`.

  Lines follow that say where a task's own source has other questions than the paper asks.
  """
  parts, notes = [], []
  for entry, count in zip(own(config), count_tests(config), strict=True):
    name, published = name_of(entry), not source_of(config, entry)
    if tasks.is_generated(name):
      parts.append(f"{name} {count} (generated)")
      continue
    if is_remote(config, entry):
      usable, records = tasks.published_size(name, "test"), tasks.published_records(name, "test")
    else:
      usable = len(load(config, entry, split="test"))
      records = tasks.count_records(name, "test", source=source_of(config, entry), **_described(config, name))
    judged = f" ({usable} have an answer that can be judged)" if usable != records else ""
    parts.append(f"{name} {count or 'all'} of {records or 'an unknown number'}{judged}")
    if published and (note := tasks.paper_note(name)):
      notes.append(note)
  parts += [f"{LM_EVAL}{name} up to {config.task.eval_questions or 'all'}" for name in lm_eval_tasks(config)]
  parts += [f"{name_of(entry)} up to {count_passages(config) or 'all'} passages" for entry in config.eval.texts]
  return "\n".join((f"test questions: {'; '.join(parts)}", *notes))


def _size(config: ml_collections.ConfigDict, entry: str, split: str, limit: int) -> int:
  name = name_of(entry)
  if tasks.is_generated(name):
    return limit
  # Nobody knows how many a custom task of the hub has.
  known = (tasks.published_size(name, split) or limit) if is_remote(config, entry) else len(
      load(config, entry, split=split))
  return min(limit, known) if limit else known


def digests(config: ml_collections.ConfigDict) -> dict[str, str]:
  """What the questions are, by split: of those that are read, not made; a source may change between two starts."""
  found = {}
  for split, entries in (("train", (config.task.name,)), ("test", own(config))):
    entries = [e for e in entries if not tasks.is_generated(name_of(e)) and split in tasks.splits(name_of(e))]
    known: list[object] = [(e.id, e.answer, e.rationale) for entry in entries for e in (
        load(config, entry, split="test") if split == "test" else _train(config, entry))]
    if split == "test":  # with what is shown before them
      known += [(e.question, e.rationale) for entry in own(config) for e in shots_of(config, entry)]
      known += list(texts_of(config).values())
    elif config.eval.shots_file:
      known += shots.read_questions(config.eval.shots_file)
    found[f"{split} questions"] = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]
  return found


def is_remote(config: ml_collections.ConfigDict, entry: str) -> bool:
  """Whether a task's questions come over the network."""
  name, source = name_of(entry), source_of(config, entry)
  has_source = bool(source) or tasks.has_default_source(name)
  return not tasks.is_generated(name) and has_source and not source.startswith("file:")


def has_remote_texts(config: ml_collections.ConfigDict) -> bool:
  """Whether any of `eval.texts` comes over the network: a corpus by its name, or a source that is no file."""
  return any(not entry.partition("=")[2].startswith("file:") for entry in config.eval.texts)


def source_of(config: ml_collections.ConfigDict, entry: str) -> str:
  """The source that the config gives for an entry; empty for the task's own."""
  name, _, source = entry.partition("=")
  return source or (config.task.source if name == config.task.name else "")


def name_of(entry: str) -> str:
  """The task that an entry of the config names.

  >>> name_of("svamp=file:data/SVAMP.json")
  'svamp'
  """
  return entry.partition("=")[0]


def _described(config: ml_collections.ConfigDict, name: str) -> dict[str, Any]:
  """What the config says of the records of `custom`; of another task nothing."""
  return {"fields": config.task.fields.to_dict(), "kind": config.task.kind} if name == "custom" else {
      "fields": {}, "kind": ""}


@functools.lru_cache(maxsize=64)
def _load(name: str, split: str, count: int | None, seed: int, source: str,
          fields: tuple[tuple[str, str], ...], kind: str) -> list[Example]:
  return tasks.load(name, split=split, count=count, seed=seed, source=source, fields=dict(fields), kind=kind)
