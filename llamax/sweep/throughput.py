"""How fast a worker trains, for the time column of a plan: a documented guess, or what the caller measured."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llamax.errors import UserError
from llamax.mesh import cpu


@dataclass(frozen=True)
class Throughput:
    """One worker's training FLOPs (6 N a token) a second by (N, tokens a batch), and seconds before the first step."""

    flops_per_second: Callable[[int, int], float]
    startup_seconds: float
    rule: str


STARTUP_SECONDS = 5.0  # before the first step of a process

# Two AVX-512 cores, float32: 42, 109 and 134 GFLOP/s at N = 34 thousand, 0.9 million and 6.2 million, 1-2 thousand
# tokens a batch.
_PEAK_A_CORE, _HALF_N, _HALF_TOKENS = 70e9, 80e3, 128.0


def guess(cores: int | None = None, startup_seconds: float = STARTUP_SECONDS) -> Throughput:
    """A guess for a CPU worker of `cores` cores (default: those this process may use), good to a factor of three.

    rate = peak x N / (N + 80 thousand) x tokens / (tokens + 128): small models wait for memory and dispatch.
    """
    share = cores or len(cpu.cores())
    peak = share * _PEAK_A_CORE

    def rate(n: int, batch_tokens: int) -> float:
        return peak * n / (n + _HALF_N) * batch_tokens / (batch_tokens + _HALF_TOKENS)

    law = "N/(N + 80,000) x batch tokens/(batch tokens + 128)"
    return Throughput(rate, startup_seconds, f"a guess, not measured: {peak / 1e9:.0f} GFLOP/s ({share} cores) x {law}")


def measured(rows: Sequence[tuple[int, int, float]], startup_seconds: float = STARTUP_SECONDS) -> Throughput:
    """From measured rows (N, tokens a batch, FLOPs a second): log-log interpolation, the end rows beyond the ends.

    Raises:
        UserError: no rows, or a number that is not positive.
    """
    if not rows or any(not value > 0 for row in rows for value in row):
        raise UserError(f"throughput rows {list(rows)!r}: give (n, batch_tokens, flops_per_second), all positive")
    by_batch: dict[int, list[tuple[float, float]]] = {}
    for n, batch_tokens, rate in rows:
        by_batch.setdefault(batch_tokens, []).append((math.log(n), math.log(rate)))
    lines = {batch: sorted(points) for batch, points in sorted(by_batch.items())}

    def flops_per_second(n: int, batch_tokens: int) -> float:
        at_n = [(math.log(batch), _interpolate(points, math.log(n))) for batch, points in lines.items()]
        return math.exp(_interpolate(at_n, math.log(batch_tokens)))

    return Throughput(flops_per_second, startup_seconds, f"interpolated between {len(rows)} measured rates")


def _interpolate(points: Sequence[tuple[float, float]], x: float) -> float:
    """Piecewise linear through sorted points, constant beyond the ends."""
    if x <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0) if x1 > x0 else y1
    return points[-1][1]


def wall_seconds(seconds: Sequence[float], workers: int) -> float:
    """Time for `workers` that each take the longest remaining cell when free."""
    free = [0.0] * max(1, workers)
    for each in sorted(seconds, reverse=True):
        first = free.index(min(free))
        free[first] += each
    return max(free)
