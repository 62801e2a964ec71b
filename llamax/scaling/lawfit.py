"""Any law of the registry fitted to a table of runs, with its bootstrap: the engine behind `llamax fit --law`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import numpy as np
import pandas as pd

from llamax.errors import UserError
from llamax.scaling.bootstrap import as_list, interval, resample_counts
from llamax.scaling.engine import Objective, Predict, Search, Task
from llamax.scaling.laws import plain
from llamax.scaling.lawspec import LISTS, LawSpec
from llamax.scaling.projection import Projection
from llamax.scaling.table import as_numbers, check_positive, derive, drop_rows, loss_words, unit_words
from llamax.scaling.traces import TRACED, trace_columns

STARTS = 32


@dataclass(frozen=True)
class LawFit:
    """A fitted law of the registry: its parameters by name, and what is needed to trust them or not.

    Fields as in `ParametricFit`; task: the columns it was fitted to; u: the optimum in the engine's coordinates
    (logarithms where the parameter has the log flag); projected: how, where variable projection found it.
    """

    spec: LawSpec
    task: Task
    u: np.ndarray
    objective: float
    residuals: np.ndarray
    search: Search
    warnings: tuple[str, ...]
    projected: Projection | None = None

    @property
    def params(self) -> dict[str, float]:
        """Parameters by name, of natural scale."""
        return {name: float(v) for name, v in zip(self.spec.names, _natural(self.spec, self.u), strict=True)}

    @property
    def n_points(self) -> int:
        return self.task.runs

    def predict(self, frame: pd.DataFrame | Mapping[str, Any]) -> np.ndarray:
        """The law's target at the columns of `frame`, `[runs]`."""
        return self.spec.predict(self.params, frame)

    def as_dict(self) -> dict[str, Any]:
        """Plain values under the names that `ParametricFit.as_dict` uses."""
        sums = self.task.objective
        return {
            "law": self.spec.name,
            "formula": self.spec.formula,
            "source": self.spec.source,
            "params": {name: plain(value) for name, value in self.params.items()},
            "objective": self.objective,
            "objective_rule": sums.rule,
            "method": "vp" if self.projected else sums.method,
            "delta": sums.delta if sums.method == "huber" else None,
            "n_points": self.n_points,
            **self.search.as_dict(),
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True)
class LawDraws:
    """Bootstrap draws of a fitted law: parameters by name `[draws]`, and how many resamples had too few runs."""

    params: dict[str, np.ndarray]
    failed: int

    def intervals(self, level: float = 0.95) -> dict[str, list[float] | None]:
        """Percentile intervals by name."""
        return {name: as_list(interval(draws, level)) for name, draws in self.params.items()}

    def standard_errors(self) -> dict[str, float | None]:
        """Standard deviations over the draws; None with fewer than ten."""
        return {name: plain(np.std(v)) if len(v) >= 10 else None for name, v in self.params.items()}


def fit_law(
    spec: LawSpec,
    frame: pd.DataFrame | Mapping[str, Any],
    *,
    method: str = "huber",
    delta: float = 1e-3,
    log: bool = True,
    starts: int = STARTS,
) -> LawFit:
    """Fit any law to the columns it reads and its target, named as in the law.

    method: huber, lad or mse, of log residuals or (`log=False`) of those in the target's unit; vp (for laws that are
    linear in some parameters) is variable projection: least squares in the target's unit, searched over the others
    alone. Deterministic. Raises UserError for missing columns, values that are not positive numbers, no more runs than
    parameters, a target that never varies, or vp for a law that is linear in none.
    """
    data = spec.read(frame)
    target = data.pop(spec.target)
    projected = Projection.of(spec, data, target) if method == "vp" else None
    _check(spec, target)
    sums = Objective("mse", log=False) if projected else Objective(method, delta, log)
    task, inside = law_task(spec, data, target, sums)
    if projected:
        us, objectives = projected.task.minimise(projected.starts(starts))
        u = _inside(spec, projected.whole(us[[int(np.argmin(objectives))]]))[0]
    else:
        us, objectives = task.minimise(inside(spec.starts(data, target, starts)))
        u = us[int(np.argmin(objectives))]
    residuals, jacobian = task.describe(u)
    if not np.isfinite(residuals).all():
        raise UserError(f"law {spec.name}: no start gives finite numbers on these columns; check their units")
    objective = task.value(residuals)
    search = Search.of(objectives, objective, task.bounds_hit(u), jacobian)
    words = [f"only {task.runs} runs for {len(spec.names)} parameters: the fit follows noise"]
    words = (words if task.runs < 3 * len(spec.names) else []) + search.words()
    return LawFit(spec, task, u, objective, residuals, search, tuple(words), projected)


def law_task(
    spec: LawSpec, data: Mapping[str, np.ndarray], target: np.ndarray, sums: Objective
) -> tuple[Task, Callable[[np.ndarray], np.ndarray]]:
    """The engine's task of a law, and the map from parameter vectors `[points, parameters]` to its coordinates."""
    task = Task(_predictor(spec), data, target, spec.names, *_bounds(spec), sums)
    return task, lambda points: _coordinates(spec, points)


