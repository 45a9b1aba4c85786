"""Converts checkpoints between HF and orbax, and checks that a checkpoint is read as transformers reads it.

    python -m imm_jax.convert --source=HF_FOLDER --out=DIR --to=orbax
    python -m imm_jax.convert --source=DIR --out=HF_FOLDER --to=hf
    python -m imm_jax.convert --source=BASE+ADAPTER --out=HF_FOLDER --to=hf
    python -m imm_jax.convert --verify=HF_FOLDER

DIR holds the parameters (`params/`, orbax, layers stacked) and the files beside them (`hf/`: config, tokenizer).
ADAPTER is a LoRA adapter of peft, which is merged into BASE.
`--verify` reads every tensor and compares what would be written with the file, byte for byte, and checks that the
tokenizer's ids fit the embedding; where torch is installed it also compares the logits of random tokens in float32, at
positions of the whole context, with those of transformers. All of it runs on the CPU, where a model that no single
accelerator holds has room.
"""

import importlib.util
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from imm_jax import cli, files
from imm_jax.errors import UserError
from imm_jax.model import folder, hf, hub, lora
from imm_jax.model.decoder import abstract_params, bind
from imm_jax.model.tokenizer import has_tokenizer, load_tokenizer

_SOURCE = flags.DEFINE_string("source", None, "The checkpoint to read: HF folder, hub id, BASE+ADAPTER, or what "
                              "--to=orbax wrote.")
_OUT = flags.DEFINE_string("out", None, "The folder to write.")
_TO = flags.DEFINE_enum("to", None, ["hf", "orbax"], "The form to write.")
_VERIFY = flags.DEFINE_string("verify", None, "Check this HF folder or hub id.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace an earlier conversion at --out.")

# Largest error of logits relative to their scale that is rounding, in float32.
_TOLERANCE = 2e-5
_ROWS, _LENGTH = 4, 64
# The context where a config.json does not give it.
_CONTEXT = 4096


class Comparison(NamedTuple):
  """Logits of ours against transformers', in float32.

  Attributes:
    max_error: largest difference, relative to the largest logit.
    kl: largest KL divergence of ours from theirs over the tokens, in nats.
    agreement: share of tokens with the same most likely successor.
    worst: (row, position) of the largest difference.
  """

  max_error: float
  kl: float
  agreement: float
  worst: tuple[int, int]


def to_orbax(source: Path, out: Path) -> None:
  """Writes the parameters of an HF folder with orbax, and the files beside them."""
  import orbax.checkpoint as ocp

  if (source / "params").is_dir() and not (source / "config.json").exists():
    raise UserError(f"{source}: is an orbax checkpoint; expected an HF folder, or --to=hf")
  _, params = hf.load(source, place=_on_host)
  with files.committed(out) as temporary:
    (temporary / "hf").mkdir(parents=True)
    folder.copy_side_files(source, temporary / "hf")
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save((temporary / "params").absolute(), params)


def from_orbax(source: Path, out: Path) -> None:
  """Writes an HF folder from what `to_orbax` wrote, or from another orbax checkpoint of the same tree beside `hf/`."""
  import orbax.checkpoint as ocp

  if not source.is_dir():
    raise UserError(f"{source}: no such folder; expected one that --to=orbax wrote")
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
      stored = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype, sharding=_on_host()),
                            dict(metadata))
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


