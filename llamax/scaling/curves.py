"""Loss curves: smoothing, several runs on one axis, spikes, collapse and the gradient's noise.

Functions on arrays, or on the long table that `llamax.curves` reads (one row a logged step, `run` says whose). Rows
are taken as evenly spaced, as the loop logs them. Losses are nats per token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float

from llamax.errors import UserError
from llamax.scaling.laws import Scalar

if TYPE_CHECKING:
    import pandas as pd

AXES = ("tokens", "flops", "seconds", "step")
MAD_TO_SIGMA = 1.4826  # of normal noise: standard deviation over median absolute deviation
LEAST_SCALE = 1e-3  # of the median: a curve smoother than this has no spikes below threshold x 0.1 %
LEAST_HISTORY = 10  # rows before a spike can be told from the first fall


# ---------------------------------------------------------------- smoothing
def ema(values: Float[np.ndarray, " rows"], half_life: Scalar) -> Float[np.ndarray, " rows"]:
    """Exponential moving average in which a row's weight halves every `half_life` rows, without bias at the start.

    The weights of the rows so far are made to add up to one (Adam's correction, arXiv:1412.6980, section 3), so the
    first value is the first row's. Values that are not finite have no weight; before the first finite one it is nan.

    Raises:
        UserError: a half-life that is not positive.
    """
    from scipy.signal import lfilter

    if not half_life > 0:
        raise UserError(f"half_life: {half_life}; give a positive number of rows")
    decay = 0.5 ** (1 / half_life)
    known = np.isfinite(values)
    weights, sums = (lfilter([1 - decay], [1, -decay], v) for v in (known.astype(float), np.where(known, values, 0.0)))
    return np.divide(sums, weights, out=np.full(len(values), np.nan), where=weights > 0)


def running_median(values: Float[np.ndarray, " rows"], window: int) -> Float[np.ndarray, " rows"]:
    """Median of the `window` rows around each row (an even window is made odd), of those there are at the ends.

    A spike narrower than half the window leaves no trace. Values that are not finite are left out.

    Raises:
        UserError: a window below 1.
    """
    import pandas as pd

    if window < 1:
        raise UserError(f"window: {window}; give at least one row")
    finite = pd.Series(np.where(np.isfinite(values), values, np.nan))
    return finite.rolling(2 * (window // 2) + 1, center=True, min_periods=1).median().to_numpy()


# ---------------------------------------------------------------- several runs on one axis
def axis_column(curves: pd.DataFrame, on: str, convention: str = "6n") -> str:
    """The column that `on` (tokens, flops, seconds, step) means; FLOPs by `convention`.

    Raises:
        UserError: another axis, or a table without that column.
    """
    column = f"flops_{convention}" if on == "flops" else on
    if on not in AXES:
        raise UserError(f"on: {on!r} is not an axis; give one of {', '.join(AXES)}")
    if column not in curves:
        raise UserError(f"curves: no column {column!r} to align on; it has {', '.join(map(str, curves.columns))}")
    return column


def align_curves(
    curves: pd.DataFrame,
    on: str = "tokens",
    *,
    column: str = "loss",
    points: int = 200,
    window: int = 1,
    convention: str = "6n",
) -> pd.DataFrame:
    """The `column` of every run on one grid of `on`: index the grid, one column a run, linear between logged rows.

    The grid is even in the logarithm, from the smallest to the largest value logged by any run; a run is nan where it
    has no rows on both sides, never extrapolated. `window`: rows of a running median taken first.

    Raises:
        UserError: no such axis or column, no rows, or fewer than two points.
    """
    import pandas as pd

    axis = axis_column(curves, on, convention)
    if column not in curves:
        raise UserError(f"curves: no column {column!r}; it has {', '.join(map(str, curves.columns))}")
    if points < 2:
        raise UserError(f"points: {points}; a grid has at least two")
    parts = {str(run): _sorted(rows, axis, column) for run, rows in curves.groupby("run", sort=False)}
    parts = {run: xy for run, xy in parts.items() if len(xy[0])}
    if not parts:
        raise UserError(f"curves: no run has rows with {axis} above zero and a finite {column}")
    low, high = min(x[0] for x, _ in parts.values()), max(x[-1] for x, _ in parts.values())
    grid = np.geomspace(low, high, points)
    grid[0], grid[-1] = low, high
    lines = {
        run: np.interp(grid, x, running_median(y, window), left=np.nan, right=np.nan) for run, (x, y) in parts.items()
    }
    return pd.DataFrame(lines, index=pd.Index(grid, name=axis))


def _sorted(rows: pd.DataFrame, axis: str, column: str) -> tuple[np.ndarray, np.ndarray]:
    good = rows[(rows[axis] > 0) & np.isfinite(rows[axis]) & np.isfinite(rows[column])].sort_values(axis)
    return good[axis].to_numpy(float), good[column].to_numpy(float)


# ---------------------------------------------------------------- spikes
@dataclass(frozen=True)
class Spike:
    """A stretch of rows far above the curve before it. `start`, `peak`, `end`: rows, the last of them included.

    height: nats above the baseline at the peak (inf where the loss was not finite). z: height in robust standard
    deviations. recovered: the curve came back to the baseline before the run ended.
    """

    start: int
    peak: int
    end: int
    height: float
    z: float
    recovered: bool


def find_spikes(
    values: Float[np.ndarray, " rows"], *, window: int = 40, threshold: Scalar = 6.0, back: Scalar = 2.0
) -> tuple[Spike, ...]:
    """Where a loss leaves its own recent past: more than `threshold` robust standard deviations above the median.

    The baseline of a row is the median of the `window` rows before it and the scale 1.4826 times their median absolute
    deviation from it, at least 0.1 % of the median. During a spike both stay what they were, so a loss that never comes
    back is one spike, `recovered=False`, to the end. It ends with the last row above `back` scales. Values that are
    not finite are spikes. Nothing is found in the first ten rows.

    Raises:
        UserError: a window below 10 rows, or thresholds that are not 0 < back <= threshold.
    """
    if window < LEAST_HISTORY:
        raise UserError(f"window: {window}; give at least {LEAST_HISTORY} rows")
    if not 0 < back <= threshold:
        raise UserError(f"threshold: {threshold} with back={back}; it must be 0 < back <= threshold")
    history: list[float] = []
    found: list[Spike] = []
    open_at: int | None = None
    centre, scale, z = math.nan, math.nan, np.zeros(len(values))
    for row, value in enumerate(values):
        if open_at is None and len(history) >= LEAST_HISTORY:
            centre, scale = _median_and_scale(np.array(history[-window:]))
        if math.isfinite(centre):
            z[row] = (value - centre) / scale if math.isfinite(value) else math.inf
        if open_at is None and z[row] > threshold:
            open_at = row
        elif open_at is not None and z[row] <= back:
            found.append(_spike(values, z, open_at, row - 1, centre, recovered=True))
            open_at = None
        if open_at is None and math.isfinite(value):
            history.append(float(value))
    if open_at is not None:
        found.append(_spike(values, z, open_at, len(values) - 1, centre, recovered=False))
    return tuple(found)


def _median_and_scale(values: np.ndarray) -> tuple[float, float]:
    centre = float(np.median(values))
    return centre, max(MAD_TO_SIGMA * float(np.median(np.abs(values - centre))), LEAST_SCALE * abs(centre), 1e-12)


def _spike(values: np.ndarray, z: np.ndarray, start: int, end: int, centre: float, *, recovered: bool) -> Spike:
    peak = start + int(np.argmax(z[start : end + 1]))
    height = float(values[peak] - centre) if math.isfinite(values[peak]) else math.inf
    return Spike(start, peak, end, height, float(z[peak]), recovered)


# ---------------------------------------------------------------- collapse
@dataclass(frozen=True)
class Collapse:
    """How nearly the curves of several sizes are one curve, each by its own horizon and final reducible loss.

    x: share of the horizon. normalized: (L - floor) / (L_final - floor), one column a run, index x. deviation: their
    standard deviation over their mean. noise: that of runs that differ by the seed alone, not normalized by their own
    end (None without such runs). score: mean of deviation over x, and ratio: over the mean of noise. Supercollapse is
    a deviation below the noise; share: of x where it is.
    """

    x: Float[np.ndarray, " points"]
    normalized: pd.DataFrame
    deviation: Float[np.ndarray, " points"]
    noise: Float[np.ndarray, " points"] | None
    score: float
    ratio: float | None
    share: float | None

    def as_dict(self) -> dict[str, Any]:
        """The numbers, without the curves."""
        return {"runs": len(self.normalized.columns), "score": self.score, "ratio": self.ratio, "share": self.share}


def collapse_curves(
    curves: pd.DataFrame,
    *,
    floor: Scalar,
    groups: Mapping[str, Any] | None = None,
    on: str = "flops",
    points: int = 100,
    window: int = 1,
    start: Scalar = 0.1,
    convention: str = "6n",
) -> Collapse:
    """Collapse of compute-optimal runs after Qiu et al. 2025 (arXiv:2507.02119, section 2.4).

    floor: the irreducible loss of a fitted law (its E), nats per token. groups: run -> what runs that differ by the
    seed alone share (their size); without two runs in some group there is no noise to compare with. window: rows of
    a running median over each curve first. start: the smallest share of the horizon that counts.

    Raises:
        UserError: fewer than two runs, a final loss at or below the floor, or a share outside (0, 1).
    """
    import pandas as pd

    if not 0 < start < 1:
        raise UserError(f"start: {start}; give a share of the horizon between 0 and 1")
    axis = axis_column(curves, on, convention)
    x = np.linspace(start, 1.0, points)
    lines: dict[str, np.ndarray] = {}
    for run, rows in curves.groupby("run", sort=False):
        at, loss = _sorted(rows, axis, "loss")
        if len(at) == 0 or at[0] > start * at[-1]:
            raise UserError(
                f"run {run}: its first row lies after {start:g} of its horizon; raise start or log more rows"
            )
        lines[str(run)] = np.interp(x, at / at[-1], running_median(loss, window)) - floor
        if not lines[str(run)][-1] > 0:
            raise UserError(f"run {run}: its final loss is not above floor={floor:g}; the law's E is too high for it")
    if len(lines) < 2:
        raise UserError(f"curves: {len(lines)} run; a collapse is of two or more")
    normalized = pd.DataFrame({run: line / line[-1] for run, line in lines.items()}, index=pd.Index(x, name="share"))
    deviation = _spread(list(normalized.to_numpy().T))
    alike: dict[Any, list[np.ndarray]] = {}
    for run, line in lines.items():
        if groups is not None and run in groups:
            alike.setdefault(groups[run], []).append(line)
    spreads = [_spread(members) for members in alike.values() if len(members) > 1]
    noise = np.sqrt(np.mean(np.square(spreads), axis=0)) if spreads else None
    score = float(deviation.mean())
    below: Bool[np.ndarray, " points"] | None = None if noise is None else deviation < noise
    return Collapse(
        x,
        normalized,
        deviation,
        noise,
        score,
        None if noise is None else score / float(noise.mean()),
        None if below is None else float(below.mean()),
    )


def _spread(lines: Sequence[np.ndarray]) -> np.ndarray:
    """Standard deviation over mean, at each point."""
    return np.std(lines, axis=0, ddof=1) / np.mean(lines, axis=0)


# ---------------------------------------------------------------- the gradient's noise
@dataclass(frozen=True)
class NoiseScale:
    """The simple noise scale of arXiv:1812.06162: `scale` = tr(Σ) / |G|², in the unit of the batches.

    signal: |G|², the squared norm of the true gradient; noise: tr(Σ), the summed variance of one example's. rows: how
    many estimates were averaged. A batch much below `scale` is mostly noise; much above it, wasted.
    """

    scale: float
    signal: float
    noise: float
    rows: int


def noise_scale(
    small_norm: Float[np.ndarray, " rows"], big_norm: Float[np.ndarray, " rows"], small: Scalar, big: Scalar
) -> NoiseScale:
    """B_simple from gradient norms at two batch sizes (arXiv:1812.06162, appendix A.1).

    small_norm, big_norm: norms of the gradient of batches of `small` and `big` examples (or tokens), of rows at about
    the same weights; a small norm may be the root mean square over several batches. |G|² = (B_big |G_big|² - B_small
    |G_small|²) / (B_big - B_small) and tr(Σ) = (|G_small|² - |G_big|²) / (1/B_small - 1/B_big) are averaged over rows
    before they are divided: their ratio row by row is biased. Rows that are not finite are left out.

    Raises:
        UserError: batches that are not 0 < small < big, no rows, or an average |G|² that is not positive: too few rows.
    """
    if not 0 < small < big:
        raise UserError(f"small={small:g}, big={big:g}: give two batch sizes, the smaller first")
    known = np.isfinite(small_norm) & np.isfinite(big_norm)
    if not known.any():
        raise UserError("gradient norms: no row has both; log them with log.gradient_noise=true")
    low, high = np.square(small_norm[known]), np.square(big_norm[known])
    signal = float(np.mean((big * high - small * low) / (big - small)))
    noise = float(np.mean((low - high) / (1 / small - 1 / big)))
    if not signal > 0:
        raise UserError(
            f"gradient norms: |G|² averages to {signal:.3g} over {int(known.sum())} rows, so noise hides the gradient; "
            "average more rows, or compare a larger batch"
        )
    return NoiseScale(noise / signal, signal, noise, int(known.sum()))
