"""The questions that a run asks and the worked examples that its prompts show, in sampling and in evaluation."""

import functools
import hashlib
import json
from typing import Any, NamedTuple

import ml_collections

from imm_jax import tasks
from imm_jax.errors import UserError, print_once
from imm_jax.tasks import protocols, shots
from imm_jax.tasks.base import Choice, Example

# Prefix of the names of lm-evaluation-harness's tasks.
LM_EVAL = "lm_eval:"
# Test questions do not depend on the run's seed, like those of a published data set.
_TEST_SEED = 0


class Questions(NamedTuple):
  """Holds three disjoint sets of questions of the in-domain train split.

  Attributes:
    shots: worked examples of the prompt, fewer than the config asks for if the task has fewer.
    held_out: questions on which `merge.base_weight=auto` is chosen.
    round_questions: questions of a round.
  """

  shots: list[Example]
  held_out: list[Example]
  round_questions: list[Example]


def load_round(config: ml_collections.ConfigDict, round_: int) -> Questions:
  """Returns the questions of a round.

  Raises:
    ValueError: when the task has too few questions.
  """
  few, count = config.prompt.few_shot, config.task.questions_per_round
  shown = max(few, count_eval_shots(config))
  held_out = config.merge.auto.questions if config.merge.base_weight == "auto" else 0
  if tasks.is_generated(config.task.name):
    before = shown + held_out
    pool = _load_train(config, config.task.name, before + (round_ + 1) * count if count else None)
    return Questions(pool[:few], pool[shown:before], pool[before + round_ * count:])
  pool = _load_train(config, config.task.name)
  shown_indices = [i for i, e in enumerate(pool) if e.rationale][:shown]
  others = [e for i, e in enumerate(pool) if i not in set(shown_indices)]
  rest = others[held_out:]
  if not rest or count > len(rest):
    advice = f"; set task.questions_per_round to {len(rest)} or less, or to 0 for all of them" if rest else ""
    raise ValueError(f"{config.task.name} has {len(pool)} train questions, of which {len(pool) - len(rest)} are set "
                     f"apart; {max(1, count)} are asked for in a round{advice}")
  # Each round continues where the previous one ended, and wraps around at the end.
  round_questions = [rest[i % len(rest)] for i in range(round_ * count, (round_ + 1) * count)] if count else rest
  return Questions([pool[i] for i in shown_indices[:few]], others[:held_out], round_questions)


def list_round_keys(config: ml_collections.ConfigDict) -> tuple[str, ...]:
  """Returns the config keys that determine which questions a round asks, apart from those shown or held out."""
  held_out = ("merge.auto.questions",) if config.merge.base_weight == "auto" else ()
  shown = ("eval.protocol", "eval.few_shot", "eval.shots_file") if count_eval_shots(config) else ()
  task = (f"task.{key}" for key in ("name", "source", "fields", "kind", "questions_per_round"))
  return "seed", *task, "prompt", *held_out, *shown


def count_worked(config: ml_collections.ConfigDict) -> tuple[int, int]:
  """Counts the in-domain train questions with a worked answer, and all of them; not for generated tasks."""
  pool = load_questions(config, config.task.name, split="train")
  return sum(bool(e.rationale) for e in pool), len(pool)


def count_eval_shots(config: ml_collections.ConfigDict) -> int:
  """Returns how many worked examples `eval.protocol` shows for the in-domain task."""
  return protocols.get_protocol(config, config.task.name).few_shot