def compare_logits(source: Path) -> Comparison:
  """Runs random tokens through our decoder and transformers' model, both in float32; needs torch.

  Half of the rows begin at position 0, the others have ascending random positions over the whole context: an error in
  the rotary frequencies grows with the position.
  """
  import torch
  import transformers

  config, params = hf.load(source, dtype=jnp.float32, place=_on_host)
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, config.vocab_size, (_ROWS, _LENGTH), np.int32)
  positions = np.tile(np.arange(_LENGTH), (_ROWS, 1))
  context = max(_LENGTH, config.max_positions or _CONTEXT)
  for row in range(_ROWS // 2, _ROWS):
    positions[row] = np.sort(rng.choice(context, _LENGTH, replace=False))
  model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, trust_remote_code=False).eval()
  with torch.no_grad():
    ids = torch.from_numpy(tokens).long()
    # Without a mask transformers takes a gap in the positions for the next text of a packed row.
    theirs = model(ids, attention_mask=torch.ones_like(ids), position_ids=torch.from_numpy(positions)).logits
    theirs = theirs.numpy().astype(np.float64)
  run = jax.jit(lambda p: bind(config, p)(tokens, positions=positions, segment_ids=np.ones_like(tokens),
                                          compute_dtype=jnp.float32))
  ours = np.asarray(run(params), np.float64)
  error = np.abs(ours - theirs).max(-1)
  log_ours, log_theirs = (x - np.logaddexp.reduce(x, -1, keepdims=True) for x in (ours, theirs))
  divergence = (np.exp(log_theirs) * (log_theirs - log_ours)).sum(-1)
  row, column = np.unravel_index(error.argmax(), error.shape)
  return Comparison(float(error.max() / np.abs(theirs).max()), float(divergence.max()),
                    float((ours.argmax(-1) == theirs.argmax(-1)).mean()), (int(row), int(positions[row, column])))


def verify(source: Path) -> None:
  """Prints what the checks found; raises UserError when one fails."""
  checked = hf.check_bytes(source)
  print(f"{source}: {checked.count} tensors come back byte for byte")
  if checked.left_out:
    print(f"not written, since they follow from the rest: {', '.join(checked.left_out)}")
  if has_tokenizer(source):
    rows = hf.read_config(source).vocab_size
    print(f"the tokenizer's {len(load_tokenizer(source, rows=rows))} ids fit the embedding's {rows} rows")
  else:
    print("no tokenizer beside the weights, so none was checked")
  if importlib.util.find_spec("torch") is None:
    print("torch is not installed, so logits were not compared with transformers")
    return
  found = compare_logits(source)
  print(f"logits of {_ROWS} x {_LENGTH} random tokens, half of them spread over the context, against transformers in "
        f"float32: largest error {found.max_error:.1e} of their scale (row {found.worst[0]}, position "
        f"{found.worst[1]}), KL {found.kl:.1e} nats, same most likely token {found.agreement:.2%}")
  if not found.max_error <= _TOLERANCE:
    raise UserError(f"{source}: the logits differ from transformers' by more than {_TOLERANCE:.0e} of their scale")


def _foreign(path: Path) -> str:
  """Why a folder is not what a conversion writes; "" where it is."""
  names = {file.name for file in path.iterdir()}
  if names == {"params", "hf"}:
    return ""
  weights = {name for name in names if name.endswith(".safetensors")}
  if not weights or "config.json" not in names:
    return "is no checkpoint"
  others = sorted(names - weights - {folder.INDEX, folder.TEMPLATES, *folder.SIDE_FILES})
  return f"holds {others[0]}, which no conversion writes" if others else ""


def _on_host(*_: object) -> jax.sharding.Sharding:
  try:
    return jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
  except RuntimeError:  # the user has switched that backend off
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def main() -> None:
  """Reads the flags and does what they say."""
  if _VERIFY.value is not None:
    if _SOURCE.value or _OUT.value or _TO.value:
      raise UserError("--verify goes alone")
    return verify(hub.resolve(_VERIFY.value))
  for name, value in (("source", _SOURCE.value), ("out", _OUT.value), ("to", _TO.value)):
    if not value:
      raise UserError(f"--{name} is missing; expected --source, --out and --to, or --verify")
  out = Path(_OUT.value)
  source = Path(_SOURCE.value)
  pair = hub.split_adapter(_SOURCE.value)
  inputs = dict(zip(("--source, its base", "--source, its adapter"), map(Path, pair), strict=True)) if pair else {
      "--source": source}
  files.check_out(out, inputs, overwrite=_OVERWRITE.value, foreign=_foreign)
  with files.alone(out):
    if _TO.value == "orbax":
      to_orbax(hub.resolve(_SOURCE.value), out)
    elif pair:
      with files.committed(out) as temporary:
        lora.merge(*hub.parts(_SOURCE.value), temporary)
    else:
      from imm_jax.training import checkpoints  # late: orbax takes its time

      checkpoints.ignore_closed_loops()  # for good: they may speak while the error is being printed
      from_orbax(source, out)
  print(f"{out}: written")
  return None


if __name__ == "__main__":
  cli.run(main)
