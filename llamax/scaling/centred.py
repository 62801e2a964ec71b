"""The Chinchilla and the coupled law as the engine fits them: coordinates in which their parameters hardly trade off.

    log L = LSE(gamma · LSE((a - alpha log N) / gamma, (b - beta log D) / gamma), e)

that is L = E + (A / N^alpha + B / D^beta)^gamma written with the whole terms a, alpha = gamma · those of the law: then
gamma changes only how the two terms add up (gamma = 1: their sum, gamma to 0: the larger of them), not the terms.
theta = (a, b, e, alpha, beta) means gamma = 1; a sixth entry is log gamma. log N and log D are taken from their means,
so that a and b are the log terms at the middle of the data: it gives the bounds a meaning.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from llamax.scaling.engine import Objective, Task
from llamax.scaling.laws import joined

EXPONENT_RANGE = (0.01, 3.0)  # alpha and beta of the additive law; published fits lie in 0.05 .. 1
# Of the coupled law: exponents of the whole terms, and gamma. The ends keep A and B within floating point.
COUPLED_EXPONENT_RANGE, GAMMA_RANGE = (0.01, 2.0), (0.1, 3.0)
GAMMA_STARTS = (1.0, 0.5, 0.25)
# Prior of the coupled law: log gamma is normal around log 0.5 with this width, weighed against the scatter of the runs.
# Some twenty noisy runs trade gamma against E, and the extrapolation follows; without scatter the prior has no weight.
PRIOR_GAMMA, PRIOR_WIDTH = 0.5, 0.1  # from pilot studies: docs/decisions.md
TERM_FLOOR = 1e-4  # smallest part of the smallest loss that E, or a power term at the middle of the data, may be
NAMES = ("A", "B", "E", "alpha", "beta", "gamma")


def log_loss(xp: Any, theta: Any, x: Any, y: Any) -> Any:
    """Log loss of theta, five or six entries, at log sizes `x` and log tokens `y`; stable for any exponent."""
    a, b, e, alpha, beta, *log_gamma = theta
    size, tokens = a - alpha * x, b - beta * y
    if not log_gamma:
        return xp.logaddexp(joined(xp, size, tokens, 1.0), e)
    gamma = xp.exp(log_gamma[0])
    return xp.logaddexp(joined(xp, size / gamma, tokens / gamma, gamma), e)


def _predict(u: Any, data: Any, weights: Any, target: Any) -> Any:
    return log_loss(jnp, u, data["x"], data["y"])


@dataclass(frozen=True)
class Centred:
    """A task in these coordinates, where its runs are centred, and their loss in nats per token."""

    task: Task
    centre: tuple[float, float]

    @classmethod
    def of(
        cls,
        n: np.ndarray,
        d: np.ndarray,
        loss: np.ndarray,
        objective: Objective,
        *,
        coupled: bool = False,
        scatter: float = 0.0,
    ) -> "Centred":
        """The task of these runs, with five parameters or, `coupled`, six.

        `scatter`, the size of the residuals of single runs, is the unit in which the prior of gamma is weighed.
        """
        x, y = np.log(n), np.log(d)
        floor, ceiling = np.log(TERM_FLOOR * loss.min()), np.log(loss.max())
        least, most = COUPLED_EXPONENT_RANGE if coupled else EXPONENT_RANGE
        lower, upper = [floor, floor, floor, least, least], [ceiling, ceiling, ceiling, most, most]
        if coupled:
            lower, upper = [*lower, np.log(GAMMA_RANGE[0])], [*upper, np.log(GAMMA_RANGE[1])]
        centre = (float(x.mean()), float(y.mean()))
        task = Task(
            _predict,
            {"x": x - centre[0], "y": y - centre[1]},
            np.asarray(loss, float),
            NAMES[: 6 if coupled else 5],
            np.array(lower),
            np.array(upper),
            objective,
            predicts_log=True,
            prior=_prior(objective, scatter) if coupled and scatter else None,
        )
        return cls(task, centre)

    def inside(self, theta: np.ndarray) -> np.ndarray:
        """Centred coordinates of theta."""
        return theta + np.array([-theta[3] * self.centre[0], -theta[4] * self.centre[1], *[0.0] * (len(theta) - 2)])

    def outside(self, centred: np.ndarray) -> np.ndarray:
        """theta of centred coordinates `[..., parameters]`."""
        theta = centred.copy()
        theta[..., 0] += theta[..., 3] * self.centre[0]
        theta[..., 1] += theta[..., 4] * self.centre[1]
        return theta

    def starts(self, projected: int = 16, spread: int = 16) -> np.ndarray:
        """Starting points `[count, parameters]`: two fixed grids, the best `projected` and `spread` by log misfit.

        For given exponents the additive law is linear in E, A, B, so an 8 x 8 grid of exponents with a non-negative
        least-squares solve gives near-optimal starts; the second grid spreads E, A, B by hand in case squares mislead
        (outliers). The coupled law starts from both with each of GAMMA_STARTS.
        """
        from scipy.optimize import nnls

        x, y, loss = self.task.data["x"], self.task.data["y"], self.task.target
        exponents = np.geomspace(0.08, 1.6, 8)
        solved = []
        for alpha in exponents:
            for beta in exponents:
                terms = np.stack([np.exp(-alpha * x), np.exp(-beta * y), np.ones_like(x)], axis=1)
                coefficients, _ = nnls(terms / loss[:, None], np.ones_like(loss))
                solved.append([*np.log(np.maximum(coefficients, 1e-3 * loss.min())), alpha, beta])
        shares = np.log(loss.min() * np.array([0.02, 0.2, 0.6]))
        grid = np.stack(np.meshgrid(shares, shares, shares, exponents[::3], exponents[::3], indexing="ij"), axis=-1)
        grids = (np.array(solved), projected), (grid.reshape(-1, 5), spread)
        if len(self.task.lower) == 5:
            return np.concatenate([self._best(points, count) for points, count in grids])
        return np.concatenate(
            [
                self._best(np.insert(points, 5, np.log(gamma), axis=1), count)
                for gamma in GAMMA_STARTS
                for points, count in grids
            ]
        )

    def _best(self, candidates: np.ndarray, count: int) -> np.ndarray:
        candidates = np.clip(candidates, self.task.lower, self.task.upper)
        fitted = log_loss(np, candidates.T[..., None], self.task.data["x"], self.task.data["y"])
        misfit = np.abs(fitted - np.log(self.task.target)).sum(-1)
        return candidates[np.argsort(misfit, kind="stable")[:count]]


def _prior(objective: Objective, scatter: float) -> tuple[np.ndarray, np.ndarray]:
    """Centre and curvature by log gamma of the prior, in units of the minimised sum.

    A nat of log likelihood is delta x scatter of Huber's sum and, at any threshold, scatter of absolute residuals
    (Laplace errors); scatter^2 of half the squares (normal errors).
    """
    nat = {"huber": objective.delta * scatter, "lad": scatter, "mse": scatter**2}[objective.method]
    centre, curvature = np.zeros(6), np.zeros(6)
    centre[5], curvature[5] = np.log(PRIOR_GAMMA), nat / PRIOR_WIDTH**2
    return centre, curvature


def huber_objective(
    theta: Float[np.ndarray, " parameters"],
    log_n: Float[np.ndarray, " runs"],
    log_d: Float[np.ndarray, " runs"],
    losses: Float[np.ndarray, " runs"],
    delta: float = 1e-3,
) -> tuple[float, Float[np.ndarray, " parameters"]]:
    """Sum of Huber losses of the log residuals and its gradient at theta, of five or six parameters; losses in logs."""

    def total(theta: Any) -> Any:
        residual = log_loss(jnp, theta, log_n, log_d) - losses
        size = jnp.abs(residual)
        return jnp.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta)).sum()

    with jax.enable_x64(True):
        value, gradient = jax.value_and_grad(total)(jnp.asarray(theta))
        return float(value), np.asarray(gradient)
