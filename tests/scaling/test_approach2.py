import math

import numpy as np
import pandas as pd
import pytest
from scipy.interpolate import Akima1DInterpolator

from llamax.errors import UserError
from llamax.scaling import bootstrap_approach2, fit_approach2, optimal_allocation
from llamax.scaling.approach2 import fit_power_law
from llamax.scaling.valleys import fit_valleys

from .published import expected, folder
from .synthetic import TINY, isoflop


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


def porian(config: str) -> pd.DataFrame:
    """Runs of one of Porian et al.'s configurations, sorted by size in each budget."""
    frame = pd.read_csv(folder() / "porian2024" / "porian_isoflops.csv")
    rows = frame[frame["config"] == config].sort_values(["flops", "params"])
    return rows.rename(columns={"params": "n", "tokens": "d"}).assign(budget=rows["flops"])


@pytest.mark.parametrize("index", range(15))
def test_porians_fifteen_exponents(index: int) -> None:
    check = expected("porian_a2_akima")
    config = check["configs"][index]
    fit = fit_approach2(porian(config["config"]), vertex="akima")
    assert fit.n.exponent == pytest.approx(config["reference_akima_a"], abs=check["tol_abs"]["vs_reference"])
    assert fit.n.exponent == pytest.approx(config["published_a"], abs=check["tol_abs"]["vs_published"])
    kept = [b for b in fit.budgets if b.n.interior]
    assert len(kept) == config["reference_n_budgets"]
    rho = [b.flops / (6 * b.n.vertex**2) for b in kept]
    assert [min(rho), max(rho)] == pytest.approx(config["rho_star_range"], rel=0.1)  # printed: medians of draws


def test_a_spline_goes_through_its_points_and_needs_four() -> None:
    x = np.log(np.geomspace(1e6, 1e8, 9))
    loss = 3 + 0.1 * (x - 16.3) ** 2 + 0.01 * (x - 16.3) ** 3
    found = fit_valleys(x, loss, np.ones((1, 9)), "akima")
    grid = np.linspace(x[0], x[-1], 100_001)
    spline = np.exp(Akima1DInterpolator(x, np.log(loss))(grid))
    assert found.vertex[0] == pytest.approx(grid[np.argmin(spline)], abs=float(np.ptp(x)) / (8 * 25))
    assert found.height[0] == pytest.approx(spline.min(), rel=1e-5)
    assert found.interior[0]
    assert found.curvature[0] == pytest.approx(0.2, rel=0.2)
    # Draws with weights: repeats of a size are averaged, sizes without weight are gone.
    doubled = fit_valleys(np.append(x, x[3]), np.append(loss, loss[3] * 1.1), np.array([[1.0] * 9 + [0.0]]), "akima")
    assert doubled.vertex[0] == pytest.approx(found.vertex[0])
    few = fit_valleys(x, loss, np.array([[1, 1, 1, 0, 0, 0, 0, 0, 0], [1, 0, 1, 0, 1, 0, 1, 0, 1]], float), "akima")
    assert list(few.sound) == [False, True]
    assert np.isnan(few.vertex[0])
    assert not fit_valleys(x, 20 - x, np.ones((1, 9)), "akima").interior[0]


def test_splines_in_a_fit() -> None:
    fit = fit_approach2(isoflop(sizes=9, span=4.0), vertex="akima")
    assert fit.vertex == fit.as_dict()["vertex"] == "akima"
    assert fit.n.exponent == pytest.approx(TINY.beta / (TINY.alpha + TINY.beta), abs=0.01)
    three = fit_approach2(isoflop(sizes=3), vertex="akima")
    assert any("3 distinct sizes in N; a spline needs 4" in w for w in three.warnings)
    off = fit_approach2(isoflop(sizes=9, span=2.0, shift=8.0), vertex="akima")
    assert any("at or beyond the grid's lower edge" in w for w in off.warnings)
    with pytest.raises(UserError, match="vertex: 'cubic'"):
        fit_approach2(isoflop(), vertex="cubic")
    draws = bootstrap_approach2(isoflop(sizes=9, noise=0.003), 50, np.random.default_rng(0), "akima")
    low, high = draws.intervals()["n_exponent"]
    assert low < fit.n.exponent < high


def test_grids_off_centre_are_named() -> None:
    centred = fit_approach2(isoflop(sizes=9, span=3.0))
    assert not any("centre" in w for w in centred.warnings)
    small = fit_approach2(isoflop(sizes=9, span=4.0, shift=1 / 2))
    assert any("in N are off-centre: too many small sizes" in w for w in small.warnings)
    assert any("in D are off-centre: too many large sizes" in w for w in small.warnings)
    drift = [isoflop(budgets=(b,), sizes=9, span=4.0, shift=s) for b, s in ((1e11, 0.5), (1e12, 1.0), (1e13, 2.0))]
    assert any("the grids in N are centred differently" in w for w in fit_approach2(pd.concat(drift)).warnings)


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
