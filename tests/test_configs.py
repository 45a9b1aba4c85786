"""The config files: that every one can run, what the paper's tables ask for, and what a run is said to cost."""

import json
import subprocess
import sys
from pathlib import Path

import ml_collections
import pytest

from configs import arguments, common, llama, paper, qwen, smollm2, tiny
from imm_jax import config as checks, files, loop, tasks
from imm_jax.errors import UserError
from imm_jax.estimates import cost
from imm_jax.model import published
from imm_jax.model.decoder import count_params
from imm_jax.runs import experiments
from imm_jax.runs.run import Model, Run
from imm_jax.runtime import hardware
from imm_jax.stages import questions, selection
from tests import REPO
from tests.runs.test_loop import SMALL, environment  # noqa: F401

PLANS = ["appendix=b9", *(f"{kind}={n}" for kind, numbers in (("table", paper.TABLES), ("figure", paper.FIGURES))
                         for n in numbers)]
# Published: the model cards.
SIZES = {"HuggingFaceTB/SmolLM2-135M": 134_515_008, "Qwen/Qwen2.5-0.5B": 494_032_768,
         "Qwen/Qwen2.5-1.5B": 1_543_714_304, "Qwen/Qwen2.5-7B": 7_615_616_512,
         "meta-llama/Llama-2-7b-hf": 6_738_415_616, "meta-llama/Meta-Llama-3-8B": 8_030_261_248}


@pytest.mark.parametrize(("module", "argument", "model", "task"), [
    (qwen, None, "Qwen/Qwen2.5-0.5B-Instruct", "gsm8k"), (qwen, "1.5b,task=math", "Qwen/Qwen2.5-1.5B-Instruct", "math"),
    (qwen, "size=7b,gsm8k", "Qwen/Qwen2.5-7B-Instruct", "gsm8k"), (llama, "math", "meta-llama/Llama-2-7b-hf", "math"),
    (llama, "llama3-8b", "meta-llama/Meta-Llama-3-8B", "gsm8k")])
def test_model_configs_take_size_and_task(module, argument, model, task):
  config = module.get_config(argument)
  checks.validate(config, downloads=False)
  assert (config.model, config.task.name) == (model, task)
  assert config.sample.num_samples == {"gsm8k": 3, "math": 6}[task]
  assert (config.sft.learning_rate, config.sft.epochs, config.sft.global_batch) == (2e-5, 3, 128)


@pytest.mark.parametrize(("size", "rounds"), [("quick", 1), ("study", 3)])
def test_the_small_real_model_has_two_settings(size, rounds):
  config = smollm2.get_config(size)
  checks.validate(config, downloads=False)
  assert config.rounds == rounds


@pytest.mark.parametrize("argument", ["3b", "size=3b", "size=0.5b,colour=red", "="])
def test_an_unknown_argument_names_the_known_ones(argument):
  with pytest.raises(ValueError, match=r"known are size=0\.5b\|1\.5b\|7b; task=gsm8k\|math"):
    qwen.get_config(argument)


def test_a_value_counts_for_the_argument_that_knows_it():
  assert arguments.parse("b,y", first=("a", "b"), second=("x", "y")) == {"first": "b", "second": "y"}


@pytest.mark.parametrize("scale", ["paper", "tiny"])
@pytest.mark.parametrize("plan", PLANS)
def test_every_table_and_figure_can_run(plan, scale):
  config = paper.get_config(f"{plan},scale={scale}")
  experiments.validate(config, downloads=scale == "tiny")
  assert config.runs or config.analyses
  for analysis in config.analyses.values():
    assert "run" not in analysis or analysis.run in config.runs


def test_the_sweep_of_table_3_trains_once_for_each_task():
  runs = paper.get_config("table=3").runs
  assert {name: run.rounds for name, run in runs.items()} == {"llama2_7b_gsm8k": 1, "llama2_7b_math": 1}
  for run in runs.values():
    assert sorted([*run.merge.sweep, run.merge.base_weight]) == [0.1, 0.3, 0.4, 0.5, 0.6, 0.7, 0.9]
    assert paper.get_config("table=3,scale=tiny").runs.tiny_stories.merge.base_weight == 0.5
    assert run.teacher == "Qwen/Qwen2.5-7B-Instruct"


