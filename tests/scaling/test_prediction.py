import json

import numpy as np
import pytest

from llamax.errors import UserError
from llamax.scaling import fit_approach3, fit_coupled, fit_frame, optimal_allocation, predict, recommend, score
from llamax.scaling.fit import holdout_error, leave_largest_out

from .synthetic import TINY, isoflop

TARGET = 9e12  # three times the largest budget
BEST = optimal_allocation(TINY, TARGET)


@pytest.fixture(scope="module")
def noisy():
    return fit_frame(isoflop(noise=0.005), bootstrap=100)


def test_fit_is_json_and_repeatable(noisy):
    record = noisy.as_dict()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert set(record["approach3"]["params"]) == {"E", "A", "B", "alpha", "beta"}
    assert {"objective", "intervals", "n_points", "warnings", "bootstrap"} <= set(record["approach3"])
    assert {"n_exponent", "n_coefficient", "d_exponent", "d_coefficient", "budgets"} <= set(record["approach2"])
    low, high = record["approach3"]["intervals"]["alpha"]
    assert low < record["approach3"]["params"]["alpha"] < high
    assert fit_frame(isoflop(noise=0.005), bootstrap=100).as_dict() == record
    other = fit_frame(isoflop(noise=0.005), bootstrap=100, seed=1).as_dict()
    assert other["approach3"]["params"] == record["approach3"]["params"]
    assert other["approach3"]["intervals"] != record["approach3"]["intervals"]


def test_without_noise_the_prediction_is_the_law():
    claim = predict(fit_frame(isoflop(), bootstrap=0), flops=TARGET, n=BEST.n * 1.3, d=BEST.d / 1.3)
    assert claim.loss == pytest.approx(float(TINY.loss(BEST.n * 1.3, BEST.d / 1.3)), rel=1e-6)
    assert claim.interval is None
    assert any("no interval" in w for w in claim.warnings)
    assert claim.recommendation.n == pytest.approx(BEST.n, rel=0.05)
    assert claim.loss_frontier == pytest.approx(BEST.loss, rel=0.02)


def test_prediction_is_a_record_that_survives_json(noisy):
    claim = predict(noisy, flops=TARGET, n=BEST.n, d=BEST.d)
    record = json.loads(json.dumps(claim.as_dict(), allow_nan=False))
    assert (record["flops"], record["n"], record["d"]) == (TARGET, pytest.approx(BEST.n), pytest.approx(BEST.d))
    low, high = record["interval"]
    assert low < record["interval_mean"][0] < record["loss"] < record["interval_mean"][1] < high
    assert record["loss"] == pytest.approx(BEST.loss, rel=0.02)
    assert record["recommendation"]["approach"] == 2
    assert "4 of 4 budgets have an interior minimum" in record["rule"]
    assert score(record, BEST.loss) == score(claim, BEST.loss)
    assert predict(noisy, flops=TARGET, n=BEST.n, d=BEST.d) == claim


def test_recommendation_spends_the_budget(noisy):
    advice = recommend(noisy, TARGET)
    assert float(noisy.cost.flops(advice.n, advice.d)) == pytest.approx(TARGET)
    assert advice.n_interval[0] < advice.n < advice.n_interval[1]
    assert advice.d_interval[0] < advice.d < advice.d_interval[1]
    assert advice.as_dict()["tokens_per_param"] == pytest.approx(advice.d / advice.n)


def test_recommendation_under_a_cost_that_is_not_6nd():
    frame = isoflop(span=2.0, sizes=7)
    # FLOPs as 40 n^0.85 d: the budget is what was really spent, sizes around the optimum of that cost.
    from llamax.scaling import Cost

    cost, rows = Cost(40.0, 0.85), []
    for budget in (3e11, 1e12, 3e12, 1e13):
        best = float(optimal_allocation(TINY, budget, cost).n)
        for n in np.geomspace(best / 2, best * 2, 7):
            d = float(cost.tokens(budget, n))
            rows.append((budget, n, d, budget, float(TINY.loss(n, d))))
    frame = type(frame)(rows, columns=["budget", "n", "d", "flops", "loss"])
    wanted = optimal_allocation(TINY, TARGET, cost)
    for approaches in ((2, 3), (3,)):
        advice = recommend(fit_frame(frame, approaches, bootstrap=0), TARGET)
        assert advice.n == pytest.approx(wanted.n, rel=0.03)
        assert advice.d == pytest.approx(wanted.d, rel=0.03)


