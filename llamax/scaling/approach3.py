"""Approach 3 of Hoffmann et al. 2022 (arXiv:2203.15556, section 3.3): all runs in one parametric fit.

Minimises  sum_i rho(log L(N_i, D_i) - log L_i)  for L = E + A / N^alpha + B / D^beta: rho is Huber's function at 1e-3
as in the paper, the absolute value or the square, of log residuals or of those in nats. The SUM, not the mean: the mean
is so small that optimisers stop early, the flaw Besiroglu et al. 2024 (arXiv:2404.10102) found in the original numbers.
Their own headline is the least sum of absolute values.

The same objective with a sixth parameter, gamma, fits the coupled law (laws.py). Coordinates, bounds and starts are in
centred.py, the minimiser in engine.py, variable projection in projection.py.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from llamax.errors import UserError
from llamax.scaling.centred import PRIOR_WIDTH, Centred
from llamax.scaling.engine import Objective, Search
from llamax.scaling.laws import ChinchillaLaw, CoupledLaw, Law, Number, plain
from llamax.scaling.projection import project, project_many

N_PARAMETERS, N_COUPLED = 5, 6
EXACT = 1e-6  # a mean error below it counts as none: two laws that both are exact tie


@dataclass(frozen=True)
class ParametricFit:
    """A parametric fit with what is needed to trust it or not.

    objective: the minimised sum (`sums` says of what). residuals: log measured - log fitted `[runs]`. scatter: mean
    absolute residual as the objective sees them. search: what became of the starts, bounds and conditioning. projected:
    E, A, B were solved for at every alpha, beta (variable projection).
    """

    law: Law
    objective: float
    sums: Objective
    n_points: int
    residuals: np.ndarray
    scatter: float
    search: Search
    warnings: tuple[str, ...]
    projected: bool = False

    @property
    def delta(self) -> float:
        """Huber's threshold."""
        return self.sums.delta

    @property
    def method(self) -> str:
        """huber, lad, mse or vp."""
        return "vp" if self.projected else self.sums.method

    @property
    def n_parameters(self) -> int:
        """Five, or six for the coupled law."""
        return len(vars(self.law))

    @property
    def theta(self) -> np.ndarray:
        """(a, b, e, alpha, beta) with A = exp(a), B = exp(b), E = exp(e); of the coupled law, see centred.py."""
        law = self.law
        logs = [float(np.log(max(float(v), 1e-300))) for v in (law.A, law.B, law.E)]
        theta = np.array([*logs, float(law.alpha), float(law.beta)])
        if isinstance(law, ChinchillaLaw):
            return theta
        return np.append(theta * law.gamma ** np.array([1, 1, 0, 1, 1]), np.log(law.gamma))

    @property
    def mean_error(self) -> float:
        """Mean absolute log residual: by how much of its loss a run lies off the law."""
        return float(np.abs(self.residuals).mean())

    @property
    def aic(self) -> float:
        """Akaike's criterion, 2 parameters - 2 log likelihood up to a constant, for Laplace errors of unknown scale.

        Those are the errors for which the objective, nearly the sum of absolute residuals at a small delta, is a
        likelihood; at its best scale, minus its logarithm is runs · log(mean absolute residual).
        """
        return 2 * (self.n_parameters + self.n_points * float(np.log(max(self.mean_error, EXACT))))

    def as_dict(self) -> dict[str, Any]:
        """Plain values; `params` of the law by name; n_exponent beta / (alpha + beta), the optimum's for C ~ N D."""
        total = self.law.alpha + self.law.beta
        return {
            "params": self.law.as_dict(),
            "n_exponent": plain(self.law.beta / total),
            "d_exponent": plain(self.law.alpha / total),
            "objective": self.objective,
            "objective_rule": self.sums.rule,
            "method": self.method,
            "delta": self.delta if self.method == "huber" else None,
            "n_points": self.n_points,
            "aic": self.aic,
            "residual_percent": plain(100 * residual_scale(self)),
            **self.search.as_dict(),
            "warnings": list(self.warnings),
        }


def residual_scale(fit: ParametricFit) -> float:
    """Root mean square of the log residuals, corrected for the fitted parameters: relative scatter of one run."""
    return float(np.sqrt(np.sum(fit.residuals**2) / max(fit.n_points - fit.n_parameters, 1)))


