"""Approach 3 of Hoffmann et al. 2022 (arXiv:2203.15556, section 3.3): all runs in one parametric fit.

Minimises  sum_i Huber_delta(LSE(a - alpha log N_i, b - beta log D_i, e) - log L_i)  over theta = (a, b, e, alpha,
beta), with A = exp(a), B = exp(b), E = exp(e). The SUM, not the mean: the mean objective is so small that optimisers
stop early, the flaw Besiroglu et al. 2024 (arXiv:2404.10102) found in the original numbers.

The minimiser is iteratively reweighted Gauss-Newton with Levenberg-Marquardt damping, batched in numpy over starts and
bootstrap resamples at once: a resample is a row of run weights, so hundreds of refits are one array program.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from llamax.errors import UserError
from llamax.scaling.laws import ChinchillaLaw, plain

N_PARAMETERS = 5
EXPONENT_RANGE = (0.01, 3.0)  # alpha and beta; published fits lie in 0.05 .. 1
TERM_FLOOR = 1e-4  # smallest part of the smallest loss that E, or a power term at the middle of the data, may be


@dataclass(frozen=True)
class Approach3Fit:
    """A parametric fit with what is needed to trust it or not.

    objective: the minimised sum. residuals: log measured - log fitted `[runs]`. starts / starts_at_best: how many
    starts were tried and how many ended within 0.01 % of the best objective. bounds_hit: names of parameters at a
    bound. condition: condition number of the column-scaled Jacobian at the optimum (1 is ideal; above 1000 parameters
    trade off against each other).
    """

    law: ChinchillaLaw
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
    def theta(self) -> np.ndarray:
        """(a, b, e, alpha, beta) with A = exp(a), B = exp(b), E = exp(e)."""
        law = self.law
        return np.array([np.log(law.A), np.log(law.B), np.log(law.E), law.alpha, law.beta])

    def as_dict(self) -> dict[str, Any]:
        """Plain values; `params` is `E, A, B, alpha, beta`, n_exponent beta / (alpha + beta), for C ~ N D."""
        total = self.law.alpha + self.law.beta
        return {
            "params": self.law.as_dict(),
            "n_exponent": plain(self.law.beta / total),
            "d_exponent": plain(self.law.alpha / total),
            "objective": self.objective,
            "delta": self.delta,
            "n_points": self.n_points,
            "residual_percent": plain(100 * residual_scale(self)),
            "starts": self.starts,
            "starts_at_best": self.starts_at_best,
            "bounds_hit": list(self.bounds_hit),
            "condition": plain(self.condition),
            "warnings": list(self.warnings),
        }


def residual_scale(fit: Approach3Fit) -> float:
    """Root mean square of the log residuals, corrected for the five fitted parameters: relative scatter of one run."""
    return float(np.sqrt(np.sum(fit.residuals**2) / max(fit.n_points - N_PARAMETERS, 1)))


def huber_objective(
    theta: Float[np.ndarray, "5"],
    log_n: Float[np.ndarray, "runs"],
    log_d: Float[np.ndarray, "runs"],
    log_loss: Float[np.ndarray, "runs"],
    delta: float = 1e-3,
) -> tuple[float, Float[np.ndarray, "5"]]:
    """Sum of Huber losses of the log residuals and its analytic gradient at theta = (a, b, e, alpha, beta)."""
    predicted, jacobian = _predict(theta[None], log_n, log_d)
    residual = predicted[0] - log_loss
    value = _huber(residual, delta).sum()
    return float(value), np.clip(residual, -delta, delta) @ jacobian[0]


def fit_approach3(
    n: Float[np.ndarray, "runs"],
    d: Float[np.ndarray, "runs"],
    loss: Float[np.ndarray, "runs"],
    *,
    delta: float = 1e-3,
) -> Approach3Fit:
    """Fit the Chinchilla law to runs: `n` parameters, `d` tokens, `loss` nats per token, all `[runs]` and positive.

    Deterministic: the starts are a fixed grid. Raises UserError for fewer than six runs, values that are not positive
    and finite, losses that are all equal, `n` or `d` that never vary, or a `delta` that is not positive.
    """
    check_runs(n, d, loss)
    if not (np.isfinite(delta) and delta > 0):
        raise UserError(f"delta: {delta}; give a positive number, such as 0.001")
    problem = _Problem.of(n, d, loss, delta)
    starts = problem.starts()
    thetas, objectives = problem.minimise(starts, np.ones((1, len(loss))), iterations=2000, tolerance=1e-13)
    best = int(np.argmin(objectives))
    theta, objective = thetas[best], float(objectives[best])
    predicted, jacobian = _predict(theta[None], problem.x, problem.y)
    norms = np.linalg.norm(jacobian[0], axis=0)
    condition = float(np.linalg.cond(jacobian[0] / np.where(norms > 0, norms, 1.0)))
    at_best = int(np.sum(objectives <= objective * (1 + 1e-4) + 1e-12))
    hit = problem.bounds_hit(theta)
    return Approach3Fit(
        law=problem.law(theta),
        objective=objective,
        delta=delta,
        n_points=len(loss),
        residuals=problem.z - predicted[0],
        starts=len(starts),
        starts_at_best=at_best,
        bounds_hit=hit,
        condition=condition,
        warnings=tuple(_warnings(n, d, len(starts), at_best, hit, condition)),
    )


def refit(
    fit: Approach3Fit,
    n: Float[np.ndarray, "runs"],
    d: Float[np.ndarray, "runs"],
    loss: Float[np.ndarray, "runs"],
    weights: Float[np.ndarray, "draws runs"],
    *,
    extra_starts: int = 3,
) -> tuple[ChinchillaLaw, Float[np.ndarray, "draws"]]:
    """Fit every row of run `weights` (bootstrap counts) at once, warm from `fit` and from a few other good starts.

    Returns the law with array fields `[draws]` and the objectives `[draws]`.
    """
    problem = _Problem.of(n, d, loss, fit.delta)
    others = (
        problem.starts(extra_starts, extra_starts // 2)[:extra_starts] if extra_starts else np.empty((0, N_PARAMETERS))
    )
    starts = np.concatenate([problem.inside(fit.theta)[None], others])
    draws, k = len(weights), len(starts)
    thetas, objectives = problem.minimise(
        np.tile(starts, (draws, 1)), np.repeat(weights, k, axis=0), iterations=300, tolerance=1e-7
    )
    best = np.argmin(objectives.reshape(draws, k), axis=1)
    rows = np.arange(draws)
    return problem.law(thetas.reshape(draws, k, N_PARAMETERS)[rows, best]), objectives.reshape(draws, k)[rows, best]


def check_runs(n: np.ndarray, d: np.ndarray, loss: np.ndarray) -> None:
    """Raise UserError unless the runs can determine five parameters at all."""
    if not len(n) == len(d) == len(loss):
        raise UserError(f"n, d, loss: {len(n)}, {len(d)} and {len(loss)} values; give one of each per run")
    for name, values in (("n", n), ("d", d), ("loss", loss)):
        bad = ~(np.isfinite(values) & (values > 0))
        if bad.any():
            row = int(np.argmax(bad))
            raise UserError(f"column {name}: {values[row]} in row {row}; every value must be a positive finite number")
    if len(loss) <= N_PARAMETERS:
        raise UserError(
            f"data: {len(loss)} runs; the law has five parameters, so give at least six (fifteen or more is sound)"
        )
    for name, values, why in (
        ("loss", loss, "nothing to fit"),
        ("n", n, "vary the model size"),
        ("d", d, "vary the tokens"),
    ):
        if np.ptp(values) <= 1e-12 * values.max():
            raise UserError(f"column {name}: all {len(values)} values equal {values[0]:.6g}; {why}")


@dataclass(frozen=True)
class _Problem:
    """The fit in centred coordinates: x = log N - mean, so a and b are the log terms at the middle of the data.

    Centring removes most of the correlation between a and alpha (b and beta), and gives the bounds a meaning.
    """

    x: np.ndarray
    y: np.ndarray
    z: np.ndarray
    centre: tuple[float, float]
    delta: float
    lower: np.ndarray
    upper: np.ndarray

    @classmethod
    def of(cls, n: np.ndarray, d: np.ndarray, loss: np.ndarray, delta: float) -> "_Problem":
        x, y, z = np.log(n), np.log(d), np.log(loss)
        floor, ceiling = z.min() + np.log(TERM_FLOOR), z.max()
        lower = np.array([floor, floor, floor, EXPONENT_RANGE[0], EXPONENT_RANGE[0]])
        upper = np.array([ceiling, ceiling, ceiling, EXPONENT_RANGE[1], EXPONENT_RANGE[1]])
        return cls(x - x.mean(), y - y.mean(), z, (float(x.mean()), float(y.mean())), delta, lower, upper)

    def inside(self, theta: np.ndarray) -> np.ndarray:
        """Centred coordinates of theta = (a, b, e, alpha, beta)."""
        a, b, e, alpha, beta = theta
        return np.array([a - alpha * self.centre[0], b - beta * self.centre[1], e, alpha, beta])

    def law(self, centred: np.ndarray) -> ChinchillaLaw:
        """The law of centred coordinates `[5]` (plain floats) or `[draws, 5]` (arrays)."""
        a, b, e, alpha, beta = np.moveaxis(centred, -1, 0)
        values = (np.exp(e), np.exp(a + alpha * self.centre[0]), np.exp(b + beta * self.centre[1]), alpha, beta)
        return ChinchillaLaw(*(v if v.ndim else float(v) for v in values))

    def bounds_hit(self, theta: np.ndarray) -> tuple[str, ...]:
        near = (theta - self.lower < 1e-6) | (self.upper - theta < 1e-6)
        return tuple(name for name, at in zip(("A", "B", "E", "alpha", "beta"), near, strict=True) if at)

    def starts(self, projected: int = 16, spread: int = 16) -> np.ndarray:
        """Starting points `[projected + spread, 5]`: two fixed grids, the best of each by objective.

        For given exponents the law is linear in E, A, B, so an 8 x 8 grid of exponents with a non-negative
        least-squares solve gives near-optimal starts; the second grid spreads E, A, B by hand in case squares mislead
        (outliers).
        """
        from scipy.optimize import nnls

        loss = np.exp(self.z)
        exponents = np.geomspace(0.08, 1.6, 8)
        solved = []
        for alpha in exponents:
            for beta in exponents:
                terms = np.stack([np.exp(-alpha * self.x), np.exp(-beta * self.y), np.ones_like(self.x)], axis=1)
                coefficients, _ = nnls(terms / loss[:, None], np.ones_like(loss))
                solved.append([*np.log(np.maximum(coefficients, 1e-3 * loss.min())), alpha, beta])
        shares = np.log(loss.min() * np.array([0.02, 0.2, 0.6]))
        grid = np.stack(np.meshgrid(shares, shares, shares, exponents[::3], exponents[::3], indexing="ij"), axis=-1)
        return np.concatenate(
            [self._best(np.array(solved), projected), self._best(grid.reshape(-1, N_PARAMETERS), spread)]
        )

    def _best(self, candidates: np.ndarray, count: int) -> np.ndarray:
        candidates = np.clip(candidates, self.lower, self.upper)
        predicted, _ = _predict(candidates, self.x, self.y)
        return candidates[np.argsort(_huber(predicted - self.z, self.delta).sum(-1), kind="stable")[:count]]

    def minimise(
        self, theta: np.ndarray, weights: np.ndarray, *, iterations: int, tolerance: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Minimise from every start `[batch, 5]` under run weights `[batch or 1, runs]`; returns thetas and objectives.

        Each step solves the weighted Gauss-Newton system with Huber weights min(1, delta / |r|), damped until the
        objective falls; a parameter at a bound whose gradient points outward is held. A start stops when ten steps
        together gain less than `tolerance` of its objective.
        """
        theta = np.clip(theta, self.lower, self.upper)
        weights = np.broadcast_to(weights, (len(theta), weights.shape[1]))
        value, result = np.empty(len(theta)), theta.copy()
        value[:] = self._value(theta, weights)
        damping = np.full(len(theta), 1e-3)
        live = np.arange(len(theta))
        checkpoint = value.copy()
        for iteration in range(1, iterations + 1):
            at, w = result[live], weights[live]
            candidate = np.clip(at + self._step(at, w, damping[live]), self.lower, self.upper)
            tried = self._value(candidate, w)
            better = tried < value[live]
            result[live] = np.where(better[:, None], candidate, at)
            value[live] = np.where(better, tried, value[live])
            damping[live] = np.clip(damping[live] * np.where(better, 0.2, 5.0), 1e-12, 1e12)
            if iteration % 10 == 0:
                gain = checkpoint[live] - value[live]
                live = live[gain > tolerance * value[live] + 1e-18]
                checkpoint = value.copy()
                if not len(live):
                    break
        return result, value

    def _value(self, theta: np.ndarray, weights: np.ndarray) -> np.ndarray:
        predicted, _ = _predict(theta, self.x, self.y)
        return (weights * _huber(predicted - self.z, self.delta)).sum(-1)

    def _step(self, theta: np.ndarray, weights: np.ndarray, damping: np.ndarray) -> np.ndarray:
        predicted, jacobian = _predict(theta, self.x, self.y)
        residual = predicted - self.z
        weighted = jacobian * (weights * self.delta / np.maximum(np.abs(residual), self.delta))[..., None]
        gradient = (weighted * residual[..., None]).sum(-2)
        normal = np.swapaxes(weighted, -1, -2) @ jacobian
        held = ((theta <= self.lower) & (gradient > 0)) | ((theta >= self.upper) & (gradient < 0))
        free = ~held
        normal = np.where(free[:, :, None] & free[:, None, :], normal, 0.0)
        diagonal = np.einsum("bii->bi", normal)
        ridge = damping[:, None] * diagonal + 1e-12 * diagonal.max(-1, keepdims=True) + 1e-30 + held
        normal = normal + ridge[:, :, None] * np.eye(N_PARAMETERS)
        return np.linalg.solve(normal, -np.where(held, 0.0, gradient)[..., None])[..., 0]


def _predict(theta: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log loss `[batch, runs]` of theta `[batch, 5]` and its Jacobian `[batch, runs, 5]`, stable for any exponent."""
    a, b, e, alpha, beta = np.moveaxis(theta[:, :, None], 1, 0)
    terms = np.stack(np.broadcast_arrays(a - alpha * x, b - beta * y, e))
    top = terms.max(0)
    share = np.exp(terms - top)
    total = share.sum(0)
    share /= total
    return top + np.log(total), np.stack([share[0], share[1], share[2], -share[0] * x, -share[1] * y], axis=-1)


def _huber(residual: np.ndarray, delta: float) -> np.ndarray:
    size = np.abs(residual)
    return np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))


def _warnings(
    n: np.ndarray, d: np.ndarray, starts: int, at_best: int, hit: tuple[str, ...], condition: float
) -> list[str]:
    words = []
    if len(n) < 15:
        words.append(f"only {len(n)} runs for five parameters: the fit follows noise")
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
    return words
