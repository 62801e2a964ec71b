"""Approach 1 of Hoffmann et al. 2022 (arXiv:2203.15556, section 3.1): the lower envelope of the training curves.

At each level of compute, the run whose curve has the least loss there gives the best size and the tokens it has seen; a
power law through those gives N_opt(C) and D_opt(C). It assumes that a curve is, all along, as low as runs that stop
there would be: true of a schedule without a horizon or of runs with horizons of many lengths, not of one long cosine.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from llamax.errors import UserError
from llamax.scaling.approach2 import NARROW_DECADES, PowerLaw, fit_power_law
from llamax.scaling.laws import plain

LEVELS = 1500  # of compute, evenly spaced in log, as in the paper
FEWEST_SIZES = 4  # inside the envelope: below it an exponent is a line through a few steps


@dataclass(frozen=True)
class Envelope:
    """The best run at each level: all fields `[levels]`, levels at which no run was measured left out.

    n parameters, d tokens seen, loss in nats per token; edge: the best run there has the smallest or the largest size
    of all runs measured at that level, so that the true best may lie beyond.
    """

    flops: np.ndarray
    n: np.ndarray
    d: np.ndarray
    loss: np.ndarray
    run: np.ndarray
    edge: np.ndarray


@dataclass(frozen=True)
class Approach1Fit:
    """Power laws N_opt(C) and D_opt(C) through the envelope, without its edges; None where they are not determined."""

    n: PowerLaw | None
    d: PowerLaw | None
    envelope: Envelope
    n_runs: int
    n_points: int
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values: exponents, coefficients, and per size on the envelope the compute over which it is the best."""
        kept = ~self.envelope.edge
        sizes = []
        for size in np.unique(self.envelope.n):
            at = self.envelope.n == size
            low, high = self.envelope.flops[at].min(), self.envelope.flops[at].max()
            sizes.append(
                {"n": plain(size), "flops": [plain(low), plain(high)], "edge": bool(self.envelope.edge[at].any())}
            )
        return {
            "n_exponent": float(self.n.exponent) if self.n else None,
            "n_coefficient": float(np.exp(self.n.log_coefficient)) if self.n else None,
            "d_exponent": float(self.d.exponent) if self.d else None,
            "d_coefficient": float(np.exp(self.d.log_coefficient)) if self.d else None,
            "levels": int(kept.sum()),
            "edge_levels": int((~kept).sum()),
            "sizes": sizes,
            "n_runs": self.n_runs,
            "n_points": self.n_points,
            "warnings": list(self.warnings),
        }


def fit_approach1(frame: pd.DataFrame, levels: int = LEVELS) -> Approach1Fit:
    """Fit training curves. Columns: `run`, `n` parameters, `d` tokens seen, `flops` spent so far, `loss` there.

    Between two points of a curve loss is linear in log FLOPs, and so is log D. Smooth noisy losses first: an envelope
    takes the lucky dips. Raises UserError for missing columns, fewer than two runs with two points each, a run whose
    size changes, or no level of compute that two sizes share.
    """
    missing = [c for c in ("run", "n", "d", "flops", "loss") if c not in frame]
    if missing:
        raise UserError(
            f"columns {', '.join(missing)}: missing; approach 1 needs run, n, d, flops, loss of every point"
        )
    if levels < 2:
        raise UserError(f"levels: {levels}; give two or more levels of compute")
    curves = [(name, rows.sort_values("flops")) for name, rows in frame.groupby("run", sort=False) if len(rows) > 1]
    for name, rows in curves:
        if rows["n"].max() > rows["n"].min() * (1 + 1e-9):
            raise UserError(f"column n: run {name} has sizes {rows['n'].min():.6g} to {rows['n'].max():.6g}; one a run")
    if len({rows["n"].iloc[0] for _, rows in curves}) < 2:
        raise UserError(
            f"column run: {len(curves)} runs have two points or more; approach 1 needs curves of at least two sizes"
        )
    envelope = _envelope(curves, levels)
    keep = ~envelope.edge
    words = _words(curves, envelope)
    laws: list[PowerLaw | None] = [None, None]
    if keep.sum() >= 2 and np.unique(envelope.n[keep]).size >= 2:
        for i, values in enumerate((envelope.n, envelope.d)):
            line = fit_power_law(np.log(envelope.flops), np.log(values)[None], keep[None])
            laws[i] = PowerLaw(float(line.exponent[0]), float(line.log_coefficient[0]))
    else:
        words.append("fewer than two sizes are the best one somewhere inside the envelope: no exponent")
    return Approach1Fit(laws[0], laws[1], envelope, len(curves), len(frame), tuple(words))


def _envelope(curves: list[tuple[Any, pd.DataFrame]], levels: int) -> Envelope:
    low = min(rows["flops"].iloc[0] for _, rows in curves)
    high = max(rows["flops"].iloc[-1] for _, rows in curves)
    grid = np.geomspace(low, high, levels)
    size = np.array([rows["n"].iloc[0] for _, rows in curves], float)
    loss = np.stack([_along(rows, grid, rows["loss"].to_numpy(float)) for _, rows in curves])
    log_d = np.stack([_along(rows, grid, np.log(rows["d"].to_numpy(float))) for _, rows in curves])
    there = np.isfinite(loss)
    measured = np.stack([np.where(there, size[:, None], fill) for fill in (np.inf, -np.inf)])
    smallest, largest = measured[0].min(0), measured[1].max(0)
    use = smallest < largest  # two sizes or more
    if not use.any():
        raise UserError("columns n, flops: no level of compute at which two sizes were measured; curves must overlap")
    best = np.argmin(np.where(there, loss, np.inf), axis=0)[use]
    level = np.flatnonzero(use)
    n = size[best]
    return Envelope(
        flops=grid[use],
        n=n,
        d=np.exp(log_d[best, level]),
        loss=loss[best, level],
        run=np.array([name for name, _ in curves], object)[best],
        edge=(n == smallest[use]) | (n == largest[use]),
    )


def _along(rows: pd.DataFrame, grid: Float[np.ndarray, " levels"], values: np.ndarray) -> np.ndarray:
    return np.interp(np.log(grid), np.log(rows["flops"].to_numpy(float)), values, left=np.nan, right=np.nan)


def _words(curves: list[tuple[Any, pd.DataFrame]], envelope: Envelope) -> list[str]:
    words = []
    edge = float(envelope.edge.mean())
    if edge > 0.2:
        words.append(
            f"at {100 * edge:.0f} % of the levels of compute the best run is the smallest or largest one measured: "
            "these are left out of the fit"
        )
    kept = ~envelope.edge
    sizes = np.unique(envelope.n[kept]).size
    if 2 <= sizes < FEWEST_SIZES:
        words.append(f"only {sizes} sizes are the best one somewhere inside the envelope: the exponent is a few steps")
    if kept.any():
        decades = float(np.log10(envelope.flops[kept].max() / envelope.flops[kept].min()))
        if decades < NARROW_DECADES:
            words.append(
                f"the envelope spans under {NARROW_DECADES} decades ({decades:.2f}): exponents are weakly determined"
            )
    rough = sum(
        bool(np.any(np.diff(rows["loss"].to_numpy(float)) > 0.02 * rows["loss"].iloc[-1])) for _, rows in curves
    )
    if rough:
        words.append(
            f"{rough} of {len(curves)} curves rise by more than 2 % from one point to the next: smooth them first"
        )
    return words
