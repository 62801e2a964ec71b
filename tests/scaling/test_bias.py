"""The bias of approach 2 against the published table, and where it must vanish."""

import numpy as np
import pytest

from llamax.errors import UserError
from llamax.scaling import ChinchillaLaw, approach2_bias, isoflop_runs, optimal_allocation
from llamax.scaling.bias import wasted_compute

from .published import expected
from .synthetic import BENT, CHINCHILLA

BUDGETS = np.geomspace(1e17, 1e21, 5)
SURFACES = {  # arXiv:2603.22339: the exponents of the three surfaces of its bias table
    "symmetric": ChinchillaLaw(E=1.69, A=406.4, B=410.7, alpha=0.31, beta=0.31),
    "chinchilla": ChinchillaLaw(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28),
    "asymmetric": ChinchillaLaw(E=1.69, A=406.4, B=410.7, alpha=0.465, beta=0.155),
}


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize("width", [2, 4, 8, 16])
def test_noise_free_bias_is_the_published_one(surface: str, width: int) -> None:
    check = expected("a2_bias_synthetic")
    found = approach2_bias(SURFACES[surface], BUDGETS, width, 15, 1e24)
    reference = check["reference"][surface][str(width)]
    assert found.d_percent == pytest.approx(reference["rel_err_D_at_1e24_pct"], abs=check["tol_abs"])
    assert found.d_exponent == pytest.approx(reference["D_exp"], abs=check["tol_abs"])
    published = check["published"].get(surface, {}).get(str(width))
    if published is not None:
        assert found.d_percent == pytest.approx(published, abs=check["tol_abs"])


def test_centred_alike_the_exponents_stay_right_and_centred_unlike_they_do_not() -> None:
    alike = approach2_bias(CHINCHILLA, BUDGETS, 8, 15, 1e24, off_centre=2.0)
    assert alike.n_exponent == pytest.approx(alike.n_exponent_true, abs=1e-9)
    assert alike.d_exponent == pytest.approx(alike.d_exponent_true, abs=1e-9)
    centred = approach2_bias(CHINCHILLA, BUDGETS, 8, 15, 1e24)
    assert abs(alike.d_percent - centred.d_percent) > 1
    drift = approach2_bias(CHINCHILLA, BUDGETS, 8, 15, 1e24, off_centre=list(np.geomspace(0.4, 2.5, 5)))
    assert abs(drift.d_exponent - drift.d_exponent_true) > 1e-3
    assert any("centred differently" in w for w in drift.warnings)
    assert any("off-centre" in w for w in approach2_bias(CHINCHILLA, BUDGETS, 8, 15, 1e24, off_centre=3.0).warnings)


def test_a_spline_on_many_points_is_hardly_biased() -> None:
    parabola = approach2_bias(SURFACES["asymmetric"], BUDGETS, 8, 41, 1e24)
    spline = approach2_bias(SURFACES["asymmetric"], BUDGETS, 8, 41, 1e24, vertex="akima")
    assert abs(spline.d_percent) < 1 < abs(parabola.d_percent)


def test_a_worse_allocation_costs_loss_and_compute() -> None:
    found = approach2_bias(SURFACES["asymmetric"], BUDGETS, 16, 15, 1e24)
    law, best = SURFACES["asymmetric"], optimal_allocation(SURFACES["asymmetric"], 1e24)
    n = float(best.n) * (1 + found.n_percent / 100)
    loss = float(law.loss(n, 1e24 / (6 * n)))
    assert found.loss_percent == pytest.approx(100 * (loss / best.loss - 1), rel=1e-6)
    # The compute whose best allocation has that loss, by search.
    grid = np.geomspace(0.9e24, 1e24, 200_001)
    losses = np.array([float(optimal_allocation(law, c).loss) for c in (grid[0], grid[-1])])
    assert losses[0] > loss > losses[1]
    c = np.exp(np.interp(-loss, -_best(law, grid), np.log(grid)))
    assert found.compute_percent == pytest.approx(100 * (1e24 / c - 1), rel=1e-4)


def _best(law, flops):
    best = optimal_allocation(law, 1.0)
    a = law.beta / (law.alpha + law.beta)
    return np.asarray(law.loss(best.n * flops**a, best.d * flops ** (1 - a)))


def test_the_coupled_law_and_its_waste() -> None:
    found = approach2_bias(BENT, np.geomspace(1e12, 1e14, 4), 4, 9, 1e16)
    assert found.n_exponent_true == pytest.approx(BENT.beta / (BENT.alpha + BENT.beta))
    assert found.n_exponent == pytest.approx(found.n_exponent_true, abs=1e-6)
    at = optimal_allocation(BENT, 5e15)
    assert wasted_compute(BENT, 1e16, float(at.loss)) == pytest.approx(100.0, rel=1e-6)
    assert wasted_compute(BENT, 1e16, BENT.E) == float("inf")


def test_runs_of_a_design_and_designs_without_a_grid() -> None:
    runs = isoflop_runs(CHINCHILLA, [1e18, 1e19], (0.5, 4.0), 7)
    assert runs.groupby("budget")["d"].agg(lambda d: d.max() / d.min()).to_numpy() == pytest.approx([8, 8])
    assert (6 * runs["n"] * runs["d"]).to_numpy() == pytest.approx(runs["flops"].to_numpy())
    for bad in (1.0, 0.5, (2.0, 1.0), (0.0, 2.0)):
        with pytest.raises(UserError, match="ratio_range"):
            approach2_bias(CHINCHILLA, BUDGETS, bad, 15, 1e24)
    with pytest.raises(UserError, match="points: 2"):
        approach2_bias(CHINCHILLA, BUDGETS, 2, 2, 1e24)
    with pytest.raises(UserError, match="flops"):
        approach2_bias(CHINCHILLA, BUDGETS, 2, 5, -1)