def load_shots(config: ml_collections.ConfigDict, entry: str) -> list[Example]:
  """Returns the worked examples that `eval.protocol` shows before a task's test questions.

  They come from `eval.shots_file` if it has any for the task, else from the task's own train split, else from that of
  the in-domain task if its answers are of the same kind. No round and no `merge.auto` asks them.

  Raises:
    UserError: when there are too few, or one is a test question.
  """
  name, file = get_task_name(entry), config.eval.shots_file
  if get_measure(config, entry) != "answer":
    return []
  count, kind = protocols.get_protocol(config, name).few_shot, protocols.answer_kind(config, name)
  if not count:
    return []
  sources = [file] if file and shots.read_examples(file, name, kind) else [
      source for source in dict.fromkeys((entry, config.task.name))
      if "train" in tasks.splits(get_task_name(source))
      and protocols.answer_kind(config, get_task_name(source)) == kind]
  examples: dict[str, list[Example]] = {}
  for origin in sources:
    pool = shots.read_examples(file, name, kind) if origin == file else _load_train(
        config, origin, count if tasks.is_generated(get_task_name(origin)) else None)
    # `load_round` excludes those of the in-domain task.
    examples[origin] = [e for e in pool if e.rationale][:count]
  origin = max(examples, key=lambda origin: len(examples[origin]), default="")
  asks = f"config.eval.protocol={config.eval.protocol} shows {count} worked example{'s' * (count > 1)}"
  if not examples.get(origin):
    raise UserError(f"{asks}, and task {name} has none: they come from its train split, or from the in-domain task's "
                    f"where that has answers of its kind ({kind}); give --config.eval.shots_file=FILE.jsonl, rows with "
                    "question, answer and rationale, or --config.eval.few_shot=0")
  if len(examples[origin]) < count:
    where = file if origin == file else f"the train split of {get_task_name(origin)}"
    raise UserError(f"{asks}, and {where} has {len(examples[origin])} for task {name}; give more in "
                    f"--config.eval.shots_file, or --config.eval.few_shot={len(examples[origin])}")
  if origin != entry:
    limit = config.task.eval_questions if tasks.is_generated(name) else None
    tests = {_strip_spaces(e.question) for e in load_questions(config, entry, split="test", count=limit)}
    for e in examples[origin]:
      if _strip_spaces(e.question) in tests:
        raise UserError(f"{e.id}: {e.question[:60]!r} is a test question of {name}, so it is no worked example for it; "
                        "give others in --config.eval.shots_file")
  return examples[origin]


def load_general_questions(config: ml_collections.ConfigDict, entry: str) -> list[Example]:
  """Returns the questions of a task of `merge.auto.general`: of its train split, without those shown in prompts.

  Raises:
    ValueError: when there are too few.
  """
  count, shown = config.merge.auto.questions, {_strip_spaces(e.question) for e in load_shots(config, entry)}
  pool = load_questions(config, entry, split="train",
                        count=count + len(shown) if tasks.is_generated(get_task_name(entry)) else None)
  examples = [e for e in pool if _strip_spaces(e.question) not in shown][:count]
  if len(examples) < count:
    raise ValueError(f"{get_task_name(entry)}/train holds {len(examples)} questions, {count} were asked for")
  return examples


def _load_train(config: ml_collections.ConfigDict, entry: str, count: int | None = None) -> list[Example]:
  """Loads train questions without those of `eval.shots_file`."""
  file = config.eval.shots_file
  shown = {_strip_spaces(question) for question in shots.read_questions(file)} if file else ()
  pool = load_questions(config, entry, split="train", count=None if count is None else count + len(shown))
  return [e for e in pool if _strip_spaces(e.question) not in shown][:count]


def _strip_spaces(question: str) -> str:
  """Removes all whitespace, so that questions compare equal however they are spaced."""
  return "".join(question.split())


def load_tests(config: ml_collections.ConfigDict) -> dict[str, list[Example]]:
  """Returns the test questions of every task by name, in-domain first, at most `task.eval_questions` of each.

  A task with fewer questions is reported once on stderr.
  """
  limit, tests = config.task.eval_questions or None, {}
  for entry in list_own_entries(config):
    name = get_task_name(entry)
    examples = load_questions(config, entry, split="test", count=limit if tasks.is_generated(name) else None)[:limit]
    if limit and len(examples) < limit:
      print_once(f"note: task {name} has {len(examples)} test questions, and all of them are asked "
                 f"(config.task.eval_questions={limit})")
    tests[name] = examples
  return tests


def count_drift_questions(config: ml_collections.ConfigDict) -> int:
  """Returns the maximum number of test questions per task for the drift of a round's models; 0 measures none."""
  return min(config.analysis.drift, config.task.eval_questions or config.analysis.drift)


def load_test_choices(config: ml_collections.ConfigDict) -> dict[str, list[Choice]]:
  """Returns the test questions, by name, of the tasks whose options are scored by likelihood."""
  return {get_task_name(entry): load_choices(config, entry, split="test", count=config.task.eval_questions)
          for entry in list_own_entries(config) if get_measure(config, entry) == "choices"}