def bootstrap_law(
    fit: LawFit, frame: pd.DataFrame, draws: int, rng: np.random.Generator, *, seed_noise: float | None = None
) -> LawDraws:
    """Refit on `draws` resamples of the runs, warm from the fit.

    By cluster where `frame` has a `run` column, by stratum where it has `budget`. seed_noise: instead, every run stays
    and every draw is the law with normal noise of that size in the logarithm.
    """
    target = None
    if seed_noise is None:
        counts = resample_counts(frame, draws, rng)
    else:
        counts = np.ones((draws, fit.task.runs))
        target = fit.predict(frame) * np.exp(seed_noise * rng.normal(size=counts.shape))
    enough = (counts > 0).sum(1) > len(fit.spec.names)
    kept = counts[enough]
    target = None if target is None else target[enough]
    found = np.zeros((0, len(fit.spec.names)))
    if len(kept) and fit.projected:
        start = fit.projected.inside(_natural(fit.spec, fit.u)[None])
        us, _ = fit.projected.task.minimise(np.tile(start, (len(kept), 1)), kept, target=target)
        found = _inside(fit.spec, fit.projected.whole(us, kept, target))
    elif len(kept):
        found, _ = fit.task.minimise(np.tile(fit.u, (len(kept), 1)), kept, target=target)
    return LawDraws(dict(zip(fit.spec.names, _natural(fit.spec, found).T, strict=True)), int(draws - len(kept)))


def law_table(spec: LawSpec, frame: pd.DataFrame, named: Mapping[str, str]) -> tuple[pd.DataFrame, list[str]]:
    """The columns a law reads, its target, and `flops`, `run`, `budget` where named, under its own names; warnings.

    `named` maps the law's names to those of the table; the others are looked for as they are. `d` is derived from
    `flops`, what a law of curves reads from `step` and `lr`. Rows with a missing value are dropped and counted, as are
    repeats. Raises UserError naming the columns that are missing, text in one, or FLOPs that are not positive.
    """
    wanted, words = [*spec.columns, spec.target], list[str]()
    frame, named = frame.reset_index(drop=True), dict(named)
    if TRACED & set(wanted) and not TRACED & set(frame) and {named.get(x, x) for x in ("step", "lr")} <= set(frame):
        frame, words = trace_columns(frame, named)
    sized = {"n", "d"} <= set(wanted) and named.get("flops") in frame
    derived = sized and named.get("d", "d") not in frame
    needed = [name for name in wanted if not (derived and name == "d")]
    missing = [name for name in needed if named.get(name, name) not in frame]
    if missing:
        raise UserError(
            f"law {spec.name}: it reads {', '.join(wanted)}; the table has no column for {', '.join(missing)}; name it "
            f"with --column {missing[0]}=NAME (the table has {', '.join(map(str, frame.columns))})"
        )
    needed += ["flops"] if sized else []
    extra = [name for name in ("run", "budget") if named.get(name) in frame]
    table = pd.DataFrame({name: frame[named.get(name, name)] for name in [*needed, *extra]})
    numbers = [name for name in needed if name not in LISTS]
    for name in numbers:
        table[name] = as_numbers(table[name], named.get(name, name))
    table, more = drop_rows(table, numbers, endless=[name for name in numbers if name.startswith("bits")])
    words += more
    if sized:
        check_positive(table, {name: named.get(name, name) for name in ("n", "d", "flops") if name in table})
        words += derive(table) if derived else []
    if {"n", "d"} <= set(wanted) and spec.target == "loss":
        units = table if sized else table.assign(flops=6 * table["n"] * table["d"])
        if (table[["n", "d", "loss"]] > 0).all(axis=None):
            words += unit_words(units) + loss_words(units, named.get("loss", "loss"))
    return table, words


def _check(spec: LawSpec, target: np.ndarray) -> None:
    count = len(spec.names)
    if len(target) <= count:
        raise UserError(
            f"data: {len(target)} runs; law {spec.name} has {count} parameters, so give at least {count + 1} (three "
            "times as many is sound)"
        )
    if np.ptp(target) <= 1e-12 * np.abs(target).max():
        raise UserError(f"column {spec.target}: all {len(target)} values equal {target[0]:.6g}; nothing to fit")


def _predictor(spec: LawSpec) -> Predict:
    return _compiled(spec.loss, spec.names, tuple(p.log for p in spec.parameters))


@lru_cache(maxsize=64)
def _compiled(loss: Callable[..., Any], names: tuple[str, ...], logs: tuple[bool, ...]) -> Predict:
    """One function object a law: the engine's compiled programs are found again by it."""

    def predict(u: Any, data: Any, weights: Any, target: Any) -> Any:
        values = {n: jax.numpy.exp(u[i]) if log else u[i] for i, (n, log) in enumerate(zip(names, logs, strict=True))}
        return loss(values, data)

    return predict


def _bounds(spec: LawSpec) -> tuple[np.ndarray, np.ndarray]:
    return tuple(_coordinates(spec, v[None])[0] for v in (spec.lower, spec.upper))  # type: ignore[return-value]


def _coordinates(spec: LawSpec, params: np.ndarray) -> np.ndarray:
    logs = np.array([p.log for p in spec.parameters])
    return np.where(logs, np.log(np.where(logs, params, 1.0)), params)


def _inside(spec: LawSpec, params: np.ndarray) -> np.ndarray:
    """Coordinates of parameters of which some may be zero: those end at their lower bound."""
    return _coordinates(spec, np.clip(params, spec.lower, spec.upper))


def _natural(spec: LawSpec, u: np.ndarray) -> np.ndarray:
    logs = np.array([p.log for p in spec.parameters])
    return np.where(logs, np.exp(np.where(logs, u, 0.0)), u)
