"""The minimiser behind the parametric laws: robust, bounded, from many starts, for many resamples at once.

Minimises  sum_i w_i Huber_delta(log L(N_i, D_i; theta) - log L_i)  with

    log L = LSE(gamma · LSE((a - alpha log N) / gamma, (b - beta log D) / gamma), e)

that is L = E + (A / N^alpha + B / D^beta)^gamma written with the whole terms a, alpha = gamma · those of the law: then
gamma changes only how the two terms add up (gamma = 1: their sum, gamma to 0: the larger of them), not the terms, and
the six parameters hardly trade off. theta = (a, b, e, alpha, beta) means gamma = 1; a sixth entry is log gamma.

The method is iteratively reweighted Gauss-Newton with Levenberg-Marquardt damping, batched in numpy over starts and
bootstrap resamples: a resample is a row of run weights, so hundreds of refits are one array program.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

EXPONENT_RANGE = (0.01, 3.0)  # alpha and beta of the additive law; published fits lie in 0.05 .. 1
# Of the coupled law: exponents of the whole terms, and gamma. The ends keep A and B within floating point.
COUPLED_EXPONENT_RANGE, GAMMA_RANGE = (0.01, 2.0), (0.1, 3.0)
GAMMA_STARTS = (1.0, 0.5, 0.25)
# Prior of the coupled law: log gamma is normal around log 0.5 with this width, weighed against the scatter of the runs.
# Some twenty noisy runs trade gamma against E, and the extrapolation follows; without scatter the prior has no weight.
PRIOR_GAMMA, PRIOR_WIDTH = 0.5, 0.1  # from pilot studies: docs/decisions.md
TERM_FLOOR = 1e-4  # smallest part of the smallest loss that E, or a power term at the middle of the data, may be


@dataclass(frozen=True)
class Problem:
    """The fit in centred coordinates: x = log N - mean, so a and b are the log terms at the middle of the data.

    Centring removes most of the correlation between a and alpha (b and beta), and gives the bounds a meaning. The
    number of bounds is the number of parameters.
    """

    x: np.ndarray
    y: np.ndarray
    z: np.ndarray
    centre: tuple[float, float]
    delta: float
    lower: np.ndarray
    upper: np.ndarray
    scatter: float = 0.0  # mean absolute log residual of single runs: the unit in which the prior is weighed
    shift: float = 0.0  # of the prior's centre, in its widths

    @classmethod
    def of(cls, n: np.ndarray, d: np.ndarray, loss: np.ndarray, delta: float, *, coupled: bool = False) -> "Problem":
        """The problem of these runs, with five parameters or, `coupled`, six."""
        x, y, z = np.log(n), np.log(d), np.log(loss)
        floor, ceiling = z.min() + np.log(TERM_FLOOR), z.max()
        least, most = COUPLED_EXPONENT_RANGE if coupled else EXPONENT_RANGE
        lower, upper = [floor, floor, floor, least, least], [ceiling, ceiling, ceiling, most, most]
        if coupled:
            lower, upper = [*lower, np.log(GAMMA_RANGE[0])], [*upper, np.log(GAMMA_RANGE[1])]
        centre = (float(x.mean()), float(y.mean()))
        return cls(x - centre[0], y - centre[1], z, centre, delta, np.array(lower), np.array(upper))

    def inside(self, theta: np.ndarray) -> np.ndarray:
        """Centred coordinates of theta."""
        return theta + np.array([-theta[3] * self.centre[0], -theta[4] * self.centre[1], *[0.0] * (len(theta) - 2)])

    def outside(self, centred: np.ndarray) -> np.ndarray:
        """theta of centred coordinates `[..., parameters]`."""
        theta = centred.copy()
        theta[..., 0] += theta[..., 3] * self.centre[0]
        theta[..., 1] += theta[..., 4] * self.centre[1]
        return theta

    def bounds_hit(self, theta: np.ndarray) -> tuple[str, ...]:
        """Names of the parameters of one centred theta that lie at a bound."""
        near = (theta - self.lower < 1e-6) | (self.upper - theta < 1e-6)
        return tuple(name for name, at in zip(("A", "B", "E", "alpha", "beta", "gamma"), near, strict=False) if at)

    def starts(self, projected: int = 16, spread: int = 16) -> np.ndarray:
        """Starting points `[count, parameters]`: two fixed grids, the best `projected` and `spread` by objective.

        For given exponents the additive law is linear in E, A, B, so an 8 x 8 grid of exponents with a non-negative
        least-squares solve gives near-optimal starts; the second grid spreads E, A, B by hand in case squares mislead
        (outliers). The coupled law starts from both with each of GAMMA_STARTS.
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
        grids = (np.array(solved), projected), (grid.reshape(-1, 5), spread)
        if len(self.lower) == 5:
            return np.concatenate([self._best(points, count) for points, count in grids])
        return np.concatenate(
            [
                self._best(np.insert(points, 5, np.log(gamma), axis=1), count)
                for gamma in GAMMA_STARTS
                for points, count in grids
            ]
        )

    def _best(self, candidates: np.ndarray, count: int) -> np.ndarray:
        candidates = np.clip(candidates, self.lower, self.upper)
        value = self._value(candidates, np.ones((1, len(self.z))))
        return candidates[np.argsort(value, kind="stable")[:count]]

    def minimise(
        self, theta: np.ndarray, weights: np.ndarray, *, iterations: int, tolerance: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Minimise from every start `[batch, parameters]` and run weights `[batch or 1, runs]`; thetas, objectives.

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

    def best(self, starts: np.ndarray, *, iterations: int, tolerance: float) -> np.ndarray:
        """The best theta that `minimise` reaches from `starts`, every run counted once."""
        thetas, values = self.minimise(starts, np.ones((1, len(self.z))), iterations=iterations, tolerance=tolerance)
        return thetas[int(np.argmin(values))]

    def value(self, theta: np.ndarray) -> float:
        """The objective at one theta, every run counted once."""
        return float(self._value(theta[None], np.ones((1, len(self.z))))[0])

    def _value(self, theta: np.ndarray, weights: np.ndarray) -> np.ndarray:
        predicted, _ = predict_log(theta, self.x, self.y)
        return (weights * huber(predicted - self.z, self.delta)).sum(-1) + self._prior(theta)[0]

    def _prior(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        """Value, slope and curvature by log gamma of the prior, in the objective's units: delta x scatter a nat."""
        if theta.shape[1] < 6 or not self.scatter:
            return np.zeros(len(theta)), np.zeros(len(theta)), 0.0
        curvature = self.delta * self.scatter / PRIOR_WIDTH**2
        off = theta[:, 5] - np.log(PRIOR_GAMMA) - (self.shift * PRIOR_WIDTH if self.shift else 0.0)
        return 0.5 * curvature * off**2, curvature * off, curvature

    def _step(self, theta: np.ndarray, weights: np.ndarray, damping: np.ndarray) -> np.ndarray:
        predicted, jacobian = predict_log(theta, self.x, self.y)
        residual = predicted - self.z
        weighted = jacobian * (weights * self.delta / np.maximum(np.abs(residual), self.delta))[..., None]
        gradient = (weighted * residual[..., None]).sum(-2)
        normal = np.swapaxes(weighted, -1, -2) @ jacobian
        _, slope, curvature = self._prior(theta)
        if curvature:
            gradient[:, 5] += slope
            normal[:, 5, 5] += curvature
        held = ((theta <= self.lower) & (gradient > 0)) | ((theta >= self.upper) & (gradient < 0))
        free = ~held
        normal = np.where(free[:, :, None] & free[:, None, :], normal, 0.0)
        diagonal = np.einsum("bii->bi", normal)
        ridge = damping[:, None] * diagonal + 1e-12 * diagonal.max(-1, keepdims=True) + 1e-30 + held
        normal = normal + ridge[:, :, None] * np.eye(len(self.lower))
        return np.linalg.solve(normal, -np.where(held, 0.0, gradient)[..., None])[..., 0]


def predict_log(
    theta: Float[np.ndarray, "batch parameters"], x: Float[np.ndarray, "runs"], y: Float[np.ndarray, "runs"]
) -> tuple[Float[np.ndarray, "batch runs"], Float[np.ndarray, "batch runs parameters"]]:
    """Log loss of theta at log sizes `x` and log tokens `y`, and its Jacobian; stable for any exponent."""
    a, b, e, alpha, beta = np.moveaxis(theta[:, :5, None], 1, 0)
    terms = np.stack([a - alpha * x, b - beta * y])
    gamma = np.exp(theta[:, 5, None]) if theta.shape[1] == 6 else 1.0
    top = terms.max(0)
    share = np.exp((terms - top) / gamma)
    total = share.sum(0)
    share /= total
    power = top + gamma * np.log(total)  # log of (A / N^alpha + B / D^beta)^gamma
    value = np.logaddexp(power, e)
    of_power, of_e = np.exp(power - value), np.exp(e - value)
    size, data = of_power * share
    columns = [size, data, of_e, -size * x, -data * y]
    if theta.shape[1] == 6:  # the derivative by log gamma is gamma times the entropy of the two shares
        columns.append(of_power * (power - (share * terms).sum(0)))
    return value, np.stack(columns, axis=-1)


def huber(residual: np.ndarray, delta: float) -> np.ndarray:
    """Half the square up to `delta`, linear beyond; elementwise."""
    size = np.abs(residual)
    return np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))
