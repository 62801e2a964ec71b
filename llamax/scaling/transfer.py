"""Does the best learning rate stay where it is as models grow? Optima of a sweep, and their shift a doubling."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from llamax.errors import UserError

NEEDED = ("parametrization", "lr", "seed", "loss")
LEVEL = 0.95


@dataclass(frozen=True)
class Shift:
    """How the optimum of one parametrization moves: log2 lr* = a + `per_doubling` log2 size, by least squares.

    `interval` is of 95 %, from the scatter of seeds at a size (pooled over sizes, Student's t with `dof`); None with
    one seed. It does not contain what a straight line leaves over. `sizes` are those used: where every seed has its
    optimum inside the grid. `cost` is what the largest size loses, in nats per token, at the grid's rate nearest to the
    smallest size's optimum, against its own best rate (means over seeds; inf if that rate diverged).
    """

    parametrization: str
    sizes: tuple[int, ...]
    per_doubling: float
    interval: tuple[float, float] | None
    dof: int
    cost: float


def lr_optima(runs: pd.DataFrame, size: str) -> pd.DataFrame:
    """The best learning rate of every (parametrization, `size`, seed): columns `lr`, `loss`, `interior`.

    `runs` has columns parametrization, `size` (width or depth), lr, seed, and loss in nats per token (nan: diverged).
    The optimum is the vertex of the parabola in log2 lr through the best rate and its two neighbours; where the best is
    at the grid's edge, or a neighbour diverged, it is that rate, and `interior` is False.

    Raises:
        UserError: a column is missing, two runs are the same cell, or a group has no run with a loss.
    """
    if missing := [name for name in (*NEEDED, size) if name not in runs]:
        raise UserError(f"runs of a transfer study need column {missing[0]!r}; there are {', '.join(map(str, runs))}")
    if not (runs["lr"] > 0).all() or not (runs[size] > 0).all():
        raise UserError(f"runs of a transfer study: lr and {size} must be positive in every row")
    keys = ["parametrization", size, "seed"]
    if runs.duplicated([*keys, "lr"]).any():
        row = runs[runs.duplicated([*keys, "lr"])].iloc[0]
        raise UserError(f"two runs are one cell: {', '.join(f'{k} {row[k]}' for k in (*keys, 'lr'))}; drop one")
    rows = []
    for values, group in runs.groupby(keys, sort=False):
        group = group.sort_values("lr")
        where = dict(zip(keys, values, strict=True))
        found = _vertex(np.log2(group["lr"].to_numpy(float)), group["loss"].to_numpy(float))
        if found is None:
            raise UserError(f"no run of {', '.join(f'{k} {v}' for k, v in where.items())} has a loss")
        rows.append({**where, "lr": 2.0 ** found[0], "loss": found[1], "interior": found[2]})
    return pd.DataFrame(rows)


def lr_shift(runs: pd.DataFrame, size: str) -> list[Shift]:
    """`Shift` of every parametrization in `runs` (see `lr_optima`), in the order they come in.

    Raises:
        UserError: as `lr_optima`; fewer than two sizes with an optimum inside the grid give a shift of nan instead.
    """
    optima = lr_optima(runs, size)
    return [
        _shift(str(name), optima[optima["parametrization"] == name], group, size)
        for name, group in runs.groupby("parametrization", sort=False)
    ]


def transfer_summary(runs: pd.DataFrame, size: str) -> dict[str, Any]:
    """`optima` and `shifts` as plain data, with `warnings` in words: diverged runs, optima at an edge, one seed."""
    shifts, optima = lr_shift(runs, size), lr_optima(runs, size)
    words = []
    edge = optima[~optima["interior"].astype(bool)]
    for (name, value), group in edge.groupby(["parametrization", size], sort=False):
        seeds = ", ".join(str(seed) for seed in group["seed"])
        words.append(
            f"{name}, {size} {value}: the best rate is at the grid's edge or beside a divergence (seed {seeds})"
        )
    if optima["seed"].nunique() < 2:
        words.append("one seed: no interval, and no way to tell a shift from noise")
    if lost := int(runs["loss"].isna().sum()):
        words.append(f"{lost} of {len(runs)} runs have no loss (diverged, failed or not run) and count as worst")
    return {
        "size": size,
        "optima": optima.to_dict("records"),
        "shifts": [asdict(shift) for shift in shifts],
        "warnings": words,
    }


def _vertex(x: np.ndarray, y: np.ndarray) -> tuple[float, float, bool] | None:
    """(place, height, whether it is inside) of the minimum of y over the increasing x."""
    finite = np.where(np.isfinite(y), y, np.inf)
    best = int(np.argmin(finite))
    if not np.isfinite(finite[best]):
        return None
    if best in (0, len(x) - 1) or not np.isfinite(finite[best - 1 : best + 2]).all():
        return float(x[best]), float(y[best]), False
    a, b, c = np.polyfit(x[best - 1 : best + 2] - x[best], y[best - 1 : best + 2], 2)
    if a <= 0:  # three equal losses
        return float(x[best]), float(y[best]), False
    return float(x[best] - b / (2 * a)), float(c - b * b / (4 * a)), True


def _shift(name: str, optima: pd.DataFrame, runs: pd.DataFrame, size: str) -> Shift:
    inside = optima.groupby(size)["interior"].all()
    used = optima[optima[size].isin(inside[inside].index)]
    sizes = tuple(sorted(int(value) for value in used[size].unique()))
    cost = _cost(optima, runs, size)
    if len(sizes) < 2:
        return Shift(name, sizes, math.nan, None, 0, cost)
    x, y = np.log2(used[size].to_numpy(float)), np.log2(used["lr"].to_numpy(float))
    slope = float(np.polyfit(x, y, 1)[0])
    groups = [np.log2(group["lr"].to_numpy(float)) for _, group in used.groupby(size)]
    dof = sum(len(group) - 1 for group in groups)
    if dof == 0:
        return Shift(name, sizes, slope, None, 0, cost)
    from scipy.stats import t

    variance = sum(float(((group - group.mean()) ** 2).sum()) for group in groups) / dof
    error = math.sqrt(variance / float(((x - x.mean()) ** 2).sum())) * float(t.ppf(0.5 + LEVEL / 2, dof))
    return Shift(name, sizes, slope, (slope - error, slope + error), dof, cost)


def _cost(optima: pd.DataFrame, runs: pd.DataFrame, size: str) -> float:
    """Loss of the largest size at the rate that is best for the smallest, less its lowest; means over seeds."""
    smallest, largest = runs[size].min(), runs[size].max()
    wanted = np.log2(optima[optima[size] == smallest]["lr"].to_numpy(float)).mean()
    means = runs[runs[size] == largest].groupby("lr")["loss"].agg(lambda losses: losses.mean(skipna=False))
    rates = means.index.to_numpy(float)
    losses = means.fillna(np.inf).to_numpy(float)
    if not np.isfinite(losses.min()):
        return math.nan
    return float(losses[int(np.argmin(np.abs(np.log2(rates) - wanted)))] - losses.min())
