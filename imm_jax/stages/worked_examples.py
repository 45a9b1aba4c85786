"""The worked examples that prompts show in evaluation, and the train questions that are none of them."""

from imm_jax.errors import UserError
from imm_jax.stages.task_entries import Entry, Tasks
from imm_jax.tasks import shots
from imm_jax.tasks.base import Example


def load_shots(tasks: Tasks, entry: Entry) -> list[Example]:
  """Returns the worked examples that `eval.protocol` shows before a task's test questions.

  They come from `eval.shots_file` if it has any for the task, else from the task's own train split, else from that of
  the in-domain task if its answers are of the same kind. No round and no `merge.auto` asks them.

  Raises:
    UserError: when there are too few, or one is a test question.
  """
  count, file = tasks.get_protocol(entry).few_shot, tasks.shots_file
  if entry.measure != "answer" or not count:
    return []
  examples: dict[Entry | str, list[Example]] = {}  # by origin: the file, or a task
  if file and (pool := shots.read_examples(file, entry.name, entry.kind)):
    examples[file] = [e for e in pool if e.rationale][:count]
  else:
    for task in dict.fromkeys((entry, tasks.in_domain)):
      if "train" in task.splits and task.kind == entry.kind:
        pool = load_train(task, file, count if task.is_generated else None)
        # `load_round` excludes those of the in-domain task.
        examples[task] = [e for e in pool if e.rationale][:count]
  origin = max(examples, key=lambda origin: len(examples[origin]), default="")
  asks = f"config.eval.protocol={tasks.protocol.name} shows {count} worked example{'s' * (count > 1)}"
  if not examples.get(origin):
    raise UserError(f"{asks}, and task {entry.name} has none: they come from its train split, or from the in-domain "
                    f"task's where that has answers of its kind ({entry.kind}); give --config.eval.shots_file=FILE"
                    ".jsonl, rows with question, answer and rationale, or --config.eval.few_shot=0")
  if len(examples[origin]) < count:
    where = f"the train split of {origin.name}" if isinstance(origin, Entry) else file
    raise UserError(f"{asks}, and {where} has {len(examples[origin])} for task {entry.name}; give more in "
                    f"--config.eval.shots_file, or --config.eval.few_shot={len(examples[origin])}")
  if origin != entry:
    questions = entry.load(split="test", count=tasks.per_test if entry.is_generated else None)
    tests = {strip_spaces(e.question) for e in questions}
    for e in examples[origin]:
      if strip_spaces(e.question) in tests:
        raise UserError(f"{e.id}: {e.question[:60]!r} is a test question of {entry.name}, so it is no worked example "
                        "for it; give others in --config.eval.shots_file")
  return examples[origin]


def load_train(entry: Entry, shots_file: str, count: int | None = None) -> list[Example]:
  """Loads the first `count` train questions, or all, without those of a file of worked examples."""
  shown = {strip_spaces(question) for question in shots.read_questions(shots_file)} if shots_file else ()
  pool = entry.load(split="train", count=None if count is None else count + len(shown))
  return [e for e in pool if strip_spaces(e.question) not in shown][:count]


def strip_spaces(question: str) -> str:
  """Removes all whitespace, so that questions compare equal however they are spaced.

  >>> strip_spaces(" How\\nmany?")
  'Howmany?'
  """
  return "".join(question.split())
