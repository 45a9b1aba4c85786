"""The questions of a config as `config_checks` loads them, entry by entry; all others take `task_entries.Tasks`."""

import ml_collections

from imm_jax.stages import round_questions, worked_examples
from imm_jax.stages.task_entries import get_entry, get_tasks
from imm_jax.tasks.base import Example


def load_round(config: ml_collections.ConfigDict, round_: int) -> round_questions.Questions:
  """Returns the questions of a round."""
  return round_questions.load_round(get_tasks(config), round_)


def load_general_questions(config: ml_collections.ConfigDict, entry: str) -> list[Example]:
  """Returns the held-out questions of a task of `merge.auto.general`."""
  return round_questions.load_general(get_tasks(config), get_entry(config, entry))


def load_shots(config: ml_collections.ConfigDict, entry: str) -> list[Example]:
  """Returns the worked examples before a task's test questions."""
  return worked_examples.load_shots(get_tasks(config), get_entry(config, entry))


def load_tests(config: ml_collections.ConfigDict) -> dict[str, list[Example]]:
  """Returns the test questions by task."""
  return get_tasks(config).load_tests()


def load_passages(config: ml_collections.ConfigDict) -> dict[str, list[str]]:
  """Returns the passages of each text."""
  return get_tasks(config).load_passages()


def count_eval_shots(config: ml_collections.ConfigDict) -> int:
  """Counts the worked examples before the in-domain task's test questions."""
  tasks = get_tasks(config)
  return tasks.get_protocol(tasks.in_domain).few_shot


def count_worked(config: ml_collections.ConfigDict) -> tuple[int, int]:
  """Counts the in-domain train questions with a worked answer, and all of them; not for generated tasks."""
  pool = get_tasks(config).in_domain.load(split="train")
  return sum(bool(e.rationale) for e in pool), len(pool)


def list_own_entries(config: ml_collections.ConfigDict) -> tuple[str, ...]:
  """Returns the entries of all tasks except lm_eval's."""
  return tuple(entry for entry in (config.task.name, *config.task.ood) if get_measure(config, entry) != "lm_eval")


def get_measure(config: ml_collections.ConfigDict, entry: str) -> str:
  """Returns how a task is measured."""
  return get_entry(config, entry).measure


def is_remote(config: ml_collections.ConfigDict, entry: str) -> bool:
  """Returns whether a task's questions come over the network."""
  return get_entry(config, entry).is_remote


def has_remote_texts(config: ml_collections.ConfigDict) -> bool:
  """Returns whether any text comes over the network."""
  return get_tasks(config).has_remote_texts


def get_task_name(entry: str) -> str:
  """Returns the task name of an entry of the config."""
  return entry.partition("=")[0]
