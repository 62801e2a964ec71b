"""Bootstrap over runs: intervals for all fits.

A resample draws whole runs with replacement, within each stratum (budget) when strata are given, because the design of
an isoFLOP sweep is fixed, not random. Rows that share a `run` (checkpoints of one run) are drawn together or not at
all: they are not independent, and resampling them one by one would make intervals far too narrow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd

from llamax.errors import UserError
from llamax.scaling.approach2 import Frontier, PowerLaw, budget_name, by_budget, fit_power_law
from llamax.scaling.approach3 import ParametricFit, refit
from llamax.scaling.centred import COUPLED_EXPONENT_RANGE, EXPONENT_RANGE, GAMMA_RANGE
from llamax.scaling.laws import ChinchillaLaw, CoupledLaw, Law, Scalar, plain
from llamax.scaling.valleys import Vertex, fit_valleys

Interval = tuple[float, float]
PRIOR_SHIFTS = tuple(NormalDist().inv_cdf((i + 0.5) / 7) for i in range(7))  # in widths of the prior


@dataclass(frozen=True)
class Approach2Draws:
    """Bootstrap draws of approach 2: power laws with fields `[draws]`, nan in a failed draw.

    degenerate: per budget, in how many draws its valley in N was dropped (fewer than three distinct sizes, curvature
    not positive, or vertex off the grid). failed: draws with fewer than two valid budgets in N or in D; they enter no
    interval.
    """

    n: PowerLaw
    d: PowerLaw
    degenerate: dict[Any, int]
    failed: int
    frontier: Frontier | None = None  # fields `[draws]`, nan where fewer than three budgets are valid

    @property
    def draws(self) -> int:
        return len(self.n.exponent)

    def intervals(self, level: float = 0.95) -> dict[str, list[float] | None]:
        """Percentile intervals of the two exponents and the two coefficients."""
        values = {
            "n_exponent": self.n.exponent,
            "n_coefficient": np.exp(self.n.log_coefficient),
            "d_exponent": self.d.exponent,
            "d_coefficient": np.exp(self.d.log_coefficient),
        }
        return {name: as_list(interval(draws, level)) for name, draws in values.items()}

    def as_dict(self) -> dict[str, Any]:
        """How the bootstrap went, in plain values."""
        degenerate = {str(k): v for k, v in self.degenerate.items()}
        return {
            "draws": self.draws,
            "failed": self.failed,
            "degenerate": degenerate,
            "warnings": self.warnings(),
        }

    def warnings(self) -> list[str]:
        """What a reader of the intervals should know, in words."""
        draws, words = self.draws, []
        if self.failed > 0.02 * draws:
            words.append(
                f"approach 2 bootstrap: {self.failed} of {draws} resamples left fewer than two valid budgets: not used"
            )
        for label, count in self.degenerate.items():
            if count > 0.2 * draws:
                words.append(
                    f"approach 2 bootstrap: {budget_name(label)} had no valid vertex in {count} of {draws} resamples"
                )
        return words


@dataclass(frozen=True)
class ParametricDraws:
    """Bootstrap draws of a parametric fit: a law whose fields are `[draws]`.

    failed: resamples with no more distinct runs than parameters, refused and not in `law`. at_bound: draws in which an
    exponent or gamma ran into its bound; they stay in, and the words say so.
    """

    law: Law
    failed: int
    at_bound: int

    @property
    def draws(self) -> int:
        return len(np.atleast_1d(self.law.alpha))

    def intervals(self, level: float = 0.95) -> dict[str, list[float] | None]:
        """Percentile intervals of the parameters and of the exponents of N* and D*: beta, alpha over their sum."""
        return {name: as_list(interval(draws, level)) for name, draws in self._named().items()}

    def standard_errors(self) -> dict[str, float | None]:
        """Standard deviations of the same over the draws; None with fewer than ten."""
        return {n: plain(np.std(v)) if np.size(v) >= 10 else None for n, v in self._named().items()}

    def _named(self) -> dict[str, Any]:
        law, total = self.law, self.law.alpha + self.law.beta
        return dict(vars(law)) | {"n_exponent": law.beta / total, "d_exponent": law.alpha / total}

    def as_dict(self) -> dict[str, Any]:
        """How the bootstrap went, in plain values."""
        return {"draws": self.draws, "failed": self.failed, "at_bound": self.at_bound, "warnings": self.warnings()}

    def warnings(self) -> list[str]:
        """What a reader of the intervals should know, in words."""
        words = []
        if self.failed:
            words.append(
                f"{self.law.label} bootstrap: {self.failed} resamples had no more distinct runs than the law has "
                "parameters and are left out"
            )
        if self.at_bound > 0.05 * max(self.draws, 1):
            words.append(
                f"{self.law.label} bootstrap: an exponent ran into its bound in {self.at_bound} of {self.draws} "
                "resamples"
            )
        return words


def resample_counts(frame: pd.DataFrame, draws: int, rng: np.random.Generator) -> np.ndarray:
    """How often each row is in each resample, `[draws, rows]` (floats, so that they are run weights).

    Stratified by `budget` when the frame has that column; clustered by `run` when it has that one. A run whose rows lie
    in several budgets cannot be stratified: then runs are drawn from all of them. Runs that are alone in their budgets
    are drawn from among each other: drawn from itself a run never varies, and intervals would have no width.

    Raises:
        UserError: one run, so nothing to draw from.
    """
    rows = len(frame)
    cluster = pd.factorize(frame["run"])[0] if "run" in frame else np.arange(rows)
    stratum = pd.factorize(frame["budget"])[0] if "budget" in frame else np.zeros(rows, int)
    table = pd.DataFrame({"cluster": cluster, "stratum": stratum}).drop_duplicates()
    if table["cluster"].duplicated().any():
        table = table.drop_duplicates("cluster").assign(stratum=0)
    if len(table) == 1:
        raise UserError(
            "bootstrap: all rows are of one run, so nothing can be drawn; name a column of several runs as the group, "
            "give the seed noise, or ask for no intervals (bootstrap 0)"
        )
    alone = table.groupby("stratum")["cluster"].transform("size") == 1
    table.loc[alone, "stratum"] = -1
    counts = np.zeros((draws, int(np.max(cluster)) + 1))
    for _, members in table.groupby("stratum"):
        names = members["cluster"].to_numpy()
        counts[:, names] = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    return counts[:, cluster]


def bootstrap_approach2(
    frame: pd.DataFrame,
    draws: int,
    rng: np.random.Generator,
    vertex: Vertex = "parabola",
    *,
    seed_noise: float | None = None,
) -> Approach2Draws:
    """Repeat the whole of approach 2, dropping of budgets included, on `draws` resamples within budgets.

    With `seed_noise`, a size in log loss, no run is drawn or left out: every draw gives each run the mean log loss of
    the runs of its budget and size with normal noise of that size, whatever curve the valley is.
    """
    frame = frame.reset_index(drop=True)
    losses = np.broadcast_to(frame["loss"].to_numpy(float), (draws, len(frame)))
    if seed_noise is None:
        counts = resample_counts(frame, draws, rng)
    else:
        counts = np.ones((draws, len(frame)))
        cell = [frame["budget"], np.round(np.log(frame["n"]), 6)]
        mean = np.log(frame["loss"]).groupby(cell).transform("mean").to_numpy()
        losses = np.exp(mean + seed_noise * rng.normal(size=counts.shape))
    groups = by_budget(frame)
    log_c = np.log([np.exp(np.log(rows["flops"]).mean()) for _, rows in groups])
    lines: dict[str, PowerLaw] = {}
    usable, degenerate = np.ones(draws, bool), {}
    for axis in ("n", "d"):
        valleys = [
            fit_valleys(np.log(rows[axis].to_numpy(float)), losses[:, rows.index], counts[:, rows.index], vertex)
            for _, rows in groups
        ]
        valid = np.stack([v.interior for v in valleys], axis=1)
        lines[axis] = fit_power_law(log_c, np.stack([v.vertex for v in valleys], axis=1), valid)
        usable &= valid.sum(1) >= 2
        if axis == "n":
            heights = np.where(valid, np.stack([v.height for v in valleys], axis=1), np.nan)
            degenerate = {label: int(draws - ok.sum()) for (label, _), ok in zip(groups, valid.T, strict=True)}
    n, d = (
        PowerLaw(*(np.where(usable, v, np.nan) for v in (line.exponent, line.log_coefficient)))
        for line in lines.values()
    )
    return Approach2Draws(n, d, degenerate, int(draws - usable.sum()), frontier_draws(log_c, heights))


def frontier_draws(log_c: np.ndarray, heights: np.ndarray) -> Frontier:
    """E + K C^-gamma through the heights `[draws, budgets]` of valid valleys (nan: not valid), fields `[draws]`.

    Least squares of the relative misfit, E and K solved for at every gamma of a grid that zooms in once; nan with under
    three heights.
    """
    valid = np.isfinite(heights)
    y, centre = np.where(valid, heights, 1.0), float(log_c.mean())

    def solve(gamma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(E, K, gamma) `[3, draws]` and the misfit `[draws]` at one gamma a draw."""
        # Relative misfit: e / y + k term / y = 1 in every row; two by two normal equations of every draw.
        one, term = valid / y, valid * np.exp(-gamma[:, None] * (log_c - centre)) / y
        a, b, c = (one**2).sum(1), (one * term).sum(1), np.maximum((term**2).sum(1), 1e-300)
        e = np.maximum((c * one.sum(1) - b * term.sum(1)) / np.maximum(a * c - b**2, 1e-300), 0.0)
        k = (term.sum(1) - e * b) / c
        with np.errstate(over="ignore", invalid="ignore"):  # a draw without heights: its k is not used
            left = ((valid - e[:, None] * one - k[:, None] * term) ** 2).sum(1)
            return np.stack([e, k * np.exp(gamma * centre), gamma]), np.where(k > 0, left, np.inf)

    grid = np.geomspace(0.005, 2.0, 100)
    middle, ratio = np.ones(len(y)), grid[1] / grid[0]
    for candidates in (grid, np.geomspace(1 / ratio, ratio, 100)):
        found = [solve(middle * factor) for factor in candidates]
        best = np.argmin([left for _, left in found], axis=0)
        values = np.stack([v for v, _ in found])[best, :, np.arange(len(y))].T
        middle = values[2]
    sure = (valid.sum(1) >= 3) & np.isfinite(np.min([left for _, left in found], axis=0))
    return Frontier(*np.where(sure, values, np.nan))


