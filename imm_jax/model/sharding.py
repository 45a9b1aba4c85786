"""The device mesh, and the sharding of parameters over it.

Sharding rules are a table of (path regex, PartitionSpec) in which the first match counts. Mesh axes: `data` replicates
parameters, `fsdp` shards their storage and gathers them for use (ZeRO-3), `tensor` shards the computation (Megatron).
Batches are sharded over `data` and `fsdp`.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from imm_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
_TILE_ROWS = 16  # rows of a TPU tile of bfloat16; 8 for float32
BATCH = P(("data", "fsdp"))
# Stacked layers have a leading axis; weights are [out, in]. `fsdp` always shards rows: they are contiguous in a
# checkpoint, and shards remain multiples of a TPU tile.
RULES: tuple[tuple[str, P], ...] = (
    (r"(embed_tokens|lm_head)\.weight", P(("tensor", "fsdp"), None)),
    (r"layers\..*(q|k|v|gate|up)_proj\.weight", P(None, ("tensor", "fsdp"), None)),
    (r"layers\..*(q|k|v|gate|up)_proj\.bias", P(None, "tensor")),
    (r"layers\..*(o|down)_proj\.weight", P(None, "fsdp", "tensor")),
    # LoRA: A [r, in] and B [out, r] are sharded so that B A has the sharding in which its weight is used.
    (r"layers\..*(q|k|v|gate|up)_proj\.lora_A", P(None, None, "fsdp")),
    (r"layers\..*(q|k|v|gate|up)_proj\.lora_B", P(None, ("tensor", "fsdp"), None)),
    (r"layers\..*(o|down)_proj\.lora_A", P(None, None, ("tensor", "fsdp"))),
    (r"layers\..*(o|down)_proj\.lora_B", P(None, "fsdp", None)),
    (r".*", P()),
)


def make_mesh(*, data: int, fsdp: int, tensor: int = 1, hidden_size: int | None = None,
              devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Makes a mesh. Several TPU slices are joined along `data`, because the network between them is slow.

  Args:
    data: size of the axis; one of the three may be -1 for the remaining devices.
    fsdp: see `data`; if both are -1, `mesh_sizes` chooses.
    tensor: see `data`.
    hidden_size: hidden size of the model, for that choice.
    devices: devices of the mesh; all by default.

  Raises:
    UserError: if the product of the sizes is not the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  sizes = mesh_sizes(len(devices), data=data, fsdp=fsdp, tensor=tensor, hidden_size=hidden_size, slices=slices)
  axis_types = (AxisType.Auto,) * len(AXES)
  if slices == 1:
    return jax.make_mesh(sizes, AXES, axis_types=axis_types, devices=devices)
  if sizes[0] % slices:
    raise UserError(f"config.mesh.data={sizes[0]}: {slices} slices must divide it, for only gradients should cross "
                    "between them")
  within = (sizes[0] // slices, *sizes[1:])
  return Mesh(mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices), AXES, axis_types=axis_types)


def mesh_sizes(count: int, *, data: int, fsdp: int, tensor: int, hidden_size: int | None = None, slices: int = 1,
               ) -> tuple[int, int, int]:
  """Computes the sizes of a mesh over `count` devices in `slices`; see `make_mesh`.

  If `data` and `fsdp` are both -1, `fsdp` is the largest size within a slice that still divides rows of weights into
  whole TPU tiles (16 rows), as smaller shards would be padded. `data` takes the rest.

  >>> mesh_sizes(16, data=2, fsdp=-1, tensor=1)
  (2, 8, 1)
  >>> mesh_sizes(256, data=-1, fsdp=-1, tensor=1, hidden_size=1536)
  (8, 32, 1)
  """
  if data == fsdp == -1 and hidden_size and tensor > 0 and count % (slices * tensor) == 0:
    within = count // (slices * tensor)
    fsdp = max(n for n in range(1, within + 1) if n == 1 or within % n == hidden_size % (_TILE_ROWS * n * tensor) == 0)
  sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
  free = [axis for axis, size in sizes.items() if size == -1]
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if len(free) == 1 and fixed > 0:
    sizes[free[0]] = count // fixed
  if any(size < 1 and size != -1 for size in (data, fsdp, tensor)):
    raise UserError(f"config.mesh data={data}, fsdp={fsdp}, tensor={tensor}: sizes are 1 or more, or -1")
  if min(sizes.values()) < 1 or math.prod(sizes.values()) != count:
    if len(free) == 1:
      raise UserError(f"config.mesh data={data}, fsdp={fsdp}, tensor={tensor} does not fit {count} device(s): {fixed} "
                      f"does not divide {count}")
    raise UserError(f"config.mesh data={data}, fsdp={fsdp}, tensor={tensor} does not fit {count} device(s); sizes must "
                    f"multiply to {count}, or one be -1")
  return sizes["data"], sizes["fsdp"], sizes["tensor"]


def local_mesh(mesh: Mesh) -> Mesh:
  """Returns the mesh itself, or if several processes share it, a tensor-parallel mesh of this process's devices."""
  if jax.process_count() == 1:
    return mesh
  return make_mesh(data=1, fsdp=1, tensor=-1, devices=jax.local_devices())


