"""`python -m imm_jax.analyze`, its figures, and the analyses behind the paper's figures."""

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from configs import paper, tiny
from imm_jax import experiments
from imm_jax.analysis.weight_change import check_same_model
from imm_jax.errors import UserError
from imm_jax.model import safetensors
from imm_jax.model.config import PROJECTIONS
from imm_jax.model.tokenizer import load_tokenizer
from imm_jax.report import analysis_figures as figures, analysis_files as output, writer
from imm_jax.stages import analyze as analyze_stage
from tests import REPO, TINY


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """The embedded model with every layer moved, each twice as far as the one before."""
  folder = Path(shutil.copytree(TINY, tmp_path_factory.mktemp("models") / "tuned"))
  rng, found = np.random.default_rng(0), safetensors.read(TINY / "model.safetensors")
  moved = {name: (x.astype(np.float32) + (0.01 * 2**int(name.split(".")[2]) * rng.standard_normal(
      x.shape) if ".layers." in name else 0)).astype(x.dtype) for name, x in found.items()}
  safetensors.write(folder / "model.safetensors", [
      (name, x.dtype, x.shape, lambda x=x: [x]) for name, x in moved.items()])
  return folder


@pytest.fixture
def analyze(environment, tmp_path):
  return lambda *flags: subprocess.run(
      [sys.executable, "-m", "imm_jax.analyze", f"--out={tmp_path / 'out'}", *flags], cwd=REPO, env=environment,
      capture_output=True, text=True, check=False)


@pytest.mark.full
def test_importance_and_weight_change(analyze, tuned: Path, tmp_path: Path):
  """Both are measured on a checkpoint."""
  (tmp_path / "a.txt").write_text("Tom has 3 apples.\n\nSara sells 4 pens " * 80)
  text = f"text=file:{tmp_path / 'a.txt'}"
  flags = ("--config=configs/tiny.py", "--model=tiny", f"--task={text}", f"--tuned={tuned}", "--examples=2",
           "--config.sft.remat=none", "--config.sft.attention=xla")  # which compile fast
  done = analyze(*flags)
  assert done.returncode == 0, done.stderr
  found = json.loads((tmp_path / "out/analysis.json").read_text())
  scores = found["importance"][text]
  assert (scores["examples"], scores["order"]) == (2, 1)
  change = found["weight_change"][str(tuned)]["layers"]
  np.testing.assert_allclose(np.array(change[1:]) / change[:-1], 2, rtol=0.02)
  lines = done.stdout.splitlines()
  assert lines[1].split()[:3] == ["layer", "0", f"{scores['layers'][0]:.4g}"]
  assert [line.split()[0] for line in lines[5:12]] == [
      "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
  assert [line.split()[0] for line in lines[12:15]] == ["early", "middle", "late"]
  assert lines[15].endswith("a.txt: order 1, 2 examples")
  assert lines[16].endswith(f": {found['spearman'][text][str(tuned)]:.3f}")
  rows = list(csv.DictReader((tmp_path / "out/layers.csv").read_text().splitlines()))
  assert [(row["measure"], row["layer"]) for row in rows] == [
      (measure, str(n)) for measure in ("importance", "weight_change") for n in range(4)]
  assert [float(row["value"]) for row in rows[4:]] == change
  assert [row["order"] for row in rows] == ["1"] * 4 + [""] * 4
  assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
      "analysis.json", "importance.png", "importance.svg", "layers.csv", "weight_change.png", "weight_change.svg"]
  again = analyze(*flags)
  assert again.returncode == 1
  assert "exists; give another folder, or --overwrite" in again.stderr


@pytest.mark.full
@pytest.mark.parametrize(("flags", "expected"), [
    (("--model=tiny", "--task=stories"), "--task needs --config"),
    (("--model=tiny", "--tuned=tiny", "--tuned=/no/such"), "/no/such: no such checkpoint folder"),
    (("--model=tiny", "--tuned=tiny", "--tuned=tiny"), "--tuned=tiny: is given twice"),
    (("--model=tiny", "--tuned=tiny", "--config=configs/tiny.py", "--examples=3", "--order=2"),
     "only --task, layer importance, reads --config, --order, --examples; give a --task"),
    (("--config=configs/tiny.py", "--model=tiny", "--task=stories", "--examples=0"), "--examples=0: 0 is not a "),
    (("--config=configs/tiny.py", "--model=tiny", "--task=storys"), "task 'storys': did you mean stories?")])