def bootstrap_parametric(
    fit: ParametricFit,
    frame: pd.DataFrame,
    draws: int,
    rng: np.random.Generator,
    *,
    extra_starts: int = 1,
    seed_noise: float | None = None,
) -> ParametricDraws:
    """Refit the law of `fit` on `draws` resamples at once, each warm from it and from `extra_starts` other starts.

    Resampling runs alone would leave the doubt of the coupled law's prior out, and intervals would be too narrow the
    more it counts. So the prior's centre varies too, by normal quantiles over blocks of resamples; for a linear law
    both together draw from the posterior (randomize-then-optimize, Bardsley et al. 2014).

    With `seed_noise`, a size in log loss, no run is drawn or left out: every draw is the law at the measured runs with
    normal noise of that size (a parametric bootstrap). It keeps the design, and knows of no other misfit.
    """
    losses = None
    if seed_noise is None:
        counts = resample_counts(frame, draws, rng)
    else:
        counts = np.ones((draws, len(frame)))
        fitted = np.asarray(fit.law.loss(frame["n"].to_numpy(float), frame["d"].to_numpy(float)))
        losses = fitted * np.exp(seed_noise * rng.normal(size=counts.shape))
    enough = (counts > 0).sum(1) > fit.n_parameters
    n, d, loss = (frame[c].to_numpy(float) for c in ("n", "d", "loss"))
    kept, shift = counts[enough], np.zeros(int(enough.sum()))
    if isinstance(fit.law, CoupledLaw):
        blocks = np.array_split(np.arange(len(shift)), len(PRIOR_SHIFTS))
        shift[:] = np.concatenate([np.full(len(rows), PRIOR_SHIFTS[i]) for i, rows in enumerate(blocks)])
    if len(kept):
        law = refit(fit, n, d, loss, kept, extra_starts=extra_starts, shift=shift, losses=losses)[0]
    else:
        law = type(fit.law)(*(np.zeros(0) for _ in vars(fit.law)))
    return ParametricDraws(law, int(draws - enough.sum()), int(_at_bound(law).sum()))


