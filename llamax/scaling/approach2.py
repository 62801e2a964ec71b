"""Approach 2 of Hoffmann et al. 2022 (arXiv:2203.15556, section 3.2): one valley per compute budget.

At a fixed budget the loss against log N (or log D) is a valley. A parabola, or an Akima spline, gives its vertex
(valleys.py); a power law through the vertices gives N_opt(C) and D_opt(C). N and D are fitted separately, each from its
own valleys.

The vertex of a parabola is biased even without noise when alpha != beta, because the valley is not symmetric
(arXiv:2603.22339): the exponent stays right, the coefficient does not, and the bias grows with the width of the grid;
where the grid is centred differently at each budget the exponent is wrong too. bias.py says by how much.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from llamax.errors import UserError
from llamax.scaling.laws import Scalar, plain
from llamax.scaling.valleys import Valleys, Vertex, fit_valleys, least_sizes

NARROW_DECADES = 1.5  # below this an exponent is an extrapolation of noise
OFF_CENTRE = 0.8  # a vertex this close to an end leaves one side of the valley unmeasured
OFF_CENTRE_ALL = 0.35  # mean over budgets, or drift over them, of the vertex off the middle: 1 is half the grid


@dataclass(frozen=True)
class Valley:
    """One fitted valley: `vertex` in parameters or tokens, `loss` in nats per token; None = not determined."""

    vertex: float | None
    loss: float | None
    curvature: float | None
    centring: float | None
    interior: bool


@dataclass(frozen=True)
class BudgetFit:
    """One budget: its label, the geometric mean of FLOPs really spent, its size, and the valleys in N and in D."""

    budget: Any
    flops: float
    n_points: int
    n_sizes: int
    residual: float | None  # root mean square of loss minus parabola in log N, nats per token; None for a spline
    n: Valley
    d: Valley
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values: `vertex, loss, curvature, centring, interior` of the valley in N; with `_d` of that in D."""
        valleys = {name: plain(value) for name, value in vars(self.n).items()}
        valleys |= {f"{name}_d": plain(value) for name, value in vars(self.d).items()}
        counts = {"n_points": self.n_points, "n_sizes": self.n_sizes, "residual": plain(self.residual)}
        head = {"budget": plain(self.budget), "flops": self.flops}
        return head | valleys | counts | {"warnings": list(self.warnings)}


@dataclass(frozen=True)
class Frontier:
    """Loss at the best allocation against compute: L(C) = E + K · C^-gamma, from the heights of the valleys.

    Plain floats, or arrays `[draws]`.
    """

    E: Any
    K: Any
    gamma: Any

    def loss(self, flops: Scalar) -> Any:
        """Nats per token at `flops` training FLOPs."""
        return self.E + self.K * flops**-self.gamma


@dataclass(frozen=True)
class PowerLaw:
    """v(C) = exp(log_coefficient) · C^exponent; plain floats, or arrays `[draws]` with nan where not determined."""

    exponent: Any
    log_coefficient: Any

    def at(self, flops: Scalar) -> Any:
        """Its value at `flops` training FLOPs."""
        return np.exp(self.log_coefficient + self.exponent * math.log(flops))


@dataclass(frozen=True)
class Approach2Fit:
    """Power laws N_opt(C) and D_opt(C), and the valleys they come from.

    None where fewer than two budgets have a valid vertex; the warnings then say so.
    """

    n: PowerLaw | None
    d: PowerLaw | None
    frontier: Frontier | None
    budgets: tuple[BudgetFit, ...]
    n_points: int
    warnings: tuple[str, ...]
    vertex: Vertex = "parabola"

    @property
    def interior_minima(self) -> int:
        """Budgets whose valley in N has its vertex inside the grid."""
        return sum(b.n.interior for b in self.budgets)

    def as_dict(self) -> dict[str, Any]:
        """Plain values: `n_exponent, n_coefficient, d_exponent, d_coefficient, frontier, budgets, ...`."""
        return {
            "n_exponent": float(self.n.exponent) if self.n else None,
            "n_coefficient": math.exp(self.n.log_coefficient) if self.n else None,
            "d_exponent": float(self.d.exponent) if self.d else None,
            "d_coefficient": math.exp(self.d.log_coefficient) if self.d else None,
            "n_points": self.n_points,
            "frontier": dict(vars(self.frontier)) if self.frontier else None,
            "vertex": self.vertex,
            "interior_minima": self.interior_minima,
            "budgets": [b.as_dict() for b in self.budgets],
            "warnings": list(self.warnings),
        }


