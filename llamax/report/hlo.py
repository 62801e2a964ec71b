"""The optimized program XLA made, read from its text (`compiled.as_text()`): what each operation does, and for whom."""

from __future__ import annotations

import dataclasses
import functools
import math
import re

# `%name = f32[2,3]{1,0} opcode(operands), attributes`; the type of a tuple is in parentheses
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
HOPS = 4  # operands followed to find the source of a copy
_SCALAR_INDICES = re.compile(r"^(?:s|u)\d+\[\]|^pred\[\]")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction. `frames` are its source lines, innermost first, as `path:line function`."""

    name: str
    opcode: str
    shape: str  # `f32[2,3]`, of a tuple its first element
    operands: tuple[str, ...]
    calls: str | None  # the computation a fusion runs
    target: str  # of a custom call
    op_name: str  # JAX's path of transformations and primitives
    frames: tuple[str, ...]
    attributes: str
    type: str = ""  # as written, with layouts; of a tuple all of it
    literal: str = ""  # of a constant its value, of a parameter its number

    @property
    def called(self) -> tuple[str, ...]:
        """Computations that run when it does: fused, wrapped as asynchronous, called, branches; not those of a loop."""
        if self.opcode == "call":
            return tuple(re.findall(r"to_apply=%?([\w.\-]+)", self.attributes))
        if self.opcode == "conditional":
            named = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
            ends = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", self.attributes)
            return tuple(re.findall(r"%?([\w.\-]+)", named[1])) if named else tuple(ends)
        asynchronous = self.opcode in ("async-update", "async-done")  # they name what async-start runs
        return (self.calls,) if self.calls and not asynchronous else ()


@dataclasses.dataclass(frozen=True)
class Program:
    """A module: its instructions by name, and those of each computation in order."""

    name: str
    instructions: dict[str, Instruction]
    computations: dict[str, tuple[Instruction, ...]]
    entry: str = ""  # the computation that runs first

    def find(self, name: str) -> Instruction | None:
        """The instruction of this name, also as a GPU kernel spells it, `loop_add_fusion_3` for `loop_add_fusion.3`."""
        return self.instructions.get(name) or self.instructions.get(self._kernels.get(name, ""))

    @functools.cached_property
    def _kernels(self) -> dict[str, str]:
        return {re.sub(r"[.\-]", "_", name): name for name in self.instructions}

    def inside(self, instruction: Instruction) -> tuple[Instruction, ...]:
        """The instruction and all that it runs, for a fusion those it fuses."""
        body = self.computations.get(instruction.calls or "", ())
        return (instruction, *(part for inner in body for part in self.inside(inner)))

    @functools.cached_property
    def executions(self) -> dict[str, float]:
        """How often each computation runs in one run of the program, branches of a conditional as if all did.

        A loop whose length is data counts once in the entry computation (a dispatch of one step), and not at all
        further inside (spare rounds of experts, which a router that is balanced never needs).
        """
        times: dict[str, float] = {}

        def run(name: str, count: float) -> None:
            times[name] = times.get(name, 0.0) + count
            for part in self.computations.get(name, ()):
                for called in part.called:
                    run(called, count)
                if part.opcode == "while":
                    unknown = 1 if name == self.entry else 0
                    trips = self.trips(part)
                    body = _attribute(r"body=%?([\w.\-]+)", part.attributes)
                    run(body or "", count * (unknown if trips is None else trips))

        run(self.entry, 1.0)
        return times

    def trips(self, loop: Instruction) -> int | None:
        """How often a while loop runs: as XLA notes it, else from a condition `i < constant`, i from 0; None if it is
        neither."""
        noted = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes)
        if noted:
            return int(noted[1])
        condition = self.computations.get(_attribute(r"condition=%?([\w.\-]+)", loop.attributes) or "", ())
        if not condition or condition[-1].opcode != "compare" or "direction=LT" not in condition[-1].attributes:
            return None
        bounds = [self.instructions[name].literal for name in condition[-1].operands if name in self.instructions]
        return next((int(text) for text in bounds if text.isdigit()), None)

    def opcodes(self, instruction: Instruction) -> list[str]:
        """The opcodes of `inside`, sorted; arithmetic on a scalar index is not counted, for it moves nothing."""
        parts = self.inside(instruction)
        kept = {part.opcode for part in parts if not _SCALAR_INDICES.match(part.shape)}
        return sorted(kept | {instruction.opcode})

    def flops(self, instruction: Instruction) -> float:
        """2 x output size x contracted size of every matrix product inside; 0 where the text does not say."""
        return float(sum(self._product(part) for part in self.inside(instruction)))

    def source(self, instruction: Instruction) -> tuple[str, tuple[str, ...]]:
        """(op_name, frames) of the product inside, else of the instruction, of the last one inside, of its operand.

        Copies that the compiler put in have none of their own, and are charged to whoever made what they copy.
        """
        for _ in range(HOPS):
            inside = self.inside(instruction)
            parts = [*(part for part in inside if part.opcode == "dot"), instruction, *reversed(inside[1:])]
            if found := next((part for part in parts if part.frames), None):
                return found.op_name, found.frames
            if not instruction.operands or instruction.operands[0] not in self.instructions:
                break
            instruction = self.instructions[instruction.operands[0]]
        return "", ()

    def _product(self, part: Instruction) -> int:
        found = re.search(r'(?:lhs_contracting_dims=\{|"lhs_contracting_dimensions":\[)([\d,"]+)', part.attributes)
        if not found or not part.operands or part.operands[0] not in self.instructions:
            return 0
        left = dimensions(self.instructions[part.operands[0]].shape)
        contracted = [int(i) for i in re.findall(r"\d+", found[1])]
        if any(i >= len(left) for i in contracted):
            return 0
        return 2 * math.prod(dimensions(part.shape)) * math.prod(left[i] for i in contracted)


def dimensions(shape: str) -> list[int]:
    """[2, 3] of `f32[2,3]`."""
    found = _SHAPE.search(shape)
    return [int(n) for n in found[2].split(",") if n] if found else []


_BITS = {"pred": 8, "s4": 4, "u4": 4, "token": 0, "opaque": 0}


def type_bytes(text: str, space: str | None = None) -> int:
    """Bytes of a type as written, of a tuple the sum; with `space`, only of the arrays whose layout names that memory
    space (`S(1)` is a TPU's on-chip memory) or, for "", none."""
    total = 0
    for dtype, sizes, layout in re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", text):
        place = re.search(r"S\(\d+\)", layout)
        if space is not None and (place[0] if place else "") != space:
            continue
        bits = _BITS[dtype] if dtype in _BITS else int(re.search(r"[1-9]\d*", dtype)[0])  # type: ignore[index]
        total += bits * math.prod(int(n) for n in sizes.split(",") if n) // 8
    return total


def parse_program(text: str) -> Program:
    """The module of an HLO text; lines it does not know are passed over."""
    frames = _Frames(text)
    text = re.sub(r'\n(?="|\}\})', "", text)  # what a kernel says of itself goes over several lines
    computations: dict[str, tuple[Instruction, ...]] = {}
    inside: list[Instruction] = []
    current, entry = "", ""
    for line in text.splitlines():
        if line[:1] == "}":  # also `}, execution_thread="sparsecore"`
            computations[current], inside = tuple(inside), []
        elif match := _COMPUTATION.match(line):
            current = match[1]
            entry = current if line.startswith("ENTRY") else entry
        elif match := _INSTRUCTION.match(line):
            inside.append(_instruction(frames, *match.groups()))
    named = {part.name: part for parts in computations.values() for part in parts}
    module = re.match(r"HloModule ([^,\s]+)", text)
    return Program(module[1] if module else "", named, computations, entry)


def _instruction(frames: _Frames, name: str, shape: str, opcode: str, rest: str) -> Instruction:
    operands, _, attributes = rest.partition(")")
    first = _SHAPE.search(shape)
    frame = re.search(r"stack_frame_id=(\d+)", attributes)
    return Instruction(
        name=name,
        opcode=opcode,
        shape=first[0] if first else shape,
        operands=tuple(re.findall(r"%([\w.\-]+)", operands)),
        calls=_attribute(r"calls=%?([\w.\-]+)", attributes),
        target=_attribute(r'custom_call_target="([^"]*)"', attributes) or "",
        op_name=_attribute(r'op_name="([^"]*)"', attributes) or "",
        frames=frames.of(int(frame[1])) if frame else (),
        attributes=attributes,
        type=shape,
        literal=operands if opcode in ("constant", "parameter") else "",
    )


def _attribute(pattern: str, attributes: str) -> str | None:
    found = re.search(pattern, attributes)
    return found[1] if found else None


class _Frames:
    """The tables of source lines that stand before the computations."""

    def __init__(self, text: str):
        self.files, self.functions, self.locations, self.frames = (self._table(text, name) for name in _TABLES)

    @staticmethod
    def _table(text: str, name: str) -> dict[int, str]:
        found = re.search(rf"^{name}\n((?:\d+ .*\n)+)", text, re.MULTILINE)
        rows = [line.split(" ", 1) for line in found[1].splitlines()] if found else []
        return {int(number): row for number, row in rows}

    @functools.cache  # noqa: B019 (lives as long as the parsing)
    def of(self, frame: int) -> tuple[str, ...]:
        """The lines of a stack, innermost first; ids of parents count from 1, so that 1 ends it."""
        lines: list[str] = []
        while frame in self.frames:
            numbers = dict(re.findall(r"(\w+)=(\d+)", self.frames[frame]))
            place = dict(re.findall(r"(\w+)=(\d+)", self.locations[int(numbers["file_location_id"])]))
            file, function = self.files[int(place["file_name_id"])], self.functions[int(place["function_name_id"])]
            lines.append(f"{file.strip(chr(34))}:{place['line']} {function.strip(chr(34))}")
            parent = int(numbers.get("parent_frame_id", 1)) - 1
            if parent >= frame:  # not written by today's XLA; a loop here would never end
                break
            frame = parent
        return tuple(lines)