def _at_bound(law: Law) -> np.ndarray:
    """In which draws an exponent, or gamma, lies at its bound."""
    if isinstance(law, ChinchillaLaw):
        bounded = [(law.alpha, EXPONENT_RANGE), (law.beta, EXPONENT_RANGE)]
    else:
        whole = COUPLED_EXPONENT_RANGE
        bounded = [(law.alpha * law.gamma, whole), (law.beta * law.gamma, whole), (law.gamma, GAMMA_RANGE)]
    return np.any([np.asarray((v < low + 1e-6) | (v > high - 1e-6)) for v, (low, high) in bounded], axis=0)


def loss_draws(
    fit: ParametricFit, draws: ParametricDraws, n: Scalar, d: Scalar, rng: np.random.Generator, *, inflate: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """At `n` parameters and `d` tokens: draws of the law's loss `[draws]`, and of one new run's `[20 * draws]`.

    The first hold the uncertainty of the parameters only. The second add the scatter of single runs around the law: a
    residual resampled for every draw. Both spreads are scaled by sqrt(runs / (runs - parameters)), because the fit made
    the residuals, which are all that resampling sees of the noise, too small; the scatter by `inflate` too.
    """
    freedom = np.sqrt(fit.n_points / max(fit.n_points - fit.n_parameters, 1))
    centre = fit.law.loss(n, d)
    mean = centre * (np.asarray(draws.law.loss(n, d)) / centre) ** freedom
    # Several residuals per draw make the ends smooth; the number of draws alone decides the cost.
    scatter = inflate * freedom * rng.choice(fit.residuals, size=(20, len(mean)))
    return mean, (mean * np.exp(scatter)).ravel()


def interval(draws: Any, level: float = 0.95) -> Interval | None:
    """Percentile interval of the finite draws; None with fewer than ten of them."""
    return mixture_interval([np.asarray(draws)], [1.0], level)


def mixture_interval(parts: Sequence[np.ndarray], weights: Sequence[float], level: float = 0.95) -> Interval | None:
    """Percentile interval of a mixture: `parts` are draws, each part as a whole has its weight.

    None when a part has fewer than ten finite draws.
    """
    finite = [np.asarray(part)[np.isfinite(part)] for part in parts]
    if any(len(part) < 10 for part in finite):
        return None
    weight = np.concatenate([np.full(len(part), w / len(part)) for part, w in zip(finite, weights, strict=True)])
    ends = np.array([(1 - level) / 2, (1 + level) / 2])
    low, high = np.quantile(np.concatenate(finite), ends, weights=weight, method="inverted_cdf")
    return float(low), float(high)


def as_list(pair: Interval | None) -> list[float] | None:
    """An interval as JSON takes it."""
    return None if pair is None else list(pair)
