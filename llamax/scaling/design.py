"""How well a study that is not run yet would answer: bias and spread of each approach at a target compute.

The truth is a law; a study is the N and D of its runs; one run's loss is the law's times exp(seed noise). Two ways:

- `expected_errors`, cheap and deterministic: the fit of the noise-free losses gives the bias, its derivative by each
  run's loss the spread (delta method). Approach 3 is an M-estimator: its covariance is A^-1 B A^-1, A and B the mean
  derivative and the variance of the score (Huber 1964), and its bias, where its formula is not the truth, that of the
  least expected objective.
- `simulate_errors`, the judge of the first: noise drawn, every draw refitted by the same approach.

Errors are of log N* and of the log of the predicted loss at the target: 0.01 is one per cent.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Float

from llamax.scaling.approach2 import Frontier, PowerLaw, fit_power_law
from llamax.scaling.approach3 import fit_approach3, refit
from llamax.scaling.bootstrap import frontier_draws
from llamax.scaling.centred import log_loss
from llamax.scaling.laws import ChinchillaLaw, Cost, Law, Scalar, optimal_allocation
from llamax.scaling.parabolas import parabola

APPROACHES = (2, 3)
DELTA = 1e-3  # of approach 3, as `fit_approach3` has it
SETTLING = 40  # Gauss-Newton steps
CUBATURE = 15  # nodes of the normal expectation of the regret


@dataclass(frozen=True)
class Runs:
    """The runs of a study: `n` parameters, `d` tokens, `budget` (any label equal within a budget), each `[runs]`."""

    n: np.ndarray
    d: np.ndarray
    budget: np.ndarray

    def flops(self, cost: Cost = Cost()) -> float:
        """Training FLOPs of all of them."""
        return float(np.sum(cost.flops(self.n, self.d)))

    def join(self, other: "Runs") -> "Runs":
        """Both together."""
        return Runs(*(np.concatenate([getattr(self, k), getattr(other, k)]) for k in ("n", "d", "budget")))


@dataclass(frozen=True)
class Errors:
    """One approach's errors at the target, in logs: bias and standard deviation of N* and of the predicted loss there.

    failed: share of simulated studies in which the approach gave no answer. Infinite where it never does.
    """

    n_bias: float
    n_sd: float
    loss_bias: float
    loss_sd: float
    failed: float = 0.0

    def rms(self, what: str) -> float:
        """Root mean square error of `n` or `loss`: bias and spread together."""
        return math.hypot(getattr(self, f"{what}_bias"), getattr(self, f"{what}_sd"))

    def as_dict(self) -> dict[str, float | None]:
        """Plain values; None for what is not finite."""
        return {name: value if math.isfinite(value) else None for name, value in asdict(self).items()}


NO_ANSWER = Errors(math.inf, math.inf, math.inf, math.inf, 1.0)


def moved(law: Law, factor: float) -> Law:
    """The law with its best size `factor` times as large at every budget: A and B trade by factor^((alpha + beta)/2).

    The loss there changes by the small common factor^((beta - alpha)/2) of its reducible part.
    """
    trade = factor ** (0.5 * (law.alpha + law.beta))
    return replace(law, A=law.A * trade, B=law.B / trade)


def expected_errors(
    truth: Law,
    runs: Runs,
    noise: float,
    target: Scalar,
    *,
    approaches: Sequence[int] = APPROACHES,
    cost: Cost = Cost(),
) -> dict[int, Errors]:
    """Bias and linearised spread of each approach; `noise`: standard deviation of one run's log loss.

    An approach that cannot answer even without noise (a vertex beyond the grid, too few runs) has infinite errors.
    """
    make = {2: _expect_valleys, 3: _expect_parametric}
    return {approach: make[approach](truth, runs, noise, float(target), cost) for approach in approaches}


def simulate_errors(
    truth: Law,
    runs: Runs,
    noise: float,
    target: Scalar,
    *,
    approaches: Sequence[int] = APPROACHES,
    draws: int = 200,
    seed: int = 0,
    cost: Cost = Cost(),
) -> dict[int, Errors]:
    """The same by refitting `draws` noisy copies of the study; medians, and half the central 68 % as spread.

    Quantiles, because a few draws of a weak study end anywhere. Designs simulated with one seed share their noise as
    far as they have runs in common positions.
    """
    rng = np.random.default_rng(seed)
    shocks = np.stack([rng.standard_normal(draws) for _ in runs.n], axis=1)
    clean = np.asarray(truth.loss(runs.n, runs.d))
    losses = clean * np.exp(noise * shocks)
    best = optimal_allocation(truth, target, cost)
    result = {}
    for approach in approaches:
        n, loss = (
            _valley_answers(runs, losses, target, cost)
            if approach == 2
            else _law_answers(runs, clean, losses, target, cost)
        )
        ok = np.isfinite(n) & np.isfinite(loss) & (loss > 0)
        if ok.sum() < 10:
            result[approach] = NO_ANSWER
            continue
        pairs = [_middle(np.log(found[ok] / truly)) for found, truly in ((n, best.n), (loss, best.loss))]
        result[approach] = Errors(*pairs[0], *pairs[1], failed=float(1 - ok.mean()))
    return result


def regret(truth: Law, target: Scalar, errors: Errors, cost: Cost = Cost()) -> float:
    """Expected extra log loss at the target for training N = N* exp(error) instead of N*, the error normal."""
    if not math.isfinite(errors.rms("n")):
        return math.inf
    best = optimal_allocation(truth, target, cost)
    nodes, weights = np.polynomial.hermite_e.hermegauss(CUBATURE)
    n = best.n * np.exp(np.clip(errors.n_bias + errors.n_sd * nodes, -20, 20))
    return float(weights @ np.log(truth.loss(n, cost.tokens(target, n)) / best.loss) / weights.sum())


# ---------------------------------------------------------------- approach 3
def _expect_parametric(truth: Law, runs: Runs, noise: float, target: float, cost: Cost) -> Errors:
    if len(runs.n) <= 5:
        return NO_ANSWER
    x, y = np.log(runs.n), np.log(runs.d)
    centre = float(x.mean()), float(y.mean())
    x, y, clean = x - centre[0], y - centre[1], np.log(np.asarray(truth.loss(runs.n, runs.d)))
    theta = _theta(truth if isinstance(truth, ChinchillaLaw) else _nearest(truth, target / cost.coefficient), centre)
    if not isinstance(truth, ChinchillaLaw):
        theta = _settle(theta, x, y, clean, noise)
    fitted, jacobian = with_slopes(theta, x, y)
    _, slope, variance = huber_moments(fitted - clean, noise)
    information = jacobian.T @ (slope[:, None] * jacobian)
    if not np.linalg.cond(information) < 1e15:
        return NO_ANSWER
    by_run = np.linalg.inv(information) @ (jacobian * np.sqrt(variance)[:, None]).T
    by_n, by_loss, n, loss = _at_optimum(theta, centre, target, cost)
    best = optimal_allocation(truth, target, cost)
    n_sd, loss_sd = (float(np.linalg.norm(g @ by_run)) for g in (by_n, by_loss))
    return Errors(n - math.log(best.n), n_sd, loss - math.log(best.loss), loss_sd)


def huber_moments(
    residual: Float[np.ndarray, " runs"], noise: float, delta: float = DELTA
) -> tuple[Float[np.ndarray, " runs"], Float[np.ndarray, " runs"], Float[np.ndarray, " runs"]]:
    """Of psi, the slope of Huber's function, at residual + normal noise: its mean, mean derivative, and variance.

    At residual 0, variance / derivative^2 / noise^2 is 1 for noise far below delta, pi/2 (the median's) far above.
    """
    from scipy.special import ndtr

    low, high = (-delta - residual) / noise, (delta - residual) / noise
    at_low, at_high = (np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi) for z in (low, high))
    inside = ndtr(high) - ndtr(low)
    mean = delta * (ndtr(-high) - ndtr(low)) + residual * inside + noise * (at_low - at_high)
    square = delta**2 * (1 - inside) + (residual**2 + noise**2) * inside
    square += 2 * residual * noise * (at_low - at_high) + noise**2 * (low * at_low - high * at_high)
    return mean, inside, np.maximum(square - mean**2, 0.0)


def with_slopes(
    theta: Float[np.ndarray, "5"], x: Float[np.ndarray, " runs"], y: Float[np.ndarray, " runs"]
) -> tuple[Float[np.ndarray, " runs"], Float[np.ndarray, "runs 5"]]:
    """The log loss of theta = (a, b, e, alpha, beta), and its Jacobian."""
    a, b, e, alpha, beta = theta
    total = log_loss(np, theta, x, y)
    share = np.exp(np.stack([a - alpha * x, b - beta * y, np.full_like(x, e)], axis=1) - total[:, None])
    return total, np.column_stack([share, -share[:, 0] * x, -share[:, 1] * y])


def _settle(theta: np.ndarray, x: np.ndarray, y: np.ndarray, clean: np.ndarray, noise: float) -> np.ndarray:
    """Where approach 3 ends from many seeds when its formula is not the truth: the least expected Huber loss.

    Reweighted Gauss-Newton steps with a little damping.
    """
    for _ in range(SETTLING):
        fitted, jacobian = with_slopes(theta, x, y)
        mean, slope, _ = huber_moments(fitted - clean, noise)
        off = fitted - clean
        with np.errstate(divide="ignore", invalid="ignore"):
            weight = np.where(np.abs(off) > 1e-9, mean / off, slope)
        normal = jacobian.T @ (weight[:, None] * jacobian)
        step = np.linalg.solve(normal + 1e-6 * np.diag(np.diag(normal)), jacobian.T @ mean)
        theta = theta - step * min(1.0, 1.0 / max(float(np.abs(step).max()), 1e-12))
        if np.abs(step).max() < 1e-4:
            break
    return theta


def _at_optimum(
    theta: np.ndarray, centre: tuple[float, float], target: float, cost: Cost
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Of a centred theta: gradients of log N* and log L(N*, D*), and the two values.

    At the optimum the loss does not change with N (envelope theorem), so its gradient is that at fixed N and D.
    """
    a, b, _, alpha, beta = theta
    s, budget = cost.n_exponent, math.log(target / cost.coefficient)
    total = alpha + s * beta
    shift = math.log(alpha / (s * beta)) + a + alpha * centre[0] - b - beta * centre[1]
    log_n = (shift + beta * budget) / total
    log_d = budget - s * log_n
    by_alpha = 1 / alpha + centre[0] - log_n
    by_beta = -1 / beta - centre[1] + budget - s * log_n
    by_n = np.array([1.0, -1.0, 0.0, by_alpha, by_beta]) / total
    value, jacobian = with_slopes(theta, np.array([log_n - centre[0]]), np.array([log_d - centre[1]]))
    return by_n, jacobian[0], float(log_n), float(value[0])


def _theta(law: ChinchillaLaw, centre: tuple[float, float]) -> np.ndarray:
    a, b = (np.log(law.A) - law.alpha * centre[0], np.log(law.B) - law.beta * centre[1])
    return np.array([a, b, np.log(law.E), law.alpha, law.beta])


@lru_cache(maxsize=32)
def _nearest(truth: Law, budget: float) -> ChinchillaLaw:
    """The additive law nearest to another one over a broad grid of sizes at budgets (N D) up to this: a warm start."""
    rows = [(c, s) for c in budget * np.geomspace(1e-4, 1, 5) for s in np.geomspace(1 / 8, 8, 7)]
    nd, factor = np.array(rows).T
    n = np.array([float(optimal_allocation(truth, 6 * c).n) for c in nd]) * factor
    law = fit_approach3(n, nd / n, np.asarray(truth.loss(n, nd / n))).law
    assert isinstance(law, ChinchillaLaw)
    return law


def _law_answers(
    runs: Runs, clean: np.ndarray, losses: np.ndarray, target: Scalar, cost: Cost
) -> tuple[np.ndarray, np.ndarray]:
    fit = fit_approach3(runs.n, runs.d, clean)
    law, _ = refit(fit, runs.n, runs.d, clean, np.ones_like(losses), losses=losses)
    best = optimal_allocation(law, target, cost)
    return np.asarray(best.n), np.asarray(best.loss)


# ---------------------------------------------------------------- approach 2
def _budgets(runs: Runs, cost: Cost) -> tuple[list[np.ndarray], np.ndarray]:
    """Rows of each budget, and the log of the geometric mean of the FLOPs they spend."""
    labels = np.unique(runs.budget)
    rows = [np.flatnonzero(runs.budget == label) for label in labels]
    log_c = np.log(cost.flops(runs.n, runs.d))
    return rows, np.array([log_c[r].mean() for r in rows])


def _expect_valleys(truth: Law, runs: Runs, noise: float, target: float, cost: Cost) -> Errors:
    clean = np.asarray(truth.loss(runs.n, runs.d))
    rows, log_c = _budgets(runs, cost)
    found = [parabola(np.log(runs.n[r]), clean[None, r]) for r in rows]
    kept = np.array([bool(v.interior[0]) for v in found])
    if kept.sum() < 2:
        return NO_ANSWER
    found = [v for v, keep in zip(found, kept, strict=True) if keep]
    log_c = log_c[kept]
    by_vertex, by_height = zip(*(v.derivatives() for v in found), strict=True)
    sigma = [noise * clean[r] for r, keep in zip(rows, kept, strict=True) if keep]
    var_vertex, var_height = (
        np.array([np.sum((g * s) ** 2) for g, s in zip(part, sigma, strict=True)]) for part in (by_vertex, by_height)
    )
    vertex, height = (np.array([float(getattr(v, name)[0]) for v in found]) for name in ("vertex", "height"))
    best = optimal_allocation(truth, target, cost)
    at = log_c - log_c.mean()
    weight = 1 / len(at) + (math.log(target) - log_c.mean()) * at / np.sum(at**2)
    n = float(weight @ vertex) - math.log(best.n), float(np.sqrt(weight**2 @ var_vertex))
    if len(height) < 3:
        return Errors(*n, math.inf, math.inf)
    frontier = frontier_draws(log_c, height[None])
    loss = np.ravel(frontier.loss(target))[0]
    if not (np.isfinite(loss) and np.all(np.diff(height) < 0)):
        return Errors(*n, math.inf, math.inf)
    pull = _frontier_pull(frontier, log_c, height, target)
    return Errors(*n, math.log(loss / best.loss), float(np.sqrt(pull**2 @ var_height) / loss))


def _frontier_pull(found: Frontier, log_c: np.ndarray, height: np.ndarray, target: float) -> np.ndarray:
    """Derivative of the frontier's loss at the target by each height: a weighted least-squares fit, linearised."""
    floor, size, gamma = (float(np.ravel(v)[0]) for v in (found.E, found.K, found.gamma))
    middle = float(log_c.mean())
    scaled = size * math.exp(-gamma * middle)

    def slopes(log_flops: Any) -> np.ndarray:
        power = np.exp(-gamma * (log_flops - middle))
        return np.stack([np.ones_like(power), power, -scaled * (log_flops - middle) * power], axis=-1)

    free = slice(0 if floor > 0 else 1, None)  # E at its bound does not move
    rows = (slopes(log_c) / height[:, None])[:, free]
    return (slopes(np.array(math.log(target)))[free] @ np.linalg.pinv(rows)) / height


def _valley_answers(runs: Runs, losses: np.ndarray, target: Scalar, cost: Cost) -> tuple[np.ndarray, np.ndarray]:
    rows, log_c = _budgets(runs, cost)
    found = [parabola(np.log(runs.n[r]), losses[:, r]) for r in rows]
    valid = np.stack([v.interior for v in found], axis=1)
    line: PowerLaw = fit_power_law(log_c, np.stack([v.vertex for v in found], axis=1), valid)
    heights = np.where(valid, np.stack([v.height for v in found], axis=1), np.nan)
    return line.at(target), np.asarray(frontier_draws(log_c, heights).loss(target))


def _middle(errors: Float[np.ndarray, " draws"]) -> tuple[float, float]:
    low, middle, high = np.quantile(errors, [0.158655, 0.5, 0.841345])
    return float(middle), float(high - low) / 2
