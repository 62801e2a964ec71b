"""Bytes that a compiled program reads and writes in a device's memory, from its text, loops counted as often as they
run: XLA's own analysis counts the body of a loop once.

Every instruction that stays in the program reads its operands and writes its result once; a fusion is one instruction.
Slices and updates in place touch only the slice. Arrays that the compiler placed in on-chip memory (`S(n)` in the
layout, on TPUs) cost nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from llamax.report.hlo import Instruction, Program, type_bytes

# Names for what is somewhere already, and ends of what was counted at its start.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"}
_FREE |= {"partition-id", "replica-id", "opt-barrier", "add-dependency", "domain", "async-update", "async-done"}
_FREE |= {"copy-done", "all-gather-done", "all-reduce-done", "collective-permute-done", "send-done", "recv-done"}
_SLICES = ("dynamic-slice", "gather", "slice")
_VIEWS = ("bitcast", "reshape", "convert", "copy", "transpose")  # what may stand between a parameter and its slice


def memory_traffic(program: Program) -> float:
    """Bytes one device reads and writes in a step."""
    return sum(times * size for _, times, size in traffic_of(program))


def traffic_of(program: Program) -> Iterator[tuple[Instruction, float, float]]:
    """(instruction, how often it runs, bytes it reads and writes each time) of all that move some: about the kernels of
    a GPU, where a library's call counts as one."""
    fused = {part.calls for part in program.instructions.values() if part.opcode == "fusion"}
    for computation, times in program.executions.items():
        if computation not in fused and times:
            for part in program.computations.get(computation, ()):
                if (size := _bytes(program, part)) > 0:
                    yield part, times, size


def _bytes(program: Program, part: Instruction) -> float:
    if part.opcode in _FREE:
        return 0.0
    if part.opcode == "fusion":
        return _fusion(program, part)
    operands = [program.instructions[name] for name in part.operands if name in program.instructions]
    if part.opcode in _SLICES:
        return 2.0 * _size(part) if operands and _size(operands[0]) else float(_size(part))
    if part.opcode == "dynamic-update-slice" and len(operands) > 1:
        return 2.0 * _size(operands[1])
    if part.opcode.endswith("-start"):  # its type holds operands and results
        return float(sum(map(_size, operands)) + max(_size(part) - sum(map(_size, operands)), 0))
    scratch = 0
    if part.opcode == "custom-call":  # a library's workspace is reserved, not filled
        scratch = sum(type_bytes(found) for found in re.findall(r"[su]8\[\d+\]\{0\}", part.type))
    return float(sum(map(_size, operands)) + _size(part) - scratch)


def _size(part: Instruction) -> int:
    return type_bytes(part.type, "")


def _fusion(program: Program, part: Instruction) -> float:
    inside = program.computations.get(part.calls or "", ())
    named = {one.name: one for one in inside}
    users: dict[str, list[Instruction]] = {}
    for one in inside:
        for name in one.operands:
            users.setdefault(name, []).append(one)
    parameters = {one.literal: one for one in inside if one.opcode == "parameter"}
    total = 0.0
    for i, name in enumerate(part.operands):
        given, parameter = program.instructions.get(name), parameters.get(str(i))
        if given is None or not _size(given):
            continue
        total += _size(given) if parameter is None else _read(parameter, users, named, _size(given))
    return total + _written(inside, named, part)


def _read(parameter: Instruction, users: dict[str, list[Instruction]], named: dict[str, Instruction], all_: int) -> int:
    """Bytes read of a parameter: its slices where nothing else is used, nothing where it is updated in place."""
    read, front = 0, [parameter]
    while front:
        source = front.pop()
        for user in users.get(source.name, []):
            if user.opcode in _SLICES and user.operands[0] == source.name:
                read += type_bytes(user.type)
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == source.name:
                continue
            elif user.opcode in _VIEWS and all_ == type_bytes(parameter.type):
                front.append(user)
            else:
                return all_
        if not users.get(source.name) and source is not parameter:
            return all_  # the fusion's result
    return min(read, all_)


def _written(inside: tuple[Instruction, ...], named: dict[str, Instruction], part: Instruction) -> int:
    """Bytes a fusion writes: of an update in place the update alone."""
    if not inside or not _size(part):
        return _size(part)
    roots = (
        [named[name] for name in inside[-1].operands if name in named] if inside[-1].opcode == "tuple" else [inside[-1]]
    )
    written = 0
    for root in roots:
        while root.opcode in ("bitcast", "reshape", "copy") and root.operands and root.operands[0] in named:
            root = named[root.operands[0]]
        update = root.opcode == "dynamic-update-slice" and len(root.operands) > 1 and root.operands[1] in named
        written += type_bytes(named[root.operands[1]].type if update else root.type)
    return min(written, _size(part))
