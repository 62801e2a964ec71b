"""Approach 2 for many noisy copies of one study at once: parabolas and frontiers whose losses are `[draws, runs]`.

The same numbers as `fit_approach2` gives copy by copy (a test holds them together), as one array program.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from llamax.scaling.laws import Scalar

GAMMAS = (0.005, 2.0)  # exponents of the frontier that are tried, as approach 2 has them
POINTS, ZOOMS = 60, 5


@dataclass(frozen=True)
class Parabolas:
    """Least-squares parabolas over one grid of log sizes: `vertex` (log N), `height`, `interior`, each `[draws]`.

    interior: opens upward, vertex strictly inside the grid. `solve` is the map from losses to coefficients over the
    grid scaled to [-1, 1], whose half width is `half`.
    """

    vertex: np.ndarray
    height: np.ndarray
    interior: np.ndarray
    coefficients: np.ndarray
    solve: np.ndarray
    half: float

    def derivatives(self) -> tuple[Float[np.ndarray, "runs"], Float[np.ndarray, "runs"]]:
        """Of the first draw's vertex and height, by each run's loss."""
        _, c1, c2 = self.coefficients[0]
        at = -c1 / (2 * c2)
        by_vertex = -self.solve[1] / (2 * c2) + c1 * self.solve[2] / (2 * c2**2)
        return self.half * by_vertex, np.array([1.0, at, at**2]) @ self.solve


def parabola(x: Float[np.ndarray, "runs"], losses: Float[np.ndarray, "draws runs"]) -> Parabolas:
    """Fit every row of `losses` over log sizes `x`. Fewer than three distinct sizes: nothing is interior."""
    middle, half = (x.max() + x.min()) / 2, max(float(np.ptp(x)) / 2, 1e-12)
    u = (x - middle) / half
    solve = np.linalg.pinv(np.stack([np.ones_like(u), u, u**2], axis=1))
    c = losses @ solve.T
    with np.errstate(divide="ignore", invalid="ignore"):
        at = -c[:, 1] / (2 * c[:, 2])
        height = c[:, 0] - c[:, 1] ** 2 / (4 * c[:, 2])
    enough = np.unique(np.round(x, 9)).size >= 3
    interior = enough & (c[:, 2] > 0) & (np.abs(at) < 1)
    return Parabolas(middle + half * at, height, interior, c, solve, half)


@dataclass(frozen=True)
class Frontiers:
    """L(C) = E + scaled · (C / scale)^-gamma, fields `[draws]`; nan where a draw has fewer than three heights."""

    E: np.ndarray
    scaled: np.ndarray
    gamma: np.ndarray
    scale: float

    def loss(self, flops: Scalar) -> Float[np.ndarray, "draws"]:
        """Nats per token at `flops` training FLOPs."""
        return self.E + self.scaled * (flops / self.scale) ** -self.gamma


def fit_frontiers(c: Float[np.ndarray, "budgets"], heights: Float[np.ndarray, "draws budgets"]) -> Frontiers:
    """Least relative squares with E and K not negative; nan heights are left out.

    For a given gamma the two others are linear, so gamma is searched on a grid that is refined around its best point.
    A draw whose heights do not fall from each budget to the next has no frontier.
    """
    scale = float(np.exp(np.log(c).mean()))
    valid = np.isfinite(heights)
    y = np.where(valid, heights, 1.0)
    low = np.full(len(y), np.log(GAMMAS[0]))
    high = np.full(len(y), np.log(GAMMAS[1]))
    at = np.arange(len(y))
    for _ in range(ZOOMS):
        grid = np.exp(low[:, None] + (high - low)[:, None] * np.linspace(0, 1, POINTS))
        floor, size, misfit = _solve((c / scale) ** -grid[..., None], y[:, None], valid[:, None])
        best = np.argmin(misfit, axis=1)
        low = np.log(grid[at, np.maximum(best - 1, 0)])
        high = np.log(grid[at, np.minimum(best + 1, POINTS - 1)])
    ok = (valid.sum(1) >= 3) & _falling(heights)
    found, pulled, gamma = (np.where(ok, v[at, best], np.nan) for v in (floor, size, grid))
    return Frontiers(found, pulled, gamma, scale)


def _solve(power: np.ndarray, y: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """E, K >= 0 with the least sum of ((E + K power) / y - 1)^2 over the valid budgets, and that sum."""
    w = valid / y
    one, p = w, power * w
    s11, s1p, spp = (one * one).sum(-1), (one * p).sum(-1), (p * p).sum(-1)
    s1, sp = one.sum(-1), p.sum(-1)
    det = s11 * spp - s1p**2
    with np.errstate(divide="ignore", invalid="ignore"):
        floor, size = (spp * s1 - s1p * sp) / det, (s11 * sp - s1p * s1) / det
        degenerate = ~(det > 1e-14 * s11 * spp)
        floor = np.where(degenerate | (floor < 0), 0.0, floor)
        size = np.where(floor == 0, sp / spp, size)
        floor = np.where(size < 0, s1 / s11, floor)
    size = np.maximum(size, 0.0)
    residual = (floor[..., None] * one + size[..., None] * p - valid) * valid
    return floor, size, (residual**2).sum(-1)


def _falling(heights: np.ndarray) -> np.ndarray:
    """Whether the finite heights of each draw fall from each budget to the next."""
    last = np.full(len(heights), np.inf)
    ok = np.ones(len(heights), bool)
    for column in heights.T:
        seen = np.isfinite(column)
        ok &= ~seen | (column < last)
        last = np.where(seen, column, last)
    return ok
