"""What approach 2 gets wrong before there is any noise: the law is known, the runs follow it exactly, the fit does not.

Noise-free bias of isoFLOP fits: arXiv:2603.22339. A valley of a law with alpha != beta is not a parabola, so its vertex
is off by an amount that grows with the width of the grid; the same at every budget when the grids are centred alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from llamax.errors import UserError
from llamax.scaling.approach2 import fit_approach2
from llamax.scaling.laws import Cost, Law, Scalar, check_flops, optimal_allocation, plain
from llamax.scaling.valleys import Vertex


@dataclass(frozen=True)
class Approach2Bias:
    """Approach 2 on noise-free runs of a law against the law's own optimum; None where the fit has no power law.

    n_percent, d_percent: error of the extrapolated N* and D* at `target` FLOPs, 100 · (fitted / true - 1).
    loss_percent: extra loss of spending `target` at the fitted N* instead of the true one. compute_percent: by how much
    more compute the true optimum would have bought that loss for less (0 = nothing wasted).
    """

    target: float
    n_exponent: float | None
    n_exponent_true: float
    d_exponent: float | None
    d_exponent_true: float
    n_percent: float | None
    d_percent: float | None
    loss_percent: float | None
    compute_percent: float | None
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values under the field names."""
        return {k: list(v) if isinstance(v, tuple) else plain(v) for k, v in asdict(self).items()}


def isoflop_runs(
    law: Law,
    budgets: Sequence[Scalar] | np.ndarray,
    ratio_range: Scalar | tuple[Scalar, Scalar],
    points: int,
    *,
    cost: Cost = Cost(),
    off_centre: Scalar | Sequence[Scalar] | np.ndarray = 1.0,
) -> pd.DataFrame:
    """Noise-free runs of a law, `points` a budget: columns `budget, n, d, flops, loss`.

    Tokens are spaced evenly in log from D*/r to D*·r (`ratio_range` = r, or (low, high) as multiples of D*) around the
    true optimum D*, times `off_centre` (one number, or one a budget). Raises UserError for a design that has no grid.
    """
    low, high = ratio_range if isinstance(ratio_range, tuple) else (1 / ratio_range, ratio_range)
    if not 0 < low < high:
        raise UserError(f"ratio_range: {ratio_range}; give a factor above 1, or (low, high) as multiples of the best D")
    if points < 3:
        raise UserError(f"points: {points}; a valley needs three runs a budget or more")
    budgets = np.asarray(budgets, float)
    shifts = np.broadcast_to(np.asarray(off_centre, float), budgets.shape)
    frames = []
    for budget, shift in zip(budgets, shifts, strict=True):
        best = optimal_allocation(law, float(budget), cost)
        d = np.geomspace(float(best.d) * low * shift, float(best.d) * high * shift, points)
        n = (budget / (cost.coefficient * d)) ** (1 / cost.n_exponent)
        frames.append(pd.DataFrame({"budget": budget, "n": n, "d": d, "flops": budget, "loss": law.loss(n, d)}))
    return pd.concat(frames, ignore_index=True)


def approach2_bias(
    law: Law,
    budgets: Sequence[Scalar] | np.ndarray,
    ratio_range: Scalar | tuple[Scalar, Scalar],
    points: int,
    target: Scalar,
    *,
    cost: Cost = Cost(),
    off_centre: Scalar | Sequence[Scalar] | np.ndarray = 1.0,
    vertex: Vertex = "parabola",
) -> Approach2Bias:
    """Bias of approach 2 at `target` FLOPs for a design: `points` noise-free runs at each of `budgets` FLOPs.

    ratio_range and off_centre: see `isoflop_runs`. vertex: how the fit finds the bottom of a valley. Raises UserError
    for a design without a grid or a target that is not positive.
    """
    check_flops(target)
    fit = fit_approach2(isoflop_runs(law, budgets, ratio_range, points, cost=cost, off_centre=off_centre), vertex)
    total, best = law.alpha + cost.n_exponent * law.beta, optimal_allocation(law, target, cost)
    n = float(fit.n.at(target)) if fit.n else None
    d = float(fit.d.at(target)) if fit.d else None
    spent = None if n is None else float(law.loss(n, cost.tokens(target, n)))
    return Approach2Bias(
        target=float(target),
        n_exponent=float(fit.n.exponent) if fit.n else None,
        n_exponent_true=float(law.beta / total),
        d_exponent=float(fit.d.exponent) if fit.d else None,
        d_exponent_true=float(law.alpha / total),
        n_percent=_percent(n, float(best.n)),
        d_percent=_percent(d, float(best.d)),
        loss_percent=_percent(spent, float(best.loss)),
        compute_percent=None if spent is None else wasted_compute(law, float(target), spent, cost),
        warnings=fit.warnings,
    )


def wasted_compute(law: Law, flops: float, loss: float, cost: Cost = Cost()) -> float:
    """100 · (flops / C - 1), where C is what the best allocation of `law` needs for `loss`; infinite at or below E.

    On the best allocation the reducible loss is a power of compute: (L - E) falls as C^-(gamma alpha beta / (alpha + s
    beta)).
    """
    best = optimal_allocation(law, flops, cost)
    slope = law.alpha * law.beta / (law.alpha + cost.n_exponent * law.beta) * getattr(law, "gamma", 1.0)
    if loss <= law.E:
        return float("inf")
    return float(100 * (((loss - law.E) / (best.loss - law.E)) ** (1 / slope) - 1))


def _percent(value: float | None, true: float) -> float | None:
    return None if value is None else 100 * (value / true - 1)