def fit_approach2(frame: pd.DataFrame, vertex: Vertex = "parabola") -> Approach2Fit:
    """Fit runs, grouped by label. Columns: `budget`, `n` parameters, `d` tokens, `flops`, `loss` nats per token.

    vertex: `parabola` or `akima` (a spline through the points, four sizes or more). Rows must be clean (see
    llamax.scaling.table.clean). Raises UserError for missing columns, no rows, or another vertex.
    """
    if vertex not in ("parabola", "akima"):
        raise UserError(f"vertex: {vertex!r}; choose parabola or akima")
    budgets = tuple(_fit_budget(label, rows, vertex) for label, rows in by_budget(frame))
    log_c = np.log([b.flops for b in budgets])
    warnings = [word for b in budgets for word in b.warnings] + _spread_warnings(log_c)
    laws: dict[str, PowerLaw | None] = {}
    for axis in ("n", "d"):
        valleys = [getattr(b, axis) for b in budgets]
        valid = np.array([[v.interior for v in valleys]])
        line = fit_power_law(log_c, np.log([[v.vertex or 1.0 for v in valleys]]), valid)
        kept, axis_name = int(valid.sum()), axis.upper()
        warnings += _centring_warnings(log_c, valleys, axis_name)
        if kept < len(budgets):
            warnings.append(f"{len(budgets) - kept} of {len(budgets)} budgets dropped from the {axis_name} fit")
        if kept < 2:
            warnings.append(f"fewer than two budgets have a valid vertex in {axis_name}: no exponent")
        elif kept == 2:
            warnings.append(
                f"only two budgets have a valid vertex in {axis_name}: the exponent is a line through two points"
            )
        laws[axis] = PowerLaw(float(line.exponent[0]), float(line.log_coefficient[0])) if kept >= 2 else None
    frontier, words = _fit_frontier(budgets)
    return Approach2Fit(laws["n"], laws["d"], frontier, budgets, len(frame), tuple(warnings + words), vertex)


def by_budget(frame: pd.DataFrame) -> list[tuple[Any, pd.DataFrame]]:
    """The rows of each budget label, from the least compute to the most."""
    missing = [c for c in ("budget", "n", "d", "flops", "loss") if c not in frame]
    if missing:
        raise UserError(f"columns {', '.join(missing)}: missing; approach 2 needs budget, n, d, flops, loss")
    if frame.empty:
        raise UserError("data: no rows; approach 2 needs at least three sizes in each of two budgets")
    return sorted(frame.groupby("budget", sort=False), key=lambda item: float(np.log(item[1]["flops"]).mean()))


def budget_name(label: Any) -> str:
    """The label in words, `budget 1e+12`."""
    return f"budget {label:.3g}" if isinstance(label, (int, float, np.number)) else f"budget {label}"


def fit_power_law(
    log_c: Float[np.ndarray, " budgets"],
    log_v: Float[np.ndarray, "draws budgets"],
    valid: Bool[np.ndarray, "draws budgets"],
) -> PowerLaw:
    """Least-squares line of log_v on log_c over the valid budgets of each draw; nan with fewer than two of them."""
    w = valid.astype(float)
    count = np.where(valid.sum(1) >= 2, w.sum(1), np.nan)
    v = np.where(valid, log_v, 0.0)
    mean_c, mean_v = (w @ log_c) / count, v.sum(1) / count
    x = (log_c - mean_c[:, None]) * w
    slope = (x * (v - mean_v[:, None])).sum(1) / (x**2).sum(1)
    return PowerLaw(slope, mean_v - slope * mean_c)


def _fit_budget(label: Any, rows: pd.DataFrame, vertex: Vertex) -> BudgetFit:
    loss = rows["loss"].to_numpy(float)
    name = budget_name(label)
    ones, words = np.ones((1, len(rows))), []
    spent = rows["flops"].to_numpy(float)
    if spent.max() > 1.2 * spent.min():
        words.append(
            f"{name}: its runs spend {spent.min():.3g} to {spent.max():.3g} FLOPs; a valley assumes one budget"
        )
    flat = bool(np.ptp(loss) <= 1e-9 * loss.max())
    sizes = int(np.unique(np.round(np.log(rows["n"].to_numpy(float)), 9)).size)
    if len(rows) == 1:
        words.append(f"{name}: one run: no valley; a nominal budget is one number for all of its runs")
    elif flat:
        words.append(f"{name}: all losses equal: no valley")
    elif sizes == 3 and vertex == "parabola":
        words.append(f"{name}: three sizes: the parabola fits exactly and says nothing about noise")
    valleys, residual = {}, None
    for axis in ("n", "d"):
        x = np.log(rows[axis].to_numpy(float))
        many = fit_valleys(x, loss, ones, vertex)
        valley = _one_valley(many, flat)
        valleys[axis] = valley
        if axis == "n" and vertex == "parabola" and valley.curvature is not None and len(rows) > 3:
            curve = many.height[0] + many.curvature[0] / 2 * (x - many.vertex[0]) ** 2
            residual = float(np.sqrt(np.sum((loss - curve) ** 2) / (len(rows) - 3)))
        words += _valley_words(name, axis, valley, x, sizes, flat, vertex)
    flops = float(np.exp(np.log(spent).mean()))
    return BudgetFit(label, flops, len(rows), sizes, residual, valleys["n"], valleys["d"], tuple(words))


