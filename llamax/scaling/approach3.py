"""Approach 3 of Hoffmann et al. 2022 (arXiv:2203.15556, section 3.3): all runs in one parametric fit.

Minimises  sum_i Huber_delta(LSE(a - alpha log N_i, b - beta log D_i, e) - log L_i)  over theta = (a, b, e, alpha,
beta), with A = exp(a), B = exp(b), E = exp(e). The SUM, not the mean: the mean objective is so small that optimisers
stop early, the flaw Besiroglu et al. 2024 (arXiv:2404.10102) found in the original numbers.

The same objective with a sixth parameter, gamma, fits the coupled law (laws.py). The minimiser is in solver.py.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from llamax.errors import UserError
from llamax.scaling.laws import ChinchillaLaw, CoupledLaw, Law, Number, plain
from llamax.scaling.solver import Problem, huber, predict_log

N_PARAMETERS, N_COUPLED = 5, 6
EXACT = 1e-6  # a mean error below it counts as none: two laws that both are exact tie


@dataclass(frozen=True)
class ParametricFit:
    """A parametric fit with what is needed to trust it or not.

    objective: the minimised sum. residuals: log measured - log fitted `[runs]`. starts / starts_at_best: how many
    starts were tried and how many ended within 0.01 % of the best objective. bounds_hit: names of parameters at a
    bound. condition: condition number of the column-scaled Jacobian at the optimum (1 is ideal; above 1000 parameters
    trade off against each other).
    """

    law: Law
    objective: float
    delta: float
    n_points: int
    residuals: np.ndarray
    starts: int
    starts_at_best: int
    bounds_hit: tuple[str, ...]
    condition: float
    warnings: tuple[str, ...]

    @property
    def n_parameters(self) -> int:
        """Five, or six for the coupled law."""
        return len(vars(self.law))

    @property
    def theta(self) -> np.ndarray:
        """(a, b, e, alpha, beta) with A = exp(a), B = exp(b), E = exp(e); of the coupled law, see solver.py."""
        law = self.law
        theta = np.array([np.log(law.A), np.log(law.B), np.log(law.E), law.alpha, law.beta])
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
            "delta": self.delta,
            "n_points": self.n_points,
            "aic": self.aic,
            "residual_percent": plain(100 * residual_scale(self)),
            "starts": self.starts,
            "starts_at_best": self.starts_at_best,
            "bounds_hit": list(self.bounds_hit),
            "condition": plain(self.condition),
            "warnings": list(self.warnings),
        }


def residual_scale(fit: ParametricFit) -> float:
    """Root mean square of the log residuals, corrected for the fitted parameters: relative scatter of one run."""
    return float(np.sqrt(np.sum(fit.residuals**2) / max(fit.n_points - fit.n_parameters, 1)))


def huber_objective(
    theta: Float[np.ndarray, "parameters"],
    log_n: Float[np.ndarray, "runs"],
    log_d: Float[np.ndarray, "runs"],
    log_loss: Float[np.ndarray, "runs"],
    delta: float = 1e-3,
) -> tuple[float, Float[np.ndarray, "parameters"]]:
    """Sum of Huber losses of the log residuals and its analytic gradient at theta, of five or six (see solver.py)."""
    predicted, jacobian = predict_log(theta[None], log_n, log_d)
    residual = predicted[0] - log_loss
    value = huber(residual, delta).sum()
    return float(value), np.clip(residual, -delta, delta) @ jacobian[0]


def fit_approach3(
    n: Float[np.ndarray, "runs"],
    d: Float[np.ndarray, "runs"],
    loss: Float[np.ndarray, "runs"],
    *,
    delta: float = 1e-3,
) -> ParametricFit:
    """Fit the Chinchilla law to runs: `n` parameters, `d` tokens, `loss` nats per token, all `[runs]` and positive.

    Deterministic: the starts are a fixed grid. Raises UserError for fewer than six runs, values that are not positive
    and finite, losses that are all equal, `n` or `d` that never vary, or a `delta` that is not positive.
    """
    return _fit(n, d, loss, delta, coupled=False)


def fit_coupled(
    n: Float[np.ndarray, "runs"],
    d: Float[np.ndarray, "runs"],
    loss: Float[np.ndarray, "runs"],
    *,
    delta: float = 1e-3,
) -> ParametricFit:
    """Fit the coupled law L = E + (A / N^alpha + B / D^beta)^gamma; objective, starts and errors as in `fit_approach3`.

    gamma lies in 0.1 .. 3. It is fitted twice: freely, which gives the scatter of the runs, then with a prior on gamma
    (solver.py) weighed against that scatter; `objective` leaves the prior out. Raises UserError for fewer than seven
    runs.
    """
    return _fit(n, d, loss, delta, coupled=True)


def _fit(n: np.ndarray, d: np.ndarray, loss: np.ndarray, delta: float, *, coupled: bool) -> ParametricFit:
    check_runs(n, d, loss, N_COUPLED if coupled else N_PARAMETERS)
    if not (np.isfinite(delta) and delta > 0):
        raise UserError(f"delta: {delta}; give a positive number, such as 0.001")
    problem = Problem.of(n, d, loss, delta, coupled=coupled)
    starts = problem.starts(*((8, 4) if coupled else (16, 16)))  # for each start of gamma
    thetas, objectives = problem.minimise(starts, np.ones((1, len(loss))), iterations=2000, tolerance=1e-13)
    best = int(np.argmin(objectives))
    theta, objective = thetas[best], float(objectives[best])
    if coupled:
        scatter = float(np.abs(predict_log(theta[None], problem.x, problem.y)[0] - problem.z).mean())
        theta = replace(problem, scatter=scatter).best(thetas, iterations=2000, tolerance=1e-13)
        objective = problem.value(theta)
    predicted, jacobian = predict_log(theta[None], problem.x, problem.y)
    norms = np.linalg.norm(jacobian[0], axis=0)
    condition = float(np.linalg.cond(jacobian[0] / np.where(norms > 0, norms, 1.0)))
    at_best = int(np.sum(objectives <= objective * (1 + 1e-4) + 1e-12))
    hit = problem.bounds_hit(theta)
    return ParametricFit(
        law=_law(problem.outside(theta)),
        objective=objective,
        delta=delta,
        n_points=len(loss),
        residuals=problem.z - predicted[0],
        starts=len(starts),
        starts_at_best=at_best,
        bounds_hit=hit,
        condition=condition,
        warnings=tuple(_warnings(n, d, len(starts), at_best, hit, condition, coupled=coupled)),
    )


def refit(
    fit: ParametricFit,
    n: Float[np.ndarray, "runs"],
    d: Float[np.ndarray, "runs"],
    loss: Float[np.ndarray, "runs"],
    weights: Float[np.ndarray, "draws runs"],
    *,
    extra_starts: int = 3,
    shift: float = 0.0,
) -> tuple[Law, Float[np.ndarray, "draws"]]:
    """Fit every row of run `weights` (bootstrap counts) at once, warm from `fit` and from a few other good starts.

    `shift` moves the centre of the coupled law's prior by that many of its widths.
    Returns the law with array fields `[draws]` and the objectives `[draws]`.
    """
    coupled = isinstance(fit.law, CoupledLaw)
    problem = Problem.of(n, d, loss, fit.delta, coupled=coupled)
    if coupled:
        problem = replace(problem, scatter=fit.mean_error, shift=shift)
    per_gamma = (1, 0) if coupled else (extra_starts, extra_starts // 2)
    others = problem.starts(*per_gamma)[:extra_starts]
    starts = np.concatenate([problem.inside(fit.theta)[None], others])
    draws, k = len(weights), len(starts)
    thetas, objectives = problem.minimise(
        np.tile(starts, (draws, 1)), np.repeat(weights, k, axis=0), iterations=300, tolerance=1e-7
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


def _warnings(
    n: np.ndarray, d: np.ndarray, starts: int, at_best: int, hit: tuple[str, ...], condition: float, *, coupled: bool
) -> list[str]:
    words = []
    if len(n) < 15:
        words.append(f"only {len(n)} runs for {'six' if coupled else 'five'} parameters: the fit follows noise")
    words += [
        f"{name} spans less than a factor of 4: its exponent is hardly determined"
        for name, v in (("n", n), ("d", d))
        if v.max() < 4 * v.min()
    ]
    if at_best == 1:
        words.append(f"only one of {starts} starts reached the best objective: it may not be the global minimum")
    words += [f"{name} ran into its bound: these data do not determine it" for name in hit]
    if condition > 1000:
        words.append(
            f"the parameters trade off against each other (condition number {condition:.3g}): trust predictions near "
            "the data, not single parameters"
        )
    return [f"{CoupledLaw.label}: {word}" for word in words] if coupled else words
