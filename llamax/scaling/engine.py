"""The minimiser behind every fit: robust, bounded, from many starts, for thousands of resamples at once, in JAX.

Minimises  sum_i w_i rho(f(u; data_i) - y_i)  over coordinates u inside bounds, plus a normal prior where one is given.
rho is Huber's function, its limit of absolute values, or the square; y is the loss or its logarithm.

The method is Newton's, damped as by Levenberg and Marquardt, tried at every step against iteratively reweighted
Gauss-Newton: the second always descends, the first ends in a few steps and needs no tuning where Huber's threshold is
far below the residuals. Absolute values are reached by continuation, from a threshold at a tenth of the scatter of the
losses down to a billionth of it, and by steps through as many runs as there are parameters, where its optimum lies. A
resample is a row of run weights. Members (starts, resamples, points of a profile) run in blocks of one shape, so that a
law compiles once for every number of runs up to a power of two.

Float64 is local to the calls here: the global flag is never touched, and the CPU is used whatever else there is.
"""

import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from llamax.errors import UserError
from llamax.scaling.laws import plain

BLOCK = 32  # members of one compiled call: its arrays stay in cache, and it ends when its slowest member does
STALLED = 6  # steps without a gain that end a member; the damping grows five-fold in each
SMALLEST = 1e-9  # threshold, over the scatter of the losses, at which Huber's function counts as the absolute value

# (u [parameters], data, weights [runs], target [runs]) -> [runs]; the last two are for models that solve for some of
# their parameters themselves (variable projection). Hashable: it is a part of the compiled program's name.
Predict = Callable[[Any, Mapping[str, Any], Any, Any], Any]


@dataclass(frozen=True)
class Objective:
    """What is summed over runs: rho (huber with its threshold, lad, mse) of log residuals or (`log=False`) in nats."""

    method: str = "huber"
    delta: float = 1e-3
    log: bool = True

    def __post_init__(self) -> None:
        if self.method not in ("huber", "lad", "mse"):
            raise UserError(f"method: {self.method!r}; choose huber, lad or mse, or vp (variable projection)")
        if not (math.isfinite(self.delta) and self.delta > 0):
            raise UserError(f"delta: {self.delta}; give a positive number, such as 0.001")

    @property
    def rule(self) -> str:
        """The objective as a formula."""
        r = "log L - log fit" if self.log else "L - fit"
        return {
            "huber": f"sum of Huber({self.delta:g}) of {r}",
            "lad": f"sum of |{r}|",
            "mse": f"sum of ({r})^2",
        }[self.method]


