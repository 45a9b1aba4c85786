"""Accuracy of one checkpoint on the tasks of a config: greedy, and with `eval.num_samples` pass@k and majority vote.

Questions are asked by `eval.protocol` (docs/protocols.md).

    python -m imm_jax.evaluate --config=configs/tiny.py --model=tiny --out=runs/scores
    python -m imm_jax.evaluate --config=configs/tiny.py --model=DIR --out=OUT --config.eval.num_samples=16

OUT holds <task>.jsonl (a row a question, with the answer, its verdict and what was judged), <task>_samples.jsonl, and
scores.json, which says of each task the protocol, the worked examples, the mean tokens of an answer and the share that
was cut. It appears whole or not at all.
"""

import json
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from imm_jax import cli, config, experiments, files
from imm_jax.errors import UserError
from imm_jax.evaluation import Accuracy
from imm_jax.model import hf, hub
from imm_jax.report.results import Asked
from imm_jax.stages import devices, evaluating, sampling

_CONFIG = config_flags.DEFINE_config_file("config", None, "Settings: task, prompt, eval, sampler and mesh count.")
_MODEL = flags.DEFINE_string("model", None, "An HF checkpoint folder, a hub id, tiny, or BASE+ADAPTER.")
_OUT = flags.DEFINE_string("out", None, "The folder to write.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace an earlier result in --out.")
flags.mark_flags_as_required(["config", "model", "out"])


def main() -> None:
  settings = cli.config_of(_CONFIG)
  if experiments.is_experiment(settings):
    raise UserError("--config: holds several runs; give the config of one, such as configs/qwen.py")
  settings.model = _MODEL.value
  config.validate(settings, trains=False)
  devices.leave_to_others(settings)
  sampling.check_sampler(settings)
  out = Path(_OUT.value)
  model = hub.resolve(settings.model)
  hf.check(model)
  files.check_out(out, {"model": model}, overwrite=_OVERWRITE.value, foreign=_foreign)
  scratch = out.with_name(f".{out.name}.sampling")
  with files.alone(out), files.committed(out) as folder:
    facts = evaluating.evaluate(settings, model, scratch, folder, label=model.name)
    files.write_text(folder / "scores.json", json.dumps({"model": settings.model, **facts}, indent=1) + "\n")
  files.remove(scratch)
  for task, found in facts["scores"].items():
    for metric, score in found.items():
      a = Accuracy(**score)
      print(f"{task:<16}{metric:<14}{a.value:.3f} [{a.low:.3f}, {a.high:.3f}] n={a.n}")
  for task, how in facts["protocol"].items():
    asked = Asked(*(how[name] for name in Asked._fields))
    print(f"{task}: {asked.rule}; {asked.mean_tokens:.1f} tokens an answer, {asked.cut:.1%} cut at "
          f"config.eval.max_new_tokens={settings.eval.max_new_tokens}")
  for task, count in facts["long_prompts"].items():
    print(f"{task}: {count} questions were skipped: with their answers they do not fit in the model's context")
  print(f"answers and scores: {out}")


def _foreign(folder: Path) -> str:
  return "" if (folder / "scores.json").is_file() else "is no earlier result (it has no scores.json)"


if __name__ == "__main__":
  cli.run(main)
