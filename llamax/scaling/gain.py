"""Compute-equivalent gain: how much more compute the base would need for a variant's loss, and its trend with scale.

gain = C_base(loss of the variant) / C_variant (Davidson et al. 2023, arXiv:2312.07413), with C_base the inverse of the
base's own loss against compute over the ladder, L = E + A C^-a. At each size it is divided by the same figure of the
base, which is 1 but for the misfit of the law, so that the base's gain is 1 everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

EXPONENTS = np.geomspace(0.005, 2.0, 400)  # of the law; between two of them the loss moves by far less than any noise
DRAWS = 2000


@dataclass(frozen=True)
class BaseLaw:
    """L = E + A (C / scale)^-a in nats per token, one law a draw; `fitted` where the losses fall with compute."""

    E: Float[np.ndarray, " draws"]
    A: Float[np.ndarray, " draws"]
    a: Float[np.ndarray, " draws"]
    scale: float

    @property
    def fitted(self) -> Bool[np.ndarray, " draws"]:
        return self.A > 0

    def loss(self, flops: Float[np.ndarray, " sizes"]) -> Float[np.ndarray, "draws sizes"]:
        """Loss at `flops` of each draw."""
        return self.E[:, None] + self.A[:, None] * (flops[None] / self.scale) ** -self.a[:, None]

    def compute(self, loss: Float[np.ndarray, "draws sizes"]) -> Float[np.ndarray, "draws sizes"]:
        """Training FLOPs at which the base reaches `loss`: inf at or below E, nan where no law was fitted."""
        over = (loss - self.E[:, None]) / np.where(self.fitted, self.A, np.nan)[:, None]
        with np.errstate(divide="ignore", over="ignore"):
            return self.scale * np.maximum(over, 0.0) ** (-1 / self.a[:, None])


def fit_base(flops: Float[np.ndarray, " sizes"], losses: Float[np.ndarray, "draws sizes"]) -> BaseLaw:
    """Least squares in nats, one law a row: E >= 0, A and a free; with two sizes E = 0.

    For a given a the loss is linear in E and A, which are solved in closed form (variable projection); a is the best of
    EXPONENTS.
    """
    scale = float(np.exp(np.log(flops).mean()))
    x = (flops / scale)[None] ** -EXPONENTS[:, None]  # [exponent, size]
    mean_x, mean_y = x.mean(1), losses.mean(1)
    spread = ((x - mean_x[:, None]) ** 2).sum(1)
    slope = (losses @ (x - mean_x[:, None]).T) / spread  # [draw, exponent]
    offset = mean_y[:, None] - slope * mean_x
    through = (losses @ x.T) / (x**2).sum(1)
    free = (offset >= 0) & (len(flops) > 2)
    E, A = np.where(free, offset, 0.0), np.where(free, slope, through)
    wrong = ((losses[:, None] - E[:, :, None] - A[:, :, None] * x) ** 2).sum(2)
    best = np.argmin(wrong, axis=1)
    rows = np.arange(len(losses))
    falls = (losses * (np.log(flops) - np.log(scale))).sum(1) < 0
    return BaseLaw(E[rows, best], np.where(falls, A[rows, best], 0.0), EXPONENTS[best], scale)


def gains(
    base_flops: Float[np.ndarray, " sizes"],
    base_loss: Float[np.ndarray, "draws sizes"],
    flops: Float[np.ndarray, "variants sizes"],
    loss: Float[np.ndarray, "draws variants sizes"],
) -> Float[np.ndarray, "draws variants sizes"]:
    """Compute-equivalent gain of every draw, variant and size; above 1 the variant saves compute."""
    law = fit_base(base_flops, base_loss)
    own = law.compute(base_loss) / base_flops
    draws, variants, sizes = loss.shape
    wide = law.compute(loss.reshape(draws, variants * sizes)).reshape(loss.shape)
    with np.errstate(invalid="ignore"):
        return wide / flops[None] / own[:, None]


def trend(
    base_flops: Float[np.ndarray, " sizes"], gain: Float[np.ndarray, "draws variants sizes"]
) -> Float[np.ndarray, "draws variants"]:
    """The factor by which a gain changes for each decade of compute: 10 to the slope of log10 gain by least squares."""
    x = np.log10(base_flops) - np.log10(base_flops).mean()
    with np.errstate(divide="ignore", invalid="ignore"):
        return 10 ** ((np.log10(gain) * x).sum(2) / (x**2).sum())


def redraw(
    means: Float[np.ndarray, "variants sizes"],
    paired: Float[np.ndarray, " sizes"],
    df: Float[np.ndarray, " sizes"],
    shared: Float[np.ndarray, " sizes"],
    seeds: Float[np.ndarray, " sizes"],
    draws: int = DRAWS,
    seed: int = 0,
) -> Float[np.ndarray, "draws variants sizes"]:
    """Means as other seeds might have had them: the pooled noise, itself redrawn, over the number of seeds.

    The variance of a draw is df x paired^2 / chi^2(df), so that an effect has the t interval of its block design, and
    what a seed does to all variants of a size alike is drawn once for them. Resampling three seeds would have ten
    outcomes and intervals a quarter too narrow.
    """
    rng = np.random.default_rng(seed)
    scale = paired * np.sqrt(df / rng.chisquare(df, (draws, len(df))))
    own = rng.standard_normal((draws, *means.shape)) * scale[:, None]
    common = rng.standard_normal((draws, 1, means.shape[1])) * shared
    return means + (own + common) / np.sqrt(seeds)