@dataclass(frozen=True)
class Search:
    """How far the optimum of a fit can be trusted: what became of its starts, its bounds, and its conditioning.

    starts_at_best: starts that reached the objective to 1e-4. start_ratios: median and largest objective of the starts
    over the least one. bounds_hit: names of parameters at a bound. condition: condition number of the Jacobian with
    columns of length 1.
    """

    starts: int
    starts_at_best: int
    start_ratios: tuple[float, float]
    bounds_hit: tuple[str, ...]
    condition: float

    @classmethod
    def of(
        cls,
        objectives: Float[np.ndarray, " starts"],
        objective: float,
        bounds_hit: tuple[str, ...],
        jacobian: Float[np.ndarray, "runs parameters"],
    ) -> "Search":
        """The search whose starts ended at `objectives` (not all finite, perhaps) and whose best is `objective`."""
        norms = np.linalg.norm(jacobian, axis=0)
        finite = objectives[np.isfinite(objectives)]
        least = finite.min() or 1.0
        return cls(
            starts=len(objectives),
            starts_at_best=int(np.sum(finite <= objective * (1 + 1e-4) + 1e-12)),
            start_ratios=(float(np.median(finite) / least), float(finite.max() / least)),
            bounds_hit=bounds_hit,
            condition=float(np.linalg.cond(jacobian / np.where(norms > 0, norms, 1.0))),
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values; what is not finite is None."""
        median, worst = self.start_ratios
        return {
            "starts": self.starts,
            "starts_at_best": self.starts_at_best,
            "starts_median_ratio": plain(median),
            "starts_worst_ratio": plain(worst),
            "bounds_hit": list(self.bounds_hit),
            "condition": plain(self.condition),
        }

    def words(self) -> list[str]:
        """What of it is worth a warning."""
        words = []
        if self.starts_at_best == 1 and self.starts > 1:
            words.append(
                f"only one of {self.starts} starts reached the best objective: it may not be the global minimum"
            )
        words += [f"{name} ran into its bound: these data do not determine it" for name in self.bounds_hit]
        if self.condition > 1000:
            words.append(
                f"the parameters trade off against each other (condition number {self.condition:.3g}): trust "
                "predictions near the data, not single parameters"
            )
        return words


@dataclass(frozen=True)
class Task:
    """One table of runs to be fitted by one model: everything except starts and run weights.

    predict: the model, of the loss or (`predicts_log`) its logarithm. data: arrays `[runs]`. target: measured loss in
    nats per token, or another positive number a run. names, lower, upper: of the coordinates `[parameters]`. prior:
    centre and curvature of a quadratic penalty on each coordinate, in units of the minimised sum.
    """

    predict: Predict
    data: Mapping[str, np.ndarray]
    target: np.ndarray
    names: tuple[str, ...]
    lower: np.ndarray
    upper: np.ndarray
    objective: Objective = field(default_factory=Objective)
    predicts_log: bool = False
    prior: tuple[np.ndarray, np.ndarray] | None = None
    newton: bool = (
        True  # False leaves the second derivatives out: for models whose own solve makes them slow to compile
    )

    @property
    def runs(self) -> int:
        return len(self.target)

    def observed(self, target: np.ndarray) -> np.ndarray:
        """The measured loss as the objective compares it."""
        return np.log(target) if self.objective.log else target

    def minimise(
        self,
        starts: Float[np.ndarray, "members parameters"],
        weights: Float[np.ndarray, "rows runs"] | None = None,
        *,
        lower: Float[np.ndarray, "members parameters"] | None = None,
        upper: Float[np.ndarray, "members parameters"] | None = None,
        target: Float[np.ndarray, "members runs"] | None = None,
        prior_centre: Float[np.ndarray, "members parameters"] | None = None,
        iterations: int = 1000,
        tolerance: float = 1e-13,
    ) -> tuple[Float[np.ndarray, "members parameters"], Float[np.ndarray, " members"]]:
        """Descend from every start under its row of run `weights` (one row serves all; None counts every run once).

        Bounds, measured losses and the prior's centre may differ by member. Returns the coordinates and the minimised
        sums: of Huber's function, of absolute values, or of squares, as `Objective.rule` says. `iterations` bounds the
        steps of each stage; a member ends earlier when six steps running gain less than `tolerance` of its value.
        """
        members = len(starts)
        lower, upper = (
            np.broadcast_to(own if given is None else given, (members, len(self.names)))
            for own, given in ((self.lower, lower), (self.upper, upper))
        )
        centre, curvature = self.prior or (np.zeros(len(self.names)), np.zeros(len(self.names)))
        centre = np.broadcast_to(centre if prior_centre is None else prior_centre, lower.shape)
        weights = np.ones((1, self.runs)) if weights is None else weights
        weights = np.broadcast_to(weights, (members, self.runs))
        observed = self.observed(self.target if target is None else target)
        observed = np.broadcast_to(observed, (members, self.runs))
        if self.objective.method == "lad":  # many stages, each warm from the last: none needs to end to the last bit
            iterations, tolerance = min(iterations, 60), max(tolerance, 1e-9)
        data, extra = self._padded()
        wide = ((0, 0), (0, extra))

        def block(k: int) -> tuple[np.ndarray, np.ndarray]:
            at = np.minimum(np.arange(k, k + BLOCK), members - 1)  # the last member fills the last block
            fixed = (np.pad(weights[at], wide), np.pad(observed[at], wide, mode="edge"), data, lower[at], upper[at])
            u, value = np.clip(starts[at], lower[at], upper[at]), np.zeros(BLOCK)
            with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
                for delta in self._deltas(u, *fixed[:2]):
                    pull = centre[at], curvature * (delta if self.objective.method == "lad" else 1.0)
                    found = _descend(
                        self.predict, self._spaces, self._steps, u, *fixed, pull, delta, tolerance, iterations
                    )
                    u, value = np.asarray(found[0]), np.asarray(found[1])
            scale = {"huber": 1.0, "lad": 1 / delta, "mse": 2.0}[self.objective.method]
            return u[: members - k], scale * value[: members - k]

        first, *rest = range(0, members, BLOCK)
        done = [block(first)]  # alone: two threads would compile the same program twice
        if rest:
            with ThreadPoolExecutor(min(os.cpu_count() or 1, len(rest))) as pool:
                done += pool.map(block, rest)
        return np.concatenate([u for u, _ in done]), np.concatenate([value for _, value in done])

    def describe(
        self, u: Float[np.ndarray, " parameters"], weights: Float[np.ndarray, " runs"] | None = None
    ) -> tuple[Float[np.ndarray, " runs"], Float[np.ndarray, "runs parameters"]]:
        """Measured less fitted, as the objective compares them, and the Jacobian of the fitted, at `u`."""
        data, extra = self._padded()
        weights = np.ones(self.runs) if weights is None else weights
        observed = np.pad(self.observed(self.target), (0, extra), mode="edge")
        with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
            residual, jacobian = _describe(self.predict, self._spaces, u, np.pad(weights, (0, extra)), observed, data)
        return -np.asarray(residual)[: self.runs], np.asarray(jacobian)[: self.runs]

    def value(self, residuals: Float[np.ndarray, " runs"]) -> float:
        """The objective of residuals, every run counted once, without the prior."""
        size = np.abs(residuals)
        if self.objective.method == "huber":
            return float(huber(residuals, self.objective.delta).sum())
        return float(size.sum() if self.objective.method == "lad" else (size**2).sum())

    def bounds_hit(self, u: Float[np.ndarray, " parameters"]) -> tuple[str, ...]:
        """Names of the coordinates of `u` that lie at a bound."""
        near = (u - self.lower < 1e-6) | (self.upper - u < 1e-6)
        return tuple(name for name, at in zip(self.names, near, strict=True) if at)

    @property
    def _steps(self) -> tuple[bool, bool]:
        """Which steps are tried beside the reweighted one: Newton's, and (absolute values) that through a corner."""
        return self.newton, self.objective.method == "lad"

    @property
    def _spaces(self) -> tuple[bool, bool]:
        return self.predicts_log, self.objective.log

    def _padded(self) -> tuple[dict[str, np.ndarray], int]:
        """The data with its last run repeated up to a power of two (those repeats weigh nothing), and their number."""
        extra = max(32, 1 << (self.runs - 1).bit_length()) - self.runs
        arrays = {name: np.asarray(values, float) for name, values in self.data.items()}  # [runs] or [runs, anything]
        return {
            name: np.pad(values, ((0, extra), *[(0, 0)] * (values.ndim - 1)), mode="edge")
            for name, values in arrays.items()
        }, extra

    def _deltas(self, u: np.ndarray, weights: np.ndarray, observed: np.ndarray) -> list[float]:
        """Thresholds in the order they are used: one, or for absolute values a falling row."""
        if self.objective.method == "huber":
            return [self.objective.delta]
        if self.objective.method == "mse":
            return [1e30]
        scale = max(float(np.std(observed[:, : self.runs])), 1e-12)
        return list(scale * np.geomspace(1e-1, SMALLEST, 9))


def huber(residual: np.ndarray, delta: float) -> np.ndarray:
    """Half the square up to `delta`, linear beyond; elementwise."""
    size = np.abs(residual)
    return np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))


