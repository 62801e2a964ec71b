"""Profile likelihood: fix one parameter on a grid, refit the rest, and see how fast the objective rises.

An M-estimate has no likelihood of its own. What is used is the statistic of Heritier and Ronchetti (1994, J. Amer.
Statist. Assoc. 89:897): twice the rise of the objective, times E[psi'] / E[psi^2] of the residuals, is chi-square with
one degree of freedom. For squares that is the usual likelihood ratio with an estimated variance; for Huber's function
and absolute values it needs no particular density of the errors. As the scale of the residuals is estimated, the
quantile is that of F with one and (runs - parameters) degrees of freedom. It assumes independent runs of one scale:
rows that are checkpoints of one run make it far too narrow, so use the cluster bootstrap for those.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from llamax.errors import UserError
from llamax.scaling.approach3 import ParametricFit
from llamax.scaling.engine import Task
from llamax.scaling.lawfit import LawFit, fit_law
from llamax.scaling.laws import ChinchillaLaw, plain
from llamax.scaling.registry import law as registry_law

POINTS = 8  # of the grid on either side, which is refined around the crossing
REFINED = 8


@dataclass(frozen=True)
class Profile:
    """The profile of one coordinate: where it was fixed, by how much the objective rose (chi-square units), and the
    interval; None for an end that the data do not close inside the bounds."""

    name: str
    at: np.ndarray
    statistic: np.ndarray
    interval: tuple[float | None, float | None]

    def as_dict(self) -> dict[str, Any]:
        """Plain values: `interval` (None for an open end), and the profile itself."""
        return {"interval": list(self.interval), "at": plain(self.at), "statistic": plain(self.statistic)}


def rise_quantile(runs: int, parameters: int) -> float:
    """The 95 % quantile of the statistic: of F with 1 and runs - parameters degrees of freedom."""
    from scipy.stats import f

    return float(f.ppf(0.95, 1, max(runs - parameters, 1)))


def chi_square_scale(task: Task, residuals: Float[np.ndarray, " runs"], parameters: int) -> float:
    """2 E[psi'] / E[psi^2]: what turns a rise of the objective into a chi-square variable."""
    runs, size = len(residuals), np.abs(residuals)
    freedom = max(runs - parameters, 1) / runs  # the fit made the residuals too small
    if task.objective.method == "mse":  # of squares, not of half of them
        return float(freedom / max(float((residuals**2).mean()), 1e-300))
    size = np.sort(size)[min(parameters, runs - 1) :]  # a robust fit passes through so many runs: they say nothing
    delta = task.objective.delta if task.objective.method == "huber" else 0.0
    # The share of residuals inside the threshold, over a window wide enough to count some where the threshold is not.
    window = max(delta, 1.1 * float(np.quantile(size, 0.6)) * runs**-0.2)
    density = float((size <= window).mean()) / window  # twice the density at zero, where that window is small
    if task.objective.method == "lad":
        return float(2 * freedom * density)
    inside = (size <= delta).mean() if window == delta else density * delta
    return float(2 * freedom * inside / max(float((np.minimum(size, delta) ** 2).mean()), 1e-300))


def profile(
    task: Task,
    best: Float[np.ndarray, " parameters"],
    objective: float,
    index: int,
    scale: float,
    *,
    quantile: float,
) -> Profile:
    """Profile of coordinate `index` of the optimum `best`, whose objective (with any prior) is `objective`.

    `scale` is that of `chi_square_scale`, `quantile` of `rise_quantile`. Raises UserError where the objective is zero
    (nothing to compare with).
    """
    if not (np.isfinite(scale) and 0 < scale < 1e250):
        raise UserError("profile likelihood: the runs lie on the law exactly; there is no scatter to compare with")
    low, high = float(task.lower[index]), float(task.upper[index])
    rise = partial(rise_at, task, best, objective, index, scale)
    ats, values, ends = [np.array([best[index]])], [np.zeros(1)], []
    for bound in (low, high):
        end, at, value = _crossing(rise, float(best[index]), bound, quantile)
        ends.append(end)
        ats.append(at)
        values.append(value)
    at, statistic = np.concatenate(ats), np.concatenate(values)
    order = np.argsort(at)
    return Profile(task.names[index], at[order], statistic[order], (ends[0], ends[1]))


def rise_at(
    task: Task,
    best: Float[np.ndarray, " parameters"],
    objective: float,
    index: int,
    scale: float,
    at: Float[np.ndarray, " points"],
) -> Float[np.ndarray, " points"]:
    """The statistic at fixed values of the coordinate `index`, every other one refitted from `best`."""
    starts = np.tile(best, (len(at), 1))
    lower, upper = (np.tile(ends, (len(at), 1)) for ends in (task.lower, task.upper))
    starts[:, index] = lower[:, index] = upper[:, index] = at
    value = task.minimise(starts, lower=lower, upper=upper)[1]
    return scale * np.maximum(value - objective, 0.0)


def profile_parametric(fit: ParametricFit, runs: pd.DataFrame, name: str) -> Profile:
    """95 % profile of a parameter of the Chinchilla law, `runs` having columns `n, d, loss`.

    In the registry's coordinates, where A and B are what the law calls so. Raises UserError for another name, the
    coupled law (its prior is no likelihood) or variable projection.
    """
    if not isinstance(fit.law, ChinchillaLaw) or fit.projected:
        raise UserError("profile likelihood: for the Chinchilla law by huber, lad or mse, and laws of the registry")
    spec = registry_law("chinchilla")
    found = fit_law(spec, runs, method=fit.sums.method, delta=fit.sums.delta, log=fit.sums.log)
    return profile_law(found, name)


def profile_law(fit: LawFit, name: str) -> Profile:
    """95 % profile of a parameter of any law, of natural scale. Raises UserError for a name that the law has not."""
    names = fit.spec.names
    if name not in names:
        raise UserError(f"profile: parameter {name!r}; law {fit.spec.name} has {', '.join(names)}")
    index = names.index(name)
    scale = chi_square_scale(fit.task, fit.residuals, len(names))
    found = profile(fit.task, fit.u, fit.objective, index, scale, quantile=rise_quantile(fit.n_points, len(names)))
    if not fit.spec.parameters[index].log:
        return found
    low, high = (None if end is None else float(np.exp(end)) for end in found.interval)
    return Profile(name, np.exp(found.at), found.statistic, (low, high))


def _crossing(
    rise: Callable[[np.ndarray], np.ndarray], centre: float, bound: float, quantile: float
) -> tuple[float | None, np.ndarray, np.ndarray]:
    """Where the statistic reaches the quantile between `centre` and `bound`, and all points that were tried."""
    if bound == centre:
        return None, np.zeros(0), np.zeros(0)
    # Far to near: exponents are known to percents, coefficients to factors, and either is found by this grid.
    at = centre + (bound - centre) * np.geomspace(1e-4, 1.0, 4 * POINTS)
    value = rise(at)
    above = np.flatnonzero(value >= quantile)
    if not len(above):
        return None, at, value
    first = int(above[0])
    left, right = (centre if first == 0 else float(at[first - 1])), float(at[first])
    fine = np.linspace(left, right, REFINED + 2)[1:-1]
    between = rise(fine)
    points = np.concatenate([[left], fine, [right]])
    heights = np.concatenate([[0.0 if first == 0 else value[first - 1]], between, [value[first]]])
    k = int(np.flatnonzero(heights >= quantile)[0])
    x, y = points[k - 1 : k + 1], np.sqrt(heights[k - 1 : k + 1])  # the root of the statistic is nearly straight
    end = float(x[0] + (x[1] - x[0]) * (np.sqrt(quantile) - y[0]) / max(y[1] - y[0], 1e-300))
    return end, np.concatenate([at, fine]), np.concatenate([value, between])
