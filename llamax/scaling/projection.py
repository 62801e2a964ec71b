"""Variable projection: the Chinchilla law fitted by a search over its two exponents alone.

For given alpha and beta the law is linear in E, A and B, so that non-negative least squares gives them at once; what is
minimised over (alpha, beta) is the sum of squares that is left (Golub and Pereyra 1973; for scaling laws
arXiv:2603.22339). Residuals are in nats per token. Two dimensions in place of five: no start can go astray in E, A, B.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from llamax.scaling.centred import EXPONENT_RANGE
from llamax.scaling.engine import Objective, Task
from llamax.scaling.laws import ChinchillaLaw

STARTS = np.geomspace(0.05, 1.6, 6)  # of both exponents
SUPPORTS = np.array([m for m in itertools.product((0.0, 1.0), repeat=3) if any(m)])  # which of E, A, B are above zero


@dataclass(frozen=True)
class Projected:
    """The law, the objective of every start, parameters at a bound, and the Jacobian by (log E, A, B, alpha, beta)."""

    law: ChinchillaLaw
    objectives: np.ndarray
    bounds_hit: tuple[str, ...]
    jacobian: np.ndarray


def project(n: Float[np.ndarray, "runs"], d: Float[np.ndarray, "runs"], loss: Float[np.ndarray, "runs"]) -> Projected:
    """The least-squares Chinchilla law of runs: `n` parameters, `d` tokens, `loss` nats per token, positive."""
    task, centre = _task(n, d, loss)
    starts = np.array(list(itertools.product(STARTS, STARTS)))
    exponents, objectives = task.minimise(starts)
    best = exponents[int(np.argmin(objectives))]
    law = _laws(task, centre, best[None], np.ones((1, len(loss))), loss[None])
    law = ChinchillaLaw(*(float(np.ravel(v)[0]) for v in vars(law).values()))
    size, tokens = np.asarray(law.A * n**-law.alpha), np.asarray(law.B * d**-law.beta)
    columns = [np.full_like(size, law.E), size, tokens, -size * task.data["x"], -tokens * task.data["y"]]
    zero = tuple(name for name in ("E", "A", "B") if getattr(law, name) <= 0)
    return Projected(law, objectives, zero + task.bounds_hit(best), np.stack(columns, axis=1))


def project_many(
    n: Float[np.ndarray, "runs"],
    d: Float[np.ndarray, "runs"],
    loss: Float[np.ndarray, "runs"],
    weights: Float[np.ndarray, "draws runs"],
    start: Any,
    *,
    losses: Float[np.ndarray, "draws runs"] | None = None,
) -> tuple[ChinchillaLaw, Float[np.ndarray, "draws"]]:
    """The law of every row of run weights, from the exponents of the law `start`: fields `[draws]`, and objectives."""
    task, centre = _task(n, d, loss)
    exponents = np.tile([float(start.alpha), float(start.beta)], (len(weights), 1))
    exponents, objectives = task.minimise(exponents, weights, target=losses)
    observed = np.broadcast_to(loss, weights.shape) if losses is None else losses
    return _laws(task, centre, exponents, weights, observed), objectives


def _task(n: np.ndarray, d: np.ndarray, loss: np.ndarray) -> tuple[Task, tuple[float, float]]:
    x, y = np.log(n), np.log(d)
    centre = (float(x.mean()), float(y.mean()))
    low, high = (np.full(2, end) for end in EXPONENT_RANGE)
    data = {"x": x - centre[0], "y": y - centre[1]}
    squares = Objective("mse", log=False)
    return Task(_predict, data, loss, ("alpha", "beta"), low, high, squares, newton=False), centre


def _laws(
    task: Task, centre: tuple[float, float], exponents: np.ndarray, weights: np.ndarray, losses: np.ndarray
) -> ChinchillaLaw:
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        solved = np.asarray(_coefficients(exponents, dict(task.data), weights, losses))
    e, a, b = solved.T
    alpha, beta = exponents.T
    return ChinchillaLaw(e, a * np.exp(alpha * centre[0]), b * np.exp(beta * centre[1]), alpha, beta)


def _basis(u: Any, data: Any) -> Any:
    x, y = data["x"], data["y"]
    return jnp.stack([jnp.ones_like(x), jnp.exp(-u[0] * x), jnp.exp(-u[1] * y)], axis=1)


def _solve(u: Any, data: Any, weights: Any, target: Any) -> Any:
    """Non-negative least squares of E and the two terms at the middle of the data, by trying every support."""
    basis = _basis(u, data)
    scale = jnp.sqrt((weights[:, None] * basis**2).sum(0))
    basis = basis / scale
    normal, right = (basis.T * weights) @ basis, (weights * target) @ basis

    def on(support: Any) -> tuple[Any, Any]:
        matrix = normal * support[:, None] * support + jnp.diag(1.0 - support) + 1e-15 * jnp.eye(3)
        found = jnp.linalg.solve(matrix, right * support)
        left = found @ normal @ found - 2 * found @ right
        return found, jnp.where((found >= 0).all(), left, jnp.inf)

    found, left = jax.vmap(on)(jnp.asarray(SUPPORTS))
    return found[jnp.argmin(left)] / scale


def _predict(u: Any, data: Any, weights: Any, target: Any) -> Any:
    return _basis(u, data) @ _solve(u, data, weights, target)


@jax.jit
def _coefficients(exponents: Any, data: Any, weights: Any, targets: Any) -> Any:
    return jax.vmap(_solve, in_axes=(0, None, 0, 0))(exponents, data, weights, targets)