def load_choices(config: ml_collections.ConfigDict, entry: str, *, split: str, count: int) -> list[Choice]:
  """Loads the first `count` questions (0 for all) of a task with options to score."""
  name = get_task_name(entry)
  try:
    return tasks.load_choices(name, split=split, seed=_TEST_SEED if split == "test" else config.seed,
                              source=get_source(config, entry))[:count or None]
  except UserError as e:
    raise UserError(str(e) if str(e).startswith("task ") else f"task {name}: {e}") from e


def needs_likelihood(config: ml_collections.ConfigDict) -> bool:
  """Returns whether an evaluation scores options or texts by likelihood."""
  return bool(config.eval.texts) or any(get_measure(config, entry) == "choices" for entry in list_own_entries(config))


def load_passages(config: ml_collections.ConfigDict) -> dict[str, list[str]]:
  """Loads the passages of each text of `eval.texts`, by name."""
  passages = {}
  for entry in config.eval.texts:
    name, _, source = entry.partition("=")
    passages[name] = tasks.load_text("" if source else name, source=source, count=count_passages(config) or None)
  return passages


def count_passages(config: ml_collections.ConfigDict) -> int:
  """Returns the maximum number of passages per text; 0 means all."""
  return config.eval.passages or config.task.eval_questions


def list_own_entries(config: ml_collections.ConfigDict) -> tuple[str, ...]:
  """Returns the entries of all tasks except lm_eval's, which loads its own questions."""
  return tuple(e for e in (config.task.name, *config.task.ood) if get_measure(config, e) != "lm_eval")


def list_lm_eval_tasks(config: ml_collections.ConfigDict) -> list[str]:
  """Returns the names of lm_eval's tasks in `task.ood`."""
  return [entry.removeprefix(LM_EVAL) for entry in config.task.ood if get_measure(config, entry) == "lm_eval"]


def get_measure(config: ml_collections.ConfigDict, entry: str) -> str:
  """Returns how a task is measured: `answer` (generated and judged), `choices` (likelihood of options) or `lm_eval`.

  >>> from configs import tiny
  >>> [get_measure(tiny.get_config(), entry) for entry in ("piqa", "svamp=file:DIR", "lm_eval:piqa")]
  ['choices', 'answer', 'lm_eval']
  """
  name = get_task_name(entry)
  if name.startswith(LM_EVAL):
    return "lm_eval"
  if name in config.eval.by_likelihood:
    return "choices"
  return "answer" if name == config.task.name else tasks.default_measure(name)  # the in-domain task is sampled


def load_questions(config: ml_collections.ConfigDict, entry: str, *, split: str,
                   count: int | None = None) -> list[Example]:
  """Loads questions of a task, given its entry in the config: `NAME` or `NAME=SOURCE`.

  Raises:
    ValueError: when there are fewer than `count`.
  """
  if tasks.is_generated(name := get_task_name(entry)) and count is None:
    raise ValueError(f"{name} makes as many questions as it is asked for: expected 1 or more")
  seed, custom = _TEST_SEED if split == "test" else config.seed, _custom_options(config, name)
  try:
    return list(_load_cached(name, split, count, seed, get_source(config, entry),
                             tuple(sorted(custom["fields"].items())), custom["kind"]))
  except UserError as e:
    raise UserError(str(e) if str(e).startswith("task ") else f"task {name}: {e}") from e


def count_questions(config: ml_collections.ConfigDict) -> tuple[int, int]:
  """Counts the questions that a round asks and the test questions to answer.

  Uses published sizes where the questions would have to be downloaded.
  """
  num_questions = _count_split(config, config.task.name, "train", config.task.questions_per_round)
  return num_questions, sum(n for entry, n in zip(list_own_entries(config), count_tests(config), strict=True)
                            if get_measure(config, entry) == "answer")


def count_tests(config: ml_collections.ConfigDict) -> list[int]:
  """Counts the test questions of each entry of `list_own_entries`, see `count_questions`; 0: all, of unknown number."""
  return [_count_split(config, entry, "test", config.task.eval_questions) for entry in list_own_entries(config)]