def fit_approach3(
    n: Float[np.ndarray, " runs"],
    d: Float[np.ndarray, " runs"],
    loss: Float[np.ndarray, " runs"],
    *,
    delta: float = 1e-3,
    method: str = "huber",
    log: bool = True,
) -> ParametricFit:
    """Fit the Chinchilla law to runs: `n` parameters, `d` tokens, `loss` nats per token, all `[runs]` and positive.

    method: huber (threshold `delta`), lad (least absolute deviations), mse (least squares), each of log residuals or,
    `log=False`, of residuals in nats; or vp: least squares in nats, E, A and B solved for at every alpha, beta
    (variable projection, arXiv:2603.22339). Deterministic: the starts are a fixed grid. Raises UserError for fewer than
    six runs, values that are not positive and finite, losses that are all equal, `n` or `d` that never vary, an unknown
    method, or a `delta` that is not positive.
    """
    check_runs(n, d, loss, N_PARAMETERS)
    if method == "vp":
        return _fit_projected(n, d, loss)
    return _fit(n, d, loss, Objective(method, delta, log), coupled=False)


def fit_coupled(
    n: Float[np.ndarray, " runs"],
    d: Float[np.ndarray, " runs"],
    loss: Float[np.ndarray, " runs"],
    *,
    delta: float = 1e-3,
    method: str = "huber",
    log: bool = True,
) -> ParametricFit:
    """Fit the coupled law L = E + (A / N^alpha + B / D^beta)^gamma; objective, starts and errors as in `fit_approach3`.

    gamma lies in 0.1 .. 3. It is fitted twice: freely, which gives the scatter of the runs, then with a prior on gamma
    (centred.py) weighed against that scatter; `objective` leaves the prior out. Raises UserError for fewer than seven
    runs.
    """
    check_runs(n, d, loss, N_COUPLED)
    return _fit(n, d, loss, Objective(method, delta, log), coupled=True)


def _fit(n: np.ndarray, d: np.ndarray, loss: np.ndarray, sums: Objective, *, coupled: bool) -> ParametricFit:
    problem = Centred.of(n, d, loss, sums, coupled=coupled)
    starts = problem.starts(*((8, 4) if coupled else (16, 16)))  # for each start of gamma
    thetas, objectives = problem.task.minimise(starts)
    theta = thetas[int(np.argmin(objectives))]
    residuals, jacobian = problem.task.describe(theta)
    scatter = float(np.abs(residuals).mean())
    if coupled:
        weighed = Centred.of(n, d, loss, sums, coupled=True, scatter=scatter).task
        candidates, values = weighed.minimise(thetas)
        theta = candidates[int(np.argmin(values))]
        residuals, jacobian = problem.task.describe(theta)
    return _result(
        _law(problem.outside(theta)),
        problem.task.value(residuals),
        sums,
        (n, d, loss),
        scatter=float(np.abs(residuals).mean()),
        objectives=objectives,
        bounds_hit=problem.task.bounds_hit(theta),
        jacobian=jacobian,
    )


def _fit_projected(n: np.ndarray, d: np.ndarray, loss: np.ndarray) -> ParametricFit:
    found = project(n, d, loss)
    residuals = loss - np.asarray(found.law.loss(n, d))
    return _result(
        found.law,
        float((residuals**2).sum()),
        Objective("mse", log=False),
        (n, d, loss),
        scatter=float(np.abs(residuals).mean()),
        objectives=found.objectives,
        bounds_hit=found.bounds_hit,
        jacobian=found.jacobian,
        projected=True,
    )


def _result(
    law: Law,
    objective: float,
    sums: Objective,
    runs: tuple[np.ndarray, np.ndarray, np.ndarray],
    *,
    scatter: float,
    objectives: np.ndarray,
    bounds_hit: tuple[str, ...],
    jacobian: np.ndarray,
    projected: bool = False,
) -> ParametricFit:
    n, d, loss = runs
    search = Search.of(objectives, objective, bounds_hit, jacobian)
    return ParametricFit(
        law=law,
        objective=objective,
        sums=sums,
        n_points=len(loss),
        residuals=np.log(loss) - np.log(np.asarray(law.loss(n, d))),
        scatter=scatter,
        search=search,
        warnings=tuple(_warnings(n, d, search, coupled=isinstance(law, CoupledLaw))),
        projected=projected,
    )


