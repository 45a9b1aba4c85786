"""Converts checkpoints between HF and orbax, and checks that a checkpoint is read as transformers reads it.

    imm convert --source=HF_FOLDER --out=DIR --to=orbax
    imm convert --source=DIR --out=HF_FOLDER --to=hf
    imm convert --source=BASE+ADAPTER --out=HF_FOLDER --to=hf
    imm convert --verify=HF_FOLDER

DIR holds the parameters (`params/`, in orbax's format, layers stacked) and the other files (`hf/`: config, tokenizer).
ADAPTER is a LoRA adapter of peft, which is merged into BASE.
`--verify` reads every tensor and compares what would be written with the file, byte for byte, and compares the
tokenizer with its file on texts. If torch is installed it also compares logits with those of transformers; see
`imm_jax.model.verification`. All of it runs on the CPU, whose memory also fits models that are too large for an
accelerator.
"""

from pathlib import Path

import jax
from absl import flags

from imm_jax import cli, files
from imm_jax.errors import UserError, first_line
from imm_jax.model import checkpoint_folder, hf, hub, lora, verification
from imm_jax.model.decoder import abstract_params

_SOURCE = flags.DEFINE_string("source", None, "The checkpoint to read: an HF folder, a hub id, BASE+ADAPTER, or a "
                              "folder that --to=orbax wrote.")
_OUT = flags.DEFINE_string("out", None, "The folder to write.")
_TO = flags.DEFINE_enum("to", None, ["hf", "orbax"], "The format to write.")
_VERIFY = flags.DEFINE_string("verify", None, "Check this checkpoint instead of converting: an HF folder, a hub id or "
                              "BASE+ADAPTER.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace an earlier conversion at --out.")


def to_orbax(source: Path, out: Path) -> None:
  """Writes the parameters of an HF folder in orbax's format to `out`/params, and the other files to `out`/hf.

  Raises:
    UserError: when the source is no HF folder, or the output cannot be written.
  """
  import orbax.checkpoint as ocp

  if (source / "params").is_dir() and not (source / "config.json").exists():
    raise UserError(f"{source}: is an orbax checkpoint; expected an HF folder, or --to=hf")
  _, params = hf.load(source, place=hf.place_on_host)
  with files.write_atomically(out) as temporary:
    (temporary / "hf").mkdir(parents=True)
    checkpoint_folder.copy_side_files(source, temporary / "hf")
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save((temporary / "params").absolute(), params)


def from_orbax(source: Path, out: Path) -> None:
  """Writes an HF folder from what `to_orbax` wrote, or from another orbax checkpoint of the same tree beside `hf/`.

  Raises:
    UserError: when the source is something else, or its tensors do not fit its config.
  """
  import orbax.checkpoint as ocp

  if not source.is_dir():
    raise UserError(f"{source}: no such folder; expected one that --to=orbax wrote, or BASE+ADAPTER (a model of the "
                    "hub is in HF form already)")
  if (source / checkpoint_folder.ADAPTER_CONFIG).exists() and not checkpoint_folder.has_weights(source):
    raise checkpoint_folder.adapter_error(str(source), source / checkpoint_folder.ADAPTER_CONFIG)
  if (source / "config.json").exists():
    raise UserError(f"{source}: is an HF folder; expected one that --to=orbax wrote, or --to=orbax")
  if not (source / "params").is_dir() or not (source / "hf").is_dir():
    raise UserError(f"{source}: expected params/ (orbax) and hf/ (config.json, tokenizer) in it, as --to=orbax writes")
  config = hf.read_config(source / "hf")
  with ocp.StandardCheckpointer() as checkpointer:
    try:
      # Shapes are compared before anything is read, because a failed restore leaves threads and coroutines behind.
      metadata = checkpointer.metadata((source / "params").absolute()).item_metadata
      if metadata is None:
        raise ValueError("its list of tensors is missing or damaged")
      stored = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype,
                                                              sharding=hf.place_on_host()), dict(metadata))
      expected = jax.tree.map(lambda leaf: tuple(leaf.shape), abstract_params(config))
      if jax.tree.map(lambda leaf: tuple(leaf.shape), stored) != expected:
        raise ValueError("its tensors have other names or shapes")
      params = checkpointer.restore((source / "params").absolute(), stored)
    except (ValueError, KeyError, TypeError, FileNotFoundError) as e:
      raise UserError(f"{source / 'params'}: is no orbax checkpoint of what hf/config.json describes "
                      f"({first_line(e)})") from e
  with files.write_atomically(out) as temporary:
    hf.save(params, temporary, like=source / "hf")


def _explain_foreign(path: Path) -> str:
  """Explains why a folder is no output of a conversion; returns "" if it is one."""
  names = {file.name for file in path.iterdir()}
  if names == {"params", "hf"}:
    return ""
  weights = {name for name in names if name.endswith(".safetensors")}
  if not weights or "config.json" not in names:
    return "is no checkpoint"
  side_files = {checkpoint_folder.INDEX, checkpoint_folder.TEMPLATES, *checkpoint_folder.SIDE_FILES}
  unknown = sorted(names - weights - side_files)
  return f"holds {unknown[0]}, which no conversion writes" if unknown else ""


def main() -> None:
  """Converts or checks a checkpoint, as the flags say."""
  if _VERIFY.value is not None:
    if _SOURCE.value or _OUT.value or _TO.value:
      raise UserError("--verify cannot be combined with --source, --out or --to")
    verification.verify(hub.resolve(_VERIFY.value))
    return
  for name, value in (("source", _SOURCE.value), ("out", _OUT.value), ("to", _TO.value)):
    if not value:
      raise UserError(f"--{name} is missing; expected --source, --out and --to, or --verify")
  out = Path(_OUT.value)
  source = Path(_SOURCE.value)
  pair = hub.split_adapter(_SOURCE.value)
  inputs = dict(zip(("--source, its base", "--source, its adapter"), map(Path, pair), strict=True)) if pair else {
      "--source": source}
  files.check_out(out, inputs, overwrite=_OVERWRITE.value, explain_foreign=_explain_foreign)
  with files.lock(out):
    if _TO.value == "orbax":
      to_orbax(hub.resolve(_SOURCE.value), out)
    elif pair:
      with files.write_atomically(out) as temporary:
        lora.merge(*hub.resolve_pair(_SOURCE.value), temporary)
    else:
      from imm_jax.training import states  # imported here because orbax takes seconds to import

      states.ignore_closed_loops()  # until the process ends, as they could garble the message of an error
      from_orbax(source, out)
  print(f"{out}: written")


if __name__ == "__main__":
  cli.run(main)
