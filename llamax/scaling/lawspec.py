"""What a scaling law is to the fits: named parameters with bounds and starts, the columns it reads, and its formula.

A law maps parameters and columns of a table of runs to one number a run, usually the loss in nats per token. Anything
that fits, resamples or plots laws works on `LawSpec` alone; the laws themselves are in lawbook.py, traces.py and
formula.py, listed by name in registry.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float

from llamax.errors import UserError

Values = Mapping[str, Any]  # arrays by name: parameters (scalars) or columns `[runs]`

COLUMNS = {
    "n": "parameters",
    "d": "training tokens, repeats counted",
    "loss": "nats per token",
    "n_active": "parameters a token uses",
    "experts": "experts of a layer (1 = dense)",
    "granularity": "hidden size of the dense MLP over that of one expert",
    "unique_tokens": "distinct training tokens",
    "bits_weights": "bits of the weights in training",
    "bits_activations": "bits of the activations in training",
    "bits_kv": "bits of the keys and values in training",
    "bits_post": "bits the weights are rounded to after training",
    "lr": "peak learning rate",
    "batch": "batch, tokens",
    "s1": "sum of the learning rates of all steps so far",
    "s2": "annealing area: sum of the decayed drops of the learning rate so far",
    "lr_drop": "[runs, changes] how far the learning rate fell at each change so far",
    "lr_then": "[runs, changes] learning rate after each change",
    "lr_since": "[runs, changes] sum of the learning rates since each change",
    "error": "error rate on downstream tasks, 0 to 1",
}
MAY_BE_ZERO = ("s1", "s2", "lr_drop", "lr_since")
# Columns `[runs, changes]`, and what fills the rows of runs that have fewer changes than others: nothing changes.
LISTS = {"lr_drop": 0.0, "lr_then": 1.0, "lr_since": 0.0}
MOST_STARTS = 400  # grids of starts are thinned to this many before anything is solved


def floats(column: Any, name: str) -> np.ndarray:
    """A column as floats; one of LISTS, whose cells are lists in a table, as an array filled up to the longest."""
    if name not in LISTS or np.asarray(column).dtype != object:
        return np.asarray(column, float)
    rows = [np.asarray(cell, float) for cell in column]
    wide = max(map(len, rows))
    return np.stack([np.pad(row, (0, wide - len(row)), constant_values=LISTS[name]) for row in rows])


@lru_cache(maxsize=64)
def _many(loss: Callable[[Values, Values], Any], names: tuple[str, ...]) -> Callable[[Any, Values], Any]:
    """The law at many parameter vectors, compiled once for each shape."""
    import jax

    def one(point: Any, data: Values) -> Any:
        return loss({name: point[i] for i, name in enumerate(names)}, data)

    return jax.jit(jax.vmap(one, in_axes=(0, None)))


@dataclass(frozen=True)
class Parameter:
    """One number of a law: fitted in `lower .. upper`, as its logarithm when `log`; `starts` are typical values."""

    name: str
    lower: float
    upper: float
    log: bool = False
    starts: tuple[float, ...] = (1.0,)
    about: str = ""

    def __post_init__(self) -> None:
        if not self.lower < self.upper or (self.log and self.lower <= 0):
            raise UserError(f"parameter {self.name}: bounds {self.lower:g} .. {self.upper:g}; give lower below upper")


@dataclass(frozen=True)
class LawSpec:
    """A law: `loss(params, data)` gives its `target` column for every run, in pure jnp (values of natural scale).

    params: one scalar a parameter by name. data: the arrays `[runs]` of `columns`. linear: parameters in which the
    target is linear once the others are given (its logarithm when `linear_in` is "log", and then a parameter with the
    log flag counts by its logarithm): a linear solve replaces their starts, and variable projection fits without them.
    start: `(data, target) -> starts` where a grid of `Parameter.starts` would not do. published: parameters as printed,
    by a label that says where.
    """

    name: str
    formula: str
    source: str
    columns: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    loss: Callable[[Values, Values], Any] = field(repr=False)
    target: str = "loss"
    linear: tuple[str, ...] = ()
    linear_in: Literal["value", "log"] = "value"
    published: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    start: Callable[[Mapping[str, np.ndarray], np.ndarray], Sequence[Mapping[str, float]]] | None = field(
        default=None, repr=False
    )

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters' names, in order."""
        return tuple(p.name for p in self.parameters)

    @property
    def lower(self) -> np.ndarray:
        """Lower bounds `[parameters]`."""
        return np.array([p.lower for p in self.parameters], float)

    @property
    def upper(self) -> np.ndarray:
        """Upper bounds `[parameters]`."""
        return np.array([p.upper for p in self.parameters], float)

    def vector(self, params: Values) -> np.ndarray:
        """Parameters by name to `[parameters]`. Raises UserError for one missing or unknown."""
        if set(params) != set(self.names):
            raise UserError(f"law {self.name}: parameters {', '.join(params)}; it has {', '.join(self.names)}")
        return np.array([float(params[name]) for name in self.names])

    def read(self, frame: pd.DataFrame | Values, *, target: bool = True) -> dict[str, np.ndarray]:
        """The columns the law reads (and its target) as float arrays.

        Raises UserError naming columns that are missing, or the first value that is not a finite number; columns that
        MAY_BE_ZERO does not name must be positive.
        """
        wanted = (*self.columns, self.target) if target else self.columns
        if missing := [name for name in wanted if name not in frame]:
            words = ", ".join(f"{name} ({COLUMNS.get(name, 'of the formula')})" for name in missing)
            raise UserError(f"law {self.name}: it reads columns {', '.join(wanted)}; missing: {words}")
        data = {name: floats(frame[name], name) for name in wanted}
        for name, values in data.items():
            none = np.isposinf(values) & name.startswith("bits")  # infinitely many bits: never rounded
            bad = ~(np.isfinite(values) | none) | ((values <= 0) & (name in COLUMNS and name not in MAY_BE_ZERO))
            if bad.any():
                row = int(np.argmax(bad))
                raise UserError(
                    f"column {name}: {values.flat[row]} in row {row}; law {self.name} needs positive numbers"
                )
        return data

    def predict(self, params: Values, frame: pd.DataFrame | Values) -> np.ndarray:
        """The law's target at the columns of `frame`, `[runs]`, in float64."""
        return self.evaluate(self.vector(params)[None], self.read(frame, target=False))[0]

    def evaluate(self, points: Float[np.ndarray, "points parameters"], data: Values) -> np.ndarray:
        """The target at many parameter vectors, in the order of `names`: `[points, runs]`, in float64."""
        import jax

        with jax.enable_x64(True):
            columns = {name: np.asarray(data[name], np.float64) for name in self.columns}
            return np.asarray(_many(self.loss, self.names)(np.asarray(points, np.float64), columns))

    def starts(self, data: Mapping[str, np.ndarray], target: np.ndarray, count: int = 16) -> np.ndarray:
        """The `count` best starting points `[count, parameters]`, by the sum of absolute log misfits; deterministic.

        Candidates are `start`, or the product of `Parameter.starts` of the parameters that are not linear (thinned
        evenly above MOST_STARTS); the linear ones are then solved within their bounds.
        """
        if self.start is not None:
            points = np.array([self.vector(p) for p in self.start(data, target)])
        else:
            points = self._solve(self._grid(), data, target)
        points = np.clip(points, self.lower, self.upper)
        with np.errstate(divide="ignore", invalid="ignore"):
            misfit = np.abs(np.log(self.evaluate(points, data) / target)).sum(1)
        return points[np.argsort(np.where(np.isfinite(misfit), misfit, np.inf), kind="stable")[:count]]

    def _grid(self) -> np.ndarray:
        """Product of the starts; one value each for the linear parameters. `[points, parameters]`."""
        values = [p.starts[:1] if p.name in self.linear else p.starts for p in self.parameters]
        size = math.prod(map(len, values))
        stride = max(1, -(-size // MOST_STARTS))
        while math.gcd(stride, size) > 1:  # so that thinning keeps every value of every parameter
            stride += 1
        return np.array(list(itertools.islice(itertools.product(*values), 0, None, stride)), float)

    def _solve(self, points: np.ndarray, data: Mapping[str, np.ndarray], target: np.ndarray) -> np.ndarray:
        """The points with their linear parameters solved: bounded least squares of the relative misfit."""
        from scipy.optimize import lsq_linear

        at = [self.names.index(name) for name in self.linear]
        if not at:
            return points
        in_log = self.linear_in == "log"
        logged = np.array([in_log and self.parameters[i].log for i in at])
        lower, upper = (np.where(logged, np.log(np.where(logged, b, 1.0)), b) for b in (self.lower[at], self.upper[at]))

        def column(coordinates: np.ndarray) -> np.ndarray:
            moved = points.copy()
            moved[:, at] = np.where(logged, np.exp(coordinates), coordinates)
            found = self.evaluate(moved, data)
            return np.log(found) if in_log else found

        base = column(np.zeros(len(at)))
        basis = np.stack([column(unit) - base for unit in np.eye(len(at))], axis=-1)
        weight = np.ones_like(target) if in_log else 1 / np.abs(target)
        wanted = ((np.log(target) if in_log else target) - base) * weight
        basis = np.nan_to_num(basis * weight[:, None], posinf=0.0, neginf=0.0)
        solved = points.copy()
        for i, matrix in enumerate(basis):
            norm = np.linalg.norm(matrix, axis=0)
            norm = np.where(norm > 0, norm, 1.0)
            ends = (lower * norm, upper * norm)
            # By active sets, which end: the default method's line search can go on for ever.
            u = lsq_linear(matrix / norm, wanted[i], ends, method="bvls", max_iter=100).x / norm
            solved[i, at] = np.where(logged, np.exp(np.where(logged, u, 0.0)), u)
        return solved
