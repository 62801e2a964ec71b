"""Bootstrap bands: how far the power laws and the loss at the optimum are determined at every compute, for plots."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float

from llamax.scaling.bootstrap import Approach2Draws, ParametricDraws, interval
from llamax.scaling.laws import Cost, optimal_allocation

POINTS, BEYOND = 40, 100.0  # of the grid, which ends at BEYOND times the largest compute measured


def compute_grid(flops: Float[np.ndarray, " runs"]) -> Float[np.ndarray, " points"]:
    """Compute, in training FLOPs, from half the least measured to BEYOND times the most, evenly in its logarithm."""
    return np.geomspace(flops.min() / 2, BEYOND * flops.max(), POINTS)


def approach2_bands(draws: Approach2Draws, grid: Float[np.ndarray, " points"], level: float) -> dict[str, Any] | None:
    """Percentile bands of N_opt and D_opt: `flops`, `n` and `d`, each `low` and `high`. None with too few draws."""
    return _bands(grid, level, n=draws.n.at, d=draws.d.at)


def parametric_bands(
    draws: ParametricDraws, cost: Cost, grid: Float[np.ndarray, " points"], level: float
) -> dict[str, Any] | None:
    """Percentile bands of the law's own optimum: `flops`, `n`, `d`, and `loss` there in nats per token."""

    def at(name: str) -> Callable[[float], Any]:
        return lambda flops: getattr(optimal_allocation(draws.law, flops, cost), name)

    return _bands(grid, level, n=at("n"), d=at("d"), loss=at("loss"))


def _bands(grid: np.ndarray, level: float, **values: Callable[[float], Any]) -> dict[str, Any] | None:
    result: dict[str, Any] = {"flops": grid.tolist()}
    for name, at in values.items():
        pairs = [interval(at(float(flops)), level) for flops in grid]
        kept = [pair for pair in pairs if pair is not None]
        if len(kept) < len(pairs):
            return None
        result[name] = {"low": [low for low, _ in kept], "high": [high for _, high in kept]}
    return result
