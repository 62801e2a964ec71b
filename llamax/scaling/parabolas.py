"""Approach 2's parabolas for many noisy copies of one study at once: losses are `[draws, runs]`.

The same numbers as `fit_approach2` gives copy by copy (a test holds them together), and their derivatives.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


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

    def derivatives(self) -> tuple[Float[np.ndarray, " runs"], Float[np.ndarray, " runs"]]:
        """Of the first draw's vertex and height, by each run's loss."""
        _, c1, c2 = self.coefficients[0]
        at = -c1 / (2 * c2)
        by_vertex = -self.solve[1] / (2 * c2) + c1 * self.solve[2] / (2 * c2**2)
        return self.half * by_vertex, np.array([1.0, at, at**2]) @ self.solve


def parabola(x: Float[np.ndarray, " runs"], losses: Float[np.ndarray, "draws runs"]) -> Parabolas:
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
