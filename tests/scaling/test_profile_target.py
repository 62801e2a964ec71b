"""Profiles of the optimum at a compute: against a grid by brute force, and against the bootstrap."""

import numpy as np
import pytest
from scipy.optimize import least_squares

from llamax.errors import UserError
from llamax.scaling import Cost, bootstrap_parametric, fit_approach3, fit_coupled, optimal_allocation
from llamax.scaling.profile import rise_quantile
from llamax.scaling.profile_target import ABOUT, profile_targets
from llamax.scaling.target import target_parametric

from .synthetic import BENT, TINY, isoflop

FLOPS, COST = 1e13, Cost(7.0, 0.95)


def columns(frame):
    return tuple(frame[c].to_numpy(float) for c in ("n", "d", "loss"))


def test_the_law_about_its_optimum_is_the_law() -> None:
    best = optimal_allocation(TINY, FLOPS, COST)
    params = {"n_opt": best.n, "loss_opt": best.loss, "share": TINY.E / best.loss, "alpha": 0.38, "beta": 0.40}
    frame = isoflop().assign(log_budget=np.log(FLOPS / COST.coefficient), n_exponent=COST.n_exponent)
    assert ABOUT.predict(params, frame) == pytest.approx(frame["loss"].to_numpy(), rel=1e-12)


def test_profiles_are_those_of_a_grid_and_near_the_bootstrap() -> None:
    frame = isoflop(noise=0.004, sizes=8, budgets=(3e11, 1e12, 3e12, 1e13))
    n, d, loss = columns(frame)
    fit = fit_approach3(n, d, loss, method="mse")
    found = profile_targets(fit, frame, FLOPS, Cost())
    draws = bootstrap_parametric(fit, frame, 300, np.random.default_rng(0))
    boot = target_parametric(fit, draws, FLOPS, Cost()).intervals
    best = optimal_allocation(fit.law, FLOPS)
    variance = fit.objective / (len(loss) - 5)

    def squares(index: int, value: float) -> float:
        """The least sum of squares with N* or L* fixed, by scipy over the other four."""

        def residual(free: np.ndarray) -> np.ndarray:
            log_n, log_loss, share, alpha, beta = np.insert(free, index, value)
            log_d = np.log(FLOPS / 6) - log_n
            size, data = np.exp(-alpha * (np.log(n) - log_n)), np.exp(-beta * (np.log(d) - log_d))
            terms = (beta * size + alpha * data) / (alpha + beta)
            return log_loss + np.log(share + (1 - share) * terms) - np.log(loss)

        whole = [np.log(best.n), np.log(best.loss), fit.law.E / best.loss, fit.law.alpha, fit.law.beta]
        start = np.delete(np.array(whole, float), index)
        return float(2 * least_squares(residual, start, xtol=1e-14, ftol=1e-14, gtol=1e-14, x_scale="jac").cost)

    for index, name in ((0, "n_opt"), (1, "loss")):
        low, high = found[name].interval
        for end in (low, high):  # at the ends of the interval the squares have risen by the quantile
            rise = (squares(index, np.log(end)) - fit.objective) / variance
            assert rise == pytest.approx(rise_quantile(len(loss), 5), rel=0.03), name
        assert low < getattr(best, "n" if name == "n_opt" else "loss") < high
    for name in ("n_opt", "d_opt", "tokens_per_param", "loss"):
        low, high = found[name].interval
        assert np.log(high / low) == pytest.approx(np.log(boot[name][1] / boot[name][0]), rel=0.4), name
    low, high = found["n_opt"].interval
    assert found["d_opt"].interval == pytest.approx((FLOPS / 6 / high, FLOPS / 6 / low))
    assert found["tokens_per_param"].interval == pytest.approx((FLOPS / 6 / high**2, FLOPS / 6 / low**2))


def test_what_has_no_profile_is_refused() -> None:
    frame = isoflop(BENT, noise=0.003)
    with pytest.raises(UserError, match="choose from n_opt, d_opt"):
        profile_targets(fit_approach3(*columns(frame)), frame, FLOPS, Cost(), ("regret",))
    with pytest.raises(UserError, match="the coupled law has a prior"):
        profile_targets(fit_coupled(*columns(frame)), frame, FLOPS, Cost())
