"""The tasks of a run: where their questions come from, how many are asked, and how their answers are measured."""

import functools
from typing import Any, NamedTuple

import ml_collections

from imm_jax import tasks
from imm_jax.errors import UserError, print_once
from imm_jax.tasks import protocols
from imm_jax.tasks.base import Choice, Example

# Prefix of the names of lm-evaluation-harness's tasks.
LM_EVAL = "lm_eval:"
# Test questions do not depend on the run's seed, like those of a published data set.
_TEST_SEED = 0


class RunTask(NamedTuple):
  """Holds a task as a config names it: `NAME` or `NAME=SOURCE`.

  Attributes:
    name: name of the task.
    source: source of its questions; empty for the task's default.
    measure: how it is measured: `answer` (generated and judged), `choices` (likelihood of options) or `lm_eval`.
    seed: seed of the order of its train questions.
    fields: of task `custom`, the names of its records' fields, as pairs.
    custom_kind: of task `custom`, the kind of its answers; empty for others.
  """

  name: str
  source: str
  measure: str
  seed: int
  fields: tuple[tuple[str, str], ...] = ()
  custom_kind: str = ""

  @property
  def kind(self) -> str:
    """Returns the kind of (most of) its answers: `number`, `latex` or `choice`."""
    return self.custom_kind or protocols.answer_kind(self.name)

  @property
  def is_generated(self) -> bool:
    """Returns whether it generates its questions, and so has no fixed number of them."""
    return tasks.is_generated(self.name)

  @property
  def is_remote(self) -> bool:
    """Returns whether its questions come over the network."""
    has_source = bool(self.source) or tasks.has_default_source(self.name)
    return not self.is_generated and has_source and not self.source.startswith("file:")

  @property
  def splits(self) -> tuple[str, ...]:
    """Returns the splits that it has."""
    return tasks.splits(self.name)

  def load(self, *, split: str, count: int | None = None) -> list[Example]:
    """Loads the first `count` of its questions, or all of them.

    Raises:
      ValueError: when there are fewer than `count`.
    """
    if self.is_generated and count is None:
      raise ValueError(f"{self.name} makes as many questions as it is asked for: expected 1 or more")
    try:
      return list(_load(self.name, split, count, self._seed(split), self.source, self.fields, self.custom_kind))
    except UserError as e:
      raise self._name_in(e) from e

  def load_choices(self, *, split: str, count: int) -> list[Choice]:
    """Loads the first `count` of its questions, 0 for all, as options to score."""
    try:
      return tasks.load_choices(self.name, split=split, seed=self._seed(split), source=self.source,
                                fields=dict(self.fields) or None)[:count or None]
    except UserError as e:
      raise self._name_in(e) from e

  def count_questions(self, split: str, limit: int) -> int:
    """Counts the questions to ask of a split, at most `limit` unless it is 0; 0 means all, of unknown number.

    Uses the published size where the questions would have to be downloaded.
    """
    if self.is_generated:
      return limit
    # The size of a custom task on the hub is unknown.
    known = (tasks.published_size(self.name, split) or limit) if self.is_remote else len(self.load(split=split))
    return min(limit, known) if limit else known

  def describe_tests(self, limit: int) -> str:
    """Describes how many of its test questions are asked, see `count_questions`, and of how many."""
    count = self.count_questions("test", limit)
    if self.is_generated:
      return f"{self.name} {count} (generated)"
    if self.is_remote:
      usable, records = tasks.published_size(self.name, "test"), tasks.published_records(self.name, "test")
    else:
      usable = len(self.load(split="test"))
      records = tasks.count_records(self.name, "test", source=self.source, fields=dict(self.fields),
                                    kind=self.custom_kind)
    judged = f" ({usable} have an answer that can be judged)" if usable != records else ""
    return f"{self.name} {count or 'all'} of {records or 'an unknown number'}{judged}"

  def _seed(self, split: str) -> int:
    return _TEST_SEED if split == "test" else self.seed

  def _name_in(self, error: UserError) -> UserError:
    """Returns an error that names the task."""
    return UserError(str(error) if str(error).startswith("task ") else f"task {self.name}: {error}")


