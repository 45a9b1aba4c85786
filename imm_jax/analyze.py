"""Measures which layers of a checkpoint matter for a task or a text, and which changed between two checkpoints.

    imm analyze --config=tiny --model=tiny --task=stories --task=groups --out=runs/layers
    imm analyze --config=qwen --model=DIR --task=math --task=bookcorpus --order=2 --out=OUT
    imm analyze --model=DIR --tuned=DIR --tuned=DIR --out=OUT

--task measures the importance of each layer (eq. 3; --order=2: eq. 2) on the worked answers of a task's train split, on
a corpus (bookcorpus, tiny_shakespeare) or on text=file:PATH. --tuned measures how much the weights of each layer
changed (eq. 4). Both flags may be given several times. With both, Spearman's rank correlation between the two is
computed.

OUT gets analysis.json, layers.csv, and figures of importance and weight change as .png and .svg. An error leaves no
partial OUT.
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
    "config", None, "With --task: the settings, as a file or a name such as tiny or qwen:1.5b. Used are prompt, sft "
    "(rows, dtype, attention), seed and mesh.")
_MODEL = flags.DEFINE_string("model", None, "The model: an HF checkpoint folder, a hub id, tiny, or BASE+ADAPTER.")
_TASK = flags.DEFINE_multi_string("task", [], "A task or text to measure layer importance on, NAME or "
                                  "NAME=SOURCE; may be given several times.")
_TUNED = flags.DEFINE_multi_string("tuned", [], "A model that was trained or merged from --model, whose weights are "
                                   "compared with those of --model; may be given several times.")
_ORDER = flags.DEFINE_enum("order", "1", list(map(str, ORDERS)), "Order of the importance: 1 for |gradient x weight| "
                           "(eq. 3), 2 to include the second-order term (eq. 2).")
_EXAMPLES = flags.DEFINE_integer("examples", None, "Largest number of examples of each task; by default "
                                 "analysis.examples of the config.", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "The folder to write.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace an earlier result in --out.")
flags.mark_flags_as_required(["model", "out"])


def main() -> None:
  """Measures layer importance, weight change or both, and writes the results to --out."""
  entries, tuned = _TASK.value, _TUNED.value
  if not entries and not tuned:
    raise UserError("give --task=NAME, for layer importance, --tuned=DIR, for weight change, or both")
  for flag, values in ((_TASK, entries), (_TUNED, tuned)):
    if repeated := [name for i, name in enumerate(values) if name in values[:i]]:
      raise UserError(f"--{flag.name}={repeated[0]}: is given twice")
  if not entries:
    unused = [f"--{flag.name}" for flag in (_CONFIG, _ORDER, _EXAMPLES) if flag.present]
    if unused:
      raise UserError(f"only --task, layer importance, reads {', '.join(unused)}; give a --task, or leave that out")
    # The disk limits the speed of weight change, so an accelerator would be started for nothing.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
  settings = _read_settings(entries) if entries else None
  # Imported here because jax reads JAX_PLATFORMS when it is imported.
  from imm_jax.analysis.weight_change import check_same_model, weight_change
  from imm_jax.report import analysis_files as output

  model, tuned_models = hub.resolve(_MODEL.value), {name: hub.resolve(name) for name in tuned}
  for tuned_model in tuned_models.values():
    check_same_model(model, tuned_model)
  if entries:
    from imm_jax.model import hf  # imported here because weight change does not need it

    hf.check_folder(model)
  out = Path(_OUT.value)
  inputs = {"model": model} | {f"tuned[{i}]": folder for i, folder in enumerate(tuned_models.values())}
  files.check_out(out, inputs, overwrite=_OVERWRITE.value, explain_foreign=output.explain_foreign)
  with files.lock(out), files.write_atomically(out) as folder:
    change = {name: weight_change(model, tuned_model).to_json() for name, tuned_model in tuned_models.items()}
    result = output.combine(_measure_importance(settings, model, entries) if entries else {}, change)
    output.write(folder, {"model": _MODEL.value, **result})
  print(output.format_table(result))
  print(f"json, csv and figures: {out}")


# These two import what they need themselves: weight change needs none of it, and the imports take seconds.
def _read_settings(entries: Sequence[str]) -> Any:
  from imm_jax import config_checks, config_keys, experiments
  from imm_jax.stages import analyze

  if _CONFIG.value is None:
    raise UserError("--task needs --config, such as --config=configs/qwen.py: prompt, rows and mesh come from it")
  settings = cli.read_config(_CONFIG)
  if experiments.is_experiment(settings):
    raise UserError("--config: holds several runs; give the config of one, such as configs/qwen.py")
  settings.model = _MODEL.value
  if _EXAMPLES.value:
    settings.analysis.examples = _EXAMPLES.value
  config_checks.validate(settings, trains=False, downloads=False)
  config_keys.require(settings, "analysis.examples", lambda n: n > 0, "expected 1 or more, or --examples")
  for entry in entries:
    analyze.check_entry(entry)
  return settings


def _measure_importance(settings: Any, model: Path, entries: Sequence[str]) -> Mapping[str, Any]:
  from imm_jax.stages import analyze

  return analyze.measure_importance(settings, model, entries, int(_ORDER.value))


if __name__ == "__main__":
  cli.run(main)
