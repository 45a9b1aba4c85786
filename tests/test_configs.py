"""The config files: that every one can run, and what the paper's tables ask for."""

import pytest

from configs import arguments, llama, paper, qwen, smollm2
from imm_jax import config_checks, experiments
from imm_jax.model import published
from imm_jax.model.decoder import count_params

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
  config_checks.validate(config, downloads=False)
  assert (config.model, config.task.name) == (model, task)
  assert config.sample.num_samples == {"gsm8k": 3, "math": 6}[task]
  assert (config.sft.learning_rate, config.sft.epochs, config.sft.global_batch) == (2e-5, 3, 128)


@pytest.mark.parametrize(("size", "rounds"), [("quick", 1), ("study", 3)])
def test_the_small_real_model_has_two_settings(size, rounds):
  config = smollm2.get_config(size)
  config_checks.validate(config, downloads=False)
  assert config.rounds == rounds


@pytest.mark.parametrize("argument", ["3b", "size=3b", "size=0.5b,color=red", "="])
def test_an_unknown_argument_names_the_known_ones(argument):
  with pytest.raises(ValueError, match=r"known are size=0\.5b\|1\.5b\|7b; task=gsm8k\|math"):
    qwen.get_config(argument)


def test_values_find_their_argument():
  """A value counts for the argument that knows it."""
  assert arguments.parse("b,y", first=("a", "b"), second=("x", "y")) == {"first": "b", "second": "y"}


@pytest.mark.parametrize("scale", ["paper", "tiny"])
@pytest.mark.parametrize("plan", PLANS)
def test_every_table_and_figure_can_run(plan, scale):
  config = paper.get_config(f"{plan},scale={scale}")
  experiments.validate(config, downloads=scale == "tiny")
  assert config.runs or config.analyses
  for analysis in config.analyses.values():
    assert "run" not in analysis or analysis.run in config.runs


def test_table_3_sweep_trains_once():
  """It trains once for each task."""
  runs = paper.get_config("table=3").runs
  assert {name: run.rounds for name, run in runs.items()} == {"llama2_7b_gsm8k": 1, "llama2_7b_math": 1}
  for run in runs.values():
    assert sorted([*run.merge.sweep, run.merge.base_weight]) == [0.1, 0.3, 0.4, 0.5, 0.6, 0.7, 0.9]
    assert paper.get_config("table=3,scale=tiny").runs.tiny_stories.merge.base_weight == 0.5
    assert run.teacher == "Qwen/Qwen2.5-7B-Instruct"


def test_figure_7_methods_and_table_5():
  """The methods of figure 7 and the interventions of table 5 are those of the paper."""
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
def test_shared_runs_are_done_once(scale):
  """They are runs and analyses that occur in several plans."""
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


@pytest.mark.parametrize("argument", [None, "table=3,figure=7", "table=10", "figure=5"])
def test_what_is_no_table_or_figure_is_an_error(argument):
  with pytest.raises(ValueError, match=r"expected one table or figure|no argument"):
    paper.get_config(argument)


@pytest.mark.parametrize(("model", "count"), SIZES.items())
def test_published_parameter_counts(model, count):
  """Shapes of published models have the published number of parameters."""
  assert count_params(published.MODELS[model]) == count


def test_bare_number_needs_its_kind():
  """A number alone must say whether it is a table or a figure."""
  with pytest.raises(ValueError, match="may be table=3 or figure=3: say which"):
    paper.get_config("3")