def test_approach3_decides_where_the_valleys_are_off_the_grid():
    fit = fit_frame(isoflop(shift=6.0, span=2.0, noise=1e-4), bootstrap=50)
    advice = recommend(fit, TARGET)
    assert advice.approach == 3
    assert "0 of 4 budgets have an interior minimum" in advice.rule
    assert advice.n == pytest.approx(BEST.n, rel=0.3)
    assert recommend(fit_frame(isoflop(), bootstrap=0, budget=None), TARGET).approach == 3
    with pytest.raises(UserError, match="no allocation"):
        recommend(fit_frame(isoflop(shift=6.0, span=2.0), (2,), bootstrap=0), TARGET)


def test_largest_budget_left_out_widens_the_interval_of_a_wrong_law():
    good = isoflop(noise=0.002, seed=1)
    rest, largest = leave_largest_out(isoflop())
    assert set(largest["budget"]) == {3e12}
    assert set(rest["budget"]) == {3e11, 7e11, 1.5e12}
    assert holdout_error(fit_approach3, rest, largest) < 1e-6
    assert holdout_error(fit_coupled, rest, largest) < 1e-5
    assert holdout_error(fit_approach3, rest, largest.assign(loss=largest["loss"] * 1.05)) == pytest.approx(
        np.log(1.05), rel=1e-3
    )
    assert leave_largest_out(isoflop(budgets=(1e12, 1e13))) is None
    broken = good.assign(loss=np.where(good["budget"] == good["budget"].max(), 1.04 * good["loss"], good["loss"]))
    at = {"flops": TARGET, "n": BEST.n, "d": BEST.d}
    plain, wide = (predict(fit_frame(f, bootstrap=100), **at) for f in (good, broken))
    assert not any("widened" in w for w in plain.warnings)
    assert any("widened" in w for w in wide.warnings)
    assert wide.interval[1] - wide.interval[0] > 2 * (plain.interval[1] - plain.interval[0])


def test_what_a_reader_must_know_is_said(noisy):
    far = predict(noisy, flops=1e15, n=1e7, d=1e7)
    words = " ".join(far.warnings)
    assert "333 times the largest budget" in words
    assert "not the 1e+15 of the budget" in words
    assert "more than a factor of two from the recommended" in words


def test_score_says_hit_and_miss(noisy):
    claim = predict(noisy, flops=TARGET, n=BEST.n, d=BEST.d)
    hit = score(claim, claim.loss * 1.0001)
    assert hit.inside
    assert hit.miss_percent == pytest.approx(0.01)
    assert "inside the 95 % interval" in hit.words
    miss = score(claim, claim.loss * 0.8)
    assert miss.inside is False
    assert miss.miss_percent == pytest.approx(20)
    assert "below" in miss.words
    assert "OUTSIDE" in miss.words
    assert score({"loss": 2.0, "interval": None}, 2.1).inside is None
    for bad in (float("nan"), 0.0, -1.0):
        with pytest.raises(UserError, match="measured"):
            score(claim, bad)


def test_thin_and_odd_tables():
    two = fit_frame(isoflop(budgets=(1e12, 2e12)), bootstrap=0)
    assert any("fewer than three budgets" in w for w in two.all_warnings())
    assert two.additive.holdout_error is two.coupled.holdout_error is None
    assert two.choose()[0] == "approach3"
    with pytest.raises(UserError, match="5 runs"):
        fit_frame(isoflop(budgets=(1e12,), sizes=5), bootstrap=0)
    with pytest.raises(UserError, match="one budget"):
        fit_frame(isoflop(budgets=(1e12,), sizes=5), (2,), bootstrap=20)
    bent = isoflop()
    bent["flops"] *= np.where(bent.index % 2, 1.6, 1.0)
    assert any("optimal allocations are that uncertain" in w for w in fit_frame(bent, bootstrap=0).all_warnings())


def test_bad_arguments(noisy):
    for approaches in ((), (1,), (2, 4)):
        with pytest.raises(UserError, match="approaches"):
            fit_frame(isoflop(), approaches)
    with pytest.raises(UserError, match="level"):
        fit_frame(isoflop(), level=95)
    with pytest.raises(UserError, match="bootstrap: -1"):
        fit_frame(isoflop(), bootstrap=-1)
    with pytest.raises(UserError, match=r"delta: 0\.0"):
        fit_frame(isoflop(), delta=0.0)
    with pytest.raises(UserError, match="budget"):
        fit_frame(isoflop(), (2,), budget=None)
    with pytest.raises(UserError, match="flops"):
        recommend(noisy, -1.0)
    with pytest.raises(UserError, match="n: 0"):
        predict(noisy, flops=TARGET, n=0, d=1e8)
    with pytest.raises(UserError, match="approach 3 was not fitted"):
        predict(fit_frame(isoflop(), (2,), bootstrap=0), flops=TARGET, n=1e5, d=1e7)
