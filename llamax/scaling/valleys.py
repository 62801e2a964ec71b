"""The vertex of loss against log size at one budget: a parabola through all points, or an Akima spline through each.

The parabola is that of Hoffmann et al. 2022 (arXiv:2203.15556, section 3.2); the spline (Akima 1970) that of Porian et
al. 2024 (arXiv:2406.19146, appendix), whose minimum needs no symmetric valley but follows every wiggle of the data.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

Vertex = str  # "parabola" or "akima"
AKIMA_POINTS = 25  # of the search grid between two sizes, as in Porian et al.


@dataclass(frozen=True)
class Valleys:
    """Valleys of one grid under many weightings; every field is `[draws]`.

    x is log N or log D, vertex in the same unit; height in nats, curvature in nats per (unit of natural log)^2: of the
    parabola height + curvature/2 (x - vertex)^2, or of the spline at its minimum. `interior`: the vertex lies strictly
    inside the measured range and the curve opens upward. `centring`: 0 at the middle of the grid in x, -1 and +1 at its
    ends. `sound`: enough distinct x had weight (three for a parabola, four for a spline); else the numbers are nan.
    """

    vertex: np.ndarray
    height: np.ndarray
    curvature: np.ndarray
    centring: np.ndarray
    interior: np.ndarray
    sound: np.ndarray


def least_sizes(vertex: Vertex) -> int:
    """Distinct sizes that a vertex needs."""
    return 3 if vertex == "parabola" else 4


def fit_valleys(
    x: Float[np.ndarray, " runs"],
    y: Float[np.ndarray, " runs"] | Float[np.ndarray, "draws runs"],
    weights: Float[np.ndarray, "draws runs"],
    vertex: Vertex = "parabola",
) -> Valleys:
    """Valley of y (of all draws, or each its own) over x for every row of `weights` (a bootstrap draw, or ones).

    The parabola is a weighted least-squares fit. The spline goes through the weighted mean of log y at each distinct x.
    """
    y = np.broadcast_to(y, weights.shape)
    # Sizes of one grid differ by far more than rounding; tokens of equal runs may differ in the last bit.
    distinct = np.unique(np.round(x, 9), return_inverse=True)[1]
    mass = np.stack([weights[:, distinct == i].sum(1) for i in range(int(np.max(distinct)) + 1)], axis=1)
    sound = (mass > 0).sum(1) >= least_sizes(vertex)
    if vertex == "akima":
        return _akima(x, y, weights, distinct, mass, sound)
    middle, half = (x.max() + x.min()) / 2, max(float(np.ptp(x)) / 2, 1e-12)
    u = (x - middle) / half  # in [-1, 1]: the normal equations are then well conditioned
    basis = np.stack([np.ones_like(u), u, u**2], axis=1)
    normal = np.einsum("bm,mi,mj->bij", weights, basis, basis)
    normal[~sound] = np.eye(3)
    c0, c1, c2 = np.linalg.solve(normal, ((weights * y) @ basis)[..., None])[..., 0].T
    with np.errstate(divide="ignore", invalid="ignore"):
        at = np.where(np.abs(c2) > 1e-14 * (np.abs(y).max() + 1e-300), -c1 / (2 * c2), np.inf)
    low = np.where(sound, np.min(np.where(weights > 0, u, np.inf), axis=1), np.nan)
    high = np.where(sound, np.max(np.where(weights > 0, u, -np.inf), axis=1), np.nan)
    interior = sound & (c2 > 0) & (at > low) & (at < high)
    values = (middle + half * at, c0 - c1**2 / (4 * np.where(c2 == 0, np.nan, c2)), 2 * c2 / half**2, at)
    vertex_at, height, curvature, centring = (np.where(sound & np.isfinite(v), v, np.nan) for v in values)
    return Valleys(vertex_at, height, curvature, centring, interior, sound)


def _akima(
    x: np.ndarray, y: np.ndarray, weights: np.ndarray, distinct: np.ndarray, mass: np.ndarray, sound: np.ndarray
) -> Valleys:
    from scipy.interpolate import Akima1DInterpolator

    size = mass.shape[1]
    at = np.array([x[distinct == i].mean() for i in range(size)])
    total = np.stack([(weights * np.log(y))[:, distinct == i].sum(1) for i in range(size)], axis=1)
    found = np.full((4, len(weights)), np.nan)
    interior = np.zeros(len(weights), bool)
    for draw in np.flatnonzero(sound):
        keep = mass[draw] > 0
        knots, log_y = at[keep], total[draw, keep] / mass[draw, keep]
        spline = Akima1DInterpolator(knots, log_y)
        grid = np.linspace(knots[0], knots[-1], (len(knots) - 1) * AKIMA_POINTS)
        best = int(np.argmin(spline(grid)))
        interior[draw] = 0 < best < len(grid) - 1
        bottom = float(np.exp(spline(grid[best])))
        # y = exp(s): y'' = y (s'' + s'^2), and s' = 0 at the minimum.
        curvature = bottom * (float(spline(grid[best], nu=2)) + float(spline(grid[best], nu=1)) ** 2)
        middle, half = (knots[-1] + knots[0]) / 2, (knots[-1] - knots[0]) / 2
        found[:, draw] = grid[best], bottom, curvature, (grid[best] - middle) / half
    return Valleys(found[0], found[1], found[2], found[3], interior, sound)
