"""A run whose config is changed where it stands: which stages run again, and what is asked first."""

import dataclasses
import json
from pathlib import Path

import ml_collections
import pytest

from configs import tiny
from imm_jax import files, integrity, loop
from imm_jax.errors import UserError
from imm_jax.estimates import cost
from imm_jax.model import checkpoint_folder
from imm_jax.report import reading
from imm_jax.runs import record as run_record
from imm_jax.runs.run import Checkpoint, Run, Stage
from imm_jax.runs.rundir import RunDir
from imm_jax.stages.round_questions import compute_digests
from imm_jax.stages.task_entries import get_tasks
from tests import TINY

EXTERNAL = {"base": "b", "train questions": "q", "test questions": "t"}


def config(**changes: object) -> ml_collections.ConfigDict:
  found = tiny.get_config()
  found.rounds, found.method = 2, "imm"
  found.update_from_flattened_dict(changes)
  return found


def stages(settings: ml_collections.ConfigDict, root: Path) -> list[Stage]:
  return loop.plan(Run(settings, root, Checkpoint(Path("base"), "base")))


def finish(root: Path, **changes: object) -> None:
  """Makes the directory of a run that is done, of which every output is empty."""
  settings = config(**changes)
  with RunDir(root, settings) as directory:
    made = stages(settings, root)
    directory.begin(made, EXTERNAL, rerun=False)
  record = {"stages": {}}
  for stage in made:
    if stage.name.endswith("/sweep"):
      (root / stage.name).mkdir(parents=True)
    else:
      (root / stage.name).parent.mkdir(parents=True, exist_ok=True)
      (root / stage.name).touch()
    record["stages"][stage.name] = {
        "inputs": run_record.collect_inputs(stage, record, EXTERNAL), "output": f"of {stage.name}", "bytes": 0,
        "facts": {}, **({"costly": True} if stage.costly else {})}
  files.write_text(root / "run.json", json.dumps(record))


def begin(root: Path, *, rerun: bool = False, external: dict[str, str] = EXTERNAL, **changes: object) -> set[str]:
  """The stages that were done before, and are to be run again once the run has begun with changes."""
  settings = config(**changes)
  before = {*run_record.read(root)["stages"]}
  with RunDir(root, settings) as directory:
    made = stages(settings, root)
    directory.record_facts(method=settings.method, tasks={"id": settings.task.name, "ood": list(settings.task.ood)})
    directory.begin(made, external, rerun=rerun)
  record = run_record.read(root)
  return before - ({*record["stages"]} - {*run_record.list_stale(made, record, root, external)})


def _changes(value: object) -> str | None:
  """Names a case by what changes; sets have no order."""
  return None if isinstance(value, dict) else ""


EVALUATIONS = {"base/eval", *(f"round_{t}/eval/{model}" for t in (0, 1) for model in ("sft", "merged"))}
SECOND = {f"round_1/{name}" for name in (
    "samples.jsonl", "train.jsonl", "sft", "eval/sft", "merged", "eval/merged", "analysis.json", "drift.json")}
ANALYSES, DRIFTS = ({f"round_{t}/{name}.json" for t in (0, 1)} for name in ("analysis", "drift"))


@pytest.mark.parametrize(("changes", "again"), [
    ({"eval.num_samples": 4}, EVALUATIONS),
    ({"eval.max_new_tokens": 50}, EVALUATIONS),
    ({"task.ood": ("groups", "compare", "price", "sequence", "choice", "drill")}, EVALUATIONS | DRIFTS),
    ({"task.eval_questions": 100}, EVALUATIONS),
    ({"analysis.examples": 3}, ANALYSES),
    ({"analysis.drift": 3}, DRIFTS),
    ({"merge.sweep": (0.1, 0.9)}, set()),
    ({"rounds": 3}, set()),
    ({"sample.batch_size": 3, "eval.batch_size": 2, "sft.accumulation": 2, "mesh.fsdp": 1}, set()),
    ({"merge.auto.questions": 7}, set()),  # nothing is chosen automatically
    ({"eval.temperature": 0.9, "eval.pass_at_k": (1, 2), "eval.top_p": 0.5, "eval.passages": 3,
      "eval.lm_eval.few_shot": 2}, set()),  # nothing is sampled, no text is scored, lm_eval does not run
    ({"sft.gradient_decay": 0.5, "sft.max_norm": 1.0, "sft.top_share": 0.5, "data.mixture_share": 0.7}, set())],
    ids=_changes)