def _residual(predict: Predict, spaces: tuple[bool, bool], u: Any, w: Any, observed: Any, data: Any) -> Any:
    given_log, wanted_log = spaces
    target = jnp.exp(observed) if wanted_log else observed
    fitted = predict(u, data, w, target)
    if given_log != wanted_log:
        fitted = jnp.log(fitted) if wanted_log else jnp.exp(fitted)
    return fitted - observed


@partial(jax.jit, static_argnums=(0, 1))
def _describe(predict: Predict, spaces: tuple[bool, bool], u: Any, w: Any, observed: Any, data: Any) -> Any:
    def residual(u: Any) -> Any:
        return _residual(predict, spaces, u, w, observed, data)

    return residual(u), jax.jacfwd(residual)(u)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _descend(
    predict: Predict,
    spaces: tuple[bool, bool],
    steps: tuple[bool, bool],
    u: Any,
    weights: Any,
    observed: Any,
    data: Any,
    lower: Any,
    upper: Any,
    prior: Any,
    delta: Any,
    tolerance: Any,
    iterations: Any,
) -> Any:
    """Coordinates `[members, parameters]` and values `[members]` where every member's descent ends."""
    centre, curvature = prior

    def value(u: Any, w: Any, y: Any, c: Any) -> Any:
        residual = _residual(predict, spaces, u, w, y, data)
        size = jnp.abs(residual)
        rho = jnp.where(size <= delta, 0.5 * residual**2, delta * (size - 0.5 * delta))
        return jnp.where(w > 0, w * rho, 0.0).sum() + 0.5 * (curvature * (u - c) ** 2).sum()

    def step(gradient: Any, matrix: Any, ridge: Any, free: Any) -> Any:
        matrix = jnp.where(free[:, None] & free[None, :], matrix, 0.0) + jnp.diag(jnp.where(free, ridge, 1.0))
        return jnp.linalg.solve(matrix, -jnp.where(free, gradient, 0.0))

    def one(*member: Any) -> Any:
        u, f, damping, stalled, w, y, c, low, high = member
        residual = _residual(predict, spaces, u, w, y, data)
        jacobian = jax.jacfwd(lambda v: _residual(predict, spaces, v, w, y, data))(u)
        robust = jnp.where(w > 0, w * delta / jnp.maximum(jnp.abs(residual), delta), 0.0)
        jacobian = jnp.where(w[:, None] > 0, jacobian, 0.0)
        gradient = (robust * residual) @ jacobian + curvature * (u - c)
        normal = (jacobian.T * robust) @ jacobian + jnp.diag(curvature)
        matrices = [normal, jax.hessian(value)(u, w, y, c)] if steps[0] else [normal]
        free = ~(((u <= low) & (gradient >= 0)) | ((u >= high) & (gradient <= 0)))
        diagonal = jnp.diag(normal)
        ridge = damping * diagonal + 1e-12 * diagonal.max() + 1e-300
        tried = [jnp.clip(u + step(gradient, m, ridge, free), low, high) for m in matrices]
        if steps[1]:  # the least sum of absolute values passes through as many runs as there are parameters
            near = jax.lax.top_k(-jnp.where(w > 0, jnp.abs(residual), jnp.inf), len(u))[1]
            square = jacobian[near] + 1e-14 * jnp.abs(jacobian[near]).max() * jnp.eye(len(u))
            tried.append(jnp.clip(u - jnp.linalg.solve(square, residual[near]), low, high))
        values = jnp.nan_to_num(jnp.stack([value(t, w, y, c) for t in tried]), nan=jnp.inf)
        best, found = jnp.stack(tried)[jnp.argmin(values)], values.min()
        better = found < f
        stalled = jnp.where(f - found > tolerance * f, 0, stalled + 1)
        damping = jnp.clip(damping * jnp.where(better, 0.2, 5.0), 1e-12, 1e12)
        return jnp.where(better, best, u), jnp.where(better, found, f), damping, stalled

    def body(state: Any) -> Any:
        *members, count = state
        new = jax.vmap(one)(*members, weights, observed, centre, lower, upper)
        return (*new, count + 1)

    def going(state: Any) -> Any:
        return (state[4] < iterations) & jnp.any(state[3] < STALLED)

    start = (u, jax.vmap(value)(u, weights, observed, centre), jnp.full(len(u), 1e-3), jnp.zeros(len(u), int))
    found = jax.lax.while_loop(going, body, (*start, 0))
    return found[0], found[1]
