"""Expected errors of a design against simulation, brute force and the fits themselves."""

import math

import numpy as np
import pandas as pd
import pytest

from llamax.scaling import ChinchillaLaw, CoupledLaw, fit_approach2, fit_approach3, optimal_allocation
from llamax.scaling.design import (
    Errors,
    Runs,
    expected_errors,
    huber_moments,
    moved,
    regret,
    simulate_errors,
    with_slopes,
)
from llamax.scaling.parabolas import parabola
from tests.scaling.synthetic import BENT, CHINCHILLA, TINY, isoflop

LAWS = {"tiny": (TINY, 1e11), "chinchilla": (CHINCHILLA, 1e18), "bent": (BENT, 1e11)}


def runs_of(frame: pd.DataFrame) -> Runs:
    return Runs(*(frame[c].to_numpy(float) for c in ("n", "d", "budget")))


def study(law: ChinchillaLaw | CoupledLaw, first: float, *, budgets: int = 4, repeats: int = 1, **how: float) -> Runs:
    frame = isoflop(law, tuple(first * np.geomspace(1, 100, budgets)), **how)  # type: ignore[arg-type]
    return runs_of(pd.concat([frame] * repeats))


@pytest.mark.parametrize("name", LAWS)
def test_the_linearised_spread_is_that_of_refits(name: str) -> None:
    law, first = LAWS[name]
    runs, noise, target = study(law, first, sizes=7, span=6.0, repeats=2), 0.004, first * 3000
    expected = expected_errors(law, runs, noise, target)
    found = simulate_errors(law, runs, noise, target, draws=240)
    for approach in (2, 3):
        e, s = expected[approach], found[approach]
        assert s.failed < 0.02
        for what in ("n", "loss"):
            sd, simulated = getattr(e, f"{what}_sd"), getattr(s, f"{what}_sd")
            assert simulated == pytest.approx(sd, rel=0.25), (approach, what)
            bias, median = getattr(e, f"{what}_bias"), getattr(s, f"{what}_bias")
            assert median == pytest.approx(bias, abs=4 * 1.25 * sd / math.sqrt(240)), (approach, what)


@pytest.mark.parametrize("name", LAWS)
def test_the_bias_of_approach_2_is_that_of_its_fit_without_noise(name: str) -> None:
    law, first = LAWS[name]
    frame = isoflop(law, tuple(first * np.array([1, 4, 30, 100])), sizes=6, span=8.0, shift=1.3)
    target = first * 1e4
    fit, best = fit_approach2(frame), optimal_allocation(law, target)
    e = expected_errors(law, runs_of(frame), 0.01, target, approaches=(2,))[2]
    assert fit.n is not None
    assert fit.frontier is not None
    assert e.n_bias == pytest.approx(math.log(fit.n.at(target) / best.n), abs=1e-10)
    assert e.loss_bias == pytest.approx(math.log(fit.frontier.loss(target) / best.loss), abs=1e-4)
    assert abs(e.n_bias) > 1e-3, "a valley with alpha != beta is not a parabola"


def test_approach_3_is_unbiased_where_its_formula_is_true_and_says_how_far_off_it_is_where_not() -> None:
    right = expected_errors(TINY, study(TINY, 1e11), 0.005, 1e14)[3]
    assert abs(right.n_bias) < 1e-9
    assert abs(right.loss_bias) < 1e-12
    runs = study(BENT, 1e11, sizes=7, span=8.0)
    e = expected_errors(BENT, runs, 0.02, 1e14)[3]
    fit = fit_approach3(runs.n, runs.d, np.asarray(BENT.loss(runs.n, runs.d)))
    best = optimal_allocation(BENT, 1e14)
    off = math.log(optimal_allocation(fit.law, 1e14).loss / best.loss)
    assert e.loss_bias == pytest.approx(off, abs=0.03)
    assert off > 0.05


def test_copies_are_fitted_as_one_by_one() -> None:
    frame = isoflop(TINY, (1e11, 1e12, 4e12, 1e13), sizes=5)
    rng = np.random.default_rng(3)
    losses = frame["loss"].to_numpy() * np.exp(0.01 * rng.standard_normal((20, len(frame))))
    labels = frame["budget"].to_numpy()
    found = [parabola(np.log(frame["n"].to_numpy()[labels == c]), losses[:, labels == c]) for c in np.unique(labels)]
    for i, row in enumerate(losses):
        fit = fit_approach2(frame.assign(loss=row))
        for valley, budget in zip(found, fit.budgets, strict=True):
            assert bool(valley.interior[i]) == budget.n.interior
            if budget.n.interior:
                assert math.exp(valley.vertex[i]) == pytest.approx(budget.n.vertex, rel=1e-8)
                assert valley.height[i] == pytest.approx(budget.n.loss, rel=1e-10)


