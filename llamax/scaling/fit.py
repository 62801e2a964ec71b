"""One table of runs to all fits with their intervals: what `llamax fit` and the quickstart call."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import pandas as pd

from llamax.errors import UserError
from llamax.scaling.approach2 import Approach2Fit, budget_name, by_budget, fit_approach2
from llamax.scaling.approach3 import N_COUPLED, ParametricFit, fit_approach3, fit_coupled
from llamax.scaling.bands import approach2_bands, compute_grid, parametric_bands
from llamax.scaling.bootstrap import Approach2Draws, ParametricDraws, bootstrap_approach2, bootstrap_parametric
from llamax.scaling.caveats import (
    bootstrap_words,
    check_noise,
    group_words,
    seed_scatter,
    span_words,
    undertrained_words,
)
from llamax.scaling.laws import Cost, Scalar, fit_cost
from llamax.scaling.table import clean


@dataclass(frozen=True)
class Parametric:
    """One parametric law fitted to the table, its bootstrap draws, and its holdout error.

    holdout_error: root mean square relative error on the runs of the largest budget (without budgets: the fifth of the
    runs with the most compute) when the law is fitted without them; None where that cannot be done.
    """

    fit: ParametricFit
    draws: ParametricDraws | None
    holdout_error: float | None

    def as_dict(self, cost: Cost, grid: np.ndarray, level: float) -> dict[str, Any]:
        """Plain values of the fit with `intervals`, `bootstrap`, `bands` and `holdout_error_percent`."""
        bands = parametric_bands(self.draws, cost, grid, level) if self.draws else None
        record = _with_draws(self.fit, self.draws, level, bands) or {}
        return record | {"holdout_error_percent": _percent(self.holdout_error)}


@dataclass(frozen=True)
class ScalingFit:
    """The fits of one table, their bootstrap draws, the cost model of its FLOPs, and everything worth a warning.

    A fit that was not asked for or cannot be made is None and the warnings say why.
    """

    runs: pd.DataFrame
    cost: Cost
    level: float
    seed: int
    approach2: Approach2Fit | None
    approach2_draws: Approach2Draws | None
    additive: Parametric | None
    coupled: Parametric | None
    warnings: tuple[str, ...]
    seed_noise: float | None = None

    @property
    def approach3(self) -> ParametricFit | None:
        """The fit of the Chinchilla law."""
        return self.additive.fit if self.additive else None

    @property
    def laws(self) -> dict[str, Parametric]:
        """The parametric laws that were fitted, by name in `as_dict`."""
        laws = {"approach3": self.additive, "coupled": self.coupled}
        return {name: part for name, part in laws.items() if part}

    def weights(self) -> dict[str, float]:
        """How much each law counts in a predicted interval, by name in `as_dict`: Akaike weights, which sum to 1.

        exp(-aic / 2), normalized (Burnham and Anderson 2002, section 2.9): the likelihood of all runs, less a factor e
        a parameter. Leaving the largest budget out tests extrapolation itself, but on too few runs to choose by: that
        takes the wrong law in 23 % of synthetic studies, these weights in 2 % (docs/decisions.md).

        Raises:
            UserError: without approach 3.
        """
        if not self.laws:
            raise UserError("fit: approach 3 was not fitted; a predicted loss needs it")
        aic = {name: part.fit.aic for name, part in self.laws.items()}
        raw = {name: math.exp((min(aic.values()) - value) / 2) for name, value in aic.items()}
        return {name: value / sum(raw.values()) for name, value in raw.items()}

    def choose(self) -> tuple[str, Parametric, str]:
        """Which law predicts, by name in `as_dict`, its fit, and why in words: the one of the larger weight.

        Approach 3, which has a parameter less, keeps a tie. Raises UserError without it.
        """
        weights = self.weights()
        name = max(weights, key=weights.__getitem__)  # the first of equals
        errors = " and ".join(
            f"{100 * part.fit.mean_error:.2g} % for {part.fit.law.label}" for part in self.laws.values()
        )
        why = f"the mean error over all {len(self.runs)} runs is {errors} (Akaike weight {weights[name]:.2g})"
        return name, self.laws[name], why if len(weights) > 1 else "no other law was fitted"

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready: every approach with `intervals`, `bootstrap` and `bands`; `law` that predicts; cost, warnings."""
        two = self.approach2_draws
        grid = compute_grid(self.runs["flops"].to_numpy(float))
        bands2 = approach2_bands(two, grid, self.level) if two else None
        parametric = {
            name: part.as_dict(self.cost, grid, self.level) if part else None
            for name, part in (("approach3", self.additive), ("coupled", self.coupled))
        }
        return {
            "approach2": _with_draws(self.approach2, two, self.level, bands2),
            **parametric,
            "law": self.choose()[0] if self.laws else None,
            "cost": {"coefficient": self.cost.coefficient, "n_exponent": self.cost.n_exponent},
            "n_points": len(self.runs),
            "level": self.level,
            "seed": self.seed,
            "seed_noise": self.seed_noise,
            "holdout_error_percent": _percent(self.additive.holdout_error) if self.additive else None,
            "warnings": list(self.warnings),
        }

    def all_warnings(self) -> list[str]:
        """The warnings of the table, of all fits and of all bootstraps, in that order, each once."""
        laws = [part for part in (self.additive, self.coupled) if part]
        parts: list[Sequence[str]] = [self.warnings]
        parts += [fit.warnings for fit in (self.approach2, *(part.fit for part in laws)) if fit]
        parts += [draws.warnings() for draws in (self.approach2_draws, *(part.draws for part in laws)) if draws]
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
    vertex: str = "parabola",
    delta: float = 1e-3,
    method: str = "huber",
    log: bool = True,
    laws: Sequence[str] = ("approach3", "coupled"),
    bootstrap: int = 300,
    seed_noise: float | Literal["replicates"] | None = None,
    seed: int = 0,
    level: Scalar = 0.95,
) -> ScalingFit:
    """Fit a ledger-like table, one row a run; `n` (parameters) to `run` name its columns (loss in nats per token).

    budget: column of the nominal compute budget; None leaves approach 2 out. run: column that names a run or a cluster
    of runs, when one has several rows (checkpoints), so that the bootstrap draws clusters. vertex: of a valley of
    approach 2, parabola or akima. method, log, delta: the objective of approach 3 (`fit_approach3`). laws: which of
    `approach3` and `coupled` to fit. bootstrap: resamples (0 = no intervals). seed_noise: the runs stay and every draw
    gives them new normal noise of this size in log loss, around a parametric law or (approach 2) the mean of the runs
    of a budget and size; or of the size that "replicates" of equal n and d show, pooled. The same table
    and seed give the same numbers. Raises UserError for what cannot be fitted at all; whatever else is doubtful is in
    the warnings.
    """
    if not set(approaches) <= {2, 3} or not approaches:
        raise UserError(f"approaches: {list(approaches)}; choose from 2 and 3")
    if not 0 < level < 1:
        raise UserError(f"level: {level}; give a probability between 0 and 1, such as 0.95")
    few = bootstrap_words(bootstrap, seed)
    check_noise(seed_noise)
    runs, words = clean(frame, n=n, d=d, loss=loss, flops=flops, budget=budget, run=run)
    try:
        cost, misfit = fit_cost(*(runs[c].to_numpy(float) for c in ("n", "d", "flops")))
    except UserError as error:  # mixed units are the usual cause
        raise UserError("; ".join([str(error), *words])) from error
    if misfit > 0.1:
        words.append(
            f"FLOPs per token follow {cost.coefficient:.3g}·n^{cost.n_exponent:.3g} only to {100 * misfit:.0f} %: "
            "optimal allocations are that uncertain"
        )
    words += few + group_words(runs)
    noise = seed_scatter(runs)[0] if seed_noise == "replicates" else seed_noise
    two = two_draws = additive = coupled = None
    if 2 in approaches:
        why = _no_budgets(runs)
        if why and 3 not in approaches:
            raise UserError(f"budget: {why}")
        if why:
            words.append(f"approach 2 left out: {why}")
        else:
            two, rng = fit_approach2(runs, vertex), np.random.default_rng([seed, 2])
            two_draws = bootstrap_approach2(runs, bootstrap, rng, vertex, seed_noise=noise) if bootstrap else None
    if 3 in approaches:
        words += [] if two else span_words(runs)
        parts = leave_largest_out(runs)
        options = {"delta": delta, "method": method, "log": log}

        def part(fit: Callable[..., ParametricFit], number: int) -> Parametric:
            return _parametric(partial(fit, **options), runs, parts, bootstrap, [seed, number], noise)

        if "approach3" in laws:
            additive = part(fit_approach3, 3)
        if "coupled" in laws and method == "vp":
            words.append("the coupled law left out: it is not linear in A and B, so there is nothing to project")
        elif "coupled" in laws and len(runs) <= N_COUPLED and additive:
            words.append(f"the coupled law left out: {len(runs)} runs, it needs at least {N_COUPLED + 1}")
        elif "coupled" in laws:
            coupled = part(fit_coupled, 5)
    fit = ScalingFit(runs, cost, float(level), seed, two, two_draws, additive, coupled, tuple(words), noise)
    if not fit.laws:
        return fit
    return replace(fit, warnings=(*words, *undertrained_words(runs, fit.choose()[1].fit.law, cost)))


