"""The answer at a compute: optimum, intervals and regret against brute force."""

import numpy as np
import pytest

from llamax.errors import UserError
from llamax.scaling import ChinchillaLaw, Cost, CoupledLaw, fit_frame, optimal_allocation, regret, target_approach2
from llamax.scaling.bootstrap import bootstrap_approach2, frontier_draws
from llamax.scaling.target import target_parametric

from .synthetic import BENT, TINY, isoflop

TARGET = 1e13


@pytest.mark.parametrize("law", [TINY, BENT])
@pytest.mark.parametrize("cost", [Cost(), Cost(9.0, 0.9)])
def test_regret_is_the_brute_force(law, cost):
    best = optimal_allocation(law, TARGET, cost)
    n = 2.5 * float(best.n)
    d = float(cost.tokens(TARGET, n))
    draws = type(law)(**{name: np.full(12, value) for name, value in vars(law).items()})
    found = regret(draws, TARGET, n, d, cost)
    spent = float(law.loss(n, d))
    assert found.extra_loss == pytest.approx(spent - float(best.loss), rel=1e-9)
    grid = np.geomspace(TARGET / 10, TARGET, 20_001)
    losses = np.array([float(optimal_allocation(law, c, cost).loss) for c in grid])
    enough = np.interp(-spent, -losses, grid)  # the loss falls with compute
    assert found.wasted_compute == pytest.approx(1 - enough / TARGET, abs=1e-4)
    assert regret(draws, TARGET, float(best.n), float(best.d), cost).extra_loss == pytest.approx(0.0, abs=1e-12)


def test_target_of_a_parametric_law():
    fit = fit_frame(isoflop(noise=0.005, sizes=7), (3,), laws=("approach3",), bootstrap=100)
    found = target_parametric(fit.additive.fit, fit.additive.draws, TARGET, fit.cost)
    best = optimal_allocation(fit.additive.fit.law, TARGET)
    assert (found.n_opt, found.d_opt, found.loss) == pytest.approx((best.n, best.d, best.loss))
    assert found.tokens_per_param == pytest.approx(best.d / best.n)
    for name in ("n_opt", "d_opt", "tokens_per_param", "loss"):
        low, high = found.intervals[name]
        assert low < getattr(found, name) < high, name
    truth = optimal_allocation(TINY, TARGET)
    assert found.intervals["loss"][0] < truth.loss < found.intervals["loss"][1]
    assert 0 <= found.regret.extra_loss <= found.regret.extra_loss_95
    assert 0 <= found.regret.wasted_compute <= found.regret.wasted_compute_95 < 1
    assert target_parametric(fit.additive.fit, None, TARGET, fit.cost).intervals == {}


def test_target_of_approach_2():
    frame = isoflop(sizes=9, span=1.5, noise=5e-4)
    fit = fit_frame(frame, (2,), bootstrap=0)
    draws = bootstrap_approach2(fit.runs, 200, np.random.default_rng(0))
    found = target_approach2(fit.approach2, draws, TARGET)
    assert found.n_opt == pytest.approx(float(fit.approach2.n.at(TARGET)))
    assert found.d_opt == pytest.approx(float(fit.approach2.d.at(TARGET)))
    assert found.loss == pytest.approx(fit.approach2.frontier.loss(TARGET))
    assert found.loss == pytest.approx(float(optimal_allocation(TINY, TARGET).loss), rel=0.01)
    for name in ("n_opt", "d_opt", "tokens_per_param", "loss"):
        low, high = found.intervals[name]
        assert low <= getattr(found, name) <= high, name
    with pytest.raises(UserError, match="flops"):
        target_approach2(fit.approach2, draws, -1.0)


def test_frontier_draws_are_the_frontier():
    fit = fit_frame(isoflop(sizes=9, span=1.5), (2,), bootstrap=0).approach2
    heights = np.array([[b.n.loss for b in fit.budgets]] * 2)
    heights[1, :2] = np.nan
    found = frontier_draws(np.log([b.flops for b in fit.budgets]), heights)
    assert found.loss(TARGET)[0] == pytest.approx(fit.frontier.loss(TARGET), rel=1e-5)
    assert np.isnan(found.loss(TARGET)[1])


def test_no_draws_no_regret():
    assert regret(ChinchillaLaw(*np.full((5, 3), np.nan)), TARGET, 1e6, 1e7) is None
    assert regret(CoupledLaw(*np.full((6, 3), np.nan)), TARGET, 1e6, 1e7) is None
