"""One table of runs to both fits with their intervals: what `llamax fit` and the quickstart call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from llamax.errors import UserError
from llamax.scaling.approach2 import Approach2Fit, by_budget, fit_approach2
from llamax.scaling.approach3 import N_PARAMETERS, Approach3Fit, fit_approach3
from llamax.scaling.bands import approach2_bands, approach3_bands, compute_grid
from llamax.scaling.bootstrap import Approach2Draws, Approach3Draws, bootstrap_approach2, bootstrap_approach3
from llamax.scaling.laws import Cost, Scalar, fit_cost
from llamax.scaling.table import clean


@dataclass(frozen=True)
class ScalingFit:
    """Both fits of one table, their bootstrap draws, the cost model of its FLOPs, and everything worth a warning.

    A fit that was not asked for or cannot be made is None and the warnings say why. holdout_error: root mean square
    relative error on the runs of the largest budget when approach 3 is fitted without them; None where that cannot be
    done.
    """

    runs: pd.DataFrame
    cost: Cost
    level: float
    seed: int
    approach2: Approach2Fit | None
    approach2_draws: Approach2Draws | None
    approach3: Approach3Fit | None
    approach3_draws: Approach3Draws | None
    holdout_error: float | None
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready: both approaches, each with `intervals`, `bootstrap` and `bands`; cost, counts, warnings."""
        two, three = self.approach2_draws, self.approach3_draws
        grid = compute_grid(self.runs["flops"].to_numpy(float))
        bands2 = approach2_bands(two, grid, self.level) if two else None
        bands3 = approach3_bands(three, self.cost, grid, self.level) if three else None
        return {
            "approach2": _with_draws(self.approach2, two, self.level, bands2),
            "approach3": _with_draws(self.approach3, three, self.level, bands3),
            "cost": {"coefficient": self.cost.coefficient, "n_exponent": self.cost.n_exponent},
            "n_points": len(self.runs),
            "level": self.level,
            "seed": self.seed,
            "holdout_error_percent": None if self.holdout_error is None else 100 * self.holdout_error,
            "warnings": list(self.warnings),
        }

    def all_warnings(self) -> list[str]:
        """The warnings of the table, of both fits and of both bootstraps, in that order, each once."""
        parts: list[Sequence[str]] = [self.warnings]
        parts += [fit.warnings for fit in (self.approach2, self.approach3) if fit]
        parts += [draws.warnings() for draws in (self.approach2_draws, self.approach3_draws) if draws]
        return list(dict.fromkeys(word for part in parts for word in part))


def fit_frame(
    frame: pd.DataFrame,
    approaches: Sequence[int] = (2, 3),
    *,
    n: str = "n",
    d: str | None = "d",
    loss: str = "loss",
    flops: str | None = "flops",
    budget: str | None = "budget",
    run: str | None = None,
    delta: float = 1e-3,
    bootstrap: int = 300,
    seed: int = 0,
    level: Scalar = 0.95,
) -> ScalingFit:
    """Fit a ledger-like table, one row a run; `n` (parameters) to `run` name its columns (loss in nats per token).

    budget: column of the nominal compute budget; None leaves approach 2 out. run: column that names a run, when a run
    has several rows (checkpoints), so that the bootstrap draws runs. bootstrap: resamples (0 = no intervals). The same
    table and seed give the same numbers. Raises UserError for what cannot be fitted at all; whatever else is doubtful
    is in the warnings.
    """
    if not set(approaches) <= {2, 3} or not approaches:
        raise UserError(f"approaches: {list(approaches)}; choose from 2 and 3")
    if not 0 < level < 1:
        raise UserError(f"level: {level}; give a probability between 0 and 1, such as 0.95")
    if bootstrap < 0:
        raise UserError(f"bootstrap: {bootstrap}; give the number of resamples, 0 for no intervals")
    runs, words = clean(frame, n=n, d=d, loss=loss, flops=flops, budget=budget, run=run)
    two = three = two_draws = three_draws = held_out = None
    if 2 in approaches and budget is None:
        if 3 not in approaches:
            raise UserError("budget: no column named; approach 2 groups runs by their compute budget")
        words.append("approach 2 left out: no budget column named")
    elif 2 in approaches:
        two = fit_approach2(runs)
        two_draws = bootstrap_approach2(runs, bootstrap, np.random.default_rng([seed, 2])) if bootstrap else None
    if 3 in approaches:
        columns = [runs[c].to_numpy(float) for c in ("n", "d", "loss")]
        three = fit_approach3(*columns, delta=delta)
        three_draws = (
            bootstrap_approach3(three, runs, bootstrap, np.random.default_rng([seed, 3])) if bootstrap else None
        )
        held_out = leave_largest_out(runs, delta) if budget is not None else None
    cost, misfit = fit_cost(*(runs[c].to_numpy(float) for c in ("n", "d", "flops")))
    if misfit > 0.1:
        words.append(
            f"FLOPs per token follow {cost.coefficient:.3g}·n^{cost.n_exponent:.3g} only to {100 * misfit:.0f} %: "
            "optimal allocations are that uncertain"
        )
    return ScalingFit(runs, cost, float(level), seed, two, two_draws, three, three_draws, held_out, tuple(words))


def leave_largest_out(runs: pd.DataFrame, delta: float = 1e-3) -> float | None:
    """Relative error (root mean square of log ratios) on the largest budget of an approach 3 fit to all the others.

    The honest test of an extrapolation, made before it is used. None with fewer than three budgets or too few runs
    left.
    """
    groups = by_budget(runs)
    if len(groups) < 3:
        return None
    rest = pd.concat([rows for _, rows in groups[:-1]])
    largest = groups[-1][1]
    if len(rest) <= N_PARAMETERS + 1 or min(rest[c].nunique() for c in ("n", "d", "loss")) < 3:
        return None
    law = fit_approach3(*(rest[c].to_numpy(float) for c in ("n", "d", "loss")), delta=delta).law
    predicted = law.loss(largest["n"].to_numpy(float), largest["d"].to_numpy(float))
    return float(np.sqrt(np.mean(np.log(largest["loss"].to_numpy(float) / predicted) ** 2)))


def _with_draws(fit: Any, draws: Any, level: float, bands: Any) -> dict[str, Any] | None:
    if fit is None:
        return None
    if draws is None:
        return fit.as_dict() | {"intervals": None, "bootstrap": None, "bands": None}
    return fit.as_dict() | {"intervals": draws.intervals(level), "bootstrap": draws.as_dict(), "bands": bands}