def test_the_methods_of_figure_7_and_interventions_of_table_5():
  methods = [run.method for run in paper.get_config("figure=7").runs.values()]
  assert {m: methods.count(m) for m in methods} == dict.fromkeys(
      ("imm", "star", "data_mixture", "data_accumulation"), 6)
  found = {run.sft.intervention for run in paper.get_config("table=5").runs.values()}
  assert found == {"none", "gradient_decay", "gradient_clipping", "weight_masking"}


def test_the_models_that_the_paper_means():
  """Tables 7 and 8 hold the figures of table 2 for 1.5B, whose samples are the teacher's; table 6 is of 0.5B."""
  teachers = {name: run.teacher for name, run in paper.get_config("table=7").runs.items()}
  assert teachers == {"qwen_0_5b_gsm8k": "", "qwen_1_5b_gsm8k": qwen.MODELS["7b"], "llama2_7b_gsm8k": ""}
  assert [run.teacher for run in paper.get_config("table=8").runs.values()] == [qwen.MODELS["7b"]]
  assert {run.model for run in paper.get_config("table=6").runs.values()} == {qwen.MODELS["0.5b"]}
  clips = {run.sft.grad_clip for run in paper.get_config("table=5").runs.values()
           if run.method == "star" and run.sft.intervention == "none"}
  assert clips == {0.0, 1.0}
  exports = {run.sft.export for plan in ("figure=4", "figure=9", "figure=12", "appendix=b9", "table=1")
             for run in paper.get_config(plan).runs.values()}
  assert exports == {"float32"}


@pytest.mark.parametrize("scale", ["paper", "tiny"])
def test_equal_runs_and_analyses_of_several_plans_are_done_once(scale):
  everything = paper.get_config(f"all,scale={scale}")
  texts = [run.to_json() for run in everything.runs.values()]
  analyses = [analysis.to_json() for analysis in everything.analyses.values()]
  for found in (texts, analyses):
    assert len(set(found)) == len(found)
  for plan in PLANS:
    of_plan = paper.get_config(f"{plan},scale={scale}")
    assert {run.to_json() for run in of_plan.runs.values()} <= {*texts}
    for analysis in of_plan.analyses.values():
      if "run" in analysis:  # the same model of the same run
        assert any(other.get("model") == analysis.model and "run" in other and everything.runs[other.run].to_json()
                   == of_plan.runs[analysis.run].to_json() for other in everything.analyses.values())
      else:  # none is lost for its name: figures 3 and 10 have an importance_math each, of two models
        assert any((analysis.get("model"), analysis.get("task"), analysis.get("after")) == (
            other.get("model"), other.get("task"), other.get("after")) for other in everything.analyses.values())


@pytest.mark.parametrize(("method", "before"), [("star", "round_1/sft"), ("imm", "round_1/merged"),
                                                ("ema", "round_1/sft/ema"), ("rest_em", "")])
def test_a_change_is_counted_from_what_sft_started_from(method: str, before: str, tmp_path: Path):
  config = ml_collections.ConfigDict({"runs": {"a": tiny.get_config()}})
  config.runs.a.method = method
  analysis = ml_collections.ConfigDict({"kind": "weight_change", "run": "a", "model": "round_2/sft"})
  found = experiments._list_models(config, analysis, tmp_path)
  here = tmp_path / "a"
  assert found == {"before": str(here / before) if before else "tiny", "after": str(here / "round_2/sft")}


@pytest.mark.parametrize("argument", [None, "table=3,figure=7", "table=10", "figure=5"])
def test_what_is_no_table_or_figure_is_an_error(argument):
  with pytest.raises(ValueError, match=r"expected one table or figure|no argument"):
    paper.get_config(argument)


@pytest.mark.parametrize(("model", "count"), SIZES.items())
def test_shapes_of_published_models_have_the_published_number_of_parameters(model, count):
  assert count_params(published.MODELS[model]) == count


def run(key: str, value: object) -> ml_collections.ConfigDict:
  config = common.get_config()
  config.update_from_flattened_dict({key: value})
  return config


