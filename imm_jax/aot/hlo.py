"""Reads what XLA made of a program: its loops, collectives, cycle estimates and memory traffic.

The input is the text of a compiled module (`compiled.as_text()`), in which every loop stands once. Here each
instruction comes with how often it runs, which is the product of the trip counts of the loops around it.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4,
          "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
# A send crosses between slices, where the compiler has split a reduction into parts within a slice and one between.
_COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute", "send")
# What moves nothing itself: names of values, or the second half of a pair whose first half was counted.
_FREE = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "after-all",
         "partition-id", "replica-id")


class Instruction(NamedTuple):
  """One line of HLO."""

  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  attributes: str

  def attribute(self, pattern: str) -> str | None:
    """What the first group of a pattern finds in the attributes."""
    found = re.search(pattern, self.attributes)
    return found[1] if found else None


class Region(NamedTuple):
  """Instructions that run one after another, `times` times in a step: the entry or the body of a loop."""

  name: str
  times: int
  instructions: list[Instruction]


class Collective(NamedTuple):
  """A collective that the program runs `times` times.

  Attributes:
    kind: such as `all-gather`.
    size: bytes of the whole array that a device ends up with (gather) or starts from (scatter, reduce).
    group: partition numbers within a slice of the devices that take part, of the first group.
    times: how often a step runs it.
    overlapped: whether it runs beside computation.
    region: of which region.
    name: of the instruction.
  """

  kind: str
  size: float
  group: tuple[int, ...]
  times: int
  overlapped: bool
  region: str
  name: str


class Module:
  """A compiled module.

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
    self.computations = {name: [_instruction(line) for line in lines] for name, lines in self.computations.items()}
    self.shapes = {name: {i.name: i.shape for i in instructions} for name, instructions in self.computations.items()}

  def regions(self) -> list[Region]:
    """The entry and all loop bodies, with how often they run."""
    found: dict[str, int] = {}
    self._visit(self.entry, 1, found)
    return [Region(name, times, self.computations[name]) for name, times in found.items()]

  def _visit(self, name: str, times: int, found: dict[str, int]) -> None:
    found[name] = found.get(name, 0) + times
    for i in self.computations[name]:
      if i.opcode == "while":
        self._visit(i.attribute(r"body=%?([\w.\-]+)"), times * self.trip_count(i), found)
      elif i.opcode in ("call", "conditional"):
        for called in re.findall(r"(?:to_apply|_computation|branch_computations=\{)=?%?([\w.\-]+)", i.attributes):
          self._visit(called, times, found)

  def trip_count(self, loop: Instruction) -> int:
    """How often a loop that counts from 0 runs.

    Raises:
      ValueError: when that stands neither in its attributes nor in its condition.
    """
    known = loop.attribute(r'known_trip_count":\{"n":"(\d+)"')
    if known:
      return int(known)
    condition = loop.attribute(r"condition=%?([\w.\-]+)")
    limits = {int(i.operands[0]) for _, i in self._inside(condition) if i.opcode == "constant"
              and i.shape[:4] in ("s32[", "u32[") and i.operands[0].isdigit()}
    if len(limits) != 1:
      raise ValueError(f"{loop.name}: the condition {condition} does not say how often the loop runs")
    return limits.pop()

  def _inside(self, name: str) -> Iterator[tuple[str, Instruction]]:
    """A computation's instructions and those of the fusions that it calls, with the computation that they stand in."""
    for i in self.computations[name]:
      yield name, i
      for called in re.findall(r"calls=%?([\w.\-]+)", i.attributes):
        yield from self._inside(called)

  def collectives(self) -> list[Collective]:
    """Every collective once: those that run beside computation stand in all fusions that they overlap with."""
    found: dict[tuple[str, str], Collective] = {}
    for region in self.regions():
      for where, i in self._inside(region.name):
        kind = i.opcode.removesuffix("-start")
        if kind not in _COLLECTIVES:
          continue
        fused = where != region.name
        # Channels are shared by all collectives of a shard_map; a chain is one collective in several fusions.
        chain = fused and (i.attribute(r'chain_id="(\d+)"') or i.attribute(r"channel_id=(\d+)"))
        group = _group(i)
        size = _size(i.shape, biggest=i.opcode.endswith("-start") or kind == "send")
        size *= len(group) if i.opcode == "reduce-scatter" else 1
        found.setdefault((region.name, chain or i.name), Collective(
            kind, size, group, region.times, fused or i.opcode.endswith("-start"), region.name, i.name))
    return list(found.values())

  def kernels(self, region: Region) -> list[tuple[str, list[str]]]:
    """Names and operands' shapes of the Pallas kernels that a region calls."""
    return [(i.name, [self.shapes[where].get(name, "") for name in i.operands])
            for where, i in self._inside(region.name) if '"tpu_custom_call"' in i.attributes]

  def cycles(self, region: Region) -> int:
    """The compiler's estimate for one run of a region; kernels and collectives have none."""
    return sum(int(found) for i in region.instructions if (found := i.attribute(r'"estimated_cycles":"(\d+)"')))

  def traffic(self, region: Region) -> float:
    """Bytes between HBM and the chip in one run of a region: what instructions other than collectives read and write.

    Buffers in on-chip memory do not count. A fusion that cuts a slice from an operand reads the slice, one that writes
    into a part of its result writes the part, and what it only passes on (a collective under way) is not touched.
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
        total += 2 * _size(shapes.get(i.operands[1], ""))
      elif i.opcode in ("slice", "dynamic-slice"):
        total += 2 * _size(i.shape)
      else:
        total += _size(i.shape, hbm=True) + sum(_size(shapes.get(name, ""), hbm=True) for name in i.operands)
    return total

  def _fusion_traffic(self, fusion: Instruction, inner: list[Instruction], shapes: dict[str, str]) -> float:
    by_name = {j.name: j for j in inner}
    root = inner[-1]
    results = [by_name[name] for name in root.operands] if root.opcode == "tuple" else [root]
    passed = {j.name for j in results if j.opcode == "parameter"}
    updated = {j.operands[0] for j in inner if j.opcode == "dynamic-update-slice"}
    read = 0.0
    for j in inner:
      if j.opcode != "parameter" or j.name in passed | updated:
        continue
      operand = fusion.operands[int(j.operands[0])]
      users = [k for k in inner if j.name in k.operands]
      if any(k.opcode in _COLLECTIVES for k in users) or "S(1)" in shapes.get(operand, ""):
        continue
      cuts = [k for k in users if k.opcode in ("slice", "dynamic-slice")]
      read += sum(_size(k.shape) for k in cuts) if len(cuts) == len(users) else _size(shapes.get(operand, ""))
    written = 0.0
    for j in results:
      if j.opcode == "dynamic-update-slice":
        written += _size(by_name[j.operands[1]].shape)
      elif j.opcode not in ("parameter", *_COLLECTIVES):
        written += _size(j.shape, hbm=True)
    return read + written


def _instruction(line: str) -> Instruction:
  name, rest = line.split(" = ", 1)
  end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ") - 1
  shape, rest = rest[:end + 1], rest[end + 1:].lstrip()
  opcode = rest[:rest.index("(")]
  end = _closing(rest, len(opcode))
  inside = re.sub(r"/\*.*?\*/", "", rest[len(opcode) + 1:end])
  operands = tuple(re.findall(r"%([\w.\-]+)", inside)) or (inside,)
  return Instruction(name.lstrip("%"), shape, opcode, operands, rest[end + 1:])


def _closing(text: str, start: int) -> int:
  """Where the parenthesis that opens at `start` closes."""
  depth = 0
  for at in range(start, len(text)):
    depth += (text[at] == "(") - (text[at] == ")")
    if depth == 0:
      return at
  raise ValueError(f"no closing parenthesis: {text[:80]}")


def _size(shape: str, *, biggest: bool = False, hbm: bool = False) -> float:
  """Bytes of a shape or a tuple; of its biggest element alone, or of those that lie in HBM."""
  sizes = [_BYTES.get(dtype, 0) * math.prod(int(n) for n in dims.split(",") if n)
           for dtype, dims, layout in re.findall(r"([a-z]\w*)\[([\d,]*)\](\{[^{}]*\})?", shape)
           if not (hbm and "S(" in layout)]
  return (max if biggest else sum)(sizes or [0.0])


def dims(shape: str) -> tuple[int, ...]:
  """The sizes of an array's shape; of a tuple's first.

  >>> dims("bf16[2,4]{1,0:T(8,128)}")
  (2, 4)
  """
  found = re.search(r"\[([\d,]*)\]", shape)
  return tuple(int(n) for n in found[1].split(",") if n) if found else ()


def _group(i: Instruction) -> tuple[int, ...]:
  """Partition numbers of a collective's first group, from any of the three forms of `replica_groups`."""
  axes = re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", i.attributes)
  if axes:
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes[1])}
    numbers = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    used = re.findall(r"'(\w+)'", axes[2])
    return tuple(numbers[tuple(slice(None) if name in used else 0 for name in sizes)].ravel().tolist())
  iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", i.attributes)
  if iota:
    groups, dims = ([int(n) for n in part.split(",")] for part in iota.groups()[:2])
    numbers = np.arange(math.prod(dims)).reshape(dims)
    if iota[3]:
      numbers = numbers.transpose([int(n) for n in iota[3].split(",")])
    return tuple(numbers.reshape(groups)[0].tolist())
  listed = re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", i.attributes)
  return tuple(int(n) for n in listed[1].split(",")) if listed else ()