def refit(
    fit: ParametricFit,
    n: Float[np.ndarray, " runs"],
    d: Float[np.ndarray, " runs"],
    loss: Float[np.ndarray, " runs"],
    weights: Float[np.ndarray, "draws runs"],
    *,
    extra_starts: int = 1,
    shift: float | np.ndarray = 0.0,
    losses: Float[np.ndarray, "draws runs"] | None = None,
) -> tuple[Law, Float[np.ndarray, " draws"]]:
    """Fit every row of run `weights` (bootstrap counts) at once, warm from `fit` and from a few other good starts.

    `shift` moves the centre of the coupled law's prior by that many of its widths (one number, or one a draw).
    `losses`: measured losses that differ by draw. Returns the law with array fields `[draws]` and the objectives.
    """
    if fit.projected:
        return project_many(n, d, loss, weights, fit.law, losses=losses)
    coupled = isinstance(fit.law, CoupledLaw)
    problem = Centred.of(n, d, loss, fit.sums, coupled=coupled, scatter=fit.scatter)
    extra_starts = 0 if fit.sums.method == "lad" else extra_starts  # its continuation begins anew from any start
    others = problem.starts(*((1, 0) if coupled else (extra_starts, extra_starts // 2)))[:extra_starts]
    starts = np.concatenate([problem.inside(fit.theta)[None], others])
    draws, k = len(weights), len(starts)
    centre = None
    if problem.task.prior:
        off = np.zeros((draws, fit.n_parameters))
        off[:, 5] = np.asarray(shift) * PRIOR_WIDTH
        centre = np.repeat(problem.task.prior[0] + off, k, axis=0)
    thetas, objectives = problem.task.minimise(
        np.tile(starts, (draws, 1)),
        np.repeat(weights, k, axis=0),
        target=None if losses is None else np.repeat(losses, k, axis=0),
        prior_centre=centre,
    )
    thetas, objectives = thetas.reshape(draws, k, fit.n_parameters), objectives.reshape(draws, k)
    at = np.arange(draws), np.argmin(objectives, axis=1)
    return _law(problem.outside(thetas[at])), objectives[at]


def check_runs(n: np.ndarray, d: np.ndarray, loss: np.ndarray, parameters: int = N_PARAMETERS) -> None:
    """Raise UserError unless the runs can determine that many parameters at all."""
    if not len(n) == len(d) == len(loss):
        raise UserError(f"n, d, loss: {len(n)}, {len(d)} and {len(loss)} values; give one of each per run")
    for name, values in (("n", n), ("d", d), ("loss", loss)):
        bad = ~(np.isfinite(values) & (values > 0))
        if bad.any():
            row = int(np.argmax(bad))
            raise UserError(f"column {name}: {values[row]} in row {row}; every value must be a positive finite number")
    if len(loss) <= parameters:
        raise UserError(
            f"data: {len(loss)} runs; the law has {parameters} parameters, so give at least {parameters + 1} (fifteen "
            "or more is sound)"
        )
    for name, values, why in (
        ("loss", loss, "nothing to fit"),
        ("n", n, "vary the model size"),
        ("d", d, "vary the tokens"),
    ):
        if np.ptp(values) <= 1e-12 * values.max():
            raise UserError(f"column {name}: all {len(values)} values equal {values[0]:.6g}; {why}")


def _law(theta: np.ndarray) -> Law:
    """The law of theta `[5 or 6]` (plain floats) or `[draws, 5 or 6]` (arrays)."""
    a, b, e, alpha, beta = np.moveaxis(theta[..., :5], -1, 0)
    if theta.shape[-1] == N_PARAMETERS:
        return ChinchillaLaw(*map(_number, (np.exp(e), np.exp(a), np.exp(b), alpha, beta)))
    gamma = np.exp(theta[..., 5])
    values = np.exp(e), np.exp(a / gamma), np.exp(b / gamma), alpha / gamma, beta / gamma, gamma
    return CoupledLaw(*map(_number, values))


def _number(value: Any) -> Number:
    return value if value.ndim else float(value)


def _warnings(n: np.ndarray, d: np.ndarray, search: Search, *, coupled: bool) -> list[str]:
    words = []
    if len(n) < 15:
        words.append(f"only {len(n)} runs for {'six' if coupled else 'five'} parameters: the fit follows noise")
    words += [
        f"{name} spans less than a factor of 4: its exponent is hardly determined"
        for name, v in (("n", n), ("d", d))
        if v.max() < 4 * v.min()
    ]
    words += search.words()
    return [f"{CoupledLaw.label}: {word}" for word in words] if coupled else words