def test_bad_input_is_one_line(analyze, tmp_path: Path, flags: tuple[str, ...], expected: str):
  done = analyze(*flags)
  assert done.returncode == 1
  line, = done.stderr.splitlines()
  assert line.startswith("error: ")
  assert expected in line
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("entry", "expected"), [
    ("text", "needs a source"), ("stories=file:/x", "is generated and has no source"), ("bookcorpos", "bookcorpus")])
def test_an_entry_that_is_no_task_is_named(entry: str, expected: str):
  with pytest.raises(UserError, match=expected):
    analyze_stage.check_entry(entry)


@pytest.mark.parametrize(("entry", "text", "expected"), [
    ("text=file:DIR/train.txt", b"", "train.txt: holds no text"),
    ("text=file:DIR/train.txt", b" \t\r\n\n  ", "train.txt: holds no text"),
    ("text=file:DIR", b'{"text": " "}', "file:.*: holds no text"),
    ("text=file:DIR", b'{"text": null}', "train.jsonl:1: the field 'text' is null; expected a text"),
    ("text=file:DIR", b'{"text": "a \\ud800"}', "train.jsonl:1: the field 'text' is no valid text"),
    ("text=file:DIR/train.txt", b"Tom isst \xc4pfel", r"train.txt: cannot be read \(.*\); expected UTF-8"),
    ("text=file:DIR/none.txt", b"", "none.txt is no file or folder"),
    ("text=file:DIR/train.txt", b"7", "task text=.*train.txt: no passage has a second token"),
    ("gsm8k=file:DIR", b'{"question": "Tom", "answer": "#### 1"}', "gsm8k=.*: none of its 1 answers is worked out"),
    ("gsm8k=file:DIR", b'{"question": "Tom", "answer": "%s #### 1"}' % (b"so " * 300),
     "gsm8k=.*: none of its 1 answers fits with its prompt in config.sft.row_length=192 tokens; the shortest takes"),
    ("stories", b"", "task stories, config.analysis.examples=200000: 200000 questions were asked for")],
    ids=["empty", "blank", "blank-record", "null", "surrogate", "latin-1", "no-file", "one-token", "no-rationale",
         "too-long", "too-few"])
def test_unmeasurable_importance_is_one_line(entry: str, text: bytes, expected: str, tmp_path: Path):
  """What importance cannot be measured on is named."""
  config = tiny.get_config()
  config.analysis.examples = 200_000
  (tmp_path / ("train.txt" if entry.endswith(".txt") else "train.jsonl")).write_bytes(text)
  (tmp_path / "test.jsonl").write_text('{"question": "in no train split", "answer": "#### 1"}')
  with pytest.raises(UserError, match=expected) as caught:
    analyze_stage.measure_importance(config, TINY, [entry.replace("DIR", str(tmp_path))])
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("edit", "config", "expected"), [
    (lambda name, x: None if ".layers.3." in name else x, {"num_hidden_layers": 3}, r"x: has 3 layers, \S+tiny 4"),
    (lambda name, x: None if ".layers.3." in name else x, {}, "x: weights do not fit config.json with its 4 layers: "
     "missing layers.3.down_proj, missing layers.3.gate_proj"),
    (lambda name, x: x, {"num_hidden_layers": 3}, "3 layers: unknown layers.3.down_proj"),
    (lambda name, x: x[:-2] if "gate_proj" in name else x, {},
     r"x: layers.0.gate_proj has shape \(382, 128\), in \S+tiny \(384, 128\); expected two checkpoints of one model"),
    (lambda name, x: x.astype(np.int8) if "2.mlp.up_proj" in name else x, {}, "x: .*up_proj.weight has dtype int8; "),
    (lambda name, x: x, {"model_type": "gemma"}, "config.json: model_type='gemma' is not supported"),
    (None, {}, "x: is a file; expected a folder with config.json")],
    ids=["three-layers", "layer-missing", "layer-left", "narrow", "int8", "gemma", "file"])
def test_unrelated_checkpoints_are_one_line(edit: Any, config: dict, expected: str, tmp_path: Path):
  """They are not of one model."""
  folder = tmp_path / "x"
  if edit is None:
    folder.touch()
  else:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(json.loads((TINY / "config.json").read_text()) | config))
    found = {name: edit(name, x) for name, x in safetensors.read(TINY / "model.safetensors").items()}
    safetensors.write(folder / "model.safetensors", [
        (name, x.dtype, x.shape, lambda x=x: [x]) for name, x in found.items() if x is not None])
  with pytest.raises(UserError, match=expected) as caught:
    check_same_model(TINY, folder)
  assert "\n" not in str(caught.value)


