"""What a compiled program sends between its devices, read from its text: kind, mesh axes, bytes, how often."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence

from llamax.accounting.roofline import SENT
from llamax.report.hlo import Instruction, Program, type_bytes

Group = tuple[int, ...]
PERMUTATION = "collective-permute"


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation. `bytes` is the whole array that a group holds or reduces: of an all-gather its result,
    of the others their operand, on one device; `times` how often it runs a step, `group` one group of positions in the
    mesh."""

    kind: str
    axes: tuple[str, ...]
    bytes: int
    times: float
    group: Group
    name: str
    both_ways: bool = False  # a permutation beside its reverse: they use the two directions of links

    @property
    def sent(self) -> float:
        """Bytes that one device sends in a step."""
        return self.times * self.bytes * SENT[self.kind](len(self.group))


def collectives(program: Program, mesh: Mapping[str, int]) -> list[Collective]:
    """Every collective that runs, in the order of the text. `mesh` are the axes with their sizes, in the mesh's order:
    a device's number in the program is its position there."""
    found = []
    for computation, times in program.executions.items():
        instructions = program.computations.get(computation, ())
        permutations = [
            {pair for pair in _groups(part, 0)} for part in instructions if part.opcode.startswith(PERMUTATION)
        ]
        sliced = any(part.opcode == "dynamic-slice" for part in instructions) and computation != program.entry
        for part in instructions:
            kind = part.opcode.removesuffix("-start")
            if kind not in SENT or times == 0:
                continue
            groups = _groups(part, math.prod(mesh.values()))
            if kind == "all-reduce" and sliced and _is_fused(program, computation):
                kind = "reduce-scatter"  # as TPUs spell it: a fusion of an all-reduce and the slice that is kept
            axes = spanned(groups, mesh)
            if not axes:
                continue  # groups of one device each
            whole = _operand_bytes(program, part) * (len(groups[0]) if kind == "all-gather" else 1)
            reverse = {(target, source) for source, target in groups} if kind == PERMUTATION else None
            both = reverse in permutations and reverse != set(groups)
            found.append(Collective(kind, axes, whole, times, groups[0], part.name, both))
    return found


def spanned(groups: Sequence[Group], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the members of some group differ."""
    names, sizes = list(mesh), list(mesh.values())
    strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    seen = set()
    for group in groups:
        for name, size, stride in zip(names, sizes, strides, strict=True):
            if name not in seen and len({member // stride % size for member in group}) > 1:
                seen.add(name)
    return tuple(name for name in names if name in seen)


def _is_fused(program: Program, computation: str) -> bool:
    return any(part.opcode == "fusion" and part.calls == computation for part in program.instructions.values())


def _operand_bytes(program: Program, part: Instruction) -> int:
    """Of what is sent: a ragged exchange has its result's buffer, offsets and sizes for operands too."""
    names = part.operands[:1] if part.opcode.startswith("ragged-all-to-all") else part.operands
    return sum(type_bytes(program.instructions[name].type) for name in names if name in program.instructions)


# ---------------------------------------------------------------- groups
_INTEGERS = re.compile(r"\d+")
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"


def _groups(part: Instruction, devices: int) -> list[Group]:
    """The groups of devices that talk, in any of the forms XLA writes; for a permutation its pairs."""
    text = part.attributes
    if found := re.search(r"source_target_pairs=\{(.*?\})\}", text):
        return _listed(found[1])
    if found := re.search(r"replica_groups=\{(.*?\})\}", text):
        return _listed(found[1])
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=" + _IOTA, text):
        order = _iota(found[2], found[3])
        size = _numbers(found[1])[-1]
        return [tuple(order[i : i + size]) for i in range(0, len(order), size)]
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(" + _IOTA + r"\))? \{([^}]*)\}", text):
        return _of_mesh(found[1], found[2], found[3], found[4])
    return [tuple(range(devices))]  # `replica_groups={}`: all


def _listed(text: str) -> list[Group]:
    return [tuple(map(int, _INTEGERS.findall(group))) for group in re.findall(r"\{([\d,]*)\}", "{" + text + "}")]


def _numbers(text: str) -> list[int]:
    return [int(n) for n in _INTEGERS.findall(text)]


def _iota(dims: str, permutation: str | None) -> list[int]:
    """The numbers 0, 1, ... laid out in `dims`, transposed, and read in order."""
    sizes = _numbers(dims)
    axes = _numbers(permutation) if permutation else list(range(len(sizes)))
    strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    places = itertools.product(*(range(sizes[axis]) for axis in axes))
    return [sum(i * strides[axis] for i, axis in zip(place, axes, strict=True)) for place in places]


def _of_mesh(axes: str, dims: str | None, permutation: str | None, chosen: str) -> list[Group]:
    """`mesh['a'=2,'b'=8], device_ids=([4,2,2]T(1,0,2)) {'a'}`: groups along the chosen axes of a mesh of these ids."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    order = _iota(dims, permutation) if dims else list(range(math.prod(sizes.values())))
    inside = set(re.findall(r"'([^']+)'", chosen))
    groups: dict[Group, list[int]] = {}
    for member, place in zip(order, itertools.product(*(range(size) for size in sizes.values())), strict=True):
        outside = tuple(i for name, i in zip(sizes, place, strict=True) if name not in inside)
        groups.setdefault(outside, []).append(member)
    return [tuple(group) for group in groups.values()]
