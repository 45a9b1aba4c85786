"""The training data that each method selects in a round, from synthetic samples."""

import json
from pathlib import Path

import ml_collections
import pytest

from configs import common
from imm_jax.errors import UserError
from imm_jax.stages import select as select_stage
from imm_jax.stages.round_questions import load_round
from imm_jax.stages.task_entries import get_tasks

ROUNDS, COUNT = 3, 40


@pytest.fixture
def config() -> ml_collections.ConfigDict:
  config = common.get_config()
  config.task.questions_per_round = COUNT
  config.prompt.few_shot = 2
  return config


def write_samples(folder: Path, config: ml_collections.ConfigDict) -> list[Path]:
  """Writes two samples per question: the first is right, except for every fifth question, where both are wrong; for
  every fourth question both are right and equal."""
  paths = []
  for t in range(ROUNDS):
    rows = []
    for i, e in enumerate(load_round(get_tasks(config), t).round_questions):
      for s in range(2):
        right = i % 5 > 0 and (s == 0 or i % 4 == 0)
        rows.append({"id": e.id, "question": e.question, "text": f"round {t} says {e.answer if right else 'no'}",
                     "finish": "stop", "span": e.answer, "correct": right})
    paths.append(folder / f"samples_{t}.jsonl")
    paths[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
  return paths


def select(config: ml_collections.ConfigDict, folder: Path, round_: int) -> tuple[list[dict], dict]:
  samples = write_samples(folder, config)
  facts = select_stage.select(config, samples[:round_ + 1], round_, folder / "train.jsonl")
  return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()], facts


def texts(rows: list[dict]) -> set[tuple[str, str]]:
  assert len({(r["question"], r["response"]) for r in rows}) == len(rows)
  return {(r["question"], r["response"]) for r in rows}


def right(config: ml_collections.ConfigDict, round_: int) -> set[tuple[str, str]]:
  asked = load_round(get_tasks(config), round_).round_questions
  return {(e.question, f"round {round_} says {e.answer}") for i, e in enumerate(asked) if i % 5}


def worked(config: ml_collections.ConfigDict, round_: int) -> set[tuple[str, str]]:
  return {(e.question, e.rationale) for e in load_round(get_tasks(config), round_).round_questions}


@pytest.mark.parametrize("method", ["imm", "iimm", "star"])
def test_right_samples_are_selected_once(method: str, config, tmp_path: Path):
  config.method = method
  rows, facts = select(config, tmp_path, 1)
  assert texts(rows) == right(config, 1)
  both = sum(i % 4 == 0 and i % 5 > 0 for i in range(COUNT))
  assert facts == {"kept": 32, "real": 0, "of_earlier_rounds": 0, "dropped_wrong": 2 * COUNT - 32 - both,
                   "dropped_unfinished": 0, "dropped_duplicate": both}
  assert {r["source"] for r in rows} == {"synthetic"}


def test_mixture_adds_earlier_rounds(config, tmp_path: Path):
  """It adds a share of each."""
  config.method, config.data.mixture_share = "data_mixture", 0.25
  assert texts(select(config, tmp_path, 0)[0]) == right(config, 0)
  rows, facts = select(config, tmp_path, 2)
  assert right(config, 2) <= texts(rows)
  for t in (0, 1):
    mixed = texts([r for r in rows if r["round"] == t])
    assert len(mixed) == 8
    assert mixed < right(config, t)
  assert facts["of_earlier_rounds"] == 16
  config.seed = 1
  assert texts([r for r in select(config, tmp_path, 2)[0] if r["round"] == 0]) != mixed


def test_accumulation_keeps_all_rounds(config, tmp_path: Path):
  """It adds real answers where that is asked for."""
  config.method = "data_accumulation"
  everything = right(config, 0) | right(config, 1) | right(config, 2)
  assert texts(select(config, tmp_path, 2)[0]) == everything
  config.data.with_real = True
  rows, facts = select(config, tmp_path, 2)
  assert texts(rows) == everything | worked(config, 0) | worked(config, 1) | worked(config, 2)
  assert facts["real"] == sum(r["source"] == "real" for r in rows) == 3 * COUNT


def test_real_trains_on_worked_answers(config, tmp_path: Path):
  config.method = "real"
  facts = select_stage.select(config, [], 1, tmp_path / "train.jsonl")
  rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
  assert texts(rows) == worked(config, 1)
  assert facts == {"kept": COUNT, "real": COUNT, "of_earlier_rounds": 0}