@pytest.mark.parametrize(("key", "value", "expected"), [
    ("method", "immm", "did you mean imm"), ("task.name", "svamp", "has no train split; expected one of"),
    ("task.name", "mbpp", "config.task.name has 'mbpp'"), ("task.ood", ("gsm9k",), "did you mean gsm8k"),
    ("task.ood", ("custom",), "only the in-domain task"), ("task.questions_per_round", 0, "expected 1 or more"),
    ("prompt.style", "chatty", "did you mean chat"), ("merge.base_weight", "automatic", "a list of them over the"),
    ("merge.base_weight", [], "a list of them over"), ("merge.base_weight", [0.1, 2.0], "a list of them over"),
    ("merge.sweep", (0.3, 0.3), "expected different numbers"), ("merge.sweep", (1.3,), "expected different numbers"),
    ("eval.pass_at_k", (0,), "expected whole numbers"), ("data.real_fraction", 1.5, "expected a share"),
    ("data.with_real", True, "is for method=data_accumulation"), ("sft.top_share", 0.0, "more than 0 and at most 1"),
    ("task.source", "file:/x", "stories is generated"), ("task.ood", ("groups=file:/x",), "groups is generated"),
    ("task.fields.question", "q", "is for task custom"), ("merge.auto.step", 0.0, "more than 0"),
    ("merge.sweep", (0.12345671, 0.12345672), "expected different numbers"),
    ("sft.intervention", "decay", "config.sft.intervention='decay'"), ("sft.max_norm", 0.0, "expected a number > 0"),
    ("sft.kl_weight", 0.0, "expected a number > 0"), ("sft.l2_sp_weight", float("inf"), "expected a number > 0"),
    ("sft.ema_decay", 1.0, "more than 0 and less than 1"), ("sft.stop_share", 1.0, "0 or more and less than 1"),
    ("sft.lora_rank", 0, "expected 1 or more"), ("sft.lora_alpha", -1.0, "expected a number > 0"),
    ("sample.temperatures", (), "one or more numbers"), ("sample.temperatures", ((0.2,), 0.4), "such a tuple for each"),
    ("sample.temperatures", ((0.2,), ()), "such a tuple for each"),
    ("sample.temperatures", ((0.2,), (-1.0,)), "such a tuple for each"),
    ("sample.temperatures", ((0.2,),) * 4, "has 4 tuples, config.rounds=3")])
def test_a_value_that_cannot_work_is_one_line(key, value, expected):
  with pytest.raises(UserError) as raised:
    checks.validate(run(key, value))
  assert expected in str(raised.value)
  assert "\n" not in str(raised.value)


def test_values_that_contradict_each_other_are_one_line():
  config = run("method", "real")
  config.teacher = "tiny"
  with pytest.raises(UserError, match="method=real trains on worked answers alone"):
    checks.validate(config)
  config = run("merge.base_weight", "auto")
  config.method = "star"
  with pytest.raises(UserError, match="method=star merges nothing"):
    checks.validate(config)
  for key, value in (("sft.intervention", "weight_masking"), ("sft.export", "float32")):
    config = run(key, value)
    config.method = "lora"
    with pytest.raises(UserError, match=rf"config\.{key}={value}: .*method=lora"):
      checks.validate(config)
  config = run("eval.num_samples", 8)
  config.eval.pass_at_k = (16,)
  with pytest.raises(UserError, match=r"all are more than eval\.num_samples=8"):
    checks.validate(config)
  for general in (("stories",), ("groups", "groups")):
    config = run("merge.auto.general", general)
    config.merge.base_weight = "auto"
    with pytest.raises(UserError, match="expected different tasks, and not the in-domain one"):
      checks.validate(config)
  config = run("merge.base_weight", "auto")
  config.merge.auto.general = ()
  with pytest.raises(UserError, match=r"needs one or more of merge\.auto\.weights"):
    checks.validate(config)


def _settings(**changes: object) -> list[dict[str, object]]:
  """Of the stages that sample and train, in two rounds, as they are compared."""
  config = tiny.get_config()
  config.rounds = 2
  config.update_from_flattened_dict(changes)
  value = Run(config, Path("run"), Model(Path("base"), "base"))
  found = [stage for stage in loop.plan(value) if stage.name.endswith(("samples.jsonl", "/sft"))]
  assert [stage.name for stage in found if "eval" not in stage.name] == [
      f"round_{t}/{name}" for t in range(2) for name in ("samples.jsonl", "sft")]
  return [json.loads(json.dumps(stage.settings)) for stage in found if "eval" not in stage.name]


