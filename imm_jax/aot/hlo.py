"""Parses a program compiled by XLA: its loops, collectives, cycle estimates and memory traffic.

The input is the text of a compiled module (`compiled.as_text()`). The number of times that an instruction runs is the
product of the trip counts of the loops around it.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4,
          "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
# A send crosses slices: the compiler splits a reduction into parts within slices and one between them.
_COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute", "send")
# Opcodes that move no data themselves.
_FREE = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "after-all",
         "partition-id", "replica-id")


class Instruction(NamedTuple):
  """Holds a line of HLO."""

  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  attributes: str

  def attribute(self, pattern: str) -> str | None:
    """Returns the first group of a pattern's match in the attributes, or None."""
    match = re.search(pattern, self.attributes)
    return match[1] if match else None


class Region(NamedTuple):
  """Holds the instructions of the entry or of a loop's body, which run `times` times in a step."""

  name: str
  times: int
  instructions: list[Instruction]


class Collective(NamedTuple):
  """Describes a collective of a program.

  Attributes:
    kind: opcode, such as `all-gather`.
    size: bytes of the full array that a device ends with (gather) or starts with (scatter, reduce).
    group: partition numbers, within a slice, of the devices in the first group.
    times: number of times that a step runs it.
    overlapped: whether it overlaps with computation.
    region: name of its region.
    name: name of the instruction.
  """

  kind: str
  size: float
  group: tuple[int, ...]
  times: int
  overlapped: bool
  region: str
  name: str