def test_only_what_depends_on_a_change_runs_again(tmp_path: Path, capsys: pytest.CaptureFixture, changes: dict,
                                                  again: set[str]) -> None:
  finish(tmp_path / "run")
  assert begin(tmp_path / "run", **changes) == again
  said = capsys.readouterr().err
  if again:
    assert f"config.{next(iter(changes))} was " in said
    assert all(name in said for name in again)
  assert begin(tmp_path / "run", **changes) == again  # as if killed before any of them
  assert not capsys.readouterr().err


MERGED = SECOND | {"round_0/merged", "round_0/eval/merged", "round_0/analysis.json", "round_0/drift.json"}
TUNED = MERGED | {"round_0/sft", "round_0/eval/sft"}
SAMPLED = TUNED | {"round_0/samples.jsonl", "round_0/train.jsonl"}


@pytest.mark.parametrize(("changes", "lost"), [
    ({"merge.base_weight": 0.7}, MERGED), ({"merge.method": "ties"}, MERGED), ({"sft.learning_rate": 1e-4}, TUNED),
    ({"sample.top_p": 0.9}, SAMPLED), ({"seed": 1}, SAMPLED), ({"task.questions_per_round": 9}, SAMPLED),
    ({"rounds": 1}, SECOND)], ids=_changes)
def test_what_throws_work_away_is_asked_first(tmp_path: Path, changes: dict, lost: set[str]) -> None:
  root = tmp_path / "run"
  finish(root)
  before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
  refusal = r"which would (run|drop) finished work .*: .*round_1/s.*; give --rerun"
  with pytest.raises(UserError, match=refusal) as refused:
    begin(root, **changes)
  assert before == {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
  assert ("--config.merge.sweep" in str(refused.value)) == ("merge.base_weight" in changes)
  assert begin(root, rerun=True, **changes) == lost
  assert begin(root, **changes) == (set() if "rounds" in changes else lost)  # it was asked


def test_outdated_stages_are_not_reported(tmp_path: Path) -> None:
  """What a start has still to make again is of the config before, until it is made or found to be the same."""
  root, changes = tmp_path / "run", {"sft.learning_rate": 1e-4}
  finish(root)
  done = run_record.read(root)["stages"].keys()
  begin(root, rerun=True, **changes)
  record = run_record.read(root)
  assert {*record["outdated"]} == TUNED
  assert reading.read_stages(root, record, []).keys() == done - TUNED
  settings = config(**changes)
  with RunDir(root, settings) as directory:
    first, second, *_ = [stage for stage in stages(settings, root) if stage.name in TUNED]
    directory.begin(stages(settings, root), EXTERNAL, rerun=False)
    directory.run(dataclasses.replace(first, make=lambda out, _: out.touch() or {}, summarize=lambda _: ""), EXTERNAL)
  assert {*run_record.read(root)["outdated"]} == TUNED - {first.name}
  assert first.name in reading.read_stages(root, run_record.read(root), [])
  assert second.name not in reading.read_stages(root, run_record.read(root), [])


def stop_in_training(root: Path, round_: int = 1) -> Path:
  """Makes the directory of a run that was killed in SFT of a round, of which a training state is left."""
  finish(root)
  record, made = run_record.read(root), stages(config(), root)
  stage = next(stage for stage in made if stage.name == f"round_{round_}/sft")
  identity = run_record.collect_inputs(stage, record, EXTERNAL)
  done = {stage.name: record["stages"][stage.name] for stage in made[:made.index(stage)]}
  files.write_text(root / "run.json", json.dumps(record | {"stages": done}))
  about = root / f"round_{round_}/sft_state/4/about"
  about.mkdir(parents=True)
  files.write_text(about / "metadata", json.dumps({"step": 4, "identity": identity}))
  return root / f"round_{round_}/sft_state"


@pytest.mark.parametrize(("changes", "lost", "finished"), [
    ({"sft.learning_rate": 1e-4}, True, True), ({"merge.base_weight": 0.7}, True, True),
    ({"sample.temperatures": ((0.2, 0.4, 0.6), (0.9,))}, True, True), ({"data.real_fraction": 0.5}, True, True),
    ({"eval.num_samples": 4, "analysis.examples": 3, "merge.sweep": (0.5,)}, False, False),
    ({"sft.save_interval": 3, "data.skip_empty": True}, False, False), ({}, False, False)], ids=_changes)
def test_a_half_trained_state_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture, changes: dict, lost: bool,
                                           finished: bool) -> None:
  """It is named as what would be lost; once that is allowed it is removed before anything runs."""
  root = tmp_path / "run"
  states = stop_in_training(root)
  if lost:
    with pytest.raises(UserError, match=r"lose what is half trained: round_1/sft_state \(step 4 of round_1/sft\)"
                       ) as raised:
      begin(root, **changes)
    assert ("finished work" in str(raised.value)) == finished
    assert states.exists()
  begin(root, rerun=lost, **changes)
  assert states.exists() != lost
  assert ("round_1/sft_state (step 4" in capsys.readouterr().err) == lost
  begin(root, **changes)


