"""The train questions of a run: those that a round asks, that its prompts show, and that `merge.auto` holds out."""

from typing import NamedTuple

from imm_jax import files
from imm_jax.stages.task_entries import RunTask, Tasks
from imm_jax.stages.worked_examples import load_shots, load_train, read_file_questions, strip_spaces
from imm_jax.tasks.base import Example


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


def load_round(tasks: Tasks, round_: int) -> Questions:
  """Returns the questions of a round.

  Raises:
    ValueError: when the task has too few questions.
  """
  task, few, held_out, count = tasks.in_domain, tasks.few_shot, tasks.held_out, tasks.per_round
  shown = max(few, tasks.get_protocol(task).few_shot)
  if task.is_generated:
    before = shown + held_out
    pool = load_train(tasks, task, before + (round_ + 1) * count if count else None)
    return Questions(pool[:few], pool[shown:before], pool[before + round_ * count:])
  pool = load_train(tasks, task)
  shown_indices = [i for i, e in enumerate(pool) if e.rationale][:shown]
  others = [e for i, e in enumerate(pool) if i not in set(shown_indices)]
  rest = others[held_out:]
  if not rest or count > len(rest):
    advice = f"; set task.questions_per_round to {len(rest)} or less, or to 0 for all of them" if rest else ""
    raise ValueError(f"{task.name} has {len(pool)} train questions, of which {len(pool) - len(rest)} are set "
                     f"apart; {max(1, count)} are asked for in a round{advice}")
  # Each round continues where the previous one ended, and wraps around at the end.
  round_questions = [rest[i % len(rest)] for i in range(round_ * count, (round_ + 1) * count)] if count else rest
  return Questions([pool[i] for i in shown_indices[:few]], others[:held_out], round_questions)


def count_round(tasks: Tasks) -> int:
  """Counts the questions of a round; 0 if that takes a download because the published size is not known."""
  task, shown = tasks.in_domain, max(tasks.few_shot, tasks.get_protocol(tasks.in_domain).few_shot)
  if tasks.per_round or task.is_generated:
    return tasks.per_round
  if not task.is_remote:
    return len(load_round(tasks, 0).round_questions)
  # All of its worked answers count as such: those that are shown or held out are set apart.
  return max(0, task.count_questions("train", 0) - shown - tasks.held_out)


def list_round_keys(tasks: Tasks) -> tuple[str, ...]:
  """Returns the config keys that determine which questions a round asks, apart from those shown or held out."""
  held_out = ("merge.auto.questions",) if tasks.held_out else ()
  shown = ("eval.protocol", "eval.few_shot", "eval.shots_file") if tasks.get_protocol(tasks.in_domain).few_shot else ()
  task = (f"task.{key}" for key in ("name", "source", "fields", "kind", "questions_per_round"))
  return "seed", *task, "prompt", *held_out, *shown


def load_general(tasks: Tasks, entry: RunTask) -> list[Example]:
  """Returns the held-out questions of a task of `merge.auto.general`: of its train split, none shown in prompts.

  Raises:
    ValueError: when there are too few.
  """
  count, shown = tasks.held_out, {strip_spaces(e.question) for e in load_shots(tasks, entry)}
  pool = entry.load(split="train", count=count + len(shown) if entry.is_generated else None)
  examples = [e for e in pool if strip_spaces(e.question) not in shown][:count]
  if len(examples) < count:
    raise ValueError(f"{entry.name}/train holds {len(examples)} questions, {count} were asked for")
  return examples


def compute_digests(tasks: Tasks) -> dict[str, str]:
  """Returns digests of the loaded questions by split, because a source may change between two starts of a run.

  That of `train` has the questions of `eval.shots_file`, that of `test` the worked examples and texts of evaluation.
  """
  stored = lambda split, entries: [e for e in entries if not e.is_generated and split in e.splits]
  rows = lambda examples: [(e.id, e.answer, e.rationale) for e in examples]
  train: list[object] = [row for entry in stored("train", [tasks.in_domain])
                         for row in rows(load_train(tasks, entry))]
  train += read_file_questions(tasks, tasks.in_domain)
  test: list[object] = [row for entry in stored("test", tasks.own) for row in rows(entry.load(split="test"))]
  test += [(e.question, e.rationale) for entry in tasks.own for e in load_shots(tasks, entry)]
  test += list(tasks.load_passages().values())
  return {f"{split} questions": files.digest_json(content, digits=16)
          for split, content in (("train", train), ("test", test))}