class Module:
  """Holds a compiled module.

  >>> module = Module('''HloModule m
  ... ENTRY %main (x: f32[2,3]) -> f32[2,3] {
  ...   %x = f32[2,3]{1,0} parameter(0)
  ...   ROOT %y = f32[2,3]{1,0} negate(%x)
  ... }''')
  >>> [(region.name, region.times, [i.opcode for i in region.instructions]) for region in module.regions()]
  [('main', 1, ['parameter', 'negate'])]
  """

  def __init__(self, text: str):
    self.computations: dict[str, list[Instruction]] = {}
    self.entry = ""
    lines: list[str] = []
    for line in text.splitlines():
      header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
      if header:
        lines = []
        self.computations[header[2]] = lines  # replaced by instructions below
        self.entry = header[2] if header[1] else self.entry
      elif re.match(r"\s+(ROOT )?%?[\w.\-]+ = ", line):
        lines.append(line.strip().removeprefix("ROOT "))
      elif lines and line != "}":
        lines[-1] += line  # attributes may hold line breaks
    self.computations = {name: list(map(_parse_instruction, lines)) for name, lines in self.computations.items()}
    self.shapes = {name: {i.name: i.shape for i in instructions} for name, instructions in self.computations.items()}

  def regions(self) -> list[Region]:
    """Lists the entry and all loop bodies with the number of times that they run."""
    times_by_name: dict[str, int] = {}
    self._count_runs(self.entry, 1, times_by_name)
    return [Region(name, times, self.computations[name]) for name, times in times_by_name.items()]

  def _count_runs(self, name: str, times: int, times_by_name: dict[str, int]) -> None:
    times_by_name[name] = times_by_name.get(name, 0) + times
    for i in self.computations[name]:
      if i.opcode == "while":
        self._count_runs(i.attribute(r"body=%?([\w.\-]+)"), times * self.trip_count(i), times_by_name)
      elif i.opcode in ("call", "conditional"):
        for called in re.findall(r"(?:to_apply|_computation|branch_computations=\{)=?%?([\w.\-]+)", i.attributes):
          self._count_runs(called, times, times_by_name)

  def trip_count(self, loop: Instruction) -> int:
    """Returns the trip count of a loop that counts from 0.

    Raises:
      ValueError: if neither its attributes nor its condition have it.
    """
    known = loop.attribute(r'known_trip_count":\{"n":"(\d+)"')
    if known:
      return int(known)
    condition = loop.attribute(r"condition=%?([\w.\-]+)")
    limits = {int(i.operands[0]) for _, i in self._walk_fusions(condition) if i.opcode == "constant"
              and i.shape[:4] in ("s32[", "u32[") and i.operands[0].isdigit()}
    if len(limits) != 1:
      raise ValueError(f"{loop.name}: the condition {condition} does not say how often the loop runs")
    return limits.pop()

  def _walk_fusions(self, name: str) -> Iterator[tuple[str, Instruction]]:
    """Yields (computation, instruction) for a computation's instructions and those of the fusions that it calls."""
    for i in self.computations[name]:
      yield name, i
      for called in re.findall(r"calls=%?([\w.\-]+)", i.attributes):
        yield from self._walk_fusions(called)

  def collectives(self) -> list[Collective]:
    """Lists every collective once; overlapped ones appear in all fusions that they overlap with."""
    unique: dict[tuple[str, str], Collective] = {}
    for region in self.regions():
      for computation, i in self._walk_fusions(region.name):
        kind = i.opcode.removesuffix("-start")
        if kind not in _COLLECTIVES:
          continue
        fused = computation != region.name
        # All collectives of a shard_map share a channel id; a chain id identifies one collective in several fusions.
        chain = fused and (i.attribute(r'chain_id="(\d+)"') or i.attribute(r"channel_id=(\d+)"))
        group = _parse_group(i)
        size = _num_bytes(i.shape, largest_only=i.opcode.endswith("-start") or kind == "send")
        size *= len(group) if i.opcode == "reduce-scatter" else 1
        unique.setdefault((region.name, chain or i.name), Collective(
            kind, size, group, region.times, fused or i.opcode.endswith("-start"), region.name, i.name))
    return list(unique.values())

  def kernels(self, region: Region) -> list[tuple[str, list[str]]]:
    """Lists names and operand shapes of the Pallas kernels that a region calls."""
    return [(i.name, [self.shapes[computation].get(name, "") for name in i.operands])
            for computation, i in self._walk_fusions(region.name) if '"tpu_custom_call"' in i.attributes]

  def cycles(self, region: Region) -> int:
    """Sums the compiler's cycle estimates for one run of a region; kernels and collectives have none."""
    estimates = (i.attribute(r'"estimated_cycles":"(\d+)"') for i in region.instructions)
    return sum(map(int, filter(None, estimates)))

  def traffic(self, region: Region) -> float:
    """Counts the bytes that instructions other than collectives move between HBM and the chip in a run of a region.

    Buffers in on-chip memory do not count. A fusion that slices an operand reads only the slice, one that updates a
    part of its result writes only the part, and operands that it passes through (a collective in flight) are not moved.
    """
    shapes = self.shapes[region.name]
    total = 0.0
    for i in region.instructions:
      kind = i.opcode.removesuffix("-start")
      if i.opcode in _FREE or i.opcode.endswith("-done") or kind in _COLLECTIVES:
        continue
      called = i.attribute(r"calls=%?([\w.\-]+)")
      if called is not None:
        total += self._fusion_traffic(i, self.computations[called], shapes)
      elif i.opcode == "dynamic-update-slice":
        total += 2 * _num_bytes(shapes.get(i.operands[1], ""))
      elif i.opcode in ("slice", "dynamic-slice"):
        total += 2 * _num_bytes(i.shape)
      else:
        total += _num_bytes(i.shape, hbm=True) + sum(_num_bytes(shapes.get(name, ""), hbm=True) for name in i.operands)
    return total

  def _fusion_traffic(self, fusion: Instruction, inner: list[Instruction], shapes: dict[str, str]) -> float:
    by_name = {j.name: j for j in inner}
    root = inner[-1]
    results = [by_name[name] for name in root.operands] if root.opcode == "tuple" else [root]
    passed_through = {j.name for j in results if j.opcode == "parameter"}
    updated = {j.operands[0] for j in inner if j.opcode == "dynamic-update-slice"}
    read = 0.0
    for j in inner:
      if j.opcode != "parameter" or j.name in passed_through | updated:
        continue
      operand = fusion.operands[int(j.operands[0])]
      users = [k for k in inner if j.name in k.operands]
      if any(k.opcode in _COLLECTIVES for k in users) or "S(1)" in shapes.get(operand, ""):
        continue
      cuts = [k for k in users if k.opcode in ("slice", "dynamic-slice")]
      read += sum(_num_bytes(k.shape) for k in cuts) if len(cuts) == len(users) else _num_bytes(shapes.get(operand, ""))
    written = 0.0
    for j in results:
      if j.opcode == "dynamic-update-slice":
        written += _num_bytes(by_name[j.operands[1]].shape)
      elif j.opcode not in ("parameter", *_COLLECTIVES):
        written += _num_bytes(j.shape, hbm=True)
    return read + written