def test_a_setting_that_is_not_used_is_none_of_a_stage():
  """Which keeps runs that were made before there was such a key."""
  star = _settings(method="star")
  assert star == _settings(**{"method": "star", "sft.lora_rank": 3, "sft.kl_weight": 9.0, "sft.ema_decay": 0.5})
  for method, key, value in (("kl", "kl_weight", 9.0), ("l2_sp", "l2_sp_weight", 9.0), ("lora", "lora_rank", 3),
                             ("ema", "ema_decay", 0.5), ("star", "stop_share", 0.5), ("star", "ema", True)):
    plain, changed = _settings(method=method), _settings(**{"method": method, f"sft.{key}": value})
    assert [a == b for a, b in zip(plain, changed, strict=True)] == [True, False, True, False], key
  trained = [_settings(method=method)[1] for method in ("star", "kl", "l2_sp", "lora", "ema")]
  assert all(a != b for i, a in enumerate(trained) for b in trained[:i])


def test_a_rounds_temperatures_are_its_own():
  of = lambda *given: _settings(**{"sample.temperatures": given})
  plain = of(0.2, 0.4)
  changed = of((0.2, 0.4), (0.9,))
  assert [a == b for a, b in zip(plain, changed, strict=True)] == [True, True, False, True]
  assert plain == of((0.2, 0.4))  # the last stands for later rounds
  assert changed[2]["sample"]["temperatures"] == [0.9]


def test_the_cost_of_a_run_counts_its_tokens():
  config = tiny.get_config()
  config.rounds, config.method = 2, "data_accumulation"
  found = cost.count_tokens(config, {"stages": {}})
  length = 0.4 * 40
  assert found.sampled == 2 * 1000 * 3 * length
  assert found.trained == pytest.approx((3 * (1 + 2) * 1500 + 2 * 256) * (length + 128))  # and layer importance
  assert found.evaluated == (1 + 2) * 6 * 200 * length
  assert found.eval_prompts == (1 + 2) * 6 * 200 * 128 + 2 * 2 * 6 * 32 * (128 + length)
  record = {"devices": ["cpu"], "stages": {
      "round_0/samples.jsonl": {"seconds": 10.0, "facts": {"samples": 3000, "tokens": 90_000, "correct": 600}},
      "round_0/sft": {"seconds": 5.0, "facts": {"tokens": 100_000}}}}
  found = cost.count_tokens(config, record)
  assert found.sampled == 2 * 1000 * 3 * 30
  assert found.trained == pytest.approx((3 * (1 + 2) * 600 + 2 * 256) * (30 + 128))
  assert found.sample_prompts == 2 * 1000 * 128
  hours = ((found.sampled + found.evaluated) / 9000 + found.trained / 20_000) / 3600
  assert f"about {hours:.2g} device hours at the measured 9 k sampled and 20 k trained tokens/s" in cost.describe(
      config, None, record)
  counted = cost.count_tokens(config, {"stages": {}}, question=50, answer=10)
  assert (counted.sampled, counted.sample_prompts) == (2 * 1000 * 3 * 10, 2 * 1000 * 50)


def test_what_stages_took_stands_for_those_to_come():
  names = ["base/eval", "round_0/sft", "round_0/eval/sft", "round_1/sft", "round_1/eval/sft"]
  record = {"stages": {name: {"seconds": 3600.0 * seconds, "facts": {}} for name, seconds in zip(
      names, (1, 2, 3), strict=False)}}
  assert cost.describe(tiny.get_config(), None, record, stages=names).endswith(
      "about 11 device hours by what stages took so far on 1 device(s), 5 of them to come")
  del record["stages"]["round_0/eval/sft"]
  assert "hours" not in cost.describe(tiny.get_config(), None, record, stages=names)  # of one kind none is done


def test_where_no_peak_is_known_a_second_of_products_says_how_long_a_run_takes(monkeypatch):
  config, model = tiny.get_config(), published.find_config("tiny")
  rates = {config.sample.batch_size: 1e9, 1024: 4e9}
  monkeypatch.setattr(hardware, "measure_flops", lambda rows, dtype: rates[rows])
  found, params = cost.count_tokens(config, {"stages": {}}), count_params(model)
  hours = (2 * params * (found.sampled + found.evaluated) / 0.5e9
           + params * (8 * found.trained + 2 * (found.sample_prompts + found.eval_prompts)) / 3e9) / 3600
  assert f"about {hours:.2g} hours on this machine" in cost.describe(config, model, {"stages": {}})


