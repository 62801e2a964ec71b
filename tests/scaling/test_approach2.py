import math

import numpy as np
import pandas as pd
import pytest

from llamax.errors import UserError
from llamax.scaling import ChinchillaLaw, fit_approach2, optimal_allocation
from llamax.scaling.approach2 import fit_power_law, fit_valleys

from .published import expected
from .synthetic import TINY, isoflop

SURFACES = {  # arXiv:2603.22339: the exponents of the three surfaces of its bias table
    "symmetric": ChinchillaLaw(E=1.69, A=406.4, B=410.7, alpha=0.31, beta=0.31),
    "chinchilla": ChinchillaLaw(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28),
    "asymmetric": ChinchillaLaw(E=1.69, A=406.4, B=410.7, alpha=0.465, beta=0.155),
}


def test_parabola_is_numpys():
    rng = np.random.default_rng(0)
    x, y = np.sort(rng.normal(size=9)) + 12, rng.normal(size=9)
    weights = rng.integers(0, 4, size=(5, 9)).astype(float)
    found = fit_valleys(x, y, weights)
    for i, w in enumerate(weights):
        c2, c1, c0 = np.polyfit(x - 12, y, 2, w=np.sqrt(w))
        assert found.curvature[i] == pytest.approx(2 * c2, rel=1e-8)
        assert found.vertex[i] == pytest.approx(12 - c1 / (2 * c2), rel=1e-8)
        assert found.height[i] == pytest.approx(c0 - c1**2 / (4 * c2), rel=1e-8)


