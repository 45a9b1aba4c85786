"""The paper's tables 1 to 9, figures 2 to 13 (1 and 5 are drawings) and appendix B.9, each as runs and analyses.

    python -m imm_jax.main --config=configs/paper.py:table=3 --workdir=runs/table3 --dry_run
    python -m imm_jax.main --config=configs/paper.py:figure=7 --workdir=runs/figure7
    python -m imm_jax.main --config=configs/paper.py:table=3,scale=tiny --workdir=runs/tiny3
    python -m imm_jax.main --config=configs/paper.py:all --workdir=runs/paper --dry_run

Every run has its folder in WORKDIR; the analyses follow the runs, each in its folder in WORKDIR/analyses. `all` is all
tables and figures, and makes a run that several of them share once. `scale=tiny` replaces the paper's models and tasks
by the embedded ones. --config.runs.NAME.KEY=VALUE changes a setting of a run, --config.sampler.KEY=VALUE the sampler of
all runs, --config.analyses.NAME.task=NAME=SOURCE the source of an analysis's questions, and
--config.analyses.NAME.config.KEY=VALUE one of its settings.
"""

from pathlib import Path

import ml_collections

import imm_jax
from configs import arguments, llama, qwen, reasoning, tiny

TABLES = tuple(map(str, range(1, 10)))
FIGURES = ("2", "3", "4", "6", "7", "8", "9", "10", "11", "12", "13")
# Section 5.1's models; figures 3 and 4 look at the last two.
MODELS = {"qwen_0_5b": qwen.MODELS["0.5b"], "qwen_1_5b": qwen.MODELS["1.5b"], "llama2_7b": llama.MODELS["llama2-7b"],
          "llama3_8b": llama.MODELS["llama3-8b"], "qwen_1_5b_base": "Qwen/Qwen2.5-1.5B",
          "qwen_1_5b_math": "Qwen/Qwen2.5-Math-1.5B"}
SIZES = ("qwen_0_5b", "qwen_1_5b", "llama2_7b")
TASKS = ("gsm8k", "math")
INTERVENTIONS = ("gradient_decay", "gradient_clipping", "weight_masking")
# English text without reasoning, written for this project, so that tiny scale needs no network.
_PROSE = f"text=file:{Path(imm_jax.__file__).with_name('assets') / 'prose.txt'}"
SWEEP = (0.1, 0.3, 0.4, 0.6, 0.7, 0.9)  # base weights beside 0.5; table 3's alpha is 1 less these


def get_config(argument: str | None = None) -> ml_collections.ConfigDict:
  given = arguments.parse(argument, table=("", *TABLES), figure=("", *FIGURES), appendix=("", "b9"),
                          scale=("paper", "tiny"), which=("", "all"))
  scale = given.pop("scale")
  chosen = [f"{kind} {value}".removeprefix("which ") for kind, value in given.items() if value]
  if len(chosen) != 1:
    raise ValueError("expected one table or figure, such as configs/paper.py:table=3 or configs/paper.py:figure=7, "
                     "appendix=b9, or all")
  name = chosen[0]
  runs, analyses = _together(scale) if name == "all" else _PLANS[name](scale)
  config = ml_collections.ConfigDict({"title": f"{name} of the paper" + " at tiny scale" * (scale == "tiny")})
  config.runs, config.analyses = ml_collections.ConfigDict(runs), ml_collections.ConfigDict(analyses)
  if runs:
    config.sampler = next(iter(config.runs.values())).sampler
    for run in (*config.runs.values(), *(a.config for a in config.analyses.values() if "config" in a)):
      run.sampler = config.sampler  # one and the same
  return config


