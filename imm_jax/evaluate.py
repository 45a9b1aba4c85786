"""Measures the accuracy of a checkpoint on a config's tasks: greedy, with `eval.num_samples` also pass@k and majority.

Questions are asked by `eval.protocol` (docs/protocols.md).

    imm evaluate --config=tiny --model=tiny --out=runs/scores
    imm evaluate --config=tiny --model=DIR --out=OUT --config.eval.num_samples=16
    imm evaluate --config=tiny --model=DIR --out=OUT --against=runs/scores

OUT holds <task>.jsonl (a row a question, with the answer, its verdict and what was judged), <task>_samples.jsonl, and
scores.json, which says of each task the protocol, the worked examples, the mean tokens of an answer and the share that
was cut. It appears whole or not at all. With --against comes OUT/against.json: which differences are real.
"""

import json
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from imm_jax import cli, config, files, tasks
from imm_jax.errors import UserError
from imm_jax.model import hf, hub
from imm_jax.report.results import AnswerStats
from imm_jax.runs import experiments
from imm_jax.stages import devices, evaluating, questions, sampling
from imm_jax.statistics import against
from imm_jax.statistics.evaluation import Accuracy
from imm_jax.tasks import protocols

_CONFIG = config_flags.DEFINE_config_file("config", None, "Settings: a file, or a name such as tiny or qwen:1.5b; "
                                          "its task, prompt, eval, sampler and mesh count.")
_MODEL = flags.DEFINE_string("model", None, "The model: an HF checkpoint folder, a hub id, tiny, or BASE+ADAPTER.")
_OUT = flags.DEFINE_string("out", None, "The folder to write answers and scores to.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace an earlier result in --out.")
_AGAINST = flags.DEFINE_multi_string("against", [], "An earlier --out, or an eval folder of a run, to compare with, "
                                     "question by question; may be given several times.")
flags.mark_flags_as_required(["config", "model", "out"])
_MANY_CUT = 0.1  # share of answers


def main() -> None:
  settings = cli.read_config(_CONFIG)
  if experiments.is_experiment(settings):
    raise UserError("--config: holds several runs; give the config of one, such as configs/qwen.py")
  settings.model = _MODEL.value
  if tasks.default_measure(settings.task.name) == "choices":  # nothing is sampled to train on
    settings.eval.by_likelihood = (*settings.eval.by_likelihood, settings.task.name)
  config.validate(settings, trains=False)
  devices.reserve_accelerators(settings)
  sampling.check_sampler(settings)
  out = Path(_OUT.value)
  model = hub.resolve(settings.model)
  hf.check_folder(model)
  others = {Path(name): against.read_folder(Path(name)) for name in _AGAINST.value}
  files.check_out(out, {"model": model, **{f"--against={other}": other for other in others}},
                  overwrite=_OVERWRITE.value, explain_foreign=_explain_foreign)
  scratch = out.with_name(f".{out.name}.sampling")
  with files.locked(out), files.committed(out) as folder:
    facts = evaluating.evaluate(settings, model, scratch, folder, label=model.name)
    files.write_text(folder / "scores.json", json.dumps({"model": settings.model, **facts}, indent=1) + "\n")
  files.remove(scratch)
  wide = max(14, *map(len, (*facts["scores"], *facts["texts"])))
  far = max(14, *(len(metric) for found in facts["scores"].values() for metric in found))
  for task, found in facts["scores"].items():
    for metric, score in found.items():
      a = Accuracy(**score)
      print(f"{task:<{wide}}  {metric:<{far}}  {a.value:.3f} [{a.low:.3f}, {a.high:.3f}] n={a.n}")
  for text, found in facts["texts"].items():
    for metric in ("nats_per_token", "bits_per_byte"):
      print(f"{text:<{wide}}  {metric:<{far}}  {found[metric]['value']:.4f} [{found[metric]['low']:.4f}, "
            f"{found[metric]['high']:.4f}] n={found['n']}")
  for task, how in facts["protocol"].items():
    asked = AnswerStats(*(how[name] for name in AnswerStats._fields))
    limit = "the task's own limit" if task.startswith(questions.LM_EVAL) else (
        f"config.eval.max_new_tokens={protocols.max_new_tokens(settings)}")
    length = (f"; {asked.mean_tokens:.1f} tokens an answer, {asked.cut:.1%} cut at "
              f"{limit}") if asked.mean_tokens else ""
    print(f"{task}: {asked.rule}{', chat template' * bool(how.get('chat'))}{length}")
    if asked.cut and asked.cut > _MANY_CUT:
      print(f"warning: {task}: {asked.cut:.0%} of the answers were cut at {limit}, and count as they stand; raise it",
            file=sys.stderr)
  for task, count in facts["long_prompts"].items():
    print(f"{task}: {count} questions were skipped: with their answers they do not fit in the model's context")
  print(f"answers and scores: {out}")
  if others:
    against.report(out, others, out / "against.json")


def _explain_foreign(folder: Path) -> str:
  return "" if (folder / "scores.json").is_file() else "is no earlier result (it has no scores.json)"


if __name__ == "__main__":
  cli.run(main)
