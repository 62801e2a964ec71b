"""Compute-equivalent gain: exact on noise-free ladders, against root finding, and its intervals by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import brentq, curve_fit

from llamax.scaling.gain import fit_base, gains, redraw, trend
from tests.scaling.made_ablation import FLOPS, base_loss

C = np.array(list(FLOPS.values()))


def test_the_law_is_scipys_least_squares() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        losses = base_loss(C) + 0.003 * rng.standard_normal(4)
        law = fit_base(C, losses[None])

        def curve(c: np.ndarray, e: float, a: float, k: float, scale: float = law.scale) -> np.ndarray:
            return e + a * (c / scale) ** -k

        best, _ = curve_fit(curve, C, losses, p0=(0.9, 0.3, 0.2), bounds=([0, 0, 0.005], [3, 5, 2]))
        ours, theirs = (float(((p - losses) ** 2).sum()) for p in (law.loss(C)[0], curve(C, *best)))
        assert ours <= theirs * 1.01 + 1e-10


def test_known_gains_come_back() -> None:
    truth = np.array([[1.0, 1.2, 1.5, 2.0], [0.8, 0.8, 0.8, 0.8]])
    found = gains(C, base_loss(C)[None], np.stack([C, C]), base_loss(C * truth)[None])
    assert found[0] == pytest.approx(truth, rel=0.01)  # the exponent is one of a grid
    slope = np.polyfit(np.log10(C), np.log10(truth[0]), 1)[0]
    assert trend(C, found)[0] == pytest.approx([10**slope, 1.0], rel=0.01)


def test_a_variant_that_costs_more_pays_for_it() -> None:
    """The same loss at 1.3 times the FLOPs is a gain of 1 / 1.3."""
    found = gains(C, base_loss(C)[None], 1.3 * C[None], base_loss(C)[None, None])
    assert found[0, 0] == pytest.approx([1 / 1.3] * 4, rel=1e-9)


def test_the_base_has_gain_one_whatever_the_misfit_of_its_law() -> None:
    bent = base_loss(C) + np.array([0.01, -0.02, 0.015, -0.005])
    assert gains(C, bent[None], C[None], bent[None, None])[0, 0] == pytest.approx([1.0] * 4)


def test_compute_inverts_the_law() -> None:
    law = fit_base(C, base_loss(C)[None])
    for loss in (1.4, 1.2, 1.08):
        root = brentq(lambda x, loss=loss: law.loss(np.array([np.exp(x)]))[0, 0] - loss, 10, 60)
        assert law.compute(np.array([[loss]]))[0, 0] == pytest.approx(np.exp(root), rel=1e-6)
    assert np.isinf(law.compute(law.E[:, None])[0, 0]), "no compute reaches the irreducible loss"


def test_two_sizes_make_a_power_law() -> None:
    law = fit_base(C[:2], np.array([[2.0, 1.5]]))
    assert law.E[0] == 0
    assert law.loss(C[:2])[0] == pytest.approx([2.0, 1.5], abs=2e-3)


def test_a_base_that_does_not_improve_has_no_law() -> None:
    law = fit_base(C, np.array([[1.0, 1.1, 1.2, 1.3]]))
    assert not law.fitted[0]
    assert np.isnan(law.compute(np.array([[1.1]]))).all()


def test_intervals_hold_the_true_gain() -> None:
    """400 ladders of three seeds, true gain 1.25: 95 % intervals of a size's gain and of the trend; resampling the
    three seeds instead, which has ten outcomes, holds it in 72 %."""
    rng = np.random.default_rng(2)
    noise, shared, seeds, variants = 0.004, 0.006, 3, 5
    truth = np.stack([base_loss(C), *[base_loss(1.25 * C)] * (variants - 1)])
    inside, drifts, resampled = [], [], []
    for k in range(400):
        own = noise * rng.standard_normal((seeds, variants, 4))
        y = truth + own + shared * rng.standard_normal((seeds, 1, 4))
        rest = y - y.mean(0) - y.mean(1, keepdims=True) + y.mean((0, 1))
        df = (seeds - 1) * (variants - 1)
        paired = np.sqrt((rest**2).sum((0, 1)) / df)
        between = np.maximum(0, y.mean(1).var(0, ddof=1) - paired**2 / variants)
        drawn = redraw(
            y.mean(0), paired, np.full(4, float(df)), np.sqrt(between), np.full(4, float(seeds)), draws=300, seed=k
        )
        found = gains(C, drawn[:, 0], np.stack([C] * (variants - 1)), drawn[:, 1:])
        low, high = np.quantile(found[:, 0], [0.025, 0.975], axis=0)
        inside.append((low < 1.25) & (high > 1.25))
        low, high = np.quantile(trend(C, found)[:, 0], [0.025, 0.975])
        drifts.append(low < 1 < high)
        again = y[rng.integers(0, seeds, (300, seeds))].mean(1)
        found = gains(C, again[:, 0], np.stack([C] * (variants - 1)), again[:, 1:])
        low, high = np.quantile(found[:, 0], [0.025, 0.975], axis=0)
        resampled.append((low <= 1.25) & (high >= 1.25))
    assert np.mean(inside) == pytest.approx(0.95, abs=0.025)
    assert np.mean(drifts) == pytest.approx(0.95, abs=0.03)
    assert 0.6 < np.mean(resampled) < 0.85