def _runs(scale: str, models: tuple[str, ...], tasks: tuple[str, ...] = TASKS, **changes: object) -> dict:
  """Returns a run for each model and task: `imm` over one round, changed by `changes`, whose `__` stand for dots."""
  runs = {}
  for model in models if scale == "paper" else ("tiny",):
    for task in tasks if scale == "paper" else ("stories",):
      config = reasoning.get_config(model=MODELS[model], task=task) if scale == "paper" else tiny.get_config()
      config.rounds = 1
      for key, value in changes.items():
        if scale == "paper" or key not in ("task__ood", "teacher"):
          config.update_from_flattened_dict({key.replace("__", "."): value})
      if scale == "tiny" and "teacher" in changes:
        config.teacher = "tiny"
      runs[f"{model}_{task}"] = config
  return runs


def _named(prefix: str, runs: dict) -> dict:
  return {f"{prefix}_{name}": config for name, config in runs.items()}


def _methods(scale: str, models: tuple[str, ...], *methods: str, **changes: object) -> dict:
  runs = {}
  for method in methods:
    runs |= _named(method, _runs(scale, models, method=method, **changes))
  return runs


def _importance(scale: str, model: str, task: str) -> dict[str, object]:
  config = reasoning.get_config(model=MODELS[model], task="math") if scale == "paper" else tiny.get_config()
  config.sampler.kind = "native"  # nothing is sampled; beside runs: theirs
  return {"kind": "importance", "model": config.model, "config": config,
          "task": task if scale == "paper" else {"math": "stories", "bookcorpus": _PROSE}.get(task, "groups")}


def _change(scale: str, run: str, *models: str) -> dict[str, dict[str, str]]:
  """Returns the analyses of how the weights of these models of a run changed since their round began."""
  run = run if scale == "paper" else run.split("_")[0] + "_tiny_stories"
  return {f"change_{run}_{m.replace('/', '_')}": {"kind": "weight_change", "run": run, "model": m} for m in models}


def _together(scale: str) -> tuple[dict, dict]:
  """Returns the runs and analyses of all plans: equal ones once, others of the same name prefixed by their plan."""
  runs, analyses, run_names, analysis_names = {}, {}, {}, {}
  for plan, make in _PLANS.items():
    of_plan, more = make(scale)
    names = {}
    for name, config in of_plan.items():
      unique = run_names.setdefault(config.to_json(), name if name not in runs else f"{plan.replace(' ', '_')}_{name}")
      names[name] = unique
      runs[unique] = config
    for name, analysis in more.items():
      renamed = analysis | ({"run": names[analysis["run"]]} if "run" in analysis else {})
      unique = analysis_names.setdefault(ml_collections.ConfigDict(renamed).to_json(sort_keys=True),
                                         name if name not in analyses else f"{plan.replace(' ', '_')}_{name}")
      analyses[unique] = renamed
  return runs, analyses


def _teacher_of_1_5b(runs: dict) -> dict:
  """Returns the runs, with the 7B teacher for the 1.5B model, whose figures in tables 7 and 8 are those of table 2."""
  for name, config in runs.items():
    if name.startswith("qwen_1_5b"):
      config.teacher = qwen.MODELS["7b"]
  return runs


def _table_1(scale: str) -> tuple[dict, dict]:
  runs, analyses = _figure_4(scale)
  return runs, analyses | {f"importance_{model}": _importance(scale, model, "math")
                           for model in ("qwen_1_5b_base", "qwen_1_5b_math")}


def _appendix_b9(scale: str) -> tuple[dict, dict]:
  runs, analyses = {}, {}
  for method, kinds in (("star", ("sft",)), ("imm", ("sft", "merged"))):
    runs |= _named(method, _runs(scale, ("qwen_1_5b_base",), ("math",), method=method, rounds=3, sft__export="float32"))
    analyses |= _change(scale, f"{method}_qwen_1_5b_base_math", *(f"round_{t}/{kind}" for t in range(3)
                                                                 for kind in kinds))
  return runs, analyses


def _figure_12(scale: str) -> tuple[dict, dict]:
  runs, analyses = _appendix_b9(scale)
  return runs, {name: analysis for name, analysis in analyses.items() if not analysis["model"].endswith("merged")}