def test_unmoved_model_has_a_result(environment, tmp_path: Path):
  """It starts fast, too."""
  command = [sys.executable, "-X", "importtime", "-m", "imm_jax.analyze", "--model=tiny", f"--tuned={TINY}"]
  done = subprocess.run([*command, f"--out={tmp_path / 'out'}"], cwd=REPO, env=environment, capture_output=True,
                        text=True, check=False)
  assert done.returncode == 0, done.stderr
  imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
  assert "jax" in imported
  assert not imported & {"flax", "optax", "transformers", "datasets", "imm_jax.model.decoder"}
  change = json.loads((tmp_path / "out/analysis.json").read_text())["weight_change"][str(TINY)]
  assert change["layers"] == change["share"] == [0.0] * 4
  assert ["layer", "3", "0", "(0.0%)"] in [line.split() for line in done.stdout.splitlines()]
  assert ["late", "(3", "to", "3)", "0", "(0.0%)"] in [line.split() for line in done.stdout.splitlines()]


def test_no_change_has_no_rank_correlation(tmp_path: Path):
  found = output.combine({"math": _layers(1.0, 2.0)}, {"tiny": _layers(0.0, 0.0)})
  output.write(tmp_path / "out", found)
  assert output.format_table(found).endswith("\nSpearman, importance on math and change to tiny: not defined")
  assert (tmp_path / "out/weight_change.svg").exists()