def test_valley_needs_three_weighted_sizes_and_an_upward_curve():
    x = np.array([1.0, 1.0, 2.0, 3.0, 4.0])
    y = (x - 2.2) ** 2
    found = fit_valleys(x, y, np.array([[1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [1, 1, 0, 1, 1]], float))
    assert list(found.sound) == [False, True, True]
    assert np.isnan(found.vertex[0])
    assert not found.interior[0]
    assert found.vertex[1:] == pytest.approx([2.2, 2.2])
    assert not fit_valleys(x, -y, np.ones((1, 5))).interior[0]
    assert not fit_valleys(x + 2, (x - 0.5) ** 2, np.ones((1, 5))).interior[0]


def test_power_law_is_numpys_over_the_valid_budgets():
    log_c = np.array([27.0, 28.0, 29.5, 31.0])
    log_v = np.array([[10.0, 10.6, 11.1, 99.0], [1.0, 2.0, 3.0, 4.0]])
    line = fit_power_law(log_c, log_v, np.array([[True, True, True, False], [True, False, False, False]]))
    slope, intercept = np.polyfit(log_c[:3], log_v[0, :3], 1)
    assert (line.exponent[0], line.log_coefficient[0]) == (pytest.approx(slope), pytest.approx(intercept))
    assert np.isnan(line.exponent[1])


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize("width", [2, 4, 8, 16])
def test_noise_free_bias_is_the_published_one(surface, width):
    check = expected("a2_bias_synthetic")
    law, rows = SURFACES[surface], []
    for budget in np.geomspace(1e17, 1e21, 5):
        best = float(optimal_allocation(law, budget).d)
        for d in np.geomspace(best / width, best * width, 15):
            n = budget / (6 * d)
            rows.append((budget, n, d, budget, float(law.loss(n, d))))
    fit = fit_approach2(pd.DataFrame(rows, columns=["budget", "n", "d", "flops", "loss"]))
    reference = check["reference"][surface][str(width)]
    error = 100 * (float(fit.d.at(1e24)) / float(optimal_allocation(law, 1e24).d) - 1)
    assert fit.d.exponent == pytest.approx(reference["D_exp"], abs=check["tol_abs"])
    assert error == pytest.approx(reference["rel_err_D_at_1e24_pct"], abs=check["tol_abs"])


def test_recovers_the_exponents_and_counts_the_valleys():
    fit = fit_approach2(isoflop(sizes=7, span=2.0))
    assert fit.n.exponent == pytest.approx(TINY.beta / (TINY.alpha + TINY.beta), abs=1e-6)
    assert fit.d.exponent == pytest.approx(TINY.alpha / (TINY.alpha + TINY.beta), abs=1e-6)
    assert float(fit.n.at(1e13)) == pytest.approx(float(optimal_allocation(TINY, 1e13).n), rel=0.02)
    assert fit.interior_minima == 4
    record = fit.as_dict()
    assert record["n_coefficient"] * 1e13 ** record["n_exponent"] == pytest.approx(float(fit.n.at(1e13)))
    assert {"vertex", "curvature", "interior", "vertex_d", "loss", "centring"} <= set(record["budgets"][0])
    assert [b["budget"] for b in record["budgets"]] == sorted(b["budget"] for b in record["budgets"])


def test_frontier_is_the_laws_own():
    # At the optimum both power terms fall as C^-(alpha beta / (alpha + beta)); the grid's width biases the heights.
    fit = fit_approach2(isoflop(budgets=(1e11, 1e12, 1e13, 1e14), sizes=9, span=1.3))
    assert fit.frontier.gamma == pytest.approx(TINY.alpha * TINY.beta / (TINY.alpha + TINY.beta), rel=1e-3)
    assert pytest.approx(TINY.E, rel=1e-3) == fit.frontier.E
    assert fit.frontier.loss(1e16) == pytest.approx(float(optimal_allocation(TINY, 1e16).loss), rel=1e-3)


def test_frontier_is_refused_where_it_is_not_determined():
    two = fit_approach2(isoflop(budgets=(1e12, 1e13)))
    assert two.frontier is None
    assert any("frontier: it needs three" in w for w in two.warnings)
    frame = isoflop()
    frame.loc[frame["budget"] == frame["budget"].max(), "loss"] += 1.0
    rising = fit_approach2(frame)
    assert rising.frontier is None
    assert any("does not fall" in w for w in rising.warnings)


@pytest.mark.parametrize(("shift", "side_n", "side_d"), [(8.0, "lower", "upper"), (1 / 8, "upper", "lower")])
def test_a_vertex_off_the_grid_is_dropped_in_words(shift, side_n, side_d):
    frame = pd.concat([isoflop(budgets=(1e12,), shift=shift, span=2.0), isoflop(budgets=(3e12, 1e13), span=2.0)])
    fit = fit_approach2(frame)
    assert [b.n.interior for b in fit.budgets] == [False, True, True]
    assert any(w.startswith("budget 1e+12: the vertex in N") and f"{side_n} edge" in w for w in fit.warnings)
    assert any(w.startswith("budget 1e+12: the vertex in D") and f"{side_d} edge" in w for w in fit.warnings)
    assert any("1 of 3 budgets dropped from the N fit" in w for w in fit.warnings)
    kept = fit_approach2(isoflop(budgets=(3e12, 1e13), span=2.0))
    assert fit.n.exponent == pytest.approx(kept.n.exponent)


def test_off_centre_and_downward_valleys_are_named():
    frame = isoflop(span=2.0, shift=1.85)
    assert any("is close to the grid's lower edge" in w for w in fit_approach2(frame).warnings)
    upside_down = frame.assign(loss=10 - frame["loss"])
    fit = fit_approach2(upside_down)
    assert fit.n is None
    assert fit.as_dict()["n_exponent"] is None
    assert any("opens downward" in w for w in fit.warnings)
    assert any("no exponent" in w for w in fit.warnings)


def test_thin_designs_are_named():
    one = fit_approach2(isoflop(budgets=(1e12,)))
    assert one.n is None
    assert one.budgets[0].n.vertex == pytest.approx(float(optimal_allocation(TINY, 1e12).n), rel=0.1)
    assert any("fewer than three budgets (1)" in w for w in one.warnings)
    two = fit_approach2(isoflop(budgets=(1e12, 2e12)))
    assert any("line through two points" in w for w in two.warnings)
    assert any("under 1.5 decades (0.30)" in w for w in two.warnings)
    assert any("a parabola needs three" in w for w in fit_approach2(isoflop(sizes=2)).warnings)
    assert any("three sizes" in w for w in fit_approach2(isoflop(sizes=3)).warnings)
    assert fit_approach2(isoflop(budgets=(1e12, 1e13, 1e14))).warnings == (
        "loss-compute frontier: three budgets for three parameters, so it passes through them exactly",
    )


def test_a_budget_that_is_flat_or_not_one_budget_is_named():
    frame = isoflop()
    first = frame["budget"] == frame["budget"].min()
    flat = fit_approach2(frame.assign(loss=np.where(first, 3.0, frame["loss"])))
    assert any("all losses equal" in w for w in flat.warnings)
    assert flat.budgets[0].n.vertex is None
    uneven = frame.assign(flops=np.where(first & (frame["n"] == frame["n"].min()), 2 * frame["flops"], frame["flops"]))
    assert any("a valley assumes one budget" in w for w in fit_approach2(uneven).warnings)


def test_labels_may_be_words():
    frame = isoflop().assign(budget=lambda f: f["budget"].map(lambda c: f"b{math.log10(c):.1f}"))
    assert fit_approach2(frame).n.exponent == pytest.approx(fit_approach2(isoflop()).n.exponent)


def test_bad_input():
    with pytest.raises(UserError, match="columns budget, flops"):
        fit_approach2(isoflop().drop(columns=["budget", "flops"]))
    with pytest.raises(UserError, match="no rows"):
        fit_approach2(isoflop().iloc[:0])
