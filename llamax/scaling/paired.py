"""Paired comparisons of runs that share seeds: contrasts with t intervals, pooled noise, Holm, what could be detected.

Losses are an array [seed, variant]. A run is modelled as variant + seed + noise (a randomized block design, Fisher
1935): what a seed does to all variants alike (its data order) cancels, and the noise that is left is pooled over them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float

from llamax.errors import UserError

ALPHA, POWER = 0.05, 0.8


@dataclass(frozen=True)
class Noise:
    """The scatter of one group of runs, in the unit of the losses.

    `paired`: standard deviation of a run once variant and seed are taken out, with `df` degrees of freedom (0: a single
    seed, and then nan). `seeds`: of the runs of one variant over seeds, the variants' variances averaged; what an
    unpaired comparison would have to live with. `shared`: of what a seed does to all variants alike.
    """

    paired: float
    df: int
    seeds: float
    shared: float


@dataclass(frozen=True)
class Contrasts:
    """Weighted sums of variants' means, one entry a contrast.

    `estimate`; `se`, `low`, `high`, `p` (two-sided, against zero) by the pooled noise with its degrees of freedom;
    `own_low`, `own_high`, `own_p` by the contrast's own scatter over seeds, as a paired t test. nan for a single seed.
    """

    estimate: np.ndarray
    se: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p: np.ndarray
    own_low: np.ndarray
    own_high: np.ndarray
    own_p: np.ndarray


def noise_of(losses: Float[np.ndarray, "seeds variants"]) -> Noise:
    """Residual, seed and shared standard deviations of a table of two or more variants.

    Raises:
        UserError: fewer than two variants, or a loss that is not finite.
    """
    _check(losses)
    seeds, variants = losses.shape
    df = (seeds - 1) * (variants - 1)
    if df == 0:
        return Noise(np.nan, 0, np.nan, np.nan)
    rest = losses - losses.mean(0) - losses.mean(1, keepdims=True) + losses.mean()
    paired = float((rest**2).sum() / df)
    between = variants * float(losses.mean(1).var(ddof=1))  # its mean is paired + variants x shared
    shared = max(0.0, (between - paired) / variants)
    return Noise(paired**0.5, df, float(losses.var(0, ddof=1).mean()) ** 0.5, shared**0.5)


def contrasts_of(
    losses: Float[np.ndarray, "seeds variants"], weights: Float[np.ndarray, "contrasts variants"], level: float = 0.95
) -> Contrasts:
    """Estimates and t intervals of `weights @ mean loss`; the weights of each contrast add up to zero.

    The pooled interval takes the noise to be alike in all variants; the own one does not.

    Raises:
        UserError: weights that do not add up to zero, or as `noise_of`.
    """
    from scipy.stats import t

    if np.abs(weights.sum(1)).max(initial=0.0) > 1e-9:
        raise UserError("a contrast's weights add up to zero, or it would compare losses with nothing")
    noise, seeds = noise_of(losses), len(losses)
    estimate = weights @ losses.mean(0)
    nothing = np.full(len(weights), np.nan)
    if noise.df == 0:
        return Contrasts(estimate, *(nothing,) * 7)
    se = noise.paired * np.sqrt((weights**2).sum(1) / seeds)
    own = (losses @ weights.T).std(0, ddof=1) / np.sqrt(seeds)
    reach, own_reach = t.ppf(0.5 + level / 2, noise.df) * se, t.ppf(0.5 + level / 2, seeds - 1) * own
    with np.errstate(divide="ignore", invalid="ignore"):
        p = 2 * t.sf(np.abs(estimate) / se, noise.df)
        own_p = 2 * t.sf(np.abs(estimate) / own, seeds - 1)
    return Contrasts(
        estimate, se, estimate - reach, estimate + reach, p, estimate - own_reach, estimate + own_reach, own_p
    )


def holm(p: Float[np.ndarray, " tests"]) -> Float[np.ndarray, " tests"]:
    """Adjusted p values that hold the chance of any false finding among all tests (Holm 1979); nan stays and is no
    test."""
    result = np.full(len(p), np.nan)
    known = np.flatnonzero(np.isfinite(p))
    order = known[np.argsort(p[known], kind="stable")]
    steps = np.minimum(1.0, p[order] * np.arange(len(order), 0, -1))
    result[order] = np.maximum.accumulate(steps) if len(order) else steps
    return result


def detectable(se: float, df: int, alpha: float = ALPHA, power: float = POWER) -> float:
    """The smallest true effect that a two-sided t test at `alpha` finds with probability `power`, in the unit of `se`.

    For normal noise: the power at a true effect d is that of a noncentral t statistic (Johnson and Welch 1940), here
    the normal power averaged over what the estimated scatter can be. nan without degrees of freedom.
    """
    from scipy.optimize import brentq
    from scipy.stats import t

    if df < 1 or not np.isfinite(se):
        return float("nan")
    critical = float(t.ppf(1 - alpha / 2, df))
    nodes, weights = _scatter(df)

    def missing(shift: float) -> float:
        return float(weights @ (_above(critical * nodes - shift) + _above(critical * nodes + shift))) - power

    high = critical + 2.0
    while missing(high) < 0:
        high *= 2
    return se * float(brentq(missing, 0.0, high, xtol=1e-8))


@lru_cache(maxsize=64)
def _scatter(df: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of estimated / true standard deviation with `df` degrees of freedom (Gauss-Legendre in its
    probability)."""
    from scipy.stats import chi2

    x, weights = np.polynomial.legendre.leggauss(400)
    return np.sqrt(chi2.ppf((x + 1) / 2, df) / df), weights / 2


def _above(x: np.ndarray) -> np.ndarray:
    from scipy.special import ndtr

    return ndtr(-x)


def uneven(losses: Float[np.ndarray, "seeds variants"], alpha: float = 0.01) -> list[int]:
    """Variants whose scatter is larger than the others' by an F test at `alpha` over the number of variants."""
    from scipy.stats import f

    seeds, variants = losses.shape
    if seeds < 2 or variants < 3:
        return []
    rest = losses - losses.mean(0) - losses.mean(1, keepdims=True) + losses.mean()
    each = (rest**2).sum(0)
    own, others = each / (seeds - 1), (each.sum() - each) / ((seeds - 1) * (variants - 2))
    with np.errstate(divide="ignore", invalid="ignore"):
        p = f.sf(own / others, seeds - 1, (seeds - 1) * (variants - 2))
    return [int(i) for i in np.flatnonzero(p < alpha / variants)]


def _check(losses: np.ndarray) -> None:
    if losses.ndim != 2 or losses.shape[1] < 2 or losses.shape[0] < 1:
        raise UserError(f"losses of shape {losses.shape}: give [seeds, variants] with a base and one variant or more")
    if not np.isfinite(losses).all():
        raise UserError("losses: not all are finite numbers; leave runs that diverged out")