def test_examples_that_do_not_fit_are_counted(tmp_path: Path):
  found = output.combine({"math": _layers(1.0, 2.0) | {"dropped_long": 35, "order": 2}}, {})
  assert output.format_table(found).endswith("\nimportance on math: order 2, 5 examples; 35 more do not fit in a row")
  config = tiny.get_config()
  config.sft.update({"remat": "none", "attention": "xla"})
  answers = ["Tom buys 3 apples"] * 2 + ["Tom buys 3 apples " * 100]
  (tmp_path / "test.jsonl").write_text(json.dumps({"question": "x", "answer": "1 #### 1"}) + "\n")
  rows = [{"question": f"How many? {i}", "answer": f"{text} #### {i}"} for i, text in enumerate(answers)]
  (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  entry = f"gsm8k=file:{tmp_path}"
  scores = analyze_stage.measure_importance(config, TINY, [entry])[entry]
  assert (scores["examples"], scores["dropped_long"]) == (2, 1)


def test_every_corpus_of_the_papers_analyses_is_read(tmp_path: Path):
  """From files; what they hold comes back from the tokens of the embedded model, which knows few words."""
  config = tiny.get_config()
  config.analysis.examples = 2
  tasks = [{"text": f"Tom buys {i} apples", "code": f"Tom sells {i}", "task_id": 600 + i} for i in range(1, 4)]
  maths = [{"problem": task["text"], "solution": rf"{task['code']} \boxed{{1}}"} for task in tasks]
  # Each has a test split, too, which no train question may be in.
  texts = {"mbpp/mbpp": [{**tasks[0], "text": "x", "task_id": 11}, *tasks], "math/train": maths,
           "math/test": [{"problem": "x", "solution": r"\boxed{1}"}],
           "bookcorpus/all": [{"text": f"Sara has {i} pens . " * 90} for i in range(1, 4)]}
  for name, records in texts.items():
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
  tokenizer = load_tokenizer(TINY)
  for name, source in {"mbpp": "mbpp", "math": "math", "bookcorpus": "bookcorpus/all.jsonl"}.items():
    source = tmp_path / source
    found = analyze_stage.load_examples(config, TINY, f"{name}=file:{source}")
    assert len(found) == 2
    for example in found:
      prompt, response = (tokenizer.decode(ids) for ids in example)
      if name == "bookcorpus":
        assert example.prompt == []
        assert len(example.response) == config.sft.row_length
        assert response.count("Sara has") > 10
      else:
        assert "Tom buys" in prompt
        assert "Tom sells" in response
        assert example.response[-1] == tokenizer.eos_token_id
  with pytest.raises(UserError, match="task svamp has no train split"):
    analyze_stage.load_examples(config, TINY, "svamp")


def test_folder_with_more_is_kept(tmp_path: Path):
  """A folder that holds more than a result is not replaced."""
  for name in (output.FILE, output.TABLE):
    assert "is no earlier result (it has no" in output.explain_foreign(tmp_path)
    (tmp_path / name).touch()
  assert output.explain_foreign(tmp_path) == ""
  (tmp_path / "samples.jsonl").touch()
  assert output.explain_foreign(tmp_path) == "is no earlier result (it holds samples.jsonl)"


def _layers(*values: float) -> dict[str, Any]:
  """What analysis.json holds of these layers, as importance and as weight change."""
  modules = {f"{m}_proj": list(values) for m in ("q", "k", "v", "o", "gate", "up", "down")}
  whole = sum(values) or 1
  return {"examples": 5, "dropped_long": 0, "order": 1, "layers": [7 * v for v in values], "modules": modules,
          "share": [v / whole for v in values]}


def test_figures_are_complete_and_repeat(tmp_path: Path):
  """They hold every name, and the same bytes again."""
  scores = _layers(1.0, 2.0)
  for name, draw, found in (("importance", figures.plot_importance, {"math": scores, "books": {**scores, "order": 2}}),
                            ("weight_change", figures.plot_weight_change, {f"round {i}": scores for i in range(10)})):
    texts = [writer.to_svg(draw(found)) for _ in range(2)]
    assert texts[0] == texts[1]
    assert all(f">{of}<" in texts[0] for of in found)
    writer.save(draw(found), tmp_path, name)
  assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("draw", [figures.plot_importance, figures.plot_weight_change])
@pytest.mark.parametrize("values", [(1.0,), (0.0, 0.0), (2e-9, 1e-9, 0.0), np.linspace(1e8, 2e8, 32)], ids=len)
def test_figure_parts_do_not_overlap(draw: Callable[..., Figure], values: Sequence[float]):
  """Nothing in a figure reaches into something else."""
  names = [f"runs/a$b{i}/" + "a_long_name_of_32/"[:8 + 8 * (i % 2)] for i in range(10 if len(values) > 3 else 1)]
  names[0] = r"/somewhere/a$\nothing$b/" + "a_long_name_of_32"
  figure = draw(dict.fromkeys(names, _layers(*values)))
  renderer = FigureCanvasAgg(figure).get_renderer()
  figure.draw(renderer)
  legend, = figure.legends  # its frame is not drawn
  parts = [*(axes.get_tightbbox(renderer) for axes in figure.axes),
           *(part.get_window_extent(renderer) for part in (*legend.get_texts(), *legend.get_patches()))]
  assert len(parts) >= len(figure.axes) + len(names if draw is figures.plot_weight_change else PROJECTIONS)
  for i, part in enumerate(parts):
    assert (part.min >= 0).all()
    assert (part.max <= figure.bbox.max).all()
    assert not any(part.overlaps(other) for other in parts[:i])
  ticks = [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
  assert all(text.isdigit() for text, x in zip(ticks, figure.axes[0].get_xticks(), strict=True)
             if 0 <= x < len(values))


def test_figure_10_runs_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
  """The analysis of figure 10 runs, and is not run again."""
  config = paper.get_config("figure=10,scale=tiny")
  of = config.analyses.importance_math
  of.config.analysis.examples = 4
  of.config.sft.update({"remat": "none", "attention": "xla"})
  experiments.validate(config)
  experiments.run(config, str(tmp_path))
  said = "analysis importance_math: layer importance of tiny on stories:"
  assert f"{said} run\n" in capsys.readouterr().out
  found = json.loads((tmp_path / "analyses/importance_math/analysis.json").read_text())
  assert found["importance"]["stories"]["examples"] == 4
  assert (tmp_path / "analyses/figures/importance.png").exists()
  of.config.sft.remat = "full"  # how, not what
  experiments.run(config, str(tmp_path))
  assert f"{said} done before\n" in capsys.readouterr().out
  of.config.update({"seed": 1, "sft": {"remat": "none"}})
  experiments.run(config, str(tmp_path))
  assert f"{said} run\n" in capsys.readouterr().out
  again = json.loads((tmp_path / "analyses/importance_math/analysis.json").read_text())
  assert again["importance"] != found["importance"]
  of.task = "none"
  with pytest.raises(UserError, match="analysis importance_math: task 'none': did you mean"):
    experiments.validate(config)


@pytest.mark.slow
def test_figure_12_uses_its_run(tmp_path: Path):
  """The weight changes of figure 12 are those of its run."""
  config = paper.get_config("figure=12,scale=tiny")
  run = next(iter(config.runs.values()))
  run.rounds = 3
  run.task.update({"questions_per_round": 24, "eval_questions": 4, "ood": ()})
  run.sft.update({"epochs": 1, "global_batch": 4})
  run.analysis.examples = 0
  experiments.run(config, str(tmp_path))
  root, = (tmp_path / name for name in config.runs)
  for t in range(3):
    found, = (json.loads(path.read_text()) for path in (tmp_path / "analyses").glob(f"*_round_{t}_sft/analysis.json"))
    of_round = json.loads((root / f"round_{t}/analysis.json").read_text())["weight_change"]["sft"]
    assert next(iter(found["weight_change"].values())) == of_round