@pytest.mark.slow
def test_an_experiment_runs_each_of_its_runs_in_a_folder(environment, tmp_path):  # noqa: F811
  flags = [flag.replace("--config.", "--config.runs.tiny_stories.") for flag in SMALL]
  command = [sys.executable, "-m", "imm_jax.main", "--config=configs/paper.py:table=7,scale=tiny",
             f"--workdir={tmp_path / 'all'}", *flags, "--config.runs.tiny_stories.rounds=1"]
  of = lambda *more: subprocess.run([*command, *more], cwd=REPO, env=environment, capture_output=True, text=True,
                                    check=False)
  planned = of("--dry_run")
  assert planned.returncode == 0, planned.stderr
  assert "8 of 8 stages to do" in planned.stdout
  assert not (tmp_path / "all").exists()
  done = of()
  assert done.returncode == 0, done.stderr
  assert "table 7 of the paper at tiny scale, run 1 of 1: tiny_stories" in done.stdout
  assert (tmp_path / "all/tiny_stories/round_0/merged/model.safetensors").exists()
  planned = of("--dry_run").stdout
  assert "0 of 8 stages to do" in planned
  assert "by what stages took so far" in planned


@pytest.mark.full
def test_what_cannot_be_asked_shows_before_the_run(environment, tmp_path):  # noqa: F811
  """The embedded model has 256 positions and no chat template."""
  for flag, expected in (("--config.eval.max_new_tokens=250", "task stories: none of 8 prompts leaves room for "
                          "config.eval.max_new_tokens=250 in the 256 positions"),
                         ("--config.prompt.few_shot=8", "lower config.sample.max_new_tokens or config.prompt.few_shot"),
                         ("--config.prompt.style=chat", "has no chat template")):
    done = subprocess.run([sys.executable, "-m", "imm_jax.main", "--config=configs/tiny.py", *SMALL, flag,
                           f"--workdir={tmp_path / 'run'}"], cwd=REPO, env=environment, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 1
    assert expected in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.full
def test_scores_of_one_checkpoint(environment, tmp_path):  # noqa: F811
  other, asked = tmp_path / "other", tasks.load("choice", split="test", count=5, seed=0)
  other.mkdir()
  files.write_jsonl(other / "choice.jsonl", [
      {"id": e.id, "question": e.question, "gold": e.answer, "correct": False} for e in asked])
  command = [sys.executable, "-m", "imm_jax.evaluate", "--config=configs/tiny.py", "--model=tiny",
             f"--out={tmp_path / 'out'}", f"--against={other}", "--config.task.ood=('choice',)",
             "--config.task.eval_questions=6", "--config.eval.batch_size=8", "--config.eval.num_samples=2"]
  done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  scores, _, compared = done.stdout.partition("answers and scores: ")
  printed = scores.splitlines()
  metrics = ("greedy", "pass@1", "pass@2", "majority@2")
  assert [line.split()[:2] for line in printed[:-2]] == [
      [task, metric] for task in ("stories", "choice") for metric in metrics]
  scores = json.loads((tmp_path / "out/scores.json").read_text())
  for line, task in zip(printed[-2:], ("stories", "choice"), strict=True):
    rows = [json.loads(row) for row in (tmp_path / f"out/{task}.jsonl").read_text().splitlines()]
    expected = {
        "name": "paper", "shots": 0, "n": 6, "mean_tokens": round(sum(row["tokens"] for row in rows) / 6, 2),
        "cut": round(sum(row["finish"] == "length" for row in rows) / 6, 4)}
    assert scores["protocol"][task].items() >= expected.items()
    assert line.startswith(f"{task}: protocol paper, 0 worked examples; ")
  assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
      "against.json", "choice.jsonl", "choice_samples.jsonl", "scores.json", "stories.jsonl", "stories_samples.jsonl"]
  assert f"choice: compared on the 5 questions that both answered; {tmp_path}/out/choice.jsonl alone has 1" in compared
  (found,), rows = (json.loads((tmp_path / "out/against.json").read_text()),
                    (tmp_path / "out/choice.jsonl").read_text().splitlines()[:5])
  assert [(test["task"], test["n"], test["only_this"]) for test in found["tests"]] == [
      ("choice", 5, sum(json.loads(row)["correct"] for row in rows))]
  again = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=False)
  assert again.returncode == 1
  assert "exists; give another folder, or --overwrite" in again.stderr
  itself = subprocess.run([*command, "--overwrite", f"--against={tmp_path / 'out'}"], cwd=REPO, env=environment,
                          capture_output=True, text=True, check=False)
  assert itself.returncode == 1
  assert "is or holds the input --against" in itself.stderr


