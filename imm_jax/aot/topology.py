"""Describes TPU slices that are not attached: their chips, their links, and meshes over them to compile for."""

import contextlib
import dataclasses
import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from imm_jax.errors import UserError, first_line, suggest
from imm_jax.model import sharding
from imm_jax.runtime.hardware import peak_flops


@dataclasses.dataclass(frozen=True)
class Chip:
  """Describes a TPU chip, which jax sees as one device.

  Attributes:
    flops: peak bfloat16 FLOP/s.
    clock: clock rate in Hz, for the compiler's cycles.
    unit: edge of a matrix unit.
    hbm: bytes of HBM that a program can use.
    hbm_rate: HBM bandwidth in bytes per second.
    link: bandwidth of one link to a neighbor in bytes per second, one way.
    wrap: smallest number of chips along an axis whose ends are linked to a ring.
    network: a chip's share of its host's network bandwidth in bytes per second, for traffic between slices.
    name: libtpu's name, before the sizes.
    largest: largest slice, in chips along each axis.
    options: further options for libtpu.
  """

  flops: float
  clock: float
  unit: int
  hbm: float
  hbm_rate: float
  link: float
  wrap: int
  network: float
  name: str
  largest: tuple[int, ...]
  options: tuple[tuple[str, str], ...] = ()


# HBM and links: cloud.google.com/tpu/docs/v4, v5e, v5p, v6e ("key specifications"). Their figure for the links of
# a chip (1600, 4800, 3200 Gbps, 2400 for v4) covers all ports (4 in a 2D torus, 6 in a 3D torus), each way. The network
# is a host's NICs over its chips (v5e 2 x 100 Gbps and v6e 4 x 200 Gbps for 8 chips, v4 and v5p 200 Gbps for 4).
# The clock rate is that at which a chip's matrix units (128 x 128, v6e 256 x 256) reach its peak. `hbm` is what the
# compiler makes available to a program, as its out-of-memory errors report.
CHIPS = {
    "v4": Chip(peak_flops("TPU v4"), 1.05e9, 128, 30.75 * 2**30, 1228e9, 50e9, 4, 6.25e9, "v4", (16, 16, 16),
               (("chip_config_name", "megacore"),)),
    "v5e": Chip(peak_flops("TPU v5e"), 1.5e9, 128, 15.75 * 2**30, 819e9, 50e9, 16, 3.125e9, "v5e", (16, 16)),
    "v5p": Chip(peak_flops("TPU v5p"), 1.75e9, 128, 95.74 * 2**30, 2765e9, 100e9, 4, 6.25e9, "v5p", (16, 16, 24)),
    "v6e": Chip(peak_flops("TPU v6"), 1.75e9, 256, 31.25 * 2**30, 1640e9, 100e9, 16, 12.5e9, "v6e", (16, 16)),
}


@dataclasses.dataclass(frozen=True)
class TpuSlice:
  """Describes a TPU slice, or several equal ones, joined by the network."""

  name: str
  chip: Chip
  sizes: tuple[int, ...]
  slices: int
  devices: tuple[jax.Device, ...]

  def mesh(self, **sizes: int) -> Mesh:
    """Makes a mesh over all chips with physical neighbors adjacent; arguments and errors as `sharding.make_mesh`."""
    return sharding.make_mesh(**sizes, devices=self.devices)

  def seconds(self, kind: str, size: float, group: Sequence[jax.Device]) -> float:
    """Estimates the seconds of a collective from the bytes that a chip receives.

    In a gather or scatter of `size` bytes over n chips each chip receives size * (n - 1) / n, in a reduction twice
    that, over all links along the group's axes: two along a ring, one along a line, whose ends have only one. A
    permutation uses one link, a send the chip's share of the network.

    Args:
      kind: opcode, such as `all-gather`.
      size: bytes of the full array.
      group: the participating chips.
    """
    if kind == "send":
      return size / self.chip.network
    if kind == "collective-permute":
      return size / self.chip.link
    links = sum(2 if chips >= self.chip.wrap else 1 for axis, chips in enumerate(self.sizes)
                if len({d.coords[axis] for d in group}) > 1)
    rounds = 2 if kind == "all-reduce" else 1
    return rounds * size * (len(group) - 1) / len(group) / (links * self.chip.link) if links else 0.0


def describe_slice(name: str, *, slices: int = 1) -> TpuSlice:
  """Describes a slice by its name: the kind of chip and the chips along each axis, such as `v5e:4x4`.

  Raises:
    UserError: for a name that libtpu does not know, or if libtpu is missing.
  """
  if importlib.util.find_spec("libtpu") is None:
    raise UserError("--compile_only needs libtpu, TPU's compiler: pip install -e '.[aot]'")
  kind, _, sizes = name.partition(":")
  examples = "v5e:4x4, v5e:16x16, v5p:2x2x2, v6e:4x4, v4:2x2x2"
  if kind not in CHIPS:
    raise UserError(f"--topology={name}: {suggest(kind, list(CHIPS))}, then the chips along each axis, such as "
                    f"{examples}")
  if not re.fullmatch(r"\d+(x\d+){1,2}", sizes) or slices < 1:
    raise UserError(f"--topology={name} --slices={slices}: expected the chips along each axis and 1 slice or more, "
                    f"such as {examples}")
  chip = CHIPS[kind]
  lengths = [int(n) for n in sizes.split("x")]
  if len(lengths) != len(chip.largest) or any(
      n > largest for n, largest in zip(sorted(lengths), chip.largest, strict=True)):
    raise UserError(f"--topology={name}: a {kind} slice has at most {'x'.join(map(str, chip.largest))} chips")
  options = {} if slices == 1 else {"num_slices": slices}
  try:
    with quiet_libtpu():
      described = topologies.get_topology_desc(platform="tpu", topology_name=f"{chip.name}:{sizes}",
                                               **dict(chip.options), **options)
  except Exception as e:  # libtpu raises several kinds
    raise UserError(f"--topology={name}: {first_line(e)} (known are such as {examples})") from e
  return TpuSlice(name, chip, tuple(lengths), slices, tuple(described.devices))


def compile_program(traced: Any) -> Any:
  """Compiles a traced program; raises MemoryError with one line if it does not fit."""
  try:
    with quiet_libtpu():
      return traced.lower().compile()
  except jax.errors.JaxRuntimeError as e:
    if "RESOURCE_EXHAUSTED" not in str(e):
      raise
    # Either "Used 18.1G of 15.75G hbm" or "temporaries (65.6G) exceeds available HBM (15.75G)".
    sizes = re.findall(r"\d[\d.]*[KMGT]\b", str(e))
    raise MemoryError(f"{sizes[0]} of {sizes[1]}" if len(sizes) > 1 else first_line(e)) from e


@contextlib.contextmanager
def quiet_libtpu() -> Iterator[None]:
  """Keeps libtpu from querying the machine's metadata, and from printing to stderr that there is none."""
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  # libtpu's lock protects attached TPUs, and here there are none.
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  sys.stderr.flush()
  saved_stderr = os.dup(2)
  try:
    with open(os.devnull, "w") as nowhere:
      os.dup2(nowhere.fileno(), 2)
      yield
  finally:
    os.dup2(saved_stderr, 2)
    os.close(saved_stderr)
