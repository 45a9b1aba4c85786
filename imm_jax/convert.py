"""Converts checkpoints between HF and orbax, and checks that a checkpoint is read as transformers reads it.

    imm convert --source=HF_FOLDER --out=DIR --to=orbax
    imm convert --source=DIR --out=HF_FOLDER --to=hf
    imm convert --source=BASE+ADAPTER --out=HF_FOLDER --to=hf
    imm convert --verify=HF_FOLDER

DIR holds the parameters (`params/`, orbax, layers stacked) and the files beside them (`hf/`: config, tokenizer).
ADAPTER is a LoRA adapter of peft, which is merged into BASE.
`--verify` reads every tensor and compares what would be written with the file, byte for byte, and the tokenizer with
its file, on texts; where torch is installed it also compares logits with those of transformers, see `verification`. All
of it runs on the CPU, where a model that no single accelerator holds has room.
"""

from pathlib import Path

import jax
from absl import flags

from imm_jax import cli, files
from imm_jax.errors import UserError
from imm_jax.model import folder, hf, hub, lora, verification
from imm_jax.model.decoder import abstract_params

_SOURCE = flags.DEFINE_string("source", None, "The checkpoint to read: HF folder, hub id, BASE+ADAPTER, or what "
                              "--to=orbax wrote.")
_OUT = flags.DEFINE_string("out", None, "The folder to write.")
_TO = flags.DEFINE_enum("to", None, ["hf", "orbax"], "The form to write.")
_VERIFY = flags.DEFINE_string("verify", None, "The checkpoint to check, in place of converting: HF folder, hub id or "
                              "BASE+ADAPTER.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace an earlier conversion at --out.")


def to_orbax(source: Path, out: Path) -> None:
  """Writes the parameters of an HF folder with orbax, and the files beside them."""
  import orbax.checkpoint as ocp

  if (source / "params").is_dir() and not (source / "config.json").exists():
    raise UserError(f"{source}: is an orbax checkpoint; expected an HF folder, or --to=hf")
  _, params = hf.load(source, place=hf.place_on_host)
  with files.committed(out) as temporary:
    (temporary / "hf").mkdir(parents=True)
    folder.copy_side_files(source, temporary / "hf")
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save((temporary / "params").absolute(), params)


def from_orbax(source: Path, out: Path) -> None:
  """Writes an HF folder from what `to_orbax` wrote, or from another orbax checkpoint of the same tree beside `hf/`."""
  import orbax.checkpoint as ocp

  if not source.is_dir():
    raise UserError(f"{source}: no such folder; expected one that --to=orbax wrote, or BASE+ADAPTER (a model of the "
                    "hub is in HF form already)")
  if (source / folder.ADAPTER_CONFIG).exists() and not folder.has_weights(source):
    raise folder.adapter_error(str(source), source / folder.ADAPTER_CONFIG)
  if (source / "config.json").exists():
    raise UserError(f"{source}: is an HF folder; expected one that --to=orbax wrote, or --to=orbax")
  if not (source / "params").is_dir() or not (source / "hf").is_dir():
    raise UserError(f"{source}: expected params/ (orbax) and hf/ (config.json, tokenizer) in it, as --to=orbax writes")
  config = hf.read_config(source / "hf")
  with ocp.StandardCheckpointer() as checkpointer:
    try:
      # Compared before anything is read: a restore that breaks off leaves threads and coroutines behind.
      metadata = checkpointer.metadata((source / "params").absolute()).item_metadata
      if metadata is None:
        raise ValueError("its list of tensors is missing or damaged")
      stored = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype,
                                                              sharding=hf.place_on_host()), dict(metadata))
      expected = jax.tree.map(lambda leaf: tuple(leaf.shape), abstract_params(config))
      found = jax.tree.map(lambda leaf: tuple(leaf.shape), stored)
      if found != expected:
        raise ValueError("its tensors have other names or shapes")
      params = checkpointer.restore((source / "params").absolute(), stored)
    except (ValueError, KeyError, TypeError, FileNotFoundError) as e:
      cause = str(e).strip().partition("\n")[0]
      raise UserError(f"{source / 'params'}: is no orbax checkpoint of what hf/config.json describes ({cause})") from e
  with files.committed(out) as temporary:
    hf.save(params, temporary, like=source / "hf")


def _explain_foreign(path: Path) -> str:
  """Why a folder is not what a conversion writes; "" where it is."""
  names = {file.name for file in path.iterdir()}
  if names == {"params", "hf"}:
    return ""
  weights = {name for name in names if name.endswith(".safetensors")}
  if not weights or "config.json" not in names:
    return "is no checkpoint"
  others = sorted(names - weights - {folder.INDEX, folder.TEMPLATES, *folder.SIDE_FILES})
  return f"holds {others[0]}, which no conversion writes" if others else ""


def main() -> None:
  """Reads the flags and does what they say."""
  if _VERIFY.value is not None:
    if _SOURCE.value or _OUT.value or _TO.value:
      raise UserError("--verify goes alone")
    return verification.verify(hub.resolve(_VERIFY.value))
  for name, value in (("source", _SOURCE.value), ("out", _OUT.value), ("to", _TO.value)):
    if not value:
      raise UserError(f"--{name} is missing; expected --source, --out and --to, or --verify")
  out = Path(_OUT.value)
  source = Path(_SOURCE.value)
  pair = hub.split_adapter(_SOURCE.value)
  inputs = dict(zip(("--source, its base", "--source, its adapter"), map(Path, pair), strict=True)) if pair else {
      "--source": source}
  files.check_out(out, inputs, overwrite=_OVERWRITE.value, explain_foreign=_explain_foreign)
  with files.locked(out):
    if _TO.value == "orbax":
      to_orbax(hub.resolve(_SOURCE.value), out)
    elif pair:
      with files.committed(out) as temporary:
        lora.merge(*hub.resolve_pair(_SOURCE.value), temporary)
    else:
      from imm_jax.training import checkpoints  # late: orbax takes its time

      checkpoints.ignore_closed_loops()  # for good: they may speak while the error is being printed
      from_orbax(source, out)
  print(f"{out}: written")
  return None


if __name__ == "__main__":
  cli.run(main)
