import numpy as np
import pandas as pd
import pytest

from llamax.scaling import (
    bootstrap_approach2,
    bootstrap_parametric,
    fit_approach2,
    fit_approach3,
    optimal_allocation,
)
from llamax.scaling.approach3 import refit
from llamax.scaling.bootstrap import interval, loss_draws, mixture_interval, resample_counts

from .published import chinchilla_runs, expected
from .synthetic import TINY, isoflop

NEW_BUDGET = 9e12  # three times the largest of isoflop()


def fit3(frame):
    return fit_approach3(*(frame[c].to_numpy(float) for c in ("n", "d", "loss")))


def test_resamples_keep_the_size_of_every_budget():
    frame = isoflop(sizes=5)
    counts = resample_counts(frame, 200, np.random.default_rng(0))
    assert counts.shape == (200, 20)
    for _, rows in frame.groupby("budget"):
        assert (counts[:, rows.index].sum(1) == 5).all()
    assert np.abs(counts.mean(0) - 1).max() < 0.35  # each row once on average
    assert (counts == resample_counts(frame, 200, np.random.default_rng(0))).all()
    assert (counts != resample_counts(frame, 200, np.random.default_rng(1))).any()


def test_checkpoints_of_one_run_are_drawn_together():
    frame = isoflop(sizes=6)
    paired = frame.assign(run=np.arange(len(frame)) // 2)
    counts = resample_counts(paired, 50, np.random.default_rng(0))
    assert (counts[:, 0::2] == counts[:, 1::2]).all()
    across = frame.assign(run=np.arange(len(frame)) % 6)  # one run in every budget: strata are impossible
    counts = resample_counts(across, 50, np.random.default_rng(0))
    assert (counts.reshape(50, 4, 6) == counts[:, None, :6]).all()


def test_repeating_rows_of_a_run_does_not_narrow_the_interval():
    frame = isoflop(sizes=6, noise=0.01).assign(run=lambda f: f.index)
    four = frame.loc[frame.index.repeat(4)].reset_index(drop=True)
    once = bootstrap_parametric(fit3(frame), frame, 200, np.random.default_rng(0)).intervals()["n_exponent"]
    honest = bootstrap_parametric(fit3(four), four, 200, np.random.default_rng(0)).intervals()["n_exponent"]
    naive = bootstrap_parametric(fit3(four), four.drop(columns="run"), 200, np.random.default_rng(0)).intervals()[
        "n_exponent"
    ]
    width = [high - low for low, high in (once, honest, naive)]
    assert width[1] == pytest.approx(width[0], rel=0.1)
    assert width[2] < 0.75 * width[0]


def test_approach2_draws_without_noise_hold_the_exponents():
    draws = bootstrap_approach2(isoflop(sizes=9, span=1.5), 100, np.random.default_rng(0))
    low, high = draws.intervals()["n_exponent"]
    assert low <= TINY.beta / (TINY.alpha + TINY.beta) <= high
    assert high - low < 0.02
    assert draws.failed == 0


@pytest.mark.parametrize("vertex", ["parabola", "akima"])
def test_seed_noise_reaches_approach_2(vertex):
    """Against the scatter of the exponent over many studies drawn anew, which is what the interval should say."""
    design = {"budgets": (3e11, 1e12, 3e12), "sizes": 7, "noise": 0.004}
    frames = [isoflop(**design, seed=seed) for seed in range(300)]
    losses = np.stack([frame["loss"] for frame in frames])
    true = [bootstrap_approach2(isoflop(**{**design, "noise": 0.0}), 300, np.random.default_rng(0), vertex,
                                seed_noise=0.004).n.exponent]  # fmt: skip
    again = np.array([fit_approach2(frames[0].assign(loss=row), vertex).n.exponent for row in losses[:150]])
    assert np.nanstd(true) == pytest.approx(np.nanstd(again), rel=0.25)
    if vertex == "akima":  # its vertex is not linear in the losses, so that half the variance is not half its scatter
        return
    pairs = pd.concat([frames[1], frames[2]], ignore_index=True)
    one, two = (
        bootstrap_approach2(frame, 300, np.random.default_rng(0), vertex, seed_noise=0.004)
        for frame in (frames[1], pairs)
    )
    assert np.nanstd(two.n.exponent) == pytest.approx(np.nanstd(one.n.exponent) / 2**0.5, rel=0.2)


def test_degenerate_resamples_are_counted():
    frame = isoflop(sizes=3, noise=0.002)  # a resample keeps all three sizes with probability 6/27
    draws = bootstrap_approach2(frame, 500, np.random.default_rng(0))
    assert all(300 < count < 460 for count in draws.degenerate.values())
    assert draws.failed == np.isnan(draws.n.exponent).sum() > 0
    assert any("left fewer than two valid budgets" in w for w in draws.warnings())
    assert any("budget 3e+11 had no valid vertex" in w for w in draws.warnings())
    six = isoflop(budgets=(3e11, 3e12), sizes=3, noise=0.002)
    draws = bootstrap_parametric(fit3(six), six, 100, np.random.default_rng(0))
    assert draws.failed > 90
    assert draws.draws == 100 - draws.failed
    none = bootstrap_parametric(fit3(six), six, 1, np.random.default_rng(0))
    assert (none.draws, none.failed, none.intervals()["E"]) == (0, 1, None)


def test_prediction_interval_adds_the_scatter_of_one_run():
    frame = isoflop(sizes=7, noise=0.01)
    fit = fit3(frame)
    draws = bootstrap_parametric(fit, frame, 200, np.random.default_rng(0))
    best = optimal_allocation(TINY, 1e12)  # in the middle of the data: parameters are well known there
    mean, one_run = map(interval, loss_draws(fit, draws, best.n, best.d, np.random.default_rng(1)))
    assert one_run[0] < mean[0] < fit.law.loss(best.n, best.d) < mean[1] < one_run[1]
    assert one_run[1] - one_run[0] > 2 * (mean[1] - mean[0])
    assert one_run[1] / one_run[0] - 1 == pytest.approx(4 * 0.01, rel=0.5)  # about +-2 sigma of the noise put in
    wider = interval(loss_draws(fit, draws, best.n, best.d, np.random.default_rng(1), inflate=3.0)[1])
    assert wider[1] - wider[0] > 2 * (one_run[1] - one_run[0])


def test_too_few_draws_give_no_interval():
    assert interval(np.array([1.0, 2.0, np.nan])) is None
    assert interval(np.arange(101.0), 0.9) == pytest.approx((5.0, 95.0))


def test_a_mixture_weighs_each_part_as_a_whole():
    rng = np.random.default_rng(0)
    left, right = rng.normal(0, 1, 40_000), rng.normal(10, 1, 400)
    assert mixture_interval([left, right], [1.0, 0.0]) == pytest.approx(interval(left), abs=1e-9)
    # With half of the weight each, 2.5 % below is 5 % of the left part and 2.5 % above 5 % of the right one.
    low, high = mixture_interval([left, right], [0.5, 0.5])
    assert (low, high) == pytest.approx((np.quantile(left, 0.05), np.quantile(right, 0.95)), abs=0.02)
    assert mixture_interval([left, right[:9]], [0.5, 0.5]) is None


def published_resamples(count: int) -> np.ndarray:
    """The run weights of the published bootstrap: numpy's legacy generator with its seed, in its order."""
    legacy = np.random.RandomState(42)
    picks = [legacy.choice(240, 240, replace=True) for _ in range(count)]
    return np.stack([np.bincount(pick, minlength=240) for pick in picks]).astype(float)


def test_first_resamples_of_the_published_bootstrap():
    check, runs = expected("chinchilla_a3_bootstrap"), chinchilla_runs()
    law, _ = refit(fit_approach3(*runs), *runs, published_resamples(3))
    for i, row in enumerate(check["published"]["first3_rows_A_B_E_alpha_beta"]):
        found = [float(getattr(law, name)[i]) for name in ("A", "B", "E", "alpha", "beta")]
        assert found == pytest.approx(row, rel=5e-4)  # BFGS there stops a little early


@pytest.mark.slow
def test_standard_errors_of_the_published_bootstrap():
    check, runs = expected("chinchilla_a3_bootstrap"), chinchilla_runs()
    law, _ = refit(fit_approach3(*runs), *runs, published_resamples(1000))
    for name, value in check["reference"]["se"].items():
        assert np.std(getattr(law, name)) == pytest.approx(value, rel=0.01), name
    low, high = interval(law.beta / (law.alpha + law.beta), 0.95)
    assert (low, high) == pytest.approx(tuple(check["reference"]["a_N"]["ci95"]), abs=1e-3)


@pytest.mark.slow
def test_intervals_cover_the_truth():
    """60 synthetic sweeps of 24 noisy runs: nominal 95 % intervals must hold the truth in at least 85 % of them.

    With p = 0.95 fewer than 51 hits of 60 has probability 0.002; an interval at half its width would be caught.
    """
    best, exponent, rng = (
        optimal_allocation(TINY, NEW_BUDGET),
        TINY.beta / (TINY.alpha + TINY.beta),
        np.random.default_rng(0),
    )
    hits = {"approach 2": 0, "approach 3": 0, "law": 0, "new run": 0}
    for seed in range(60):
        frame = isoflop(noise=0.005, seed=seed)
        two = bootstrap_approach2(frame, 300, np.random.default_rng(seed))
        fit = fit3(frame)
        three = bootstrap_parametric(fit, frame, 300, np.random.default_rng(seed))
        law, run = map(interval, loss_draws(fit, three, best.n, best.d, np.random.default_rng(seed)))
        measured = best.loss * np.exp(0.005 * rng.normal())
        checks = {
            "approach 2": (two.intervals()["n_exponent"], exponent),
            "approach 3": (three.intervals()["n_exponent"], exponent),
            "law": (law, best.loss),
            "new run": (run, measured),
        }
        for name, ((low, high), truth) in checks.items():
            hits[name] += low <= truth <= high
    assert min(hits.values()) >= 51, hits