def _one_valley(many: Valleys, flat: bool) -> Valley:
    if flat or not many.sound[0] or not np.isfinite(many.vertex[0]):
        return Valley(None, None, None, None, False)
    return Valley(
        vertex=float(np.exp(np.clip(many.vertex[0], -700, 700))),
        loss=float(many.height[0]),
        curvature=float(many.curvature[0]),
        centring=float(many.centring[0]),
        interior=bool(many.interior[0]),
    )


def _valley_words(
    name: str, axis: str, valley: Valley, x: np.ndarray, sizes: int, flat: bool, vertex: Vertex
) -> list[str]:
    what = axis.upper()
    if flat:
        return []
    if valley.curvature is None or valley.vertex is None or valley.centring is None:
        needs = "a parabola needs three" if vertex == "parabola" else f"a spline needs {least_sizes(vertex)}"
        return [f"{name}: {sizes} distinct sizes in {what}; {needs}"]
    grid = f"[{math.exp(x.min()):.3g}, {math.exp(x.max()):.3g}]"
    if valley.curvature <= 0 and vertex == "parabola":
        return [f"{name}: the parabola in {what} opens downward: no minimum in the grid {grid}"]
    if not valley.interior:
        side = "lower" if valley.centring < 0 else "upper"
        return [f"{name}: the vertex in {what} ({valley.vertex:.3g}) is at or beyond the grid's {side} edge {grid}"]
    if abs(valley.centring) > OFF_CENTRE:
        side = "lower" if valley.centring < 0 else "upper"
        return [f"{name}: the vertex in {what} ({valley.vertex:.3g}) is close to the grid's {side} edge {grid}"]
    return []


def _centring_warnings(log_c: np.ndarray, valleys: list[Valley], what: str) -> list[str]:
    """Grids that miss the vertex on one side, on the whole or ever more with compute."""
    kept = [(c, v.centring) for c, v in zip(log_c, valleys, strict=True) if v.interior and v.centring is not None]
    if len(kept) < 3:
        return []
    c, centring = np.array(kept).T
    mean = float(centring.mean())
    drift = float(np.polyfit(c, centring, 1)[0] * np.ptp(c)) if np.ptp(c) > 0 else 0.0
    if abs(drift) > 2 * OFF_CENTRE_ALL:
        return [
            f"the grids in {what} are centred differently: from the first budget to the last the vertex moves by "
            f"{drift:+.2f} of half the grid, which biases the exponent (llamax.scaling.approach2_bias says by how much)"
        ]
    if abs(mean) > OFF_CENTRE_ALL:
        side = "small" if mean > 0 else "large"
        return [
            f"the grids in {what} are off-centre: too many {side} sizes, the vertex lies at {mean:+.2f} of half the "
            "grid, which biases the coefficient"
        ]
    return []


def _spread_warnings(log_c: np.ndarray) -> list[str]:
    words = []
    if len(log_c) < 3:
        words.append(f"fewer than three budgets ({len(log_c)}): the power laws cannot be checked")
    decades = float(np.ptp(log_c)) / math.log(10)
    if len(log_c) > 1 and decades < NARROW_DECADES:
        words.append(f"budgets span under {NARROW_DECADES} decades ({decades:.2f}): exponents are weakly determined")
    return words


def _fit_frontier(budgets: tuple[BudgetFit, ...]) -> tuple[Frontier | None, list[str]]:
    """E + K C^-gamma through the valley heights: a bounded search for gamma, each step a non-negative linear solve."""
    from scipy.optimize import minimize_scalar, nnls

    points = [(b.flops, b.n.loss) for b in budgets if b.n.interior and b.n.loss is not None]
    if len(points) < 3:
        return None, [f"no loss-compute frontier: it needs three valid budgets, there are {len(points)}"]
    c, y = np.array(points).T
    if np.any(np.diff(y) >= 0):
        return None, ["no loss-compute frontier: the loss at the vertex does not fall from each budget to the next"]
    scale = math.exp(float(np.log(c).mean()))

    def solve(gamma: float) -> tuple[np.ndarray, float]:
        terms = np.stack([np.ones_like(c), (c / scale) ** -gamma], axis=1)
        return nnls(terms / y[:, None], np.ones_like(y))

    grid = np.geomspace(0.005, 2.0, 60)
    best = int(np.argmin([solve(g)[1] for g in grid]))
    bounds = (grid[max(best - 1, 0)], grid[min(best + 1, 59)])
    gamma = float(minimize_scalar(lambda g: solve(g)[1], bounds=bounds, method="bounded", options={"xatol": 1e-9}).x)
    (floor, size), _ = solve(gamma)
    words = []
    if floor == 0 or best in (0, 59):
        words.append("loss-compute frontier: the irreducible loss is not determined by these budgets (E at its bound)")
    elif len(points) == 3:
        words.append("loss-compute frontier: three budgets for three parameters, so it passes through them exactly")
    return Frontier(float(floor), float(size * scale**gamma), gamma), words