def decoding_mesh(mesh: Mesh, kv_heads: int) -> Mesh:
  """Reshapes a mesh for decoding, without `fsdp`, as each step of one token would be dominated by gathering weights.

  `tensor` is as large as evenly divides the key/value heads, so that each head's cache is on the devices that compute
  it; `data` takes the rest, with a copy of the weights for each.
  """
  tensor = math.gcd(kv_heads, mesh.shape["fsdp"] * mesh.shape["tensor"])
  return Mesh(mesh.devices.reshape(-1, 1, tensor), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def partition_spec(path: str) -> P:
  """Returns the partition of the parameter at this path; that of a single layer (`layers.3.`) lacks the first axis.

  >>> tuple(partition_spec("layers.mlp.down_proj.weight")), tuple(partition_spec("layers.3.mlp.down_proj.weight"))
  ((None, 'fsdp', 'tensor'), ('fsdp', 'tensor'))
  """
  spec = next(spec for pattern, spec in RULES if re.fullmatch(pattern, path))
  return P(*spec[1:]) if re.match(r"layers\.\d+\.", path) else spec


def gathered_spec(path: str) -> P:
  """Returns the partition of a parameter in use, after gathering over `fsdp`.

  >>> tuple(gathered_spec("layers.3.mlp.up_proj.weight")), tuple(gathered_spec("layers.3.mlp.down_proj.weight"))
  (('tensor',), (None, 'tensor'))
  """
  drop_fsdp = lambda axis: tuple(a for a in axis if a != "fsdp") if isinstance(axis, tuple) else axis
  axes = [None if axis == "fsdp" else drop_fsdp(axis) for axis in partition_spec(path)]
  while axes and axes[-1] is None:
    axes.pop()
  return P(*axes)


def num_batch_shards(mesh: Mesh) -> int:
  """Returns the number of shards of a batch."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def cache_sharding(mesh: Mesh, rows: int) -> NamedSharding:
  """Returns the sharding of a cache [B, K, S, h] on a decoding mesh: rows over `data`, heads over `tensor`."""
  return NamedSharding(mesh, P("data" if rows % mesh.shape["data"] == 0 else None, "tensor"))


def path_name(path: tuple) -> str:
  """Joins the keys of a leaf's path in a nested dict with dots."""
  return ".".join(part.key for part in path if isinstance(part, jax.tree_util.DictKey))


def param_sharding(mesh: Mesh, path: str, shape: tuple[int, ...]) -> NamedSharding:
  """Returns a parameter's sharding; axes that the mesh does not divide are replicated."""
  axis_size = lambda axis: math.prod(mesh.shape[a] for a in ((axis,) if isinstance(axis, str) else axis or ()))
  return NamedSharding(mesh, P(*(axis if size % axis_size(axis) == 0 else None
                                 for axis, size in zip(partition_spec(path), shape, strict=False))))


def find_undivided(params: Any, mesh: Mesh) -> list[str]:
  """Returns the paths of parameters that the table splits, but whose sizes the mesh does not divide.

  Args:
    params: arrays or their shapes.
    mesh: mesh that they are placed on.
  """
  paths = [(path_name(path), leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
  return [path for path, shape in paths if param_sharding(mesh, path, shape).is_fully_replicated
          and not NamedSharding(mesh, partition_spec(path)).is_fully_replicated]
