"""The device mesh, and which parameter is split along which axis.

Sharding is a table of (path regex -> PartitionSpec); the first match counts. Mesh axes: `data` repeats the parameters,
`fsdp` splits them; batches are split over both.
"""

import re

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from imm_jax.errors import UserError

BATCH = P(("data", "fsdp"))
# Stacked layers have a leading axis; weights are [out, in].
RULES: tuple[tuple[str, P], ...] = (
    (r"(embed_tokens|lm_head)\.weight", P("fsdp", None)),
    (r"layers\..*(q|k|v|gate|up)_proj\.weight", P(None, "fsdp", None)),
    (r"layers\..*(o|down)_proj\.weight", P(None, None, "fsdp")),
    (r".*", P()),
)


def make_mesh(*, data: int, fsdp: int) -> Mesh:
  """A mesh over all devices; one of the sizes may be -1, which takes what is left.

  Raises:
    UserError: when the sizes do not multiply to the number of devices.
  """
  count = jax.device_count()
  asked = f"mesh data={data}, fsdp={fsdp}"
  if data == -1 and fsdp > 0:
    data = count // fsdp
  elif fsdp == -1 and data > 0:
    fsdp = count // data
  if data < 1 or fsdp < 1 or data * fsdp != count:
    raise UserError(f"config.{asked} does not fit {count} device(s); sizes must multiply to {count}, or one be -1")
  return jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def spec_of(path: str) -> P:
  """The partition of the parameter at this path; a single layer's (`layers.3.`) lacks the first axis.

  >>> tuple(spec_of("layers.mlp.down_proj.weight")), tuple(spec_of("layers.3.mlp.down_proj.weight"))
  ((None, None, 'fsdp'), (None, 'fsdp'))
  """
  spec = next(spec for pattern, spec in RULES if re.fullmatch(pattern, path))
  return P(*spec[1:]) if re.match(r"layers\.\d+\.", path) else spec


def cache_sharding(mesh: Mesh, rows: int, kv_heads: int) -> NamedSharding:
  """Where a key/value cache [B, K, S, h] lies: rows over `data`, heads over `fsdp` as the weights that make them.

  Where there are fewer heads, rows are split over both axes; what does not divide is repeated.
  """
  if kv_heads % mesh.shape["fsdp"] == 0:
    return NamedSharding(mesh, P("data" if rows % mesh.shape["data"] == 0 else None, "fsdp"))
  return NamedSharding(mesh, BATCH if rows % mesh.size == 0 else P("data" if rows % mesh.shape["data"] == 0 else None))


def param_sharding(mesh: Mesh, path: str, shape: tuple[int, ...]) -> NamedSharding:
  """Where a parameter lies; an axis that the mesh does not divide is repeated instead."""
  spec = spec_of(path)
  fits = all(axis is None or size % mesh.shape[axis] == 0 for axis, size in zip(spec, shape, strict=False))
  return NamedSharding(mesh, spec if fits else P())
