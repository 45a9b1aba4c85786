"""The questions of rounds and tests, from files of a user."""

import json

import pytest

from configs import tiny
from imm_jax import config_checks
from imm_jax.errors import UserError
from imm_jax.stages import select
from imm_jax.stages.round_questions import compute_digests, load_round
from imm_jax.stages.task_entries import get_tasks


def custom_task(folder, **records):
  folder.mkdir()
  for split in ("train", "test"):
    rows = [{"question": f"{split} {i}?", "answer": str(i), **records} for i in range(9)]
    (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
  config = tiny.get_config()
  config.task.update({"name": "custom", "source": f"file:{folder}", "questions_per_round": 4, "eval_questions": 2})
  return config


def test_worked_examples_need_worked_answers(tmp_path):
  config = custom_task(tmp_path / "a")
  config_checks.validate(config)
  config.prompt.few_shot = 2
  with pytest.raises(UserError, match=r"few_shot=2: custom has no worked answers .*task.fields.rationale"):
    config_checks.validate(config)


def _half_worked(folder, worked=(1, 3, 4, 6)):
  config = custom_task(folder)
  rows = [{"question": f"train {i}?", "answer": str(i), **({"why": f"It is {i}."} if i in worked else {})}
          for i in range(9)]
  (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
  config.task.fields.rationale = "why"
  return config


def test_shots_have_rationales(tmp_path):
  """Worked examples and real answers are rows with a worked answer; the others are asked."""
  config = _half_worked(tmp_path / "a")
  config.prompt.few_shot, config.task.questions_per_round = 3, 0
  config_checks.validate(config)
  tasks = get_tasks(config)
  found = load_round(tasks, 0)
  assert len(found.shots) == 3
  assert all(e.rationale for e in found.shots)
  assert len(found.round_questions) == 6
  assert not {e.id for e in found.round_questions} & {e.id for e in found.shots}
  assert sum(not e.rationale for e in found.round_questions) == 5
  assert len(select.worked_answers(tasks, 0)) == 1


@pytest.mark.parametrize(("change", "message"), [
    ({"prompt.few_shot": 5}, r"few_shot=5: custom .*too few: 4 of its 9 train questions have one"),
    ({"prompt.few_shot": 4, "method": "real"}, r"no worked answers.*: 4 of its 9 .* none of the 4 of round 0")])
def test_too_few_worked_answers_are_counted(change, message, tmp_path):
  config = _half_worked(tmp_path / "a")
  config.update_from_flattened_dict(change)
  with pytest.raises(UserError, match=message):
    config_checks.validate(config)


def test_shots_are_first_where_all_are_worked(tmp_path):
  """Which examples a prompt shows does not change where all rows have a worked answer."""
  config = _half_worked(tmp_path / "a", worked=range(9))
  config.prompt.few_shot = 3
  tasks = get_tasks(config)
  pool, found = tasks.in_domain.load(split="train"), load_round(tasks, 0)
  assert (found.shots, found.round_questions) == (pool[:3], pool[3:7])


def test_short_test_sets_are_asked_whole(tmp_path, capsys):
  """They have fewer questions than asked for."""
  config = custom_task(tmp_path / "a")
  svamp = tmp_path / "svamp.jsonl"
  svamp.write_text("\n".join(json.dumps({"Body": f"There are {i}.", "Question": "How many?", "Answer": i, "ID": str(i)})
                             for i in range(5)))
  config.task.update({"eval_questions": 7, "ood": ("groups", f"svamp=file:{svamp}")})
  for _ in range(2):
    config_checks.validate(config, trains=False)
  assert {name: len(found) for name, found in get_tasks(config).load_tests().items()} == {
      "custom": 7, "groups": 7, "svamp": 5}
  assert get_tasks(config).count_tests() == [7, 7, 5]
  told = [line for line in capsys.readouterr().err.splitlines() if "all of them are asked" in line]
  assert told == ["note: task svamp has 5 test questions, and all of them are asked (config.task.eval_questions=7)"]
  single = tmp_path / "single.jsonl"
  single.write_text(svamp.read_text().splitlines()[0])
  config.task.ood = (f"svamp=file:{single}",)
  config_checks.validate(config, trains=False)
  assert ("note: task svamp has 1 test question, and it is asked (config.task.eval_questions=7)"
          in capsys.readouterr().err.splitlines())


def test_questions_that_change_are_noticed(tmp_path):
  first, same, other = (compute_digests(get_tasks(custom_task(tmp_path / name, **more))) for name, more in (
      ("a", {}), ("b", {}), ("c", {"answer": "7"})))
  assert first == same
  assert all(first[split] != other[split] for split in first)
  assert set(first) == {"train questions", "test questions"}


def test_dry_run_counts_test_questions(tmp_path):
  """It says how many are asked and of how many."""
  config = custom_task(tmp_path / "a")
  (tmp_path / "a" / "test.jsonl").write_text("\n".join(
      json.dumps({"question": "Test?", "answer": a}) for a in ("1", "2", "none", "1")))
  config.task.update({"eval_questions": 1000, "ood": ("groups", "mawps", "asdiv", "sciq")})
  assert get_tasks(config).count_tests() == [3, 1000, 520, 1000, 1000]
  first, note = get_tasks(config).describe_tests().splitlines()
  assert first == ("test questions: custom 3 of 4 (3 have an answer that can be judged); groups 1000 (generated); "
                   "mawps 520 of 520; asdiv 1000 of 2305 (2215 have an answer that can be judged); sciq 1000 of 1000")
  assert "mawps: hf:MU-NLPC/Calc-mawps has 520 other questions than the paper's 2065" in note
  config.task.ood = ("tabmwp",)
  with pytest.raises(UserError, match="give tabmwp=file:PATH"):
    config_checks.validate(config, downloads=False)
