"""What a step costs: FLOPs from its jaxpr, time from what the compiler made of it.

`flops` counts products (2 for each multiply-add) times the trips of the scans around them, as the program says it,
with what is computed again. `estimate` puts the compiler's cycles, the kernels' FLOPs and the collectives' bytes
together.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from imm_jax.aot import hlo
from imm_jax.aot.topology import Slice
from imm_jax.model.attention import splash_tile

# Products of [T, S] by h that each kernel makes: q k and p v; q k, do v and ds k; q k, p do, do v and ds q.
_SPLASH = {"fwd": 2, "dq": 3, "dkv": 4}
# Kernels carry no estimate. Assumed is half the peak: the softmax between the products is not hidden altogether.
KERNEL_EFFICIENCY = 0.5


def flops(jaxpr: Any) -> float:
  """FLOPs of the products in a jaxpr, over all devices.

  Raises:
    ValueError: for a loop of unknown length, or a kernel that is not known here.

  >>> x = jnp.ones((4, 4))
  >>> flops(jax.make_jaxpr(lambda x: jax.lax.scan(lambda c, _: (c @ c, None), x, length=3)[0])(x))
  384.0
  """
  total = 0.0
  for e in getattr(jaxpr, "jaxpr", jaxpr).eqns:
    kind = e.primitive.name
    inner = [flops(j) for j in _inner(e)] if kind != "pallas_call" else []
    if kind == "dot_general":
      (contracted, _), _ = e.params["dimension_numbers"]
      total += 2.0 * math.prod(e.outvars[0].aval.shape) * math.prod(e.invars[0].aval.shape[d] for d in contracted)
    elif kind == "pallas_call":
      total += kernel_flops(str(e.params["name"]), next(
          v.aval.shape for v in e.invars if jnp.issubdtype(v.aval.dtype, jnp.floating)))
    elif kind == "scan":
      total += e.params["length"] * sum(inner)
    elif kind == "cond":
      total += max(inner)
    elif kind == "shard_map":
      total += math.prod(e.params["mesh"].shape[axis] for axis in e.params["newly_manual_axes"]) * sum(inner)
    elif kind == "while" and sum(inner):
      raise ValueError("a while loop does not say how often it runs; use scan")
    else:
      total += sum(inner)
  return total


def _inner(equation: Any) -> list[Any]:
  """The jaxprs in an equation's parameters."""
  is_jaxpr = lambda p: hasattr(p, "eqns") or hasattr(getattr(p, "jaxpr", None), "eqns")
  return [p for p in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr) if is_jaxpr(p)]


def kernel_flops(name: str, queries: Sequence[int]) -> float:
  """FLOPs of one call of a splash kernel for queries [..., H, T, h]: of the tiles on and below the diagonal.

  Raises:
    ValueError: for another kernel.

  >>> kernel_flops("splash_mha_fwd_segmented", (2, 4, 1024, 64))  # two tiles a side, three of four run
  1610612736.0
  """
  phase = re.match(r"splash_m[hq]a_(fwd|dq|dkv)_", name)
  if not phase:
    raise ValueError(f"kernel {name}: its FLOPs are not known")
  *rows, length, head_dim = queries
  tiles = length // splash_tile(length)
  return _SPLASH[phase[1]] * 2.0 * math.prod(rows) * length**2 * head_dim * (tiles + 1) / (2 * tiles)


class Estimate(NamedTuple):
  """A step on one chip; times in seconds, sums over all regions of the program.

  Attributes:
    seconds: over the regions, the longer of what computes and of the collectives beside it, and those that nothing runs
      beside.
    compute: the compiler's cycles over the clock.
    kernels: of Pallas kernels, from their FLOPs at KERNEL_EFFICIENCY of the peak.
    overlapped: collectives that run beside computation.
    exposed: collectives that run alone.
    network: the part of the two that is between slices.
    traffic: bytes between HBM and the chip.
    collectives: all of them.
  """

  seconds: float
  compute: float
  kernels: float
  overlapped: float
  exposed: float
  network: float
  traffic: float
  collectives: list[hlo.Collective]

  def roofline(self, slice_: Slice, flops: float) -> tuple[float, dict[str, float]]:
    """(the longest of the terms, the terms): FLOPs, HBM bytes and collectives, each at its peak and beside the rest."""
    terms = {"compute": flops / slice_.chip.flops, "HBM": self.traffic / slice_.chip.hbm_rate,
             "links": self.overlapped + self.exposed - self.network, "network": self.network}
    return max(terms.values()), terms


def estimate(module: hlo.Module, slice_: Slice, mesh: Mesh) -> Estimate:
  """Estimates a step from its compiled module, which numbers devices as the mesh does."""
  devices = mesh.devices.ravel().tolist()
  collectives = module.collectives()
  seconds, totals = 0.0, dict.fromkeys(("compute", "kernels", "overlapped", "exposed", "network", "traffic"), 0.0)
  for region in module.regions():
    parts = {"compute": module.cycles(region) / slice_.chip.clock, "traffic": module.traffic(region), "network": 0.0,
             "kernels": kernel_seconds(module, region, slice_), "overlapped": 0.0, "exposed": 0.0}
    for c in collectives:
      if c.region == region.name:
        taken = slice_.seconds(c.kind, c.size, [devices[i] for i in c.group])
        parts["traffic"] += 2 * c.size
        parts["overlapped" if c.overlapped else "exposed"] += taken
        parts["network"] += taken if c.kind == "send" else 0.0
    seconds += region.times * (max(parts["compute"] + parts["kernels"], parts["overlapped"]) + parts["exposed"])
    totals = {name: total + region.times * parts[name] for name, total in totals.items()}
  return Estimate(seconds, collectives=collectives, **totals)


def kernel_seconds(module: hlo.Module, region: hlo.Region, slice_: Slice) -> float:
  """Seconds of the splash kernels in one run of a region; heads narrower than a matrix unit leave a part of it idle."""
  total = 0.0
  for name, shapes in module.kernels(region):
    queries = next(hlo.dims(shape) for shape in shapes if re.match("bf16|f16|f32", shape))
    busy = min(1.0, queries[-1] / slice_.chip.unit)
    total += kernel_flops(name, queries) / (KERNEL_EFFICIENCY * busy * slice_.chip.flops)
  return total
