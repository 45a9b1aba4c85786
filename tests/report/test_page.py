"""The report's page, files and data: what they say of a run, finished or going on."""

import base64
import csv
import fcntl
import gzip
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from imm_jax.errors import UserError
from imm_jax.report import live, page, results, samples, writer
from imm_jax.report.results import Results
from imm_jax.runs import status
from tests import REPO, report_runs


@pytest.fixture(scope="module")
def written(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
  out = tmp_path_factory.mktemp("reports") / "imm"
  live.write(run, out)
  return out


def rows_of(path: Path) -> list[dict[str, str]]:
  with path.open(newline="") as f:
    return list(csv.DictReader(f))


def test_the_summary_says_what_changed(run: Path, written: Path):
  scores = {name: entry["facts"]["scores"] for name, entry in report_runs.read_record(run)["stages"].items()
            if "scores" in entry["facts"]}
  before, after = (scores[name]["stories"]["greedy"]["value"] for name in ("base/eval", "round_1/eval/merged"))
  text = report_runs.text_of((written / "index.html").read_text())
  assert before == after
  change = f"stayed at {after:.3f}"
  assert f"After 2 rounds of imm on tiny, accuracy in domain (stories) {change} and out of domain (2 tasks) " in text
  right = sum(scores["base/eval"][task]["greedy"]["value"] * 6 for task in report_runs.OOD)
  assert f"base {right / 12:.3f} [" in text


def test_csv_files_hold_the_values_of_the_run(run: Path, written: Path):
  stages = report_runs.read_record(run)["stages"]
  rows = rows_of(written / "accuracy.csv")
  assert [row["model"] for row in rows] == ["base", "round 0 sft", "round 0 merged", "round 1 sft", "round 1 merged"]
  for row, name in zip(rows, ("base/eval", *(f"round_{t}/eval/{kind}" for t in (0, 1) for kind in ("sft", "merged"))),
                       strict=True):
    score = stages[name]["facts"]["scores"]["groups"]["greedy"]
    assert [float(row[f"groups, n=6{part}"]) for part in ("", " low", " high")] == [
        score["value"], score["low"], score["high"]]
  asked = rows_of(written / "protocol.csv")
  assert len(asked) == 5 * 3
  assert [list(row.values()) for row in asked[:2]] == [
      ["base", task, "paper", "0", "6", "10.0", "25.0"] for task in ("stories", "groups")]
  text = report_runs.text_of((written / "index.html").read_text())
  assert "(Wilson); protocol paper, 0 worked examples: stories, groups, choice. In domain is stories" in text
  told = results.format_table(Results.read(run)).splitlines()
  assert "protocol paper, 0 worked examples: stories, groups, choice" in told
  assert "base: 10.0 tokens an answer, 25.0% of 18 cut at eval.max_new_tokens" in told
  data = rows_of(written / "data.csv")
  assert [int(row["dropped: repeated"]) for row in data] == [1, 1]
  assert [int(row["sampled"]) for row in data] == [18, 18]
  times = {row["stage"]: row for row in rows_of(written / "stages.csv")}
  assert float(times["round_1/sft"]["seconds"]) == stages["round_1/sft"]["seconds"]
  assert float(times["round_1/sft"]["peak memory of a device, GiB"]) == 2.5
  assert int(times["base/eval"]["tokens"]) == 3 * 6 * 10
  layers = rows_of(written / "layers.csv")
  found = json.loads((run / "round_1/analysis.json").read_text())
  assert [float(row["importance"]) for row in layers if row["round"] == "1"] == found["importance"]["layers"]
  drift = rows_of(written / "drift.csv")
  assert len(drift) == 2 * 2 * 3
  found = json.loads((run / "round_1/drift.json").read_text())
  row, = (row for row in drift if (row["round"], row["model"], row["text"]) == ("1", "merged", "choice"))
  assert {key: float(row[key]) for key in ("KL", "loss", "base's loss", "entropy", "base's entropy")} == {
      "KL": found["models"]["merged"]["choice"]["kl"], "loss": found["models"]["merged"]["choice"]["loss"],
      "base's loss": found["texts"]["choice"]["loss"], "entropy": found["models"]["merged"]["choice"]["entropy"],
      "base's entropy": found["texts"]["choice"]["entropy"]}
  assert [float(row["Spearman"]) for row in rows_of(written / "spearman.csv")] == [-0.4, -0.4]


def test_figures_are_files_with_descriptions(written: Path):
  """Each stands in the page."""
  text = (written / "index.html").read_text()
  for name in ("accuracy", "front", "pass_at_k", "layers", "diversity", "drift"):
    assert (written / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert ElementTree.parse(written / f"{name}.svg").getroot().tag.endswith("svg")
  images = re.findall(r'<img alt="([^"]+)" src="data:image/svg\+xml;base64,([^"]+)"', text)
  assert len(images) == 2 + 1 + 1 + 4 + 2 + 2  # entropy was not measured
  for alt, data in images:
    assert len(alt) > 20
    assert ElementTree.fromstring(base64.b64decode(data)).tag.endswith("svg")


def test_the_page_lets_nothing_in(written: Path):
  text = (written / "index.html").read_text()
  policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1]
  assert "default-src 'none'" in policy
  assert "unsafe" not in policy
  assert "http" not in policy
  assert not re.search(r'(?:src|href)="(?!data:|#)', text)


def test_the_same_run_gives_the_same_bytes(run: Path, written: Path, tmp_path: Path):
  live.write(run, tmp_path / "again")
  assert {p.name: p.read_bytes() for p in written.iterdir()} == {
      p.name: p.read_bytes() for p in (tmp_path / "again").iterdir()}


def test_answers_survive_packing_as_they_were(run: Path):
  chunks, problems = samples.Packer().chunks(Results.read(run))
  assert not problems
  assert sum(chunk.rows for chunk in chunks) == 2 * 18 + 5 * 3 * 6
  chunk = next(chunk for chunk in chunks if chunk.name == "round_0/samples.jsonl")
  found = json.loads(gzip.decompress(base64.b64decode(chunk.packed)))
  given = [json.loads(line) for line in (run / "round_0/samples.jsonl").read_text().splitlines()]
  assert [row[6] for row in found["rows"]] == [row["text"] for row in given]
  assert [tuple(found["questions"][row[0]]) for row in found["rows"]] == [
      (row["id"], row["question"], row["gold"]) for row in given]
  assert [bool(row[3]) for row in found["rows"]] == [row["correct"] for row in given]
  assert len(found["questions"]) == 6


def test_too_many_answers_are_left_out_and_named(run: Path):
  size = (run / "round_0/samples.jsonl").stat().st_size
  chunks, problems = samples.Packer().chunks(Results.read(run), max_bytes=size + 10)
  assert [chunk.name for chunk in chunks] == ["round_0/samples.jsonl"]
  assert "round_1/samples.jsonl: not in the browser of samples" in problems[0]


def test_names_and_settings_are_escaped(run: Path, tmp_path: Path):
  root = tmp_path / "<b>run"
  shutil.copytree(run, root)
  config = json.loads((root / "config.json").read_text())
  config["model"] = "</pre><script>alert(1)</script>"
  (root / "config.json").write_text(json.dumps(config))
  found = Results.read(root)
  text = page.render(found, page.Status(), page.make_sections(found, []), [], [], {})
  assert "<b>run" not in text
  assert "<script>alert" not in text
  assert "<b>run" in report_runs.text_of(text)
  assert "alert(1)" in report_runs.text_of(text)


def test_what_is_no_run_directory_is_refused(run: Path, tmp_path: Path):
  (tmp_path / "checkpoint").mkdir()
  (tmp_path / "checkpoint/config.json").write_text('{"model_type": "qwen2"}')
  with pytest.raises(UserError, match="is no run directory"):
    results.find_runs([str(tmp_path)])
  with pytest.raises(UserError, match="is no folder"):
    results.find_runs([str(tmp_path / "none")])
  assert results.find_runs([str(run.parent)]) == [run]


def command(*flags: str) -> subprocess.CompletedProcess:
  return subprocess.run([sys.executable, "-m", "imm_jax.report", *flags], cwd=REPO, capture_output=True, text=True,
                        check=False)


@pytest.mark.full
def test_the_command_writes_and_refuses_in_one_line(run: Path, tmp_path: Path):
  out = tmp_path / "out"
  done = command(f"--workdirs={run}", f"--out={out}", "--paper")
  assert done.returncode == 0, done.stderr
  assert "round 1 merged" in done.stdout
  assert "No table of the paper has this config (model tiny" in report_runs.text_of((out / "index.html").read_text())
  (tmp_path / "other").mkdir()
  done = command(f"--workdirs={tmp_path / 'other'}", f"--out={out}")
  assert done.returncode == 1
  assert done.stderr.strip().count("\n") == 0
  assert "error: --workdirs: " in done.stderr
  assert "is no run directory" in done.stderr
  done = command(str(run), str(tmp_path / "other"), f"--out={out}")
  assert done.returncode == 1
  assert f"error: --workdirs: {tmp_path / 'other'} is no run directory" in done.stderr


def test_the_page_of_a_run_that_goes_on(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  root = tmp_path / "run"
  shutil.copytree(run, root)
  whole = report_runs.read_record(root)
  plan = list(whole["stages"])
  report_runs.write_record(root, whole | {"stages": {}})
  monkeypatch.setattr(live, "_MAX_TIME_SHARE", 1e9)
  read = lambda: report_runs.text_of((root / "report/index.html").read_text())
  with live.Live(root, plan) as report:
    assert f"Running: 0 of {len(plan)} stages done; next base/eval" in read()
    report_runs.write_record(root, whole | {"stages": {name: whole["stages"][name] for name in plan[:2]}})
    report.update()
    assert f"Running: 2 of {len(plan)} stages done; next round_0/train.jsonl" in read()
    assert "these are the base model's scores" in read()
    assert 'data-reload="30"' in (root / "report/index.html").read_text()
    assert "data:image/svg+xml" in (root / "report/index.html").read_text()
    report_runs.write_record(root, whole)
  assert f"Finished: {len(plan)} of {len(plan)} stages done" in read()
  assert 'data-reload="0"' in (root / "report/index.html").read_text()
  with pytest.raises(UserError), live.Live(root, [*plan, "round_2/samples.jsonl"]):
    raise UserError("the disk is full")
  assert f"Failed: {len(plan)} of {len(plan) + 1} stages done; next round_2/samples.jsonl. the disk is full" in read()


def test_copied_page_does_not_reload(run: Path, tmp_path: Path):
  """A copy of the page of a run that goes on does not look for a newer one."""
  root = tmp_path / "run"
  shutil.copytree(run, root)
  with status.StatusWriter(root, list(report_runs.read_record(root)["stages"])), (root / ".lock").open("w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    live.write(root, tmp_path / "copy")
  page_ = (tmp_path / "copy/index.html").read_text()
  assert 'data-reload="0"' in page_
  text = report_runs.text_of(page_)
  assert re.search(r"Running: \d+ of \d+ stages done \(as of [^;]+; this page stays as it is\)", text)


def test_live_figures_are_throttled(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  """Figures of a run that goes on are drawn only when they change and there is time."""
  root = tmp_path / "run"
  shutil.copytree(run, root)
  drawn = []
  monkeypatch.setattr(writer, "to_svg", lambda figure: drawn.append(figure) or "<svg/>")
  monkeypatch.setattr(live, "_MAX_TIME_SHARE", 1e9)
  report = live.Live(root, [])
  report.update()
  first = len(drawn)
  assert first == 12
  report.update()
  assert len(drawn) == first
  monkeypatch.setattr(live, "_MAX_TIME_SHARE", 0.0)
  report_runs.change(lambda r: r["stages"]["base/eval"]["facts"]["scores"]["stories"]["greedy"].update(low=0.0))(root)
  report.update()
  assert len(drawn) == first
  text = (root / "report/index.html").read_text()
  assert "data:image/svg+xml" in text  # the last ones stay
  assert "The figure is drawn later" not in text


def test_round_counts_once_scored(run: Path, tmp_path: Path):
  """A round counts once the model that it hands on is scored."""
  root = tmp_path / "run"
  shutil.copytree(run, root)
  report_runs.change(lambda r: [r["stages"].pop(name) for name in list(r["stages"]) if name.startswith("round_1") or (
      name == "round_0/eval/merged")])(root)
  found = results.Results.read(root)
  assert [m.label for m in found.models] == ["base", "round 0 sft"]
  assert [m.label for m in found.list_round_results()] == ["base"]


@pytest.mark.full
def test_only_an_earlier_report_is_replaced(run: Path, tmp_path: Path):
  out = tmp_path / "www"
  command = [sys.executable, "-m", "imm_jax.report", f"--workdirs={run}", f"--out={out}", "--overwrite"]
  live.write(run, out)
  (out / "thesis.tex").write_text("years")
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 1
  assert "it holds thesis.tex" in done.stderr
  assert (out / "thesis.tex").read_text() == "years"
  (out / "thesis.tex").unlink()
  assert subprocess.run(command, capture_output=True, text=True, check=False).returncode == 0


def test_a_report_that_fails_does_not_end_the_run(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                  capsys: pytest.CaptureFixture):
  def fail(*_: object) -> None:
    raise ZeroDivisionError("a mistake in the page")
  shutil.copytree(run, tmp_path / "run")
  monkeypatch.setattr(page, "make_sections", fail)
  report = live.Live(tmp_path / "run", [])
  report.update()
  report.update()
  assert capsys.readouterr().err.count("a mistake in the page") == 1
