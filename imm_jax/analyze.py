"""Measures which layers of a checkpoint matter for a task or a text, and which have moved on the way to another one.

    imm analyze --config=tiny --model=tiny --task=stories --task=groups --out=runs/layers
    imm analyze --config=qwen --model=DIR --task=math --task=bookcorpus --order=2 --out=OUT
    imm analyze --model=DIR --tuned=DIR --tuned=DIR --out=OUT

With --task the importance of each layer (eq. 3; --order=2: eq. 2) on the worked answers of a task's train split, on a
corpus (bookcorpus, tiny_shakespeare) or on text=file:PATH; each may be NAME=SOURCE, and several stand side by side.
With --tuned how far each layer has moved (eq. 4). With both also Spearman's rank correlation between the two.

OUT holds analysis.json, layers.csv, and importance and weight_change as .png and .svg. It appears whole or not at all.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from imm_jax import cli, files
from imm_jax.analysis import ORDERS
from imm_jax.errors import UserError
from imm_jax.model import hub

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "With --task: settings, a file or a name such as tiny or qwen:1.5b, of which prompt, sft (rows, "
    "dtype, attention), seed and mesh count.")
_MODEL = flags.DEFINE_string("model", None, "The model: an HF checkpoint folder, a hub id, tiny, or BASE+ADAPTER.")
_TASK = flags.DEFINE_multi_string("task", [], "A task or text that layer importance is measured on, NAME or "
                                  "NAME=SOURCE; may be given several times.")
_TUNED = flags.DEFINE_multi_string("tuned", [], "A model that --model has become, whose weights are compared with its; "
                                   "may be given several times.")
_ORDER = flags.DEFINE_enum("order", "1", list(map(str, ORDERS)), "Order of the importance: 1 for |gradient x weight| "
                           "(eq. 3), 2 with the second-order term (eq. 2).")
_EXAMPLES = flags.DEFINE_integer("examples", None, "Number of examples of each task, at most; by default "
                                 "analysis.examples of the config.", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "The folder to write.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace an earlier result in --out.")
flags.mark_flags_as_required(["model", "out"])


def main() -> None:
  asked, tuned = _TASK.value, _TUNED.value
  if not asked and not tuned:
    raise UserError("give --task=NAME, for layer importance, --tuned=DIR, for weight change, or both")
  for flag, given in ((_TASK, asked), (_TUNED, tuned)):
    if twice := [name for i, name in enumerate(given) if name in given[:i]]:
      raise UserError(f"--{flag.name}={twice[0]}: is given twice")
  if not asked:
    idle = [f"--{flag.name}" for flag in (_CONFIG, _ORDER, _EXAMPLES) if flag.present]
    if idle:
      raise UserError(f"only --task, layer importance, reads {', '.join(idle)}; give a --task, or leave that out")
    # Weight change is bound by the disk: an accelerator would only be started in vain.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
  settings = _settings(asked) if asked else None
  from imm_jax.analysis.weight_change import check_same_model, weight_change
  from imm_jax.report import analysis as output  # late: jax reads the variable above when it is imported

  model, others = hub.resolve(_MODEL.value), {name: hub.resolve(name) for name in tuned}
  for other in others.values():
    check_same_model(model, other)
  if asked:
    from imm_jax.model import hf  # late, as below

    hf.check_folder(model)
  out = Path(_OUT.value)
  inputs = {"model": model} | {f"tuned[{i}]": folder for i, folder in enumerate(others.values())}
  files.check_out(out, inputs, overwrite=_OVERWRITE.value, explain_foreign=output.explain_foreign)
  with files.locked(out), files.committed(out) as folder:
    change = {name: weight_change(model, other).to_json() for name, other in others.items()}
    found = output.combine(_importance(settings, model, asked) if asked else {}, change)
    output.write(folder, {"model": _MODEL.value, **found})
  print(output.format_table(found))
  print(f"json, csv and figures: {out}")


# Both import late: weight change needs none of it, and it takes longer than to read a small model.
def _settings(asked: Sequence[str]) -> Any:
  from imm_jax import config
  from imm_jax.runs import experiments
  from imm_jax.stages import analysing

  if _CONFIG.value is None:
    raise UserError("--task needs --config, such as --config=configs/qwen.py: prompt, rows and mesh come from it")
  settings = cli.read_config(_CONFIG)
  if experiments.is_experiment(settings):
    raise UserError("--config: holds several runs; give the config of one, such as configs/qwen.py")
  settings.model = _MODEL.value
  if _EXAMPLES.value:
    settings.analysis.examples = _EXAMPLES.value
  config.validate(settings, trains=False, downloads=False)
  config.require(settings, "analysis.examples", lambda n: n > 0, "expected 1 or more, or --examples")
  for entry in asked:
    analysing.check_entry(entry)
  return settings


def _importance(settings: Any, model: Path, asked: Sequence[str]) -> Mapping[str, Any]:
  from imm_jax.stages import analysing

  return analysing.importances(settings, model, asked, int(_ORDER.value))


if __name__ == "__main__":
  cli.run(main)