def describe_tests(config: ml_collections.ConfigDict) -> str:
  """Describes in a line how many of each task's test questions are asked, with published sizes as in `count_questions`.

  More lines follow for tasks whose default source differs from the questions of the paper.
  """
  parts, notes = [], []
  for entry, count in zip(list_own_entries(config), count_tests(config), strict=True):
    name, published = get_task_name(entry), not get_source(config, entry)
    if tasks.is_generated(name):
      parts.append(f"{name} {count} (generated)")
      continue
    if is_remote(config, entry):
      usable, records = tasks.published_size(name, "test"), tasks.published_records(name, "test")
    else:
      usable = len(load_questions(config, entry, split="test"))
      records = tasks.count_records(name, "test", source=get_source(config, entry), **_custom_options(config, name))
    judged = f" ({usable} have an answer that can be judged)" if usable != records else ""
    parts.append(f"{name} {count or 'all'} of {records or 'an unknown number'}{judged}")
    if published and (note := tasks.paper_note(name)):
      notes.append(note)
  parts += [f"{LM_EVAL}{name} up to {config.task.eval_questions or 'all'}" for name in list_lm_eval_tasks(config)]
  parts += [f"{get_task_name(entry)} up to {count_passages(config) or 'all'} passages" for entry in config.eval.texts]
  return "\n".join((f"test questions: {'; '.join(parts)}", *notes))


def _count_split(config: ml_collections.ConfigDict, entry: str, split: str, limit: int) -> int:
  if tasks.is_generated(name := get_task_name(entry)):
    return limit
  # The size of a custom task on the hub is unknown.
  known = (tasks.published_size(name, split) or limit) if is_remote(config, entry) else len(
      load_questions(config, entry, split=split))
  return min(limit, known) if limit else known


def compute_digests(config: ml_collections.ConfigDict) -> dict[str, str]:
  """Returns digests of the loaded questions by split, because a source may change between two starts of a run."""
  result = {}
  for split, entries in (("train", (config.task.name,)), ("test", list_own_entries(config))):
    entries = [e for e in entries if not tasks.is_generated(get_task_name(e))
               and split in tasks.splits(get_task_name(e))]
    content: list[object] = [(e.id, e.answer, e.rationale) for entry in entries for e in (
        load_questions(config, entry, split="test") if split == "test" else _load_train(config, entry))]
    if split == "test":  # includes worked examples and texts
      content += [(e.question, e.rationale) for entry in list_own_entries(config) for e in load_shots(config, entry)]
      content += list(load_passages(config).values())
    elif config.eval.shots_file:
      content += shots.read_questions(config.eval.shots_file)
    result[f"{split} questions"] = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
  return result


def is_remote(config: ml_collections.ConfigDict, entry: str) -> bool:
  """Returns whether a task's questions come over the network."""
  name, source = get_task_name(entry), get_source(config, entry)
  has_source = bool(source) or tasks.has_default_source(name)
  return not tasks.is_generated(name) and has_source and not source.startswith("file:")


def has_remote_texts(config: ml_collections.ConfigDict) -> bool:
  """Returns whether any of `eval.texts` comes over the network: a named corpus, or a source that is no file."""
  return any(not entry.partition("=")[2].startswith("file:") for entry in config.eval.texts)


def get_source(config: ml_collections.ConfigDict, entry: str) -> str:
  """Returns the source that the config gives for an entry; empty for the task's default."""
  name, _, source = entry.partition("=")
  return source or (config.task.source if name == config.task.name else "")


def get_task_name(entry: str) -> str:
  """Returns the task name of an entry of the config.

  >>> get_task_name("svamp=file:data/SVAMP.json")
  'svamp'
  """
  return entry.partition("=")[0]


def _custom_options(config: ml_collections.ConfigDict, name: str) -> dict[str, Any]:
  """Returns the config's description of the records of `custom`; empty for other tasks."""
  is_custom = name == "custom"
  return {"fields": config.task.fields.to_dict() if is_custom else {}, "kind": config.task.kind if is_custom else ""}


@functools.lru_cache(maxsize=64)
def _load_cached(name: str, split: str, count: int | None, seed: int, source: str,
                 fields: tuple[tuple[str, str], ...], kind: str) -> list[Example]:
  return tasks.load(name, split=split, count=count, seed=seed, source=source, fields=dict(fields), kind=kind)