def test_runs_start_servers_together_or_not_at_all():
  config = paper.get_config("table=5,scale=tiny")
  config.sampler.kind = "vllm"  # of all runs
  assert {run.sampler.kind for run in config.runs.values()} == {"vllm"}
  experiments.validate(config)
  config.runs.star_tiny_stories.sampler = config.sampler.copy_and_resolve_references()
  config.runs.star_tiny_stories.sampler.kind = "native"
  with pytest.raises(UserError, match="some start vLLM servers"):
    experiments.validate(config)


@pytest.mark.parametrize(("change", "message"), [
    ({"task.name": "gsm8k=file:DIR"}, "expected the name alone; .*--config.task.name=gsm8k --config.task.source=file"),
    ({"task.name": "custom"}, "needs config.task.source=file:PATH"),
    ({"task.name": "gsm8k", "task.source": "/data/gsm8k"}, "config.task.source: source '/data/gsm8k': expected hf:ID"),
    ({"task.ood": ("svamp=fil:x",)}, "config.task.ood: source 'fil:x': expected hf:ID"),
    ({"prompt.header": "half \ud83d of a pair"}, "is no valid text"),
])
def test_what_no_run_can_start_from_is_refused_without_a_look_at_the_questions(change, message):
  config = tiny.get_config()
  config.update_from_flattened_dict(change)
  with pytest.raises(UserError, match=message):
    checks.validate(config, downloads=False)


