"""Variable projection: a law fitted by a search over the parameters in which it is not linear.

For given others a law's linear parameters (of the Chinchilla law E, A and B) follow at once by least squares, those
with the log flag not negative; what is minimised over the rest is the sum of squares that is left (Golub and Pereyra
1973; for scaling laws arXiv:2603.22339). Residuals are in the target's own unit. Fewer dimensions: no start can go
astray in a coefficient.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from llamax.errors import UserError
from llamax.scaling.engine import Objective, Predict, Task
from llamax.scaling.lawbook import CHINCHILLA
from llamax.scaling.laws import ChinchillaLaw, Law
from llamax.scaling.lawspec import LawSpec, Parameter

STARTS = 36
NOTHING = 1e-200  # of a linear parameter: not zero, at which the slopes of its logarithm are not finite
Solver = Callable[[Any, Any, Any, Any], tuple[Any, Any]]  # (u, data, weights, target) -> linear parameters, fitted


@dataclass(frozen=True)
class Projection:
    """A law whose linear parameters are solved for: `task` has the coordinates of the others alone."""

    spec: LawSpec
    task: Task

    @classmethod
    def of(cls, spec: LawSpec, data: Mapping[str, np.ndarray], target: np.ndarray) -> "Projection":
        """Raises UserError for a law that is linear in no parameter, or in all."""
        rest = _rest(spec)
        if not rest:
            raise UserError(f"method vp: law {spec.name} is linear in every parameter; mse is its solution")
        if not spec.linear or spec.linear_in != "value":
            raise UserError(f"method vp: law {spec.name} is linear in no parameter; use huber, lad or mse")
        lower, upper = (np.array([_coordinate(p, getattr(p, end)) for p in rest]) for end in ("lower", "upper"))
        names = tuple(p.name for p in rest)
        squares = Objective("mse", log=False)
        return cls(spec, Task(_programs(*_key(spec))[0], data, target, names, lower, upper, squares, newton=False))

    def starts(self, count: int = STARTS) -> Float[np.ndarray, "starts coordinates"]:
        """The law's own starting points, without its linear parameters."""
        return self.inside(self.spec.starts(self.task.data, self.task.target, count))

    def inside(self, points: Float[np.ndarray, "points parameters"]) -> Float[np.ndarray, "points coordinates"]:
        """The coordinates of the task of whole parameter vectors, natural scale."""
        names = self.spec.names
        columns = [_coordinate(p, points[:, names.index(p.name)]) for p in _rest(self.spec)]
        return np.stack(columns, axis=1)

    def whole(
        self,
        u: Float[np.ndarray, "members coordinates"],
        weights: Float[np.ndarray, "members runs"] | None = None,
        target: Float[np.ndarray, "members runs"] | None = None,
    ) -> Float[np.ndarray, "members parameters"]:
        """Whole parameter vectors at coordinates of the task, the linear ones solved for under each row of weights."""
        shape = (len(u), self.task.runs)
        given = [1.0 if weights is None else weights, self.task.target if target is None else target]
        given = [np.broadcast_to(values, shape) for values in given]
        with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
            solved = np.asarray(_programs(*_key(self.spec))[1](u, dict(self.task.data), *given))
        values = {p.name: np.exp(u[:, i]) if p.log else u[:, i] for i, p in enumerate(_rest(self.spec))}
        values |= dict(zip(self.spec.linear, solved.T, strict=True))
        return np.stack([values[name] for name in self.spec.names], axis=1)


@dataclass(frozen=True)
class Projected:
    """The law, the objective of every start, parameters at a bound, and the Jacobian by (log E, A, B, alpha, beta)."""

    law: ChinchillaLaw
    objectives: np.ndarray
    bounds_hit: tuple[str, ...]
    jacobian: np.ndarray


def project(
    n: Float[np.ndarray, " runs"], d: Float[np.ndarray, " runs"], loss: Float[np.ndarray, " runs"]
) -> Projected:
    """The least-squares Chinchilla law of runs: `n` parameters, `d` tokens, `loss` nats per token, positive."""
    found, centre = _centred(n, d, loss)
    us, objectives = found.task.minimise(found.starts())
    best = us[int(np.argmin(objectives))]
    law = ChinchillaLaw(*(float(v[0]) for v in vars(_law(found.whole(best[None]), centre)).values()))
    size, tokens = np.asarray(law.A * n**-law.alpha), np.asarray(law.B * d**-law.beta)
    x, y = np.log(n / centre[0]), np.log(d / centre[1])
    columns = [np.full_like(size, law.E), size, tokens, -size * x, -tokens * y]
    zero = tuple(name for name in ("E", "A", "B") if getattr(law, name) <= 0)
    return Projected(law, objectives, zero + found.task.bounds_hit(best), np.stack(columns, axis=1))