def test_only_half_trained_work_is_asked_for(tmp_path: Path) -> None:
  """In the first round nothing else would be lost; other questions count, too."""
  root = tmp_path / "run"
  states = stop_in_training(root, 0)
  with pytest.raises(UserError, match=r"was 0.00055 and is 0.0001 now\), which would lose what is half trained"):
    begin(root, **{"sft.learning_rate": 1e-4, "data.skip_empty": True})
  with pytest.raises(UserError, match=r"train questions is not what it was\), which would .*round_0/sft_state"):
    begin(root, external=EXTERNAL | {"train questions": "others"})
  (states / "4/about/metadata").write_text(json.dumps({"step": 4, "identity": {"settings": "of another training"}}))
  with pytest.raises(UserError, match=r"those of what is half trained\), which would .*lose what is half trained"):
    begin(root)
  (states / "thesis.txt").write_text("mine")
  with pytest.raises(UserError, match=r"holds thesis.txt, which is no training state"):
    begin(root, rerun=True)
  (states / "thesis.txt").unlink()
  begin(root, rerun=True)
  assert not states.exists()


def test_lost_inputs_keep_the_state(tmp_path: Path) -> None:
  """What is made again as it was, since only its file is gone, may be gone on from."""
  root = tmp_path / "run"
  states = stop_in_training(root)
  (root / "round_1/train.jsonl").unlink()
  begin(root, **{"eval.num_samples": 4})
  assert states.exists()


def test_unwritable_manifest_hides_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture) -> None:
  def refuse(*_: object) -> None:
    raise UserError("the disk is full")

  def fail() -> None:
    with RunDir(tmp_path / "run", config()) as directory:
      directory.begin([], EXTERNAL, rerun=False)
      monkeypatch.setattr(integrity, "seal", refuse)
      raise KeyError("what happened")

  with pytest.raises(KeyError, match="what happened"):
    fail()
  assert "manifest.json was not written (the disk is full)" in capsys.readouterr().err
  with RunDir(tmp_path / "run", config()):  # it has been unlocked
    pass


def test_a_method_with_the_same_first_round_keeps_it(tmp_path: Path) -> None:
  """What star samples and trains in round 0 is what imm does there, which is not asked for."""
  root = tmp_path / "run"
  finish(root)
  merges = {f"round_{t}/{name}" for t in (0, 1) for name in ("merged", "eval/merged")}
  analyses = {"round_0/analysis.json", "round_0/drift.json"}
  assert begin(root, rerun=True, method="star") - analyses == SECOND | merges - analyses


def test_other_versions_settings_are_asked_for(tmp_path: Path) -> None:
  """They were counted by another version."""
  root = tmp_path / "run"
  finish(root)
  assert begin(root) == set()
  record = run_record.read(root)
  for name in (name for name in record["stages"] if name.endswith("samples.jsonl")):
    record["stages"][name]["inputs"]["settings"] = record["settings"][name] = "of a version before"
  files.write_text(root / "run.json", json.dumps(record))
  with pytest.raises(UserError, match=r"made with other code .*round_0/samples.jsonl, .*--rerun"):
    begin(root)
  assert begin(root, rerun=True) == SAMPLED


def count_formerly(root: Path, **changes: object) -> None:
  """Makes the record of a finished run one of a version that counted settings without an effect."""
  record = run_record.read(root)
  for stage in stages(config(**changes), root):
    if stage.former_settings is not None:
      digest = run_record.digest_settings(stage.former_settings)
      assert digest != record["stages"][stage.name]["inputs"]["settings"]
      record["stages"][stage.name]["inputs"]["settings"] = digest
      if "settings" in record:
        record["settings"][stage.name] = digest
  files.write_text(root / "run.json", json.dumps(record))


