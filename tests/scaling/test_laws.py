import math

import numpy as np
import pytest

from llamax.errors import UserError
from llamax.scaling import ChinchillaLaw, Cost, optimal_allocation, optimal_allocation_under
from llamax.scaling.laws import fit_cost

from .synthetic import CHINCHILLA, TINY


def brute_force(law: ChinchillaLaw, flops: float, flops_per_token) -> float:
    """Best N on a grid of 400,001 sizes: nothing shared with the code under test."""
    n = np.geomspace(1e3, 1e13, 400_001)
    d = flops / flops_per_token(n)
    return float(n[np.argmin(law.E + law.A / n**law.alpha + law.B / d**law.beta)])


def test_loss_is_the_published_formula():
    assert CHINCHILLA.loss(70e9, 1.4e12) == pytest.approx(1.69 + 406.4 / 70e9**0.34 + 410.7 / 1.4e12**0.28, rel=1e-14)


@pytest.mark.parametrize("law", [CHINCHILLA, TINY])
@pytest.mark.parametrize("cost", [Cost(), Cost(6.0, 0.85), Cost(3.3, 1.2)])
@pytest.mark.parametrize("flops", [1e13, 1e20])
def test_closed_form_is_the_brute_force_minimum(law, cost, flops):
    best = optimal_allocation(law, flops, cost)
    wanted = brute_force(law, flops, lambda n: cost.coefficient * n**cost.n_exponent)
    assert best.n == pytest.approx(wanted, rel=1e-4)
    assert cost.flops(best.n, best.d) == pytest.approx(flops, rel=1e-12)
    assert best.loss == pytest.approx(law.loss(best.n, best.d))


def test_closed_form_agrees_with_hoffmann_at_gopher_compute():
    # Hoffmann et al. 2022, rounded parameters, at 5.76e23 FLOPs: N = G (C/6)^(beta/(alpha+beta)), written out.
    g = (0.34 * 406.4 / (0.28 * 410.7)) ** (1 / 0.62)
    best = optimal_allocation(CHINCHILLA, 5.76e23)
    assert best.n == pytest.approx(g * (5.76e23 / 6) ** (0.28 / 0.62), rel=1e-12)
    assert best.n == pytest.approx(32189859151.368176, rel=1e-6)
    assert best.tokens_per_param == pytest.approx(92.64736675730518, rel=1e-6)
    assert best.as_dict()["loss"] == pytest.approx(1.930748101731648, rel=1e-6)


def test_any_flops_function_by_search():
    def attention_heavy(n: float) -> float:
        return 6 * n + 4e5 * n**0.5

    assert optimal_allocation_under(TINY, 1e14, attention_heavy).n == pytest.approx(
        brute_force(TINY, 1e14, attention_heavy), rel=1e-4
    )
    exact = optimal_allocation(TINY, 1e14)
    searched = optimal_allocation_under(TINY, 1e14, lambda n: 6 * n)
    assert (searched.n, searched.loss) == (pytest.approx(exact.n, rel=1e-4), pytest.approx(exact.loss, rel=1e-10))


def test_allocation_takes_arrays_of_draws():
    laws = ChinchillaLaw(
        *(np.array([getattr(CHINCHILLA, k), getattr(TINY, k)]) for k in ("E", "A", "B", "alpha", "beta"))
    )
    both = optimal_allocation(laws, 1e18)
    assert both.n == pytest.approx([optimal_allocation(CHINCHILLA, 1e18).n, optimal_allocation(TINY, 1e18).n])
    assert isinstance(both.as_dict()["n"], list)


def test_cost_of_measured_runs():
    n, d = np.geomspace(1e4, 1e6, 7), np.geomspace(1e8, 1e6, 7)
    cost, misfit = fit_cost(n, d, 6 * n * d)
    assert (cost.coefficient, cost.n_exponent, misfit) == (pytest.approx(6.0), 1.0, pytest.approx(0.0, abs=1e-12))
    cost, misfit = fit_cost(n, d, 5 * n**0.8 * d)
    assert (cost.coefficient, cost.n_exponent) == (pytest.approx(5.0), pytest.approx(0.8))
    assert misfit < 1e-9
    assert fit_cost(n, d, 6 * n * d * np.array([1, 1, 1, 1.5, 1, 1, 1]))[1] > 0.2


def test_bad_input_names_the_value():
    for bad in (0.0, -1e18, math.nan, math.inf):
        with pytest.raises(UserError, match="flops"):
            optimal_allocation(TINY, bad)
    with pytest.raises(UserError, match="n_range"):
        optimal_allocation_under(TINY, 1e14, lambda n: 6 * n, n_range=(1e8, 1e12))
    n, d = np.geomspace(1e4, 1e6, 7), np.full(7, 1e8)
    with pytest.raises(UserError, match="fall as n grows"):
        fit_cost(n, d, d / n)
