"""Estimates the costs of a step: FLOPs from its jaxpr, time from the compiled program.

`count_flops` counts products (2 for each multiply-add) times the lengths of the scans around them, also where they
are computed again.
`estimate` combines the compiler's cycles, the kernels' FLOPs and the collectives' bytes.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from imm_jax.aot import hlo
from imm_jax.aot.topology import TpuSlice
from imm_jax.model.attention import splash_tile

# Number of products of [T, S] by h in each kernel: q k and p v; q k, do v and ds k; q k, p do, do v and ds q.
_SPLASH = {"fwd": 2, "dq": 3, "dkv": 4}
# The compiler has no estimate for kernels. We assume half the peak, as the softmax is not fully overlapped.
KERNEL_EFFICIENCY = 0.5


def count_flops(jaxpr: Any) -> float:
  """Counts the FLOPs of the products in a jaxpr over all devices.

  Raises:
    ValueError: for a loop of unknown length, or an unknown kernel.

  >>> x = jnp.ones((4, 4))
  >>> count_flops(jax.make_jaxpr(lambda x: jax.lax.scan(lambda c, _: (c @ c, None), x, length=3)[0])(x))
  384.0
  """
  total = 0.0
  for e in getattr(jaxpr, "jaxpr", jaxpr).eqns:
    kind = e.primitive.name
    inner = [count_flops(j) for j in _inner_jaxprs(e)] if kind != "pallas_call" else []
    if kind == "dot_general":
      (contracted, _), _ = e.params["dimension_numbers"]
      total += 2.0 * math.prod(e.outvars[0].aval.shape) * math.prod(e.invars[0].aval.shape[d] for d in contracted)
    elif kind == "pallas_call":
      total += count_kernel_flops(str(e.params["name"]), next(
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


def _inner_jaxprs(equation: Any) -> list[Any]:
  """Lists the jaxprs in an equation's parameters."""
  is_jaxpr = lambda p: hasattr(p, "eqns") or hasattr(getattr(p, "jaxpr", None), "eqns")
  return [p for p in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr) if is_jaxpr(p)]


def count_kernel_flops(name: str, queries: Sequence[int]) -> float:
  """Counts the FLOPs of a splash kernel call for queries [..., H, T, h], in the tiles on and below the diagonal.

  Raises:
    ValueError: for another kernel.

  >>> count_kernel_flops("splash_mha_fwd_segmented", (2, 4, 1024, 64))  # 2 x 2 tiles, of which three run
  1610612736.0
  """
  phase = re.match(r"splash_m[hq]a_(fwd|dq|dkv)_", name)
  if not phase:
    raise ValueError(f"kernel {name}: its FLOPs are not known")
  *rows, length, head_dim = queries
  tiles = length // splash_tile(length)
  return _SPLASH[phase[1]] * 2.0 * math.prod(rows) * length**2 * head_dim * (tiles + 1) / (2 * tiles)


class Estimate(NamedTuple):
  """Holds the estimate of a step on one chip: times in seconds, summed over all regions of the program.

  Attributes:
    seconds: sum over the regions of the longer of computation and overlapped collectives, plus exposed collectives.
    compute: the compiler's cycles divided by the clock rate.
    kernels: time of Pallas kernels, from their FLOPs at KERNEL_EFFICIENCY of the peak.
    overlapped: collectives that overlap with computation.
    exposed: collectives that do not.
    network: the part of these two between slices.
    traffic: bytes between HBM and the chip.
    collectives: all collectives.
  """

  seconds: float
  compute: float
  kernels: float
  overlapped: float
  exposed: float
  network: float
  traffic: float
  collectives: list[hlo.Collective]

  def compute_roofline(self, slice_: TpuSlice, flops: float) -> tuple[float, dict[str, float]]:
    """Returns (longest term, terms): time of FLOPs, HBM bytes and collectives, each at its peak rate."""
    terms = {"compute": flops / slice_.chip.flops, "HBM": self.traffic / slice_.chip.hbm_rate,
             "links": self.overlapped + self.exposed - self.network, "network": self.network}
    return max(terms.values()), terms


def estimate(module: hlo.Module, slice_: TpuSlice, mesh: Mesh) -> Estimate:
  """Estimates a step from its compiled module, in which devices are numbered as in the mesh."""
  devices = mesh.devices.ravel().tolist()
  collectives = module.collectives()
  seconds, totals = 0.0, dict.fromkeys(("compute", "kernels", "overlapped", "exposed", "network", "traffic"), 0.0)
  for region in module.regions():
    parts = {"compute": module.cycles(region) / slice_.chip.clock, "traffic": module.traffic(region), "network": 0.0,
             "kernels": estimate_kernel_seconds(module, region, slice_), "overlapped": 0.0, "exposed": 0.0}
    for c in collectives:
      if c.region == region.name:
        duration = slice_.seconds(c.kind, c.size, [devices[i] for i in c.group])
        parts["traffic"] += 2 * c.size
        parts["overlapped" if c.overlapped else "exposed"] += duration
        parts["network"] += duration if c.kind == "send" else 0.0
    seconds += region.times * (max(parts["compute"] + parts["kernels"], parts["overlapped"]) + parts["exposed"])
    totals = {name: total + region.times * parts[name] for name, total in totals.items()}
  return Estimate(seconds, collectives=collectives, **totals)


def estimate_kernel_seconds(module: hlo.Module, region: hlo.Region, slice_: TpuSlice) -> float:
  """Estimates the seconds of splash kernels in one run of a region; heads narrower than a matrix unit underuse it."""
  total = 0.0
  for name, shapes in module.kernels(region):
    queries = next(hlo.dims(shape) for shape in shapes if re.match("bf16|f16|f32", shape))
    utilization = min(1.0, queries[-1] / slice_.chip.unit)
    total += count_kernel_flops(name, queries) / (KERNEL_EFFICIENCY * utilization * slice_.chip.flops)
  return total