def _parse_instruction(line: str) -> Instruction:
  name, rest = line.split(" = ", 1)
  end = _find_closing(rest, 0) if rest.startswith("(") else rest.index(" ") - 1
  shape, rest = rest[:end + 1], rest[end + 1:].lstrip()
  opcode = rest[:rest.index("(")]
  end = _find_closing(rest, len(opcode))
  inside = re.sub(r"/\*.*?\*/", "", rest[len(opcode) + 1:end])
  operands = tuple(re.findall(r"%([\w.\-]+)", inside)) or (inside,)
  return Instruction(name.lstrip("%"), shape, opcode, operands, rest[end + 1:])


def _find_closing(text: str, start: int) -> int:
  """Finds the position of the parenthesis that closes the one at `start`."""
  depth = 0
  for position in range(start, len(text)):
    depth += (text[position] == "(") - (text[position] == ")")
    if depth == 0:
      return position
  raise ValueError(f"no closing parenthesis: {text[:80]}")


def _num_bytes(shape: str, *, largest_only: bool = False, hbm: bool = False) -> float:
  """Returns the bytes of a shape or tuple, or only those of its largest element, or of elements in HBM."""
  sizes = [_BYTES.get(dtype, 0) * math.prod(int(n) for n in dims.split(",") if n)
           for dtype, dims, layout in re.findall(r"([a-z]\w*)\[([\d,]*)\](\{[^{}]*\})?", shape)
           if not (hbm and "S(" in layout)]
  return (max if largest_only else sum)(sizes or [0.0])


def dims(shape: str) -> tuple[int, ...]:
  """Parses the dimensions of an array's shape, or of the first one in a tuple.

  >>> dims("bf16[2,4]{1,0:T(8,128)}")
  (2, 4)
  """
  match = re.search(r"\[([\d,]*)\]", shape)
  return tuple(int(n) for n in match[1].split(",") if n) if match else ()


def _parse_group(i: Instruction) -> tuple[int, ...]:
  """Parses the partition numbers of a collective's first group, from any of the forms of `replica_groups`.

  Raises:
    ValueError: for a form that is not known, whose group would seem empty.
  """
  order = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
  axes = re.search(rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({order}\))? ?\{{([^}}]*)\}}", i.attributes)
  if axes:
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes[1])}
    numbers = _arrange(axes[2] or str(math.prod(sizes.values())), axes[3]).reshape(tuple(sizes.values()))
    used = re.findall(r"'(\w+)'", axes[4])
    return tuple(numbers[tuple(slice(None) if name in used else 0 for name in sizes)].ravel().tolist())
  iota = re.search(rf"replica_groups=\[([\d,]+)\]<={order}", i.attributes)
  if iota:
    return tuple(_arrange(iota[2], iota[3]).reshape(_parse_numbers(iota[1]))[0].tolist())
  listed = re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", i.attributes)
  if not listed and "replica_groups=" in i.attributes:
    raise ValueError(f"{i.name}: its replica_groups cannot be read: {i.attributes[:200]}")
  return tuple(_parse_numbers(listed[1])) if listed else ()


def _arrange(dims: str, axes: str | None) -> np.ndarray:
  """Returns the numbers from 0 in the shape `dims`, transposed to `axes` if given; both are comma-separated."""
  numbers = np.arange(math.prod(_parse_numbers(dims))).reshape(_parse_numbers(dims))
  return numbers.transpose(_parse_numbers(axes)) if axes else numbers


def _parse_numbers(text: str) -> list[int]:
  return [int(n) for n in text.split(",")]