def _table_5(scale: str) -> tuple[dict, dict]:
  runs = _methods(scale, ("qwen_1_5b",), "star", "imm")
  # The paper does not say whether its vanilla SFT is clipped; ours is, at 1.0.
  runs |= _named("unclipped", _runs(scale, ("qwen_1_5b",), method="star", sft__grad_clip=0.0))
  for intervention in INTERVENTIONS:
    runs |= _named(intervention, _runs(scale, ("qwen_1_5b",), method="star", sft__intervention=intervention))
  return runs, {}


def _figure_4(scale: str) -> tuple[dict, dict]:
  runs = _named("star", _runs(scale, ("qwen_1_5b_base",), ("math",), method="star", sft__export="float32"))
  analyses = _change(scale, "star_qwen_1_5b_base_math", "round_0/sft")
  if scale == "paper":
    analyses["change_post_training"] = {"kind": "weight_change", "before": MODELS["qwen_1_5b_base"],
                                        "after": MODELS["qwen_1_5b_math"]}
  return runs, analyses


def _figure_9(scale: str) -> tuple[dict, dict]:
  runs, analyses = {}, {}
  for method in ("star", "real"):
    runs |= _named(method, _runs(scale, ("qwen_1_5b_base",), ("math",), method=method, sft__export="float32"))
    analyses |= _change(scale, f"{method}_qwen_1_5b_base_math", "round_0/sft")
  return runs, analyses


def _pass_at_k(scale: str, task: str) -> tuple[dict, dict]:
  return _runs(scale, SIZES, (task,), eval__num_samples=64 if scale == "paper" else 8), {}


_BASELINES = ("imm", "star", "data_mixture", "data_accumulation")
_PLANS = {
    "table 1": _table_1,
    # 5.4: a stronger model samples.
    "table 2": lambda scale: (_runs(scale, ("qwen_1_5b", "llama2_7b"), teacher=qwen.MODELS["7b"]), {}),
    # Appendix A.2: in the setting of 5.4; one training, merged with each weight.
    "table 3": lambda scale: (_runs(scale, ("llama2_7b",), teacher=qwen.MODELS["7b"], merge__base_weight=0.5,
                                    merge__sweep=SWEEP), {}),
    "table 4": lambda scale: (_runs(scale, SIZES, ("gsm8k",), rounds=3,
                                    task__ood=("svamp", "asdiv", "mathqa", "mmlu_stem")), {}),
    "table 5": _table_5,
    "table 6": lambda scale: (_methods(scale, ("qwen_0_5b",), "iimm", "imm"), {}),
    "table 7": lambda scale: (_teacher_of_1_5b(_runs(scale, SIZES, ("gsm8k",), task__ood=("mawps",))), {}),
    "table 8": lambda scale: (_teacher_of_1_5b(_runs(scale, ("qwen_1_5b",), ("gsm8k",), task__ood=(
        "sat_math", "mawps", "mathqa", "mmlu_stem", "svamp"))), {}),
    "table 9": lambda scale: (_runs(scale, ("llama3_8b",)), {}),
    "figure 2": lambda scale: (_methods(scale, SIZES, "star"), {}),
    "figure 3": lambda scale: ({}, {f"importance_{task}": _importance(scale, "qwen_1_5b_math", task)
                                    for task in ("bookcorpus", "math")}),
    "figure 4": _figure_4,
    "figure 6": lambda scale: (_methods(scale, SIZES, *_BASELINES, rounds=3), {}),
    "figure 7": lambda scale: (_methods(scale, SIZES, *_BASELINES, rounds=3), {}),
    "figure 8": lambda scale: _pass_at_k(scale, "gsm8k"),
    "figure 9": _figure_9,
    "figure 10": lambda scale: ({}, {"importance_math": _importance(scale, "qwen_1_5b_base", "math")}),
    "figure 11": lambda scale: ({}, {"importance_mbpp": _importance(scale, "qwen_1_5b_base", "mbpp")}),
    "figure 12": _figure_12,
    "figure 13": lambda scale: _pass_at_k(scale, "math"),
    "appendix b9": _appendix_b9,
}
