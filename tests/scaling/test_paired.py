"""Contrasts, noise, Holm and detectable effects against SciPy, a regression with dummies, and simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from llamax.errors import UserError
from llamax.scaling.paired import contrasts_of, detectable, holm, noise_of, uneven


def table(seeds: int, variants: int, *, noise: float = 1.0, shared: float = 3.0, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return shared * rng.standard_normal((seeds, 1)) + noise * rng.standard_normal((seeds, variants))


def to_base(variants: int) -> np.ndarray:
    return np.eye(variants)[1:] - np.eye(variants)[0]


@pytest.mark.parametrize("seeds", [2, 3, 7])
def test_own_interval_is_scipys_paired_t_test(seeds: int) -> None:
    y = table(seeds, 4)
    found = contrasts_of(y, to_base(4), level=0.9)
    for i in range(3):
        test = stats.ttest_rel(y[:, i + 1], y[:, 0])
        low, high = test.confidence_interval(0.9)
        assert found.own_p[i] == pytest.approx(test.pvalue)
        assert (found.own_low[i], found.own_high[i]) == pytest.approx((low, high))


def test_with_one_variant_the_pooled_interval_is_the_paired_one() -> None:
    found = contrasts_of(table(4, 2), to_base(2))
    assert (found.low[0], found.high[0], found.p[0]) == pytest.approx(
        (found.own_low[0], found.own_high[0], found.own_p[0])
    )


def test_the_pooled_interval_is_that_of_a_regression_with_dummies() -> None:
    """Ordinary least squares of loss on variant and seed dummies: estimates, standard errors, degrees of freedom."""
    seeds, variants = 4, 5
    y = table(seeds, variants)
    rows = [(s, v) for s in range(seeds) for v in range(variants)]
    x = np.array([[v == k for k in range(1, variants)] + [s == k for k in range(seeds)] for s, v in rows], float)
    beta, rest, rank, _ = np.linalg.lstsq(x, y.reshape(-1), rcond=None)
    df = len(rows) - rank
    se = np.sqrt(np.diag(np.linalg.inv(x.T @ x)) * rest[0] / df)[: variants - 1]
    found = contrasts_of(y, to_base(variants))
    assert found.estimate == pytest.approx(beta[: variants - 1])
    assert found.se == pytest.approx(se)
    assert noise_of(y).df == df
    assert found.p == pytest.approx(2 * stats.t.sf(np.abs(beta[: variants - 1]) / se, df))


def test_noise_finds_what_was_put_in() -> None:
    found = noise_of(table(2000, 6, noise=0.5, shared=2.0))
    assert found.paired == pytest.approx(0.5, rel=0.03)
    assert found.shared == pytest.approx(2.0, rel=0.06)
    assert found.seeds == pytest.approx(np.hypot(0.5, 2.0), rel=0.06)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """2,000 studies of three seeds: 95 % intervals, pooled and own, hold a true effect of zero in 94 to 96 %."""
    inside = np.zeros(2)
    for k in range(2000):
        found = contrasts_of(table(3, 4, seed=k), to_base(4))
        inside += np.array([(found.low < 0) & (found.high > 0), (found.own_low < 0) & (found.own_high > 0)]).mean(1)
    assert inside / 2000 == pytest.approx([0.95, 0.95], abs=0.012)


@pytest.mark.parametrize(("seeds", "variants", "alpha"), [(3, 2, 0.05), (3, 4, 0.05), (5, 3, 0.05), (3, 4, 0.05 / 12)])
def test_a_detectable_effect_is_found_in_four_of_five_studies(seeds: int, variants: int, alpha: float) -> None:
    noise = 0.7
    df, se = (seeds - 1) * (variants - 1), noise * np.sqrt(2 / seeds)
    effect = detectable(se, df, alpha)
    found = []
    for k in range(2000):
        y = table(seeds, variants, noise=noise, seed=k)
        y[:, 1] += effect
        found.append(contrasts_of(y, to_base(variants)[:1]).p[0] < alpha)
    assert np.mean(found) == pytest.approx(0.8, abs=0.03)


def test_detectable_is_the_noncentral_t() -> None:
    for df, alpha in ((4, 0.05), (22, 0.05), (22, 0.001)):
        shift, critical = detectable(1.0, df, alpha), stats.t.ppf(1 - alpha / 2, df)
        assert stats.nct.sf(critical, df, shift) == pytest.approx(0.8, abs=1e-4)
    assert np.isnan(detectable(1.0, 0))


def test_holm_is_rs_p_adjust() -> None:
    """`p.adjust(c(0.01, 0.02, 0.03, 0.04, 0.05), "holm")` of R, in another order; a missing p is no test."""
    p = np.array([0.03, 0.01, np.nan, 0.05, 0.02, 0.04])
    assert holm(p) == pytest.approx([0.09, 0.05, np.nan, 0.09, 0.08, 0.09], nan_ok=True)
    assert holm(np.array([0.6, 0.9])) == pytest.approx([1.0, 1.0])


def test_holm_rejects_what_the_step_down_does() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        p = rng.beta(0.3, 3, 7)
        order, rejected = np.argsort(p), np.zeros(7, bool)
        for k, i in enumerate(order):
            if p[i] >= 0.05 / (7 - k):
                break
            rejected[i] = True
        assert ((holm(p) < 0.05) == rejected).all()


def test_holm_keeps_the_chance_of_any_false_finding() -> None:
    """Twelve comparisons with one base and no effect at all: some finding in at most 5 % of studies."""
    any_found = [(holm(contrasts_of(table(3, 13, seed=k), to_base(13)).p) < 0.05).any() for k in range(1000)]
    assert np.mean(any_found) < 0.065


def test_a_variant_that_scatters_more_is_named() -> None:
    y = table(4, 6, noise=0.1)
    y[:, 3] += [5.0, -5.0, 4.0, -4.0]
    assert uneven(y) == [3]
    named = sum(bool(uneven(table(3, 6, seed=k))) for k in range(500))
    assert named < 15, "1 % of studies without any such variant"


def test_one_seed_gives_an_estimate_alone() -> None:
    found = contrasts_of(np.array([[2.0, 1.5]]), to_base(2))
    assert found.estimate == pytest.approx([-0.5])
    assert np.isnan([found.low[0], found.high[0], found.p[0]]).all()


def test_bad_input() -> None:
    with pytest.raises(UserError, match="add up to zero"):
        contrasts_of(table(3, 2), np.array([[0.0, 1.0]]))
    with pytest.raises(UserError, match="a base and one variant"):
        noise_of(table(3, 1))
    with pytest.raises(UserError, match="finite"):
        noise_of(np.array([[1.0, np.nan]]))
