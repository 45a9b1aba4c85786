"""Measures a checkpoint's accuracy on a config's tasks: greedy and, with `eval.num_samples`, pass@k and majority vote.

Questions are asked as `eval.protocol` says (docs/protocols.md).

    imm evaluate --config=tiny --model=tiny --out=runs/scores
    imm evaluate --config=tiny --model=DIR --out=OUT --config.eval.num_samples=16
    imm evaluate --config=tiny --model=DIR --out=OUT --against=runs/scores
    imm evaluate --config=tiny --model=DIR --out=OUT --dry_run

OUT gets <task>.jsonl (a row per question with the answer, its verdict and the text that was judged),
<task>_samples.jsonl, and scores.json, which records for each task the scores, the protocol, the number and a digest of
the worked examples, the mean tokens of an answer, the share of answers that were cut off and the number of those in
which no answer was found. An error leaves no partial OUT. --against adds OUT/against.json, which says which differences
are significant. --dry_run shows what is asked, with the first prompt of each task.
"""

import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from imm_jax import cli, config_checks, experiments, files, tasks
from imm_jax.errors import UserError
from imm_jax.model import hf, hub
from imm_jax.report.results import AnswerStats
from imm_jax.sampling import engines
from imm_jax.stages import devices, evaluate
from imm_jax.stages.result_cache import ResultCache
from imm_jax.stages.task_entries import LM_EVAL, get_tasks
from imm_jax.statistics import model_comparison
from imm_jax.statistics.accuracy import Accuracy

_CONFIG = config_flags.DEFINE_config_file("config", None, "The settings, as a file or a name such as tiny or "
                                          "qwen:1.5b. Used are task, prompt, eval, sampler and mesh.")
_MODEL = flags.DEFINE_string("model", None, "The model: an HF checkpoint folder, a hub id, tiny, or BASE+ADAPTER.")
_OUT = flags.DEFINE_string("out", None, "The folder to write answers and scores to.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace an earlier result in --out.")
_AGAINST = flags.DEFINE_multi_string("against", [], "An earlier --out, or an eval folder of a run, to compare with "
                                     "question by question; may be given several times.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Only print the number of questions of each task, and its first prompt "
                             "as the model gets it.")
flags.mark_flags_as_required(["config", "model", "out"])
# Share of answers that are cut off above which a warning is printed.
_MAX_CUT = 0.1
# Settings of training that have no effect here, and those of evaluation in their place.
_COUNTERPARTS = {"prompt.few_shot": "eval.few_shot", "sample.max_new_tokens": "eval.max_new_tokens",
                 "sample.num_samples": "eval.num_samples", "sample.temperatures": "eval.temperature",
                 "sample.top_p": "eval.top_p", "task.questions_per_round": "task.eval_questions"}
# Share of answers in which none is found from which on a line says so.
_MANY_UNREAD = 0.1


def main() -> None:
  """Evaluates --model, writes answers and scores to --out, and prints the scores."""
  settings = cli.read_config(_CONFIG)
  if experiments.is_experiment(settings):
    raise UserError("--config: holds several runs; give the config of one, such as configs/qwen.py")
  if any(re.match("--?config[.]model=", argument) for argument in sys.argv):
    raise UserError(f"--config.model: is not used here, since --model={_MODEL.value} is the model; leave it out")
  for key, counterpart in _COUNTERPARTS.items():
    if any(re.match(f"--?config[.]{re.escape(key)}(=|$)", argument) for argument in sys.argv):
      print(f"note: --config.{key}: is for training and has no effect here; that of evaluation is "
            f"--config.{counterpart}", file=sys.stderr)
  settings.model = _MODEL.value
  if tasks.default_measure(settings.task.name) == "choices":  # as no answers are sampled for training
    settings.eval.by_likelihood = (*settings.eval.by_likelihood, settings.task.name)
  config_checks.validate(settings, trains=False)
  devices.reserve_accelerators(settings)
  engines.check_engine(settings)
  out = Path(_OUT.value)
  model = hub.resolve(settings.model)
  hf.check_folder(model)
  baselines = {Path(name): model_comparison.read_folder(Path(name)) for name in _AGAINST.value}
  chosen = get_tasks(settings)
  _check_baselines(baselines, (*chosen.names, *(text.partition("=")[0] for text in chosen.texts)))
  files.check_out(out, {"model": model, **{f"--against={path}": path for path in baselines}},
                  overwrite=_OVERWRITE.value, explain_foreign=_explain_foreign)
  if _DRY_RUN.value:
    _print_prompts(settings, model)
    return
  scratch = out.with_name(f".{out.name}.sampling")
  with files.lock(out), files.write_atomically(out) as folder:
    facts = evaluate.evaluate(settings, model, scratch, ResultCache(folder), label=model.name)
    files.write_json(folder / "scores.json", {"model": settings.model, **facts})
  files.remove(scratch)
  _print_scores(facts)
  _print_protocols(facts, settings)
  print(f"answers and scores: {out}")
  if baselines:
    model_comparison.print_and_write(out, baselines, out / "against.json")


