"""What a reader should know of the runs behind a fit, in words: schedules, repeats, undertraining, replicates."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from llamax.errors import UserError
from llamax.scaling.laws import Cost, Law, optimal_allocation

MOST_EPOCHS = 4.0  # beyond, a repeated token is worth visibly less than a new one (arXiv:2305.16264)
UNDERTRAINED = 30.0  # tokens per parameter this many times below the optimum at the same compute
FEW_GROUPS = 10
FAR = 10.0  # times the compute measured
NARROW_DECADES = 1.5
CHECKPOINTS = 8  # lengths a size, from which on they look like checkpoints
RUN_NAMES = ("run", "run_id", "run_name", "name", "id", "model", "model_name", "experiment", "hash")
FEWEST_DRAWS = 10  # of an interval (`bootstrap.interval`)


def run_words(frame: pd.DataFrame, epochs: str | None = None) -> list[str]:
    """Warnings from the columns of a ledger, or from an `epochs` column by another name."""
    words = []
    kinds = [c for c in frame if str(c).startswith("schedule.") and frame[c].nunique(dropna=True) > 1]
    if "schedule.kind" in kinds:
        names = ", ".join(sorted(map(str, frame["schedule.kind"].dropna().unique())))
        words.append(f"mixed schedules ({names}): a law assumes runs that decayed alike; fit each kind alone")
    column = epochs or "epochs"
    if column in frame:
        passes = pd.to_numeric(frame[column], errors="coerce").to_numpy(float)
        if (repeated := passes > MOST_EPOCHS).any():
            words.append(
                f"repeated data: {int(repeated.sum())} of {len(frame)} runs saw their tokens more than "
                f"{MOST_EPOCHS:g} times (up to {np.nanmax(passes):.1f}); --law repeated has a term for it"
            )
    if "status" in frame and (frame["status"].isin(["diverged", "unfinished"])).any():
        words.append("some runs diverged or did not finish: leave them out")
    return words


def checkpoint_words(frame: pd.DataFrame, columns: Mapping[str, str | None]) -> list[str]:
    """A warning where rows look like checkpoints of one run and no column says which are: of one size, many lengths.

    `columns`: names in `frame` of n, d (or flops) and run, None where there is none.
    """
    size, length = columns.get("n"), columns.get("d") or columns.get("flops")
    if columns.get("run") or size is None or length is None or not {size, length} <= set(frame):
        return []
    what = "resamples take them for independent, which makes intervals too narrow, and a run's middle is not its end"
    by_name = {str(name).lower(): str(name) for name in frame}
    for label in (by_name[name] for name in RUN_NAMES if name in by_name):
        rows = frame.groupby(label)
        several = rows[length].nunique() > 1
        if label not in (size, length) and several.mean() > 0.5 and (rows[size].nunique() == 1).all():
            return [f"rows that share {label!r} look like checkpoints of one run: {what}; name it: --group {label}"]
    lengths = frame.groupby(size)[length].nunique()
    if lengths.mean() >= CHECKPOINTS:
        return [
            f"{len(lengths)} sizes have {lengths.mean():.0f} lengths each: if these are checkpoints of one run, "
            f"{what}; name the run: --group COLUMN"
        ]
    return []


def undertrained_words(runs: pd.DataFrame, law: Law, cost: Cost) -> list[str]:
    """A warning where tokens per parameter lie far below the fitted optimum at the same compute."""
    best = np.array([_ratio(law, c, cost) for c in runs["flops"]])
    own = (runs["d"] / runs["n"]).to_numpy(float)
    low = own * UNDERTRAINED < best
    if not low.any():
        return []
    return [
        f"undertrained: {int(low.sum())} of {len(runs)} runs have under 1/{UNDERTRAINED:g} of the fitted optimum's "
        f"tokens per parameter at their compute (least {own.min():.2g}); fit again without them and compare"
    ]


def group_words(runs: pd.DataFrame) -> list[str]:
    """A warning where a cluster bootstrap has few clusters to draw from."""
    if "run" not in runs or (groups := runs["run"].nunique()) >= FEW_GROUPS:
        return []
    return [
        f"only {groups} group{'s' * (groups != 1)}: intervals from resampling so few are rough and usually too narrow"
    ]


def distance_words(runs: pd.DataFrame, flops: Any) -> list[str]:
    """A warning where the target lies far outside the compute of the runs."""
    least, largest = float(runs["flops"].min()), float(runs["flops"].max())
    if flops > FAR * largest:
        return [f"the target is {flops / largest:.3g} times the largest budget measured: a long extrapolation"]
    if flops < least / FAR:
        return [
            f"the target is {flops / least:.3g} times the smallest budget measured: a long extrapolation; check the "
            "units of the FLOPs"
        ]
    return []


def span_words(runs: pd.DataFrame) -> list[str]:
    """A warning where the runs of a parametric fit span little compute: it cannot be told how they scale."""
    decades = float(np.log10(runs["flops"].max() / runs["flops"].min()))
    if decades >= NARROW_DECADES:
        return []
    return [f"training FLOPs span under {NARROW_DECADES} decades ({decades:.2f}): exponents are weakly determined"]


def bootstrap_words(draws: int, seed: int) -> list[str]:
    """A warning where `draws` resamples are too few for an interval. Raises UserError for a negative number."""
    if draws < 0:
        raise UserError(f"bootstrap: {draws}; give the number of resamples, 0 for no intervals")
    if seed < 0:
        raise UserError(f"seed: {seed}; give a whole number, 0 or more")
    if 0 < draws < FEWEST_DRAWS:
        return [
            f"bootstrap: {draws} resamples are too few for an interval; give at least {FEWEST_DRAWS}, better hundreds"
        ]
    return []


def check_noise(noise: Any) -> None:
    """Raises UserError unless a seed noise is None, `replicates`, or a positive number of log loss."""
    if isinstance(noise, (int, float)) and not 0 < noise < float("inf"):
        raise UserError(f"seed noise: {noise}; give its size in log loss, such as 0.005, or replicates")


def seed_scatter(runs: pd.DataFrame) -> tuple[float, int]:
    """Noise between seeds: root mean square deviation of log loss inside cells of equal `n` and `d`, and its freedom.

    Raises UserError where fewer than three degrees of freedom (replicates beyond the first of a cell) determine it.
    """
    cells = pd.DataFrame({c: np.round(np.log(runs[c].to_numpy(float)), 6) for c in ("n", "d")})
    z = pd.Series(np.log(runs["loss"].to_numpy(float)))
    deviation = z - z.groupby([cells["n"], cells["d"]]).transform("mean")
    freedom = len(z) - cells.drop_duplicates().shape[0]
    if freedom < 3:
        raise UserError(
            f"seed noise: {freedom} replicates of equal n and d; three are the least that can tell it, so give a number"
        )
    return float(np.sqrt((deviation**2).sum() / freedom)), int(freedom)


def _ratio(law: Law, flops: Any, cost: Cost) -> float:
    best = optimal_allocation(law, float(flops), cost)
    return float(best.d / best.n)
