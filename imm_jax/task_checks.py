"""Checks the tasks and questions that a config names."""

from collections.abc import Callable, Sequence

import ml_collections

from imm_jax import tasks
from imm_jax.config_keys import require
from imm_jax.errors import UserError, suggest
from imm_jax.methods import is_sampling
from imm_jax.stages import lm_eval_tasks, round_questions, worked_examples
from imm_jax.stages.task_entries import RunTask, Tasks
from imm_jax.tasks import sources


def check_tasks(config: ml_collections.ConfigDict, named: Tasks, trains: bool) -> None:
  """Checks the tasks that a config names, and their sources; `trains` as in `config_checks.validate`."""
  name, equals, source = config.task.name.partition("=")
  if equals:
    raise UserError(f"config.task.name={config.task.name}: expected only the name; give its source with "
                    f"--config.task.name={name} --config.task.source={source}")
  if name == "custom" and not config.task.source:
    raise UserError("config.task.name=custom needs config.task.source=file:PATH (or hf:ID, tfds:NAME)")
  for key, task in (("task.name", named.in_domain), *(("task.ood", task) for task in named.ood)):
    if key == "task.name" or task.measure != "lm_eval":
      _check_name(key, task.name, tasks.JUDGED)
  _check_measures(config, named)
  trained = [("task.name", named.in_domain)] if trains else []
  if trains and named.general:
    names = [task.name for task in named.general]
    if any(task.measure == "lm_eval" for task in named.general):
      raise UserError(f"config.merge.auto.general={config.merge.auto.general}: a task of lm_eval has no train split "
                      "that can be held out here; expected tasks of this package")
    if config.task.name in names or len(set(names)) < len(names):
      raise UserError(f"config.merge.auto.general={config.merge.auto.general}: expected different tasks, and not the "
                      "in-domain one")
    trained += [("merge.auto.general", task) for task in named.general]
  for key, task in trained:
    _check_name(key, task.name, [name for name in tasks.JUDGED if "train" in tasks.splits(name)],
                "has no train split; ")
  for key, entry in (("task.source", f"{config.task.name}={config.task.source}"),
                     *(("task.ood", e) for e in config.task.ood)):
    name, _, source = entry.partition("=")
    if source and tasks.is_generated(name):
      advice = "; for questions of your own add --config.task.name=custom" if key == "task.source" else ""
      raise UserError(f"config.{key}={source}: {name} is generated and has no source{advice}")
    if source:
      try:
        sources.check(source)
      except UserError as e:
        raise UserError(f"config.{key}: {e}") from e
  if config.task.name != "custom" and any(config.task.fields.values()):
    raise UserError(f"config.task.fields: is for task custom; {config.task.name} has its own; for questions of "
                    "your own add --config.task.name=custom")
  if config.task.fields.choices and config.task.kind != "choice":
    raise UserError(f"config.task.fields.choices={config.task.fields.choices}: names options, while "
                    f"config.task.kind={config.task.kind}; give --config.task.kind=choice")
  ood = [task.name for task in named.ood]
  if config.task.name in ood:
    raise UserError(f"config.task.ood has {config.task.name!r}, which is the in-domain task")
  if len(set(ood)) < len(ood):
    raise UserError(f"config.task.ood={config.task.ood} names a task twice")
  if "custom" in ood:
    raise UserError("config.task.ood has 'custom', which only the in-domain task can be")