def _check_baselines(baselines: Mapping[Path, Mapping[str, Any]], tasks_and_texts: Sequence[str]) -> None:
  """Raises UserError if earlier answers are to none of these tasks and texts."""
  for path, answers in baselines.items():
    # Names of lm_eval's tasks in a group are only known once it has run.
    if not answers.keys() & {*tasks_and_texts} and not any(name.startswith(LM_EVAL) for name in tasks_and_texts):
      raise UserError(f"--against={path}: has answers to {', '.join(answers)}, of which nothing is asked; asked are "
                      f"{', '.join(tasks_and_texts)}")


def _print_prompts(settings: ml_collections.ConfigDict, model: Path) -> None:
  """Prints for each task how many questions are asked, and the first prompt."""
  for name, count, text in evaluate.list_first_prompts(settings, model):
    print(f"{name}: {count}, the first of them:")
    print(textwrap.indent(text, "  | ", lambda line: True))


def _print_scores(facts: Mapping[str, Any]) -> None:
  name_width = max(14, *map(len, (*facts["scores"], *facts["texts"])))
  metric_width = max(14, *(len(metric) for scores in facts["scores"].values() for metric in scores))
  for task, scores in facts["scores"].items():
    for metric, score in scores.items():
      value, n, low, high = Accuracy(**score)
      print(f"{task:<{name_width}}  {metric:<{metric_width}}  {value:.3f} [{low:.3f}, {high:.3f}] n={n}")
  for text, scores in facts["texts"].items():
    for metric in ("nats_per_token", "bits_per_byte"):
      mean = scores[metric]
      interval = f" [{mean['low']:.4f}, {mean['high']:.4f}]" if scores["n"] > 1 else ""  # one passage has none
      print(f"{text:<{name_width}}  {metric:<{metric_width}}  {mean['value']:.4f}{interval} n={scores['n']}")


def _print_protocols(facts: Mapping[str, Any], settings: ml_collections.ConfigDict) -> None:
  for task, protocol in facts["protocol"].items():
    stats = AnswerStats(*(protocol[name] for name in AnswerStats._fields))
    limit = "the task's own limit" if task.startswith(LM_EVAL) else (
        f"config.eval.max_new_tokens={get_tasks(settings).protocol.token_limit}")
    length = f"; {stats.mean_tokens:.1f} tokens an answer, {stats.cut:.1%} cut at {limit}" if stats.mean_tokens else ""
    print(f"{task}: {stats.protocol_text}{', chat template' * bool(protocol.get('chat'))}{length}")
    if stats.cut and stats.cut > _MAX_CUT:
      print(f"warning: {task}: {stats.cut:.0%} of the answers were cut at {limit} and are judged as they are; raise it",
            file=sys.stderr)
    unread = protocol.get("unread", 0)
    if unread and unread >= _MANY_UNREAD * protocol["n"]:
      print(f"warning: {task}: in {unread} of {protocol['n']} texts no answer was found, and they count as wrong; see "
            f"those in {task}.jsonl whose span is empty", file=sys.stderr)
  for task, count in facts["long_prompts"].items():
    print(f"{task}: {count} questions were skipped: with their answers they do not fit in the model's context")


def _explain_foreign(folder: Path) -> str:
  """Explains why a folder is no earlier result of this command; returns "" if it is one."""
  if not (folder / "scores.json").is_file():
    return "is no earlier result (it has no scores.json)"
  unknown = sorted(path.name for path in folder.iterdir() if path.is_dir() or (
      path.suffix != ".jsonl" and path.name not in ("scores.json", "against.json")))
  return f"is no earlier result (it holds {unknown[0]})" if unknown else ""


if __name__ == "__main__":
  cli.run(main, resumes=True)