def test_moments_of_the_score_by_brute_force() -> None:
    rng = np.random.default_rng(0)
    noise, delta = 0.004, 1e-3
    residual = np.array([0.0, 5e-4, -3e-3, 2e-2])
    draws = residual[:, None] + noise * rng.standard_normal((4, 400_000))
    psi = np.clip(draws, -delta, delta)
    mean, slope, variance = huber_moments(residual, noise, delta)
    assert mean == pytest.approx(psi.mean(1), abs=1e-5)
    assert slope == pytest.approx((np.abs(draws) < delta).mean(1), abs=3e-3)
    assert variance == pytest.approx(psi.var(1), rel=1e-2, abs=1e-9)
    for scale, ratio in ((1e-5, 1.0), (1.0, math.pi / 2)):  # the average, and the median (Huber 1964)
        _, slope, variance = huber_moments(np.zeros(1), scale, delta)
        assert variance[0] / slope[0] ** 2 / scale**2 == pytest.approx(ratio, rel=1e-2)


def test_the_jacobian_is_that_of_finite_differences() -> None:
    rng = np.random.default_rng(1)
    theta, x, y = np.array([0.3, -0.2, 0.1, 0.4, 0.3]), rng.standard_normal(6), rng.standard_normal(6)
    _, jacobian = with_slopes(theta, x, y)
    for k in range(5):
        step = 1e-6 * np.eye(5)[k]
        numeric = (with_slopes(theta + step, x, y)[0] - with_slopes(theta - step, x, y)[0]) / 2e-6
        assert jacobian[:, k] == pytest.approx(numeric, abs=1e-8)


@pytest.mark.parametrize("law", [TINY, BENT])
def test_a_moved_law_has_its_optimum_moved_at_every_budget(law: ChinchillaLaw | CoupledLaw) -> None:
    for flops in (1e10, 1e15):
        a, b = optimal_allocation(law, flops), optimal_allocation(moved(law, 3.0), flops)
        assert b.n / a.n == pytest.approx(3.0)
        factor = 3.0 ** ((law.beta - law.alpha) / 2 * getattr(law, "gamma", 1.0))
        assert (b.loss - law.E) / (a.loss - law.E) == pytest.approx(factor)


def test_regret_is_the_loss_given_away_on_average() -> None:
    rng = np.random.default_rng(0)
    best = optimal_allocation(TINY, 1e13)
    n = best.n * np.exp(0.1 + 0.4 * rng.standard_normal(200_000))
    given = np.log(TINY.loss(n, 1e13 / (6 * n)) / best.loss).mean()
    assert regret(TINY, 1e13, Errors(0.1, 0.4, 0.0, 0.0)) == pytest.approx(given, rel=0.01)
    assert regret(TINY, 1e13, Errors(0.0, 0.0, 0.3, 0.3)) == pytest.approx(0.0, abs=1e-12)


def test_more_of_everything_helps_and_a_bad_design_is_worse() -> None:
    noise, target = 0.005, 1e15
    good = expected_errors(TINY, study(TINY, 1e11, sizes=7, span=4.0), noise, target)
    twice = expected_errors(TINY, study(TINY, 1e11, sizes=7, span=4.0, repeats=2), noise, target)
    for approach in (2, 3):
        for what in ("n_sd", "loss_sd"):
            before, after = getattr(good[approach], what), getattr(twice[approach], what)
            assert after == pytest.approx(before / math.sqrt(2), rel=1e-6)
    narrow = expected_errors(TINY, study(TINY, 1e11, sizes=7, span=1.2), noise, target)
    off = expected_errors(TINY, study(TINY, 1e11, sizes=7, span=4.0, shift=3.5), noise, target)
    assert narrow[2].rms("n") > 5 * good[2].rms("n")
    assert narrow[3].rms("n") > 5 * good[3].rms("n")
    assert off[2].rms("n") > 3 * good[2].rms("n")


def test_no_answer_is_infinite_never_a_number() -> None:
    beyond = study(TINY, 1e11, sizes=5, span=2.0, shift=20.0)
    e = expected_errors(TINY, beyond, 0.01, 1e14)
    assert math.isinf(e[2].n_bias)
    assert e[2].as_dict()["n_bias"] is None
    assert regret(TINY, 1e14, e[2]) == math.inf
    assert simulate_errors(TINY, beyond, 1e-6, 1e14, approaches=(2,), draws=20)[2].failed == 1.0
    few = runs_of(isoflop(TINY, (1e11,), sizes=5))
    assert math.isinf(expected_errors(TINY, few, 0.01, 1e14)[3].loss_sd)
    one_budget = runs_of(isoflop(TINY, (1e11,), sizes=9))
    assert math.isinf(expected_errors(TINY, one_budget, 0.01, 1e14)[2].n_sd)
