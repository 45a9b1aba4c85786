"""The worked examples that prompts show in evaluation, and the train questions that are none of them."""

import re

from imm_jax.errors import UserError, print_once
from imm_jax.stages.task_entries import RunTask, Tasks
from imm_jax.tasks import answers, custom, shots
from imm_jax.tasks.base import Example
from imm_jax.tasks.protocols import Protocol

# The letter of an option that a question lists.
_OPTION = re.compile(r"\s\(?[A-H]\s?[).:]\s+")
# An answer of each kind, for texts whose own is unknown.
_SOME_GOLD = {"number": "0", "latex": "0", "choice": "A"}
# Characters of a text that are quoted.
_QUOTED = 60


def load_shots(tasks: Tasks, entry: RunTask) -> list[Example]:
  """Returns the worked examples that `eval.protocol` shows before a task's test questions.

  They come from `eval.shots_file` if it has any for the task, else from the task's own train split, else from that of
  the in-domain task if its answers are of the same kind. No round and no `merge.auto` asks them.

  Raises:
    UserError: when there are too few, or one is a test question, or one of the file would not be judged as its own
      answer if a model had written it. For one of a train split that is a warning.
  """
  count, file = tasks.get_protocol(entry).few_shot, tasks.shots_file
  if entry.measure != "answer" or not count:
    return []
  asks = f"config.eval.protocol={tasks.protocol.name} shows {count} worked example{'s' * (count > 1)}"
  examples: dict[RunTask | str, list[Example]] = {}  # by origin: the file, or a task
  if file and (pool := shots.read_examples(file, entry.name, entry.kind, dict(tasks.in_domain.fields))):
    examples[file] = [e for e in pool if e.rationale][:count]
  else:
    for task in dict.fromkeys((entry, tasks.in_domain)):
      if "train" in task.splits and task.kind == entry.kind:
        try:
          pool = load_train(tasks, task, count if task.is_generated else None)
        except UserError as e:
          raise UserError(f"{asks}, and the train split of {task.name} cannot be used: {e}; or give examples alone in "
                          "--config.eval.shots_file=FILE.jsonl, rows with question, answer and rationale") from e
        # `load_round` excludes those of the in-domain task.
        examples[task] = [e for e in pool if e.rationale][:count]
  origin = max(examples, key=lambda origin: len(examples[origin]), default="")
  if not examples.get(origin):
    raise UserError(f"{asks}, and task {entry.name} has none: they come from its train split, or from the in-domain "
                    f"task's where that has answers of its kind ({entry.kind}); give --config.eval.shots_file=FILE"
                    ".jsonl, rows with question, answer and rationale, or --config.eval.few_shot=0")
  if len(examples[origin]) < count:
    where = f"the train split of {origin.name}" if isinstance(origin, RunTask) else file
    raise UserError(f"{asks}, and {where} has {len(examples[origin])} for task {entry.name}; give more in "
                    f"--config.eval.shots_file, or --config.eval.few_shot={len(examples[origin])}")
  if origin != entry:
    questions = entry.load(split="test", count=tasks.per_test if entry.is_generated else None)
    tests = {form for e in questions for form in _list_forms(e.question, entry.kind, with_stem=True)}
    for e in examples[origin]:
      if tests.intersection(_list_forms(e.question, entry.kind)):
        raise UserError(f"{e.id}: {e.question[:60]!r} is a test question of {entry.name}, so it is no worked example "
                        "for it; give others in --config.eval.shots_file")
    if origin == file and entry.kind == "choice" and any(custom.lists_options(e.question) for e in questions):
      for e in examples[origin]:
        _check_options(e, entry.name)
  for e in examples[origin]:
    problem = _describe_misread(e, tasks.get_protocol(entry))
    if problem and origin == file:
      raise UserError(f"{e.id}: {problem}")
    if problem:
      print_once(f"warning: worked example {e.id}: {problem}")
  return examples[origin]


def _check_options(example: Example, task: str) -> None:
  """Raises UserError if an example of multiple choice does not list its options."""
  if not custom.lists_options(example.question):
    raise UserError(f"{example.id}: lists no options, as the questions of task {task} do; give them in a field choices "
                    "(or as task.fields.choices names it), or in the question, as `(A) ... (B) ...`; a row for another "
                    "task needs its name in a field task")
  if example.answer and not custom.lists_options(example.question, example.answer):
    raise UserError(f"{example.id}: its answer is {example.answer}, and it lists no such option")


def _describe_misread(example: Example, protocol: Protocol) -> str:
  """Says how a protocol's own judging misreads an example's worked answer; "" if it reads the example's answer."""
  gold, kind = example.answer, example.kind
  judge = lambda text: answers.verdict(protocol.read(text, kind), gold or _SOME_GOLD[kind], kind, strict=False,
                                       equal=None if gold else lambda *_: False)
  verdict, name = judge(example.rationale), f"eval.protocol={protocol.name}"
  if verdict.correct if gold else verdict.span:
    return ""
  found = f"reads the answer {verdict.span!r:.{_QUOTED}}" if verdict.span else "reads no answer"
  plain = f"The answer is {gold}"
  advice = ("one that ends in `The answer is X`, or the answer in a field answer, too" if not gold else
            f"a text from which it reads {gold}, such as {plain!r}" if judge(plain).correct else
            f"another example, because it does not even read {plain!r}")
  text = f"{'...' * (len(example.rationale) > _QUOTED)}{example.rationale[-_QUOTED:]}"
  return f"from the worked answer {text!r} {name} {found}; expected {advice}"


def load_train(tasks: Tasks, entry: RunTask, count: int | None = None) -> list[Example]:
  """Loads the first `count` train questions of a task, or all, without those of a file of worked examples."""
  shown = {form for question in read_file_questions(tasks, entry) for form in _list_forms(question, entry.kind)}
  pool = entry.load(split="train", count=None if count is None else count + len(shown))
  return [e for e in pool if shown.isdisjoint(_list_forms(e.question, entry.kind, with_stem=True))][:count]


def read_file_questions(tasks: Tasks, entry: RunTask) -> list[str]:
  """Reads the questions of the file of worked examples, if there is one, as they are shown for a task."""
  return shots.read_questions(tasks.shots_file, entry.kind, dict(tasks.in_domain.fields)) if tasks.shots_file else []


def _list_forms(question: str, kind: str, *, with_stem: bool = False) -> set[str]:
  """Returns forms of a question, of which the same question has one in common: its words however they are spaced.

  In multiple choice also its words with the options in any order, and `with_stem` those before the options, because a
  question may be written without them.
  """
  forms = {strip_spaces(question)}
  stem, *options = map(strip_spaces, _OPTION.split(question)) if kind == "choice" else [""]
  if len(options) > 1:
    forms |= {"\n".join((stem, *sorted(options))), *([stem] if with_stem else [])}
  return forms


def strip_spaces(question: str) -> str:
  """Removes all whitespace, so that questions compare equal however they are spaced.

  >>> strip_spaces(" How\\nmany?")
  'Howmany?'
  """
  return "".join(question.split())