class Tasks(NamedTuple):
  """Holds the tasks and texts of a run, how many questions of each are asked, and how.

  Attributes:
    in_domain: the task that is sampled, trained and evaluated.
    ood: the tasks that are only evaluated, those of lm_eval included.
    general: the tasks on which `merge.auto` measures what a merge preserves; none if it is not used.
    per_round: number of train questions of a round; 0 for all.
    per_test: largest number of test questions of each task; 0 for all.
    held_out: number of train questions of `in_domain` and of each of `general` that are held out for `merge.auto`.
    drift: largest number of test questions of each task on which models are compared with the base; 0 for none.
    few_shot: number of worked examples in the prompts of samples for training.
    protocol: how test questions are asked.
    shots_file: a file of worked examples for these; empty for those of train splits.
    texts: the texts whose likelihood is measured, `NAME` or `NAME=SOURCE`.
    passages: largest number of passages of each text; 0 for all.
  """

  in_domain: RunTask
  ood: tuple[RunTask, ...]
  general: tuple[RunTask, ...]
  per_round: int
  per_test: int
  held_out: int
  drift: int
  few_shot: int
  protocol: protocols.ProtocolSettings
  shots_file: str
  texts: tuple[str, ...]
  passages: int

  @property
  def names(self) -> tuple[str, ...]:
    """Returns the names of all tasks, in-domain first."""
    return tuple(entry.name for entry in (self.in_domain, *self.ood))

  @property
  def own(self) -> tuple[RunTask, ...]:
    """Returns all tasks, in-domain first, except lm_eval's, which loads its own questions."""
    return tuple(entry for entry in (self.in_domain, *self.ood) if entry.measure != "lm_eval")

  @property
  def lm_eval(self) -> tuple[str, ...]:
    """Returns the names that lm_eval gives to its tasks."""
    return tuple(entry.name.removeprefix(LM_EVAL) for entry in self.ood if entry.measure == "lm_eval")

  @property
  def needs_likelihood(self) -> bool:
    """Returns whether an evaluation scores options or texts by likelihood."""
    return bool(self.texts) or any(entry.measure == "choices" for entry in self.own)

  @property
  def has_remote_texts(self) -> bool:
    """Returns whether any of the texts comes over the network: a named corpus, or a source that is no file."""
    return any(not text.partition("=")[2].startswith("file:") for text in self.texts)

  def get_protocol(self, entry: RunTask) -> protocols.Protocol:
    """Returns the rules by which a task's test questions are asked."""
    return protocols.get_protocol(self.protocol, entry.name, entry.kind)

  def load_tests(self) -> dict[str, list[Example]]:
    """Returns the test questions of `own` by name.

    A task with fewer questions than asked for is reported once on stderr.
    """
    limit, tests = self.per_test or None, {}
    for entry in self.own:
      examples = entry.load(split="test", count=limit if entry.is_generated else None)[:limit]
      if limit and len(examples) < limit:
        number = ("1 test question, and it is asked" if len(examples) == 1 else
                  f"{len(examples)} test questions, and all of them are asked")
        print_once(f"note: task {entry.name} has {number} (config.task.eval_questions={limit})")
      tests[entry.name] = examples
    return tests

  def load_test_choices(self) -> dict[str, list[Choice]]:
    """Returns the test questions, by name, of the tasks whose options are scored by likelihood."""
    return {entry.name: entry.load_choices(split="test", count=self.per_test) for entry in self.own
            if entry.measure == "choices"}

  def load_passages(self) -> dict[str, list[str]]:
    """Loads the passages of each text, by name."""
    passages = {}
    for text in self.texts:
      name, _, source = text.partition("=")
      passages[name] = tasks.load_text("" if source else name, source=source, count=self.passages or None)
    return passages

  def count_tests(self) -> list[int]:
    """Counts the test questions to ask of each of `own`; see `RunTask.count_questions`."""
    return [entry.count_questions("test", self.per_test) for entry in self.own]

  def count_questions(self) -> tuple[int, int]:
    """Counts the questions that a round asks and the test questions to answer; see `RunTask.count_questions`."""
    tests = zip(self.own, self.count_tests(), strict=True)
    return (self.in_domain.count_questions("train", self.per_round),
            sum(count for entry, count in tests if entry.measure == "answer"))

  def describe_tests(self) -> str:
    """Describes in a line how many of each task's test questions are asked; see `RunTask.describe_tests`.

    More lines follow for tasks whose default source differs from the questions of the paper.
    """
    parts = [entry.describe_tests(self.per_test) for entry in self.own]
    parts += [f"{LM_EVAL}{name} up to {self.per_test or 'all'}" for name in self.lm_eval]
    parts += [f"{text.partition('=')[0]} up to {self.passages or 'all'} passages" for text in self.texts]
    notes = [tasks.paper_note(entry.name) for entry in self.own if not (entry.is_generated or entry.source)]
    return "\n".join((f"test questions: {'; '.join(parts)}", *filter(None, notes)))


def get_tasks(config: ml_collections.ConfigDict) -> Tasks:
  """Returns the tasks of a config."""
  task, evaluation, merge, prompt = config.task, config.eval, config.merge, config.prompt
  chooses = merge.base_weight == "auto"
  return Tasks(
      get_entry(config, task.name), tuple(get_entry(config, str(entry)) for entry in task.ood),
      tuple(get_entry(config, str(entry)) for entry in merge.auto.general) if chooses else (),
      per_round=task.questions_per_round, per_test=task.eval_questions,
      held_out=merge.auto.questions if chooses else 0,
      drift=min(config.analysis.drift, task.eval_questions or config.analysis.drift), few_shot=prompt.few_shot,
      protocol=protocols.ProtocolSettings(evaluation.protocol, evaluation.few_shot, evaluation.max_new_tokens,
                                          prompt.header, prompt.style, tuple(config.sample.stop)),
      shots_file=evaluation.shots_file, texts=tuple(evaluation.texts),
      passages=evaluation.passages or task.eval_questions)


def get_entry(config: ml_collections.ConfigDict, text: str) -> RunTask:
  """Returns a task, given as `NAME` or `NAME=SOURCE`, with what a config says about it.

  >>> from configs import tiny
  >>> [get_entry(tiny.get_config(), text)[:3] for text in ("piqa", "svamp=file:DIR", "lm_eval:piqa")]
  [('piqa', '', 'choices'), ('svamp', 'file:DIR', 'answer'), ('lm_eval:piqa', '', 'lm_eval')]
  """
  if text.startswith(LM_EVAL):
    return RunTask(text, "", "lm_eval", config.seed)
  (name, _, source), task = text.partition("="), config.task
  in_domain = name == task.name  # its answers are sampled, whatever its default measure
  measure = "choices" if name in config.eval.by_likelihood else "answer" if in_domain else tasks.default_measure(name)
  custom: dict[str, Any] = {"fields": tuple(sorted(task.fields.to_dict().items())),
                            "custom_kind": task.kind} if name == "custom" else {}
  return RunTask(name, source or (task.source if in_domain else ""), measure, config.seed, **custom)


@functools.lru_cache(maxsize=64)
def _load(name: str, split: str, count: int | None, seed: int, source: str, fields: tuple[tuple[str, str], ...],
          kind: str) -> list[Example]:
  return tasks.load(name, split=split, count=count, seed=seed, source=source, fields=dict(fields), kind=kind)
