"""Protocols of evaluation: prompts against their rules, stated here anew, and where worked examples come from."""

import json
from pathlib import Path

import ml_collections
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from configs import tiny
from imm_jax import config_checks, loop
from imm_jax.errors import UserError
from imm_jax.runs.run import Checkpoint, Run
from imm_jax.stages import evaluate
from imm_jax.stages.round_questions import compute_digests, load_general, load_round
from imm_jax.stages.task_entries import get_tasks
from imm_jax.stages.worked_examples import load_shots
from imm_jax.tasks import protocols
from imm_jax.tasks.answers import verdict
from imm_jax.tasks.base import Example

HARNESS = protocols.ProtocolSettings("harness")
ODD = "{} {x} \\frac{1}{2} é\u2028 $5\t100%"


def config(protocol: str, **changes: object) -> ml_collections.ConfigDict:
  found = tiny.get_config()
  found.eval.protocol = protocol
  found.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
  return found


def test_harness_prompts_follow_its_rule():
  """A file of examples, stripped, with three newlines between them and after them, then the question; options in a
  line."""
  shots = [(f"How many {i}? {ODD}", f" {ODD}\n\nThe answer is {i}.") for i in range(3)]
  build = lambda task, asked, *rows: protocols.get_protocol(HARNESS, task).prompt(
      asked, [Example(str(i), q, "7", a, "number") for i, (q, a) in enumerate(rows)], None)

  file = "".join(f"Question: {q}\nAnswer: {a}\n\n\n" for q, a in shots)
  for task in ("gsm8k", "svamp", "asdiv", "mawps", "stories"):
    assert build(task, Example("", ODD, "7", "", "number"), *shots) == (
        file.strip() + "\n\n\n" + f"Question: {ODD}\nAnswer:")
  file = "".join(f"Problem:\n{q}\nSolution:\n{a}\n\n\n" for q, a in shots)
  assert build("math", Example("", ODD, "7", "", "latex"), *shots) == (
      file.strip() + "\n\n\n" + f"Problem:\n{ODD}\nSolution:")

  options = ["4 (B) 5", ODD, "(A) and", "none"]
  marked = [f"({letter}) {option}" for letter, option in zip("ABCD", options, strict=True)]
  asked = Example("", "\n".join(["which one ?\n(A) x", *marked]), "B", "", "choice")
  for task, question, joint in (("mmlu_stem", "which one ?", ", "), ("mathqa", "Which one ?", ", "),
                                ("sat_math", "which one ?", " ")):
    assert build(task, asked) == (f"Problem:\n{question}\n(A) x\nWhat of the following is the right choice? "
                                  f"Explain your answer.\n{joint.join(marked)}\nSolution:")
  assert build("asdiv", Example("", "Is it?", "yes", "", "latex")) == "Question: Is it? (Yes or No)\nAnswer:"
  of = lambda task: protocols.get_protocol(HARNESS, task)
  assert [of(task).few_shot for task in ("gsm8k", "mawps", "math", "mathqa", "sat_math")] == [8, 8, 4, 4, 4]
  assert protocols.get_protocol(HARNESS._replace(few_shot=2), "gsm8k").few_shot == 2
  assert of("gsm8k").stop == ("</s>", "\n\nQuestion:", "\n\nProblem:")


