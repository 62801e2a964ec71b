"""Which cells of a sweep train together as one population, and what that is expected to gain. Imports no JAX.

Cells whose compiled step is the same program (`shape_key`) can be members of one population. Whether they are is this
file's rule, from the measured rows below; results do not depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from llamax.accounting import memory_bytes
from llamax.errors import UserError
from llamax.sweep.throughput import STARTUP_SECONDS
from llamax.train.shape import fits_one_device, shape_key

if TYPE_CHECKING:
    from llamax.sweep.plan import Cell

GAIN = 0.95  # a population is formed where it is expected to take at most this much of the time one by one
MEMORY_SHARE = 0.8  # of an accelerator that members may fill, by accounting's estimate


@dataclass(frozen=True)
class Measured:
    """Wall seconds of a member's step in a population / alone, both in one process with so many cores."""

    n: int
    cores: int
    ratio: float


@dataclass(frozen=True)
class Filled:
    """Wall seconds of a step of `members` in one program on one accelerator / of all of them one after another."""

    n: int
    members: int
    ratio: float

    def at(self, members: int) -> float:
        """The ratio for another count, by the two parts that a step of a population has: one that members share, and
        one that each adds (Amdahl's law; the shared part is 1 - `own` of a member's step alone)."""
        own = (self.ratio * self.members - 1) / (self.members - 1)
        return own + (1 - own) / members


@dataclass(frozen=True)
class Startup:
    """Seconds besides steps: of a further run in a process that has trained one, and of a further member."""

    run: float
    member: float


@dataclass(frozen=True)
class Pack:
    """How cells are packed: "auto" by the rule, "never", or "most": wherever possible, up to `members`."""

    kind: str
    members: int = 0

    def __str__(self) -> str:
        return str(self.members) if self.kind == "most" else self.kind


AUTO, NEVER = Pack("auto"), Pack("never")


def parse_pack(text: str) -> Pack:
    """`--pack`: auto, never, or a number of members from 2. Raises UserError for anything else."""
    if text in ("auto", "never"):
        return Pack(text)
    if text.isdecimal() and int(text) >= 2:
        return Pack("most", int(text))
    raise UserError(f"--pack {text}: give auto, never, or the most members of a population, a whole number from 2")


@dataclass(frozen=True)
class Group:
    """Cells of one shape, how many of them train together at most (1: one by one), and why.

    `expected` is the time of `size` members together / one by one in the same worker, None where nothing is measured.
    """

    cells: tuple[str, ...]
    size: int
    expected: float | None
    rule: str

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "cells": list(self.cells)}


def groups(
    cells: Sequence[Cell],
    pack: Pack = AUTO,
    *,
    workers: int = 1,
    cores: int = 1,
    accelerators: Sequence[int] = (),
) -> list[Group]:
    """The groups of two or more cells that can train together, in plan order.

    Args:
        workers: workers that share the study; each should get a population of its own.
        cores: cores of one worker.
        accelerators: bytes of memory of each device of one worker; empty on a CPU.
    """
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        if fits_one_device(cell.config):
            found.setdefault(_key(cell.config), []).append(cell)
    return [_group(members, pack, workers, cores, accelerators) for members in found.values() if len(members) > 1]


_key = lru_cache(maxsize=4096)(shape_key)


def _group(members: Sequence[Cell], pack: Pack, workers: int, cores: int, accelerators: Sequence[int]) -> Group:
    names = tuple(cell.name for cell in members)
    share = -(-len(members) // workers)
    if pack.kind == "never":
        return Group(names, 1, None, "--pack never")
    if pack.kind == "most":
        return Group(names, min(share, pack.members), None, f"--pack {pack}")
    if accelerators:
        return Group(names, *_fill(members[0], share, accelerators))
    return Group(names, *_on_cpu(members[0], share, cores))


def _fill(cell: Cell, share: int, accelerators: Sequence[int]) -> tuple[int, float | None, str]:
    """As many members as the devices hold, spread evenly."""
    need = memory_bytes(cell.config)["total"]
    each = int(MEMORY_SHARE * min(accelerators) / need)
    size = max(1, min(share, each * len(accelerators)))
    held = f"{MEMORY_SHARE:.0%} of {min(accelerators) / 1e9:.0f} GB holds {each} members of {need / 1e9:.3g} GB"
    rule = f"{held}, on each of {len(accelerators)} devices"
    row = min((row for row in FILLED if row.n >= cell.n), key=lambda row: row.n, default=None)
    if row is None or size < 2:
        return size, None, rule
    on_each = -(-size // len(accelerators))
    measured = f"{row.members} members of N <= {row.n:,} measured {row.ratio:g} on one {FILLED_ON} in bfloat16"
    measured += "" if on_each == row.members else f", {on_each} by Amdahl's law"
    return size, on_each * row.at(on_each) / size, f"{rule}; {measured}"


def _on_cpu(cell: Cell, share: int, cores: int) -> tuple[int, float | None, str]:
    """`share` members if the measured ratio of a step and what start-up is saved promise a gain, else 1."""
    ratio = step_ratio(cell.n, cores)
    if ratio is None or share < 2:
        return 1, None, f"N = {cell.n:,} is beyond what was measured to gain" if ratio is None else "one cell a worker"
    training, further = max(cell.seconds - STARTUP_SECONDS, 0.0), share - 1
    alone = share * training + STARTUP_SECONDS + further * STARTUP.run
    packed = share * training * ratio + STARTUP_SECONDS + further * STARTUP.member + COMPILE_SECONDS
    said = (
        f"a step takes {ratio:g} of its time alone (measured, N <= {_row(cell.n, cores).n:,}, {cores} cores), "  # type: ignore[union-attr]
        f"a further member {STARTUP.member:g} s to start instead of {STARTUP.run:g} s, {COMPILE_SECONDS:g} s to compile"
    )
    gains = packed / alone <= GAIN
    return (share if gains else 1), packed / alone, said if gains else f"{said}: no gain of {1 - GAIN:.0%}"


def step_ratio(n: int, cores: int) -> float | None:
    """The measured ratio of the smallest model at least as large as `n`; None beyond the largest."""
    row = _row(n, cores)
    return None if row is None else row.ratio


def _row(n: int, cores: int) -> Measured | None:
    rows = [row for row in MEASURED if row.n >= n and row.cores == min(cores, max(r.cores for r in MEASURED))]
    return min(rows, key=lambda row: row.n, default=None)


# ---------------------------------------------------------------- measured: benchmarks/README.md, "Packed members"
# Wall time packed / one by one on an idle machine, 2026-11-28, two cores of an AMD server CPU, K = 4, the worse of
# bfloat16 and float32 operands (the largest: bfloat16 alone). More cores than two are taken as two. One core and N
# above 32,928, and anything above the last row, were not measured.
MEASURED = (
    Measured(n=32_928, cores=1, ratio=1.0),
    Measured(n=32_928, cores=2, ratio=0.60),
    Measured(n=885_888, cores=2, ratio=0.93),
    Measured(n=5_770_496, cores=2, ratio=0.95),
)
FILLED_ON = "H200"  # benchmarks/2026-11-28-nvidia-h200.json, bfloat16
FILLED = (
    Filled(n=32_928, members=16, ratio=0.117),
    Filled(n=885_888, members=16, ratio=0.185),
    Filled(n=5_770_496, members=16, ratio=0.367),
)
COMPILE_SECONDS = 4.0  # of a population's program, which the cache may lack while it holds that of a run alone
STARTUP = Startup(run=0.82, member=0.53)  # processor seconds, 4 runs end to end less their steps
