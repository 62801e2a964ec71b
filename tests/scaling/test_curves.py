"""Curve tools against brute force, and against curves whose truth was put there."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from llamax.accounting import bits_per_byte
from llamax.errors import UserError
from llamax.scaling import align_curves, collapse_curves, ema, find_spikes, noise_scale, running_median


def table(**runs: tuple[np.ndarray, np.ndarray]) -> pd.DataFrame:
    """Long form of (tokens, loss) by run, as `llamax.curves` reads it; 10 tokens a step, 6e3 FLOPs a token."""
    parts = [
        pd.DataFrame({"run": run, "step": x / 10, "tokens": x, "loss": y, "seconds": x / 100, "flops_6n": 6e3 * x})
        for run, (x, y) in runs.items()
    ]
    return pd.concat(parts, ignore_index=True)


# ---------------------------------------------------------------- smoothing
def test_ema_is_the_weighted_mean_of_the_past() -> None:
    values = np.random.default_rng(0).normal(size=60)
    values[[0, 17, 18]] = np.nan
    found = ema(values, half_life=7.0)
    assert math.isnan(found[0])
    for row in range(1, 60):
        weights = 0.5 ** (np.arange(row, -1, -1) / 7.0) * np.isfinite(values[: row + 1])
        expected = (weights * np.nan_to_num(values[: row + 1])).sum() / weights.sum()
        assert found[row] == pytest.approx(expected, rel=1e-12)


def test_ema_of_a_constant_is_the_constant_from_the_start() -> None:
    np.testing.assert_allclose(ema(np.full(5, 2.5), 100.0), 2.5)


def test_running_median_is_brute_force() -> None:
    values = np.random.default_rng(1).normal(size=40)
    values[5] = np.inf
    for window, half in ((1, 0), (6, 3), (7, 3)):
        found = running_median(values, window)
        for row in range(40):
            near = values[max(0, row - half) : row + half + 1]
            near = near[np.isfinite(near)]
            assert found[row] == pytest.approx(np.median(near)) if len(near) else math.isnan(found[row])


@pytest.mark.parametrize("call", [lambda: ema(np.ones(3), 0.0), lambda: running_median(np.ones(3), 0)])
def test_smoothing_refuses_no_width(call) -> None:
    with pytest.raises(UserError, match=r"half_life: 0|window: 0"):
        call()


# ---------------------------------------------------------------- alignment
def test_alignment_interpolates_and_never_extrapolates() -> None:
    short, long = np.arange(10.0, 110, 10), np.arange(25.0, 425, 25)
    runs = table(a=(short, 3 - short / 100), b=(long, 5 - long / 200))
    for on, scale in (("tokens", 1.0), ("seconds", 0.01), ("flops", 6e3), ("step", 0.1)):
        found = align_curves(runs, on, points=50)
        x = found.index.to_numpy() / scale
        assert (x[0], x[-1]) == pytest.approx((10, 400))
        np.testing.assert_allclose(np.diff(np.log(x)), np.log(40) / 49)
        for run, line, (low, high) in (("a", 3 - x / 100, (10, 100)), ("b", 5 - x / 200, (25, 400))):
            inside = (x >= low) & (x <= high)
            np.testing.assert_allclose(found[run][inside], line[inside])
            assert found[run][~inside].isna().all()


def test_alignment_leaves_out_what_is_not_finite_and_sorts() -> None:
    x = np.array([30.0, 10, 20, 40])
    y = np.array([3.0, 1, np.nan, 4])
    found = align_curves(table(a=(x, y)), points=7)
    np.testing.assert_allclose(found["a"], np.interp(found.index, [10, 30, 40], [1, 3, 4]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"on": "epochs"}, "on: 'epochs'"),
        ({"on": "flops", "convention": "palm"}, "flops_palm"),
        ({"column": "eval"}, "no column 'eval'"),
        ({"points": 1}, "points: 1"),
    ],
)
def test_alignment_refuses(options: dict, words: str) -> None:
    x = np.arange(1.0, 5)
    with pytest.raises(UserError, match=words):
        align_curves(table(a=(x, x)), **options)


def test_alignment_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="no run has rows"):
        align_curves(table(a=(np.arange(1.0, 4), np.full(3, np.nan))))


# ---------------------------------------------------------------- spikes
def falling(rows: int = 400, noise: float = 0.02, seed: int = 0) -> np.ndarray:
    step = np.arange(1, rows + 1)
    return 2 + 4 * step**-0.5 + np.random.default_rng(seed).normal(0, noise, rows)


def test_a_spike_is_found_where_it_was_put() -> None:
    curve = falling()
    curve[200:212] += np.linspace(1.0, 0.2, 12)
    curve[300:] += 0.5  # and a loss that never comes back
    first, second = find_spikes(curve)
    assert (first.start, first.peak, first.recovered) == (200, 200, True)
    assert first.end in range(209, 213)
    assert first.height == pytest.approx(1.0, abs=0.1)
    assert (second.start, second.end, second.recovered) == (300, 399, False)


def test_quiet_curves_have_no_spikes() -> None:
    """400 curves of 400 rows: normal noise leaves its median by 6 robust deviations about never."""
    assert sum(len(find_spikes(falling(seed=seed))) for seed in range(50)) <= 1
    assert find_spikes(falling(noise=0.0)) == ()
    assert find_spikes(np.full(100, 3.0)) == ()


def test_z_is_the_robust_distance() -> None:
    curve = falling()
    curve[250] += 0.8
    (spike,) = find_spikes(curve, window=40)
    before = curve[210:250]
    scale = 1.4826 * np.median(np.abs(before - np.median(before)))
    assert spike.z == pytest.approx((curve[250] - np.median(before)) / scale)


def test_a_loss_that_is_not_finite_is_a_spike() -> None:
    curve = falling()
    curve[100] = np.nan
    curve[398:] = np.inf
    first, last = find_spikes(curve)
    assert (first.start, first.end, first.height, first.recovered) == (100, 100, math.inf, True)
    assert (last.start, last.end, last.recovered) == (398, 399, False)


def test_spikes_refuse_impossible_thresholds() -> None:
    with pytest.raises(UserError, match="window: 5"):
        find_spikes(falling(), window=5)
    with pytest.raises(UserError, match="back"):
        find_spikes(falling(), threshold=1.0, back=2.0)


# ---------------------------------------------------------------- collapse
def family(noise: float, *, bend: float = 0.0, seeds: int = 3) -> tuple[pd.DataFrame, dict[str, int]]:
    """Curves L = 1.5 + L_final(N) f(x), one f for all sizes but for `bend`, and noise that is common to a run."""
    rng, runs, groups = np.random.default_rng(0), {}, {}
    x = np.linspace(0.01, 1, 300)
    for size in (1, 2, 4, 8):
        for seed in range(seeds):
            shape = x ** -(0.4 + bend * math.log(size))
            reducible = (1 + noise * rng.normal()) * size**-0.3 * shape
            runs[f"{size}-{seed}"] = (x * 1000 * size, 1.5 + reducible)
            groups[f"{size}-{seed}"] = size
    return table(**runs), groups


def test_curves_of_one_shape_collapse() -> None:
    curves, groups = family(0.01)
    found = collapse_curves(curves, floor=1.5, groups=groups)
    assert found.score < 1e-3
    assert found.noise is not None
    np.testing.assert_allclose(found.noise.mean(), 0.01, rtol=0.5)
    assert found.ratio is not None
    assert found.ratio < 0.1
    assert found.share == pytest.approx(1.0)


def test_curves_of_different_shapes_do_not() -> None:
    curves, groups = family(0.01, bend=0.1)
    found = collapse_curves(curves, floor=1.5, groups=groups)
    lines = np.array([found.x ** -(0.4 + 0.1 * math.log(size)) for size in (1, 2, 4, 8) for _ in range(3)])
    np.testing.assert_allclose(found.deviation, lines.std(0, ddof=1) / lines.mean(0), rtol=0.02, atol=1e-6)
    assert found.ratio is not None
    assert found.ratio > 3


def test_collapse_without_seeds_has_no_noise() -> None:
    curves, groups = family(0.0, seeds=1)
    found = collapse_curves(curves, floor=1.5, groups=groups)
    assert (found.noise, found.ratio, found.share) == (None, None, None)
    assert found.as_dict()["runs"] == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"floor": 2.6}, "not above floor"),
        ({"floor": 1.5, "start": 0.001}, "first row lies after"),
        ({"floor": 1.5, "start": 1.0}, "start: 1"),
    ],
)
def test_collapse_refuses(options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        collapse_curves(family(0.0)[0], **options)


# ---------------------------------------------------------------- the gradient's noise
def test_noise_scale_of_gradients_of_known_covariance() -> None:
    """Gradients drawn around a known mean: B_simple is their variance over its squared norm."""
    rng = np.random.default_rng(0)
    mean, deviations = rng.normal(0, 0.1, 20), rng.uniform(0.5, 1.5, 20)
    examples = mean + deviations * rng.normal(size=(3000, 32, 20))
    big = np.linalg.norm(examples.mean(1), axis=1)
    micro = examples.reshape(3000, 8, 4, 20).mean(2)
    small = np.sqrt(np.square(np.linalg.norm(micro, axis=2)).mean(1))
    found = noise_scale(small, big, 4, 32)
    assert found.signal == pytest.approx(np.sum(mean**2), rel=0.05)
    assert found.noise == pytest.approx(np.sum(deviations**2), rel=0.02)
    assert found.scale == pytest.approx(np.sum(deviations**2) / np.sum(mean**2), rel=0.05)


def test_noise_scale_refuses() -> None:
    norms = np.ones(3)
    with pytest.raises(UserError, match="smaller first"):
        noise_scale(norms, norms, 8, 8)
    with pytest.raises(UserError, match="no row has both"):
        noise_scale(norms, np.full(3, np.nan), 4, 8)
    with pytest.raises(UserError, match="noise hides the gradient"):
        noise_scale(2 * norms, norms, 4, 8)


# ---------------------------------------------------------------- bits
def test_bits_per_byte_of_known_codes() -> None:
    assert bits_per_byte(math.log(256), 10, 10) == pytest.approx(8)  # a uniform byte
    assert bits_per_byte(math.log(65536), 5, 10) == pytest.approx(8)  # two bytes a token
    with pytest.raises(UserError, match="text_bytes: 0"):
        bits_per_byte(1.0, 1, 0)