def test_only_the_judged_text_is_learned(config, tmp_path: Path):
  """Unfinished answers are dropped, and a made-up next question is cut off."""
  rows = [{"id": str(i), "question": f"q{i}", "text": text, "finish": finish, "span": "8", "correct": True}
          for i, (text, finish) in enumerate([("The answer is 8.", "stop"), ("The answer is 8. And so", "length"),
                                              ("The answer is 8.\nQ: Who is next? The answer is", "length")])]
  (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  facts = select_stage.select(config, [tmp_path / "samples.jsonl"], 0, tmp_path / "train.jsonl")
  train = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
  assert [(r["question"], r["response"]) for r in train] == [("q0", "The answer is 8."), ("q2", "The answer is 8.")]
  assert facts["dropped_unfinished"] == 1


def test_sampled_real_answer_is_a_sample(config, tmp_path: Path):
  """A real answer that was also sampled counts as one."""
  config.data.real_fraction = 0.5
  asked = load_round(get_tasks(config), 0).round_questions
  rows = [{"id": e.id, "question": e.question, "text": e.rationale, "finish": "stop", "span": e.answer,
           "correct": True} for e in asked[:10]]
  (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  facts = select_stage.select(config, [tmp_path / "samples.jsonl"], 0, tmp_path / "train.jsonl")
  assert (facts["kept"], facts["real"]) == (20, 10)


@pytest.mark.parametrize(("fraction", "real"), [(0.2, 8), (0.5, 32), (0.9, COUNT)])
def test_real_fraction_mixes_in_worked_answers(fraction: float, real: int, config, tmp_path: Path):
  config.data.real_fraction = fraction
  rows, facts = select(config, tmp_path, 1)
  result = texts([r for r in rows if r["source"] == "real"])
  assert len(result) == facts["real"] == real
  assert result <= worked(config, 1)
  assert texts(rows) - result == right(config, 1)


def test_no_right_samples_is_an_error(config, tmp_path: Path):
  """The message has the reason."""
  samples = write_samples(tmp_path, config)
  rows = [json.loads(line) | {"correct": False, "finish": "length"} for line in samples[0].read_text().splitlines()]
  samples[0].write_text("".join(json.dumps(row) + "\n" for row in rows))
  with pytest.raises(UserError, match=r"none of 80 samples is right \(80 cut at max_new_tokens"):
    select_stage.select(config, samples[:1], 0, tmp_path / "out")
  config.data.skip_empty = True
  assert select_stage.select(config, samples[:1], 0, tmp_path / "out")["kept"] == 0
  assert not (tmp_path / "out").read_bytes()


@pytest.mark.parametrize("method", ["data_accumulation", "data_mixture"])
def test_earlier_answers_are_no_empty_round(method: str, config, tmp_path: Path, capsys: pytest.CaptureFixture):
  """Without a right answer of its own it trains on those of the rounds before, unless there are none of those."""
  config.method, config.sft.global_batch = method, 4
  samples = write_samples(tmp_path, config)
  rows = [json.loads(line) | {"correct": False} for line in samples[1].read_text().splitlines()]
  samples[1].write_text("".join(json.dumps(row) + "\n" for row in rows))
  for config.data.skip_empty in (False, True):
    facts = select_stage.select(config, samples[:2], 1, tmp_path / "out")
    chosen = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert facts["kept"] == facts["of_earlier_rounds"] == len(chosen) == (32 if method == "data_accumulation" else 16)
    assert texts(chosen) <= right(config, 0)
    assert "warning: round 1: 0 of 80 samples are right, so that" in capsys.readouterr().err
  samples[0].write_text(samples[1].read_text())
  config.data.skip_empty = False
  with pytest.raises(UserError, match=r"none of 80 samples is right .*nothing to train on.*more questions"):
    select_stage.select(config, samples[:2], 1, tmp_path / "out")
  if method == "data_accumulation":
    config.data.with_real = True
    assert select_stage.select(config, samples[:2], 1, tmp_path / "out")["kept"] == 2 * COUNT


def test_nothing_mixes_into_an_empty_round(config, tmp_path: Path):
  """Real answers are a share of what was sampled, which is nothing."""
  config.data.real_fraction = 0.5
  (tmp_path / "samples.jsonl").write_text(json.dumps(
      {"id": "a", "question": "q", "text": "t", "finish": "length", "span": "", "correct": False}) + "\n")
  with pytest.raises(UserError, match="nothing to train on"):
    select_stage.select(config, [tmp_path / "samples.jsonl"], 0, tmp_path / "out")


@pytest.mark.parametrize(("batch", "warned"), [(32, False), (33, True)])
def test_less_than_a_batch_warns(batch: int, warned: bool, config, tmp_path: Path, capsys: pytest.CaptureFixture):
  config.sft.global_batch = batch
  assert select(config, tmp_path, 0)[1]["kept"] == 32
  assert ("32 answers are all there is to train on, less than a batch of 33" in capsys.readouterr().err) == warned


@pytest.mark.parametrize(("row", "expected"), [("{}", "'id' is missing or no str"), ("[]", "not a JSON object"),
                                               ("nonsense", "not a JSON object")])
def test_damaged_samples_are_named_with_their_line(row: str, expected: str, config, tmp_path: Path):
  good = {"id": "a", "question": "q", "text": "t", "finish": "stop", "span": "1", "correct": True}
  (tmp_path / "samples.jsonl").write_text(json.dumps(good) + "\n" + row + "\n")
  with pytest.raises(UserError, match=f"samples.jsonl:2: {expected}"):
    select_stage.select(config, [tmp_path / "samples.jsonl"], 0, tmp_path / "out")


def test_question_sets_are_disjoint(config):
  """No question is shown, held out and asked at once."""
  config.merge.base_weight, config.merge.auto.questions = "auto", 30
  seen: list[str] = []
  for t in range(ROUNDS):
    result = load_round(get_tasks(config), t)
    assert (len(result.shots), len(result.held_out), len(result.round_questions)) == (2, 30, COUNT)
    seen += [e.question for e in result.round_questions]
  seen += [e.question for e in result.shots + result.held_out]
  assert len(set(seen)) == len(seen) == ROUNDS * COUNT + 32