def _custom(folder, **records):
  folder.mkdir()
  for split in ("train", "test"):
    rows = [{"question": f"{split} {i}?", "answer": str(i), **records} for i in range(9)]
    (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
  config = tiny.get_config()
  config.task.update({"name": "custom", "source": f"file:{folder}", "questions_per_round": 4, "eval_questions": 2})
  return config


def test_worked_examples_need_worked_answers(tmp_path):
  config = _custom(tmp_path / "a")
  checks.validate(config)
  config.prompt.few_shot = 2
  with pytest.raises(UserError, match=r"few_shot=2: custom has no worked answers .*task.fields.rationale"):
    checks.validate(config)


def _half_worked(folder, worked=(1, 3, 4, 6)):
  config = _custom(folder)
  rows = [{"question": f"train {i}?", "answer": str(i), **({"why": f"It is {i}."} if i in worked else {})}
          for i in range(9)]
  (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
  config.task.fields.rationale = "why"
  return config


def test_examples_of_prompts_and_real_answers_are_rows_with_a_worked_answer_and_the_others_are_asked(tmp_path):
  config = _half_worked(tmp_path / "a")
  config.prompt.few_shot, config.task.questions_per_round = 3, 0
  checks.validate(config)
  found = questions.of_round(config, 0)
  assert len(found.shots) == 3
  assert all(e.rationale for e in found.shots)
  assert len(found.asked) == 6
  assert not {e.id for e in found.asked} & {e.id for e in found.shots}
  assert sum(not e.rationale for e in found.asked) == 5
  assert len(selection.worked_answers(config, 0)) == 1


@pytest.mark.parametrize(("change", "message"), [
    ({"prompt.few_shot": 5}, r"few_shot=5: custom .*too few: 4 of its 9 train questions have one"),
    ({"prompt.few_shot": 4, "method": "real"}, r"no worked answers.*: 4 of its 9 .* none of the 4 of round 0")])
def test_too_few_worked_answers_are_counted(change, message, tmp_path):
  config = _half_worked(tmp_path / "a")
  config.update_from_flattened_dict(change)
  with pytest.raises(UserError, match=message):
    checks.validate(config)


def test_which_examples_a_prompt_shows_does_not_change_where_all_are_worked(tmp_path):
  config = _half_worked(tmp_path / "a", worked=range(9))
  config.prompt.few_shot = 3
  pool = questions.load(config, "custom", split="train")
  found = questions.of_round(config, 0)
  assert (found.shots, found.asked) == (pool[:3], pool[3:7])


def test_the_dry_run_says_how_many_test_questions_are_asked_and_of_how_many(tmp_path):
  config = _custom(tmp_path / "a")
  (tmp_path / "a" / "test.jsonl").write_text("\n".join(
      json.dumps({"question": "Test?", "answer": a}) for a in ("1", "2", "none", "1")))
  config.task.update({"eval_questions": 1000, "ood": ("groups", "mawps", "asdiv", "sciq")})
  assert questions.count_tests(config) == [3, 1000, 520, 1000, 1000]
  first, note = questions.describe_tests(config).splitlines()
  assert first == ("test questions: custom 3 of 4 (3 have an answer that can be judged); groups 1000 (generated); "
                   "mawps 520 of 520; asdiv 1000 of 2305 (2215 have an answer that can be judged); sciq 1000 of 1000")
  assert "mawps: hf:MU-NLPC/Calc-mawps has 520 other questions than the paper's 2065" in note
  config.task.ood = ("tabmwp",)
  with pytest.raises(UserError, match="give tabmwp=file:PATH"):
    checks.validate(config, downloads=False)


@pytest.mark.full
def test_a_dry_run_reads_no_text_of_the_hub(monkeypatch, tmp_path, capsys):
  def load_text(*_, **__):
    raise AssertionError("read")

  monkeypatch.setattr(tasks, "load_text", load_text)
  config = tiny.get_config()
  for texts in (("tiny_shakespeare",), ("prose=hf:SOME/prose",)):
    config.eval.texts = texts
    checks.validate(config, downloads=False)
    loop.dry_run(config, str(tmp_path / "run"))
    assert f"{texts[0].partition('=')[0]} up to 200 passages" in capsys.readouterr().out


def test_a_task_with_fewer_test_questions_than_asked_for_gives_all_it_has(tmp_path, capsys):
  config = _custom(tmp_path / "a")
  svamp = tmp_path / "svamp.jsonl"
  svamp.write_text("\n".join(json.dumps({"Body": f"There are {i}.", "Question": "How many?", "Answer": i, "ID": str(i)})
                             for i in range(5)))
  config.task.update({"eval_questions": 7, "ood": ("groups", f"svamp=file:{svamp}")})
  for _ in range(2):
    checks.validate(config, trains=False)
  assert {name: len(found) for name, found in questions.of_tests(config).items()} == {
      "custom": 7, "groups": 7, "svamp": 5}
  assert questions.count_tests(config) == [7, 7, 5]
  told = [line for line in capsys.readouterr().err.splitlines() if "all of them are asked" in line]
  assert told == ["note: task svamp has 5 test questions, and all of them are asked (config.task.eval_questions=7)"]


def test_questions_that_change_are_noticed(tmp_path):
  first, same, other = (questions.digests(_custom(tmp_path / name, **more)) for name, more in (
      ("a", {}), ("b", {}), ("c", {"answer": "7"})))
  assert first == same
  assert all(first[split] != other[split] for split in first)
  assert set(first) == {"train questions", "test questions"}


def test_a_number_alone_must_say_whether_it_is_a_table_or_a_figure():
  with pytest.raises(ValueError, match="may be table=3 or figure=3: say which"):
    paper.get_config("3")


@pytest.mark.parametrize(("slip", "message"), [
    ({"merge": {"base_wieght": 0.3}}, "merge.base_wieght, which is no setting: did you mean base_weight?"),
    ({"extra": 1}, "has extra, which is no setting"), ({"sft": {"ema": None}}, "has no key sft.ema"),
    ({"data": None}, "has no key data")])
def test_keys_of_a_config_that_was_made_anew_are_checked_too(slip: dict, message: str):
  made = tiny.get_config().to_dict()
  for key, value in slip.items():
    inner = made.setdefault(key, {}) if isinstance(value, dict) else made
    for name, new in (value if isinstance(value, dict) else slip).items():
      if new is None:
        del inner[name]
      else:
        inner[name] = new
  with pytest.raises(UserError, match=message):
    checks.validate(ml_collections.ConfigDict(made))