# Qwen2.5-Instruct's, as far as it concerns messages without tools.
QWEN = ("{% if messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{% else %}"
        "<|im_start|>system\nYou are Qwen.<|im_end|>\n{% endif %}{% for m in messages %}"
        "{% if m.role != 'system' or not loop.first %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def test_qwen_prompts_equal_transformers():
  """They are what transformers makes of the chat."""
  tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
  tokenizer.chat_template = QWEN
  protocol = protocols.get_protocol(protocols.ProtocolSettings("qwen"), "gsm8k")
  system = "Please reason step by step, and put your final answer within \\boxed{}."
  built = protocol.prompt(Example("", ODD, "7", "", "number"), (), tokenizer)
  assert built == tokenizer.apply_chat_template(
      [{"role": "system", "content": system}, {"role": "user", "content": ODD}], tokenize=False,
      add_generation_prompt=True)
  assert built == (f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{ODD}<|im_end|>\n"
                   "<|im_start|>assistant\n")
  shot = Example("", "1+1?", "2", "So \\boxed{2}.", "number")
  asked = Example("", "2+2?\n(A) 4\n(B) 5", "A", "", "choice")
  assert ("user\n1+1?\nSo \\boxed{2}.\n\n1+1?\nSo \\boxed{2}.\n\n2+2?\nAnswer Choices: (A) 4 (B) 5<|im_end|>"
          in protocol.prompt(asked, [shot, shot], tokenizer))
  assert (protocol.few_shot, protocol.chat) == (0, True)
  with pytest.raises(UserError, match=r"no chat template, which eval\.protocol=qwen needs; .*eval\.protocol=paper"):
    protocol.prompt(asked, (), None)


@pytest.mark.parametrize(("protocol", "kind", "text", "right"), [
    # The last box counts, whatever follows it; without one what would count anyway.
    ("paper", "number", "So \\boxed{7}. The answer is 8.", "8"),
    ("qwen", "number", "\\boxed{7}. The answer is 8.", "7"),
    ("harness", "number", "So \\boxed{7}. The answer is 8.", "7"),
    ("qwen", "number", "\\boxed{6}, no, \\boxed{7}", "7"),
    ("qwen", "number", "The answer is 8.", "8"), ("qwen", "latex", "\\boxed{\\frac{1}{2}} is the answer: 3", "1/2"),
    ("qwen", "number", "\\boxed{7}\nQuestion: What? \\boxed{8}", "7"), ("qwen", "choice", "Thus \\boxed{B}.", "B"),
    ("harness", "latex", "It is \\boxed{3}. The final answer is $4$. I hope it is correct.", "4"),
    # Of letters the harness takes the first that is said, and none that only stands there.
    ("harness", "choice", "The answer is (B). So the choice is C.", "B"), ("harness", "choice", "choice is c", "C"),
    ("paper", "choice", "The answer is (B). The answer is (C).", "C"), ("harness", "choice", "(B)", None)])
def test_answers_are_read_as_the_protocol_does(protocol, kind, text, right):
  read = protocols.get_protocol(protocols.ProtocolSettings(protocol), "gsm8k").read
  answers = {"number": ("6", "7", "8"), "latex": ("1/2", "3", "4"), "choice": "ABC"}[kind]
  found = [a for a in answers if verdict(read(text, kind), a, kind, strict=False).correct]
  assert found == ([] if right is None else [right])


def write(folder: Path, name: str, rows: list[dict]) -> str:
  folder.mkdir(exist_ok=True)
  (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(folder / name)


def rows(split: str, count: int, **more: object) -> list[dict]:
  return [{"question": f"{split} {i}?", "answer": str(i), "rationale": f"It is {i}.", **more} for i in range(count)]


def svamp(folder: Path) -> str:
  return "svamp=file:" + write(folder, "svamp.jsonl", [
      {"Body": f"There are {i}.", "Question": "How many?", "Answer": i, "ID": str(i)} for i in range(5)])


@pytest.fixture
def custom(tmp_path: Path) -> ml_collections.ConfigDict:
  """In domain 30 train questions of a user's, out of domain SVAMP, which has none, and two generated tasks."""
  for split, count in (("train", 30), ("test", 6)):
    write(tmp_path / "data", f"{split}.jsonl", rows(split, count))
  return config("harness", task__name="custom", task__source=f"file:{tmp_path / 'data'}",
                task__fields__rationale="rationale", task__questions_per_round=0, task__eval_questions=5,
                task__ood=("groups", "choice", svamp(tmp_path)))


def test_worked_examples_are_never_asked(custom):
  custom.merge.base_weight, custom.merge.auto.questions, custom.merge.auto.general = "auto", 6, ("groups",)
  config_checks.validate(custom)
  asked = get_tasks(custom)
  tests = asked.load_tests()
  shots = {entry.name: load_shots(asked, entry) for entry in asked.own}
  assert {name: len(found) for name, found in shots.items()} == {"custom": 8, "groups": 8, "choice": 4, "svamp": 8}
  assert shots["svamp"] == shots["custom"]  # the same kind of answer
  assert all(e.rationale.endswith(f"The answer is {e.answer}") for e in shots["custom"])
  found, general = load_round(asked, 0), load_general(asked, asked.general[0])
  assert (len(found.round_questions), len(found.held_out), len(general)) == (30 - 8 - 6, 6, 6)
  for task, shown in shots.items():
    others = (*found.round_questions, *found.held_out, *general, *tests[task])
    assert not {e.question for e in shown} & {e.question for e in others}
  custom.prompt.few_shot = 3
  fewer = load_round(get_tasks(custom), 0)
  assert (fewer.shots, fewer.round_questions) == (shots["custom"][:3], found.round_questions)


def test_file_examples_replace_others(custom, tmp_path):
  """Worked examples of a file take the place of others."""
  before = compute_digests(get_tasks(custom)), load_round(get_tasks(custom), 0)
  own = [{"question": f"own {i}?", "rationale": f"So {i}. The answer is {i}"} for i in range(7)]
  shown = before[1].round_questions[0].question
  custom.eval.shots_file = write(tmp_path, "shots.jsonl", [
      *own, {"question": shown, "answer": "It is 3.\n#### 3"}, *(r | {"task": "groups"} for r in rows("group", 8)),
      *({"question": f"Which, {i}?", "choices": ["x", "y"], "answer": 1, "task": "choice"} for i in range(4))])
  config_checks.validate(custom, trains=False)
  asked = get_tasks(custom)
  groups, _, in_file = asked.ood
  for entry in (asked.in_domain, in_file):
    assert [(e.question, e.rationale) for e in load_shots(asked, entry)] == [
        *((r["question"], r["rationale"]) for r in own), (shown, "It is 3.\n#### 3")]
  assert load_shots(asked, groups)[1].rationale == "It is 1.\nThe answer is 1"
  assert shown not in [e.question for e in load_round(asked, 0).round_questions]  # nor is it asked
  assert all(compute_digests(asked)[split] != before[0][split] for split in before[0])
  settings = lambda of: {stage.name: stage.settings for stage in loop.plan(
      Run(of, tmp_path / "run", base=Checkpoint(Path("base"), "base")))}
  plan = settings(custom)
  assert plan["round_0/samples.jsonl"]["eval.shots_file"] == custom.eval.shots_file
  assert plan["base/eval"]["eval"]["protocol"] == "harness"
  assert "eval.shots_file" not in settings(config("paper"))["round_0/samples.jsonl"]


@pytest.mark.parametrize(("row", "message"), [
    ({"question": "q?"}, r"jsonl:2: has the fields question; expected rows with question, and answer or rationale"),
    ({"question": "q?", "answer": [3]}, r"jsonl:2: 'answer' is empty or no text.*an answer may be a number"),
    ({"question": " ", "answer": "3"}, r"jsonl:2: 'question' is empty or no text"),
    ({"question": "q?", "answer": "x", "rationale": "r"}, r"jsonl:2: its answer 'x' is no number that can be judged"),
    ({"question": "There are 3. How  many?", "rationale": "It is 3."}, r"jsonl:2: .* is a test question of svamp"),
    (None, r"shows 3 worked examples, and .*shots.jsonl has 1 for task custom; give more .*--config.eval.few_shot=1"),
    ("[", r"shots.jsonl")])
def test_bad_example_file_is_one_line(custom, tmp_path, row, message):
  """It holds worked examples that cannot be shown."""
  more = [] if row is None else [row] * 2
  custom.eval.few_shot, custom.task.ood = 3, custom.task.ood[2:]
  path = Path(write(tmp_path, "shots.jsonl", [rows("own", 1)[0], *more]))
  if row == "[":
    path.write_text("[\n")
  custom.eval.shots_file = str(path)
  with pytest.raises(UserError, match=message) as raised:
    config_checks.validate(custom, trains=False)
  assert "\n" not in str(raised.value)


def test_missing_examples_say_what_to_give(custom):
  """A task without worked examples says what to give."""
  custom.task.fields.rationale = ""
  with pytest.raises(UserError, match=r"shows 8 worked examples, and task custom has none: .*eval.shots_file=FILE"):
    config_checks.validate(custom, trains=False)
  custom.eval.few_shot = 0
  config_checks.validate(custom, trains=False)
  custom.eval.shots_file = "x.jsonl"
  with pytest.raises(UserError, match=r"shots_file=x.jsonl: eval.protocol=harness shows no worked examples"):
    config_checks.validate(custom, trains=False)
  for key, value, message in (("few_shot", -2, "expected 0 or more, or -1"),
                              ("protocol", "qwenn", "did you mean qwen")):
    with pytest.raises(UserError, match=message):
      config_checks.validate(config("paper", **{f"eval__{key}": value}))


def test_without_a_protocol_nothing_is_set_apart(custom):
  custom.eval.protocol, custom.prompt.few_shot = "paper", 0
  asked = get_tasks(custom)
  assert len(load_round(asked, 0).round_questions) == 30
  assert all(load_shots(asked, entry) == [] for entry in asked.own)


def test_how_answers_came_is_counted():
  rows_of = [{"tokens": t, "finish": f, "span": s} for t, f, s in (
      (4, "stop", ""), (6, "length", "7"), (11, "stop", "7"))]
  asked = get_tasks(config("harness"))
  assert evaluate.describe_protocol(asked, asked.in_domain, rows_of) == {
      "name": "harness", "shots": 8, "n": 3, "mean_tokens": 7.0, "cut": 0.3333, "unread": 1, "chat": False,
      "max_new_tokens": 40, "stop": list(protocols.get_protocol(HARNESS, "groups").stop)}
  first, second = load_shots(asked, asked.in_domain)[:2]
  digest = lambda *shown: evaluate.describe_protocol(asked, asked.in_domain, rows_of, shown)["shots_digest"]
  others = [(second, first), (first,), (first, second._replace(rationale="It is 0. The answer is 0"))]
  assert digest(first, second) == digest(first._replace(id="x"), second)
  assert len({digest(first, second), *(digest(*other) for other in others)}) == 4