def _no_budgets(runs: pd.DataFrame) -> str | None:
    """Why approach 2 cannot be made at all, in words."""
    if "budget" not in runs:
        return "no column named; approach 2 groups runs by their compute budget"
    if runs["budget"].nunique() == 1:
        return f"one {budget_name(runs['budget'].iloc[0])}; an exponent needs two at least, and three to be checked"
    return None


def leave_largest_out(runs: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame] | None:
    """The runs without those of the largest budget, and those; None with fewer than three budgets or few runs.

    Without a budget column: the fifth of the runs with the most FLOPs, and all that spent as much as the least of them.
    """
    if "budget" in runs:
        groups = by_budget(runs)
        if len(groups) < 3:
            return None
        rest, largest = pd.concat([rows for _, rows in groups[:-1]]), groups[-1][1]
    else:
        spent = runs["flops"].to_numpy(float)
        top = spent >= np.sort(spent)[-max(len(spent) // 5, 1)] * (1 - 1e-6)
        rest, largest = runs[~top], runs[top]
    if len(rest) <= N_COUPLED + 1 or min(rest[c].nunique() for c in ("n", "d", "loss")) < 3:
        return None
    return rest, largest


def holdout_error(fit: Callable[..., ParametricFit], rest: pd.DataFrame, largest: pd.DataFrame) -> float:
    """Relative error (root mean square of log ratios) on the runs `largest` of a `fit` to the others.

    The honest test of an extrapolation, made before it is used.
    """
    law = fit(*(rest[c].to_numpy(float) for c in ("n", "d", "loss"))).law
    predicted = law.loss(largest["n"].to_numpy(float), largest["d"].to_numpy(float))
    return float(np.sqrt(np.mean(np.log(largest["loss"].to_numpy(float) / predicted) ** 2)))


def _parametric(
    fit: Callable[..., ParametricFit],
    runs: pd.DataFrame,
    parts: tuple[pd.DataFrame, pd.DataFrame] | None,
    bootstrap: int,
    seed: list[int],
    noise: float | None,
) -> Parametric:
    found = fit(*(runs[c].to_numpy(float) for c in ("n", "d", "loss")))
    rng = np.random.default_rng(seed)
    draws = bootstrap_parametric(found, runs, bootstrap, rng, seed_noise=noise) if bootstrap else None
    return Parametric(found, draws, holdout_error(fit, *parts) if parts else None)


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _with_draws(fit: Any, draws: Any, level: float, bands: Any) -> dict[str, Any] | None:
    if fit is None:
        return None
    if draws is None:
        return fit.as_dict() | {"intervals": None, "bootstrap": None, "bands": None}
    return fit.as_dict() | {"intervals": draws.intervals(level), "bootstrap": draws.as_dict(), "bands": bands}