def _check_measures(config: ml_collections.ConfigDict, named: Tasks) -> None:
  """Checks what is measured without sampled answers: options, texts and lm_eval's tasks."""
  for name in config.eval.by_likelihood:
    if name == "custom" and not (config.task.kind == "choice" and config.task.fields.choices):
      raise UserError("config.eval.by_likelihood has 'custom', whose options are not known: give "
                      "--config.task.kind=choice and the name of their field, --config.task.fields.choices=NAME")
    _check_name("eval.by_likelihood", name, [n for n in tasks.JUDGED if tasks.has_choices(n) or n == "custom"])
    if name not in named.names:
      raise UserError(f"config.eval.by_likelihood has {name!r}, which is neither task.name nor in task.ood")
  names = [entry.partition("=")[0] for entry in config.eval.texts]
  for name, entry in zip(names, config.eval.texts, strict=True):
    if "=" not in entry and name not in tasks.CORPORA:
      raise UserError(f"config.eval.texts has {name!r}: {suggest(name, [*tasks.CORPORA])}, or a text of your own, "
                      f"{name}=file:PATH.txt")
    if "=" in entry:
      try:
        sources.check(entry.partition("=")[2])
      except UserError as e:
        raise UserError(f"config.eval.texts: {e}") from e
  if len(set(names)) < len(names) or {*names}.intersection(named.names):
    raise UserError(f"config.eval.texts={config.eval.texts} names a text twice, or as a task is named")
  require(config, "eval.lm_eval.few_shot", lambda v: -1 <= v < 2**31, "expected 0 or more, or -1 for the task's own")
  lm_eval_tasks.check_lm_eval_tasks(config)


def _check_name(key: str, name: str, allowed: Sequence[str], explanation: str = "") -> None:
  """Raises UserError unless a task's name is allowed; `explanation` says why a known task may not be."""
  if name not in allowed:
    reason = explanation if name in tasks.JUDGED else ""
    raise UserError(f"config.{key} has {name!r}: {reason}{suggest(name, list(allowed))}")


def check_questions(config: ml_collections.ConfigDict, named: Tasks, trains: bool, downloads: bool) -> None:
  """Loads the questions, so that errors in them are reported before any computation."""
  task = named.in_domain
  is_loaded = lambda *read: downloads or not any(task.is_remote for task in read)
  checks: list[tuple[str, Callable[[], object], tuple[RunTask, ...]]] = [
      (f"task.eval_questions={config.task.eval_questions}", named.load_tests, named.own)]
  if downloads or not named.has_remote_texts:
    checks.append((f"eval.texts={config.eval.texts}", named.load_passages, ()))
  if trains:
    checks.append((f"task.questions_per_round={config.task.questions_per_round} in {config.rounds} rounds",
                   lambda: round_questions.load_round(named, config.rounds - 1), (task,)))
  checks += [(f"merge.auto.questions={named.held_out}", lambda other=other: round_questions.load_general(named, other),
              (other, task)) for other in (named.general if trains else ())]
  if trains and config.prompt.few_shot and is_sampling(config):
    checks.append((f"prompt.few_shot={config.prompt.few_shot}", lambda: _check_shots(named), (task,)))
  checks += [(f"eval.protocol={config.eval.protocol}", lambda other=other: worked_examples.load_shots(named, other),
              (other, task)) for other in named.own]
  for setting, check, read in checks:
    if is_loaded(*read):
      try:
        check()
      except ValueError as e:
        raise UserError(f"config.{setting}: {e}") from e
  if downloads:
    lm_eval_tasks.load(config)
  if trains and is_loaded(task) and (
      not is_sampling(config) or config.data.real_fraction or config.data.with_real):
    # Each round needs worked answers, unless it also trains on those of earlier rounds.
    needs_own = not is_sampling(config) or config.data.real_fraction
    for t in range(config.rounds if needs_own else 1):
      asked = round_questions.load_round(named, t).round_questions
      if not any(e.rationale for e in asked):
        raise UserError(f"config.task.name={config.task.name}: has no worked answers, which method=real, "
                        f"data.real_fraction and data.with_real train on: {_describe_worked(task)}, and none "
                        f"of the {len(asked)} of round {t}")


def _check_shots(named: Tasks) -> None:
  task = named.in_domain
  if len(round_questions.load_round(named, 0).shots) < named.few_shot:
    raise ValueError(f"{task.name} has no worked answers to show, or too few: {_describe_worked(task)}; name their "
                     "field in task.fields.rationale, or lower prompt.few_shot (0 for none)")


def _describe_worked(task: RunTask) -> str:
  if task.is_generated:
    return "its questions are generated"
  pool = task.load(split="train")
  return f"{sum(bool(e.rationale) for e in pool)} of its {len(pool)} train questions have one"
