"""Training states that a stopped run has left, and which of them its next start cannot go on from."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from imm_jax.runs import record as run_record
from imm_jax.runs.run import Stage
from imm_jax.training import states


def list_lost(stages: Sequence[Stage], record: Mapping[str, Any], root: Path, external: Mapping[str, str],
              ) -> dict[str, str]:
  """Lists the training states that were begun with other settings or inputs, or whose inputs will be made anew.

  Args:
    stages: all stages of the run.
    record: content of run.json.
    root: the run directory.
    external: digests of the inputs that no stage writes, by name.

  Returns:
    The folder of each, by a name for the user.
  """
  changed, lost = {*run_record.list_replaced(record, external)}, {}
  for stage in stages:
    inputs, entry = run_record.collect_inputs(stage, record, external), record["stages"].get(stage.name)
    known = entry["inputs"] if entry else {"settings": record.get("settings", {}).get(stage.name)}
    if changed.intersection(stage.needs) or _differ(known, inputs):
      changed.add(stage.name)
    saved = states.find_saved(stage.scratch) if stage.scratch else None
    if saved and (stage.name in changed or _differ(saved.identity, inputs)):
      folder = stage.scratch.removeprefix(f"{root}/")
      lost[f"{folder} (step {saved.step} of {stage.name})"] = stage.scratch
  return lost


def _differ(known: Mapping[str, str | None], inputs: Mapping[str, str | None]) -> bool:
  """Returns whether an input is known to be another; what is not known (None) may still turn out the same."""
  return any(None not in (value, inputs.get(name)) and inputs[name] != value for name, value in known.items())