def project_many(
    n: Float[np.ndarray, " runs"],
    d: Float[np.ndarray, " runs"],
    loss: Float[np.ndarray, " runs"],
    weights: Float[np.ndarray, "draws runs"],
    start: Law,
    *,
    losses: Float[np.ndarray, "draws runs"] | None = None,
) -> tuple[ChinchillaLaw, Float[np.ndarray, " draws"]]:
    """The law of every row of run weights, from the exponents of the law `start`: fields `[draws]`, and objectives."""
    found, centre = _centred(n, d, loss)
    begin = found.inside(np.array([[float(v) for v in vars(start).values()]]))
    us, objectives = found.task.minimise(np.tile(begin, (len(weights), 1)), weights, target=losses)
    return _law(found.whole(us, weights, losses), centre), objectives


def _centred(n: np.ndarray, d: np.ndarray, loss: np.ndarray) -> tuple[Projection, tuple[float, float]]:
    """The projection with sizes and tokens over their geometric means, at which A and B are then the terms."""
    centre = float(np.exp(np.log(n).mean())), float(np.exp(np.log(d).mean()))
    return Projection.of(CHINCHILLA, {"n": n / centre[0], "d": d / centre[1]}, np.asarray(loss, float)), centre


def _law(points: np.ndarray, centre: tuple[float, float]) -> ChinchillaLaw:
    e, a, b, alpha, beta = points.T
    return ChinchillaLaw(e, a * centre[0] ** alpha, b * centre[1] ** beta, alpha, beta)


def _rest(spec: LawSpec) -> list[Parameter]:
    return [p for p in spec.parameters if p.name not in spec.linear]


def _coordinate(parameter: Parameter, value: Any) -> Any:
    return np.log(value) if parameter.log else value


def _key(spec: LawSpec) -> tuple[Any, ...]:
    rest = _rest(spec)
    free = tuple(not p.log for p in spec.parameters if p.name in spec.linear)
    return spec.loss, spec.linear, free, tuple(p.name for p in rest), tuple(p.log for p in rest)


@lru_cache(maxsize=64)
def _programs(
    loss: Callable[..., Any],
    linear: tuple[str, ...],
    free: tuple[bool, ...],
    names: tuple[str, ...],
    logs: tuple[bool, ...],
) -> tuple[Predict, Any]:
    """(the projected law for the engine, the compiled solve of the linear parameters for many members)."""
    every = itertools.product((0.0, 1.0), repeat=len(linear))  # which of the linear parameters are not zero
    kept = [m for m in every if any(m) and all(on for on, any_sign in zip(m, free, strict=True) if any_sign)]
    supports, signed = np.array(kept), np.array(free)

    def solve(u: Any, data: Any, weights: Any, target: Any) -> tuple[Any, Any]:
        given = {n: jnp.exp(u[i]) if log else u[i] for i, (n, log) in enumerate(zip(names, logs, strict=True))}

        def at(values: Any) -> Any:
            return loss(given | dict(zip(linear, values, strict=True)), data) * jnp.ones_like(target)

        base = at(np.full(len(linear), NOTHING))
        basis = jnp.stack([at(np.maximum(unit, NOTHING)) - base for unit in np.eye(len(linear))], axis=1)
        scale = jnp.sqrt((weights[:, None] * basis**2).sum(0))
        unit = basis / scale
        normal, right = (unit.T * weights) @ unit, (weights * (target - base)) @ unit

        def on(support: Any) -> tuple[Any, Any]:
            matrix = normal * support[:, None] * support + jnp.diag(1.0 - support) + 1e-15 * jnp.eye(len(linear))
            found = jnp.linalg.solve(matrix, right * support)
            left = found @ normal @ found - 2 * found @ right
            return found, jnp.where(((found >= 0) | signed).all(), left, jnp.inf)

        found, left = jax.vmap(on)(jnp.asarray(supports))
        best = found[jnp.argmin(left)] / scale
        return best, base + basis @ best

    def predict(u: Any, data: Any, weights: Any, target: Any) -> Any:
        return solve(u, data, weights, target)[1]

    def linears(u: Any, data: Any, weights: Any, target: Any) -> Any:
        return solve(u, data, weights, target)[0]

    return predict, jax.jit(jax.vmap(linears, in_axes=(0, None, 0, 0)))