@pytest.mark.parametrize("older", [False, True])
def test_runs_that_counted_more_stay_finished(tmp_path: Path, capsys: pytest.CaptureFixture, older: bool) -> None:
  """They are as if they had counted what counts today."""
  root, auto = tmp_path / "run", {"merge.base_weight": "auto"}
  finish(root, **auto)
  if not older:
    assert begin(root, **auto) == set()
  count_formerly(root, **auto)
  assert begin(root, **auto) == set()
  assert begin(root, **auto, **{"eval.temperature": 0.9}) == set()
  assert "will be run again" not in capsys.readouterr().err


def test_samples_for_scores_choose_no_weight(tmp_path: Path) -> None:
  """They are drawn in evaluation, and the base weight is chosen on greedy answers."""
  auto = {"merge.base_weight": "auto"}
  finish(tmp_path / "run", **auto)
  assert begin(tmp_path / "run", **auto, **{"eval.num_samples": 2}) == EVALUATIONS


@pytest.mark.parametrize("changes", [{"merge.base_weight": 0.7}, {"rounds": 1}, {"method": "star"}], ids=_changes)
def test_dry_run_says_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch,
                                      changes: dict) -> None:
  monkeypatch.setattr(cost, "describe", lambda *_, **__: "")  # finish counts no tokens
  root = tmp_path / "run"
  finish(root)
  record = run_record.read(root)
  external = {"base": checkpoint_folder.digest(TINY), **compute_digests(get_tasks(config()))}
  for entry in record["stages"].values():
    entry["inputs"] |= {name: external[name] for name in entry["inputs"].keys() & external}
  files.write_text(root / "run.json", json.dumps(record))
  loop.dry_run(config(), str(root))
  assert "--rerun" not in capsys.readouterr().out
  with pytest.raises(UserError) as refused:
    begin(root, external=external, **changes)
  with pytest.raises(UserError) as planned:
    loop.dry_run(config(**changes), str(root))
  assert str(planned.value) == str(refused.value)
  said = capsys.readouterr().out
  assert ("again   " in said) == ("rounds" not in changes)
  assert ("no longer a part of the run: round_" in said) == ("merge.base_weight" not in changes)
  loop.dry_run(config(**changes), str(root), rerun=True)  # is not refused


def test_last_merge_may_change(tmp_path: Path) -> None:
  """It is made again without being asked for."""
  finish(tmp_path / "run", rounds=1)
  assert begin(tmp_path / "run", rounds=1, **{"merge.base_weight": 0.7}) == {
      "round_0/merged", "round_0/eval/merged", "round_0/analysis.json", "round_0/drift.json"}


def test_dropped_sweep_leaves_the_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
  """A sweep that is dropped is no part of the run."""
  finish(tmp_path / "run", **{"merge.sweep": (0.1, 0.9)})
  found = begin(tmp_path / "run", **{"merge.sweep": (0.1,)})
  assert found == {f"round_{t}/{name}" for t in (0, 1) for name in ("sweep", "eval/sweep_0.1", "eval/sweep_0.9")}
  assert "no longer a part of the run: round_0/eval/sweep_0.9, round_1/eval/sweep_0.9" in capsys.readouterr().err


def test_rounds_without_answers_are_passed(tmp_path: Path) -> None:
  """It ends the run in a later round: what the rounds before have sampled and trained is neither lost nor asked for."""
  root = tmp_path / "run"
  finish(root)
  record = run_record.read(root)
  done = {name: entry for name, entry in record["stages"].items() if name not in SECOND - {"round_1/samples.jsonl"}}
  files.write_text(root / "run.json", json.dumps({"stages": done}))
  assert begin(root, **{"data.skip_empty": True}) == set()
  assert begin(root) == set()


@pytest.mark.parametrize("older", [False, True])
def test_replaced_inputs_are_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture, older: bool) -> None:
  """The config says the same, yet all that was sampled and trained would go; once allowed it is not asked again."""
  root, other = tmp_path / "run", EXTERNAL | {"train questions": "of another file"}
  finish(root)
  if not older:  # finish leaves what runs had before they noted their inputs
    assert begin(root) == set()
  before = (root / "run.json").read_bytes()
  with pytest.raises(UserError, match=r"other inputs \(train questions is not what it was\), .*round_0/samples"):
    begin(root, external=other)
  assert (root / "run.json").read_bytes() == before
  assert begin(root, external=EXTERNAL | {"test questions": "more"}) == EVALUATIONS | DRIFTS  # costs little
  assert "test questions is not what it was: base/eval, " in capsys.readouterr().err
  assert begin(root, external=other, rerun=True) >= SAMPLED
  assert begin(root, external=other) >= SAMPLED  # as if killed before any of them
