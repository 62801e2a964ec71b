"""Any law of the registry through the engine: known parameters come back, bootstrap and profile agree with theory."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from llamax.errors import UserError
from llamax.scaling import LAWS, bootstrap_law, fit_approach3, fit_law, profile_law, profile_parametric
from llamax.scaling.lawfit import law_table
from llamax.scaling.lawspec import LawSpec, Parameter

from .synthetic import TINY, isoflop

LINE = LawSpec(
    name="line",
    formula="loss = a + b x",
    source="a test",
    columns=("x",),
    parameters=(Parameter("a", -100.0, 100.0, starts=(1.0,)), Parameter("b", -100.0, 100.0, starts=(0.0, 1.0))),
    loss=lambda p, x: p["a"] + p["b"] * x["x"],
    linear=("a", "b"),
)


def line(noise=0.1, runs=60, seed=0):
    x = np.linspace(1, 3, runs)
    return pd.DataFrame({"x": x, "loss": 5 + 2 * x + noise * np.random.default_rng(seed).normal(size=runs)})


@pytest.mark.parametrize("method", ["huber", "mse", "vp"])
def test_chinchilla_from_the_registry_is_approach_3(method):
    frame = isoflop(noise=0.005, sizes=7)
    runs = tuple(frame[c].to_numpy(float) for c in ("n", "d", "loss"))
    one, two = fit_law(LAWS["chinchilla"], frame, method=method), fit_approach3(*runs, method=method)
    assert one.objective == pytest.approx(two.objective, rel=1e-8)
    for name, value in two.law.as_dict().items():
        assert one.params[name] == pytest.approx(value, rel=1e-5), name
    assert (
        one.search.condition == pytest.approx(two.search.condition, rel=0.5)
        or one.search.condition > two.search.condition
    )  # not centred


def test_squares_of_a_line_have_the_textbook_errors():
    frame = line()
    fit = fit_law(LINE, frame, method="mse", log=False)
    found = stats.linregress(frame["x"], frame["loss"])
    assert fit.params["b"] == pytest.approx(found.slope, rel=1e-8)
    assert fit.objective == pytest.approx(((frame["loss"] - found.intercept - found.slope * frame["x"]) ** 2).sum())
    half = stats.t.ppf(0.975, 58) * found.stderr
    assert profile_law(fit, "b").interval == pytest.approx((found.slope - half, found.slope + half), rel=2e-3)
    draws = bootstrap_law(fit, frame, 400, np.random.default_rng(0))
    assert draws.standard_errors()["b"] == pytest.approx(found.stderr, rel=0.15)
    noise = float(np.sqrt((fit.residuals**2).sum() / 58))
    centre = float(frame["loss"].mean())
    seeds = bootstrap_law(fit, frame, 400, np.random.default_rng(0), seed_noise=noise / centre)
    assert seeds.standard_errors()["b"] == pytest.approx(found.stderr, rel=0.25)  # noise in logs: near, not equal


def test_variable_projection_is_least_squares_with_the_linear_parameters_solved():
    spec = LAWS["granularity"]
    n, d, g = np.array([(n, d, g) for n in (1e7, 1e8, 1e9) for d in (1e9, 1e10, 1e11) for g in (1.0, 4.0, 16.0)]).T
    data = {"n": n, "d": d, "granularity": g}
    truth = dict(spec.published["Krajewski et al. 2024"])
    loss = spec.predict(truth, data)
    exact = fit_law(spec, {**data, "loss": loss}, method="vp", starts=8)
    assert exact.params == pytest.approx(truth, rel=1e-6)
    assert exact.projected.task.names == ("alpha", "beta", "gamma")
    noisy = {**data, "loss": loss * np.exp(1e-3 * np.random.default_rng(0).normal(size=len(n)))}
    fit = fit_law(spec, noisy, method="vp", starts=8)
    assert fit.as_dict()["method"] == "vp"
    step = fit.task.describe(fit.u)[1].T @ fit.task.describe(fit.u)[0]  # the slope of the squares by every parameter
    assert np.abs(step).max() < 1e-6 * np.abs(fit.task.describe(fit.u)[1]).sum(0).max() * np.abs(fit.residuals).max()
    draws = bootstrap_law(fit, pd.DataFrame(noisy), 20, np.random.default_rng(0), seed_noise=1e-3)
    assert np.quantile(draws.params["beta"], 0.9) > truth["beta"] > np.quantile(draws.params["beta"], 0.1)
    with pytest.raises(UserError, match="method vp: law step_lr is linear in every parameter"):
        fit_law(LAWS["step_lr"], {"n": n, "d": d, "lr": loss}, method="vp")


def test_profiles_of_a_robust_fit_are_near_the_bootstrap():
    frame = isoflop(noise=0.005, sizes=12, budgets=(3e11, 7e11, 1.5e12, 3e12, 1e13))
    runs = tuple(frame[c].to_numpy(float) for c in ("n", "d", "loss"))
    fit = fit_approach3(*runs)
    found = profile_parametric(fit, frame, "alpha")
    low, high = found.interval
    assert low < fit.law.alpha < high
    assert found.statistic[np.argmin(np.abs(found.at - fit.law.alpha))] == pytest.approx(0.0, abs=1e-6)
    draws = bootstrap_law(fit_law(LAWS["chinchilla"], frame), frame, 400, np.random.default_rng(0))
    width = np.subtract(*np.quantile(draws.params["alpha"], [0.975, 0.025]))
    assert high - low == pytest.approx(width, rel=0.5)
    with pytest.raises(UserError, match="parameter 'delta'; law chinchilla has E, A, B, alpha, beta"):
        profile_parametric(fit, frame, "delta")
    exact = fit_law(LAWS["chinchilla"], isoflop(), method="mse")
    assert profile_law(exact, "alpha").interval == pytest.approx((TINY.alpha, TINY.alpha), rel=1e-2)


@pytest.mark.slow
def test_profile_intervals_cover_the_truth():
    """60 synthetic sweeps: fewer than 50 hits of 60 has probability 0.001 at 95 %."""
    hits = 0
    for seed in range(60):
        frame = isoflop(noise=0.005, sizes=12, seed=seed)
        fit = fit_approach3(*(frame[c].to_numpy(float) for c in ("n", "d", "loss")))
        low, high = profile_parametric(fit, frame, "alpha").interval
        hits += (low is None or low <= TINY.alpha) and (high is None or TINY.alpha <= high)
    assert hits >= 50, hits


def test_clusters_are_drawn_whole():
    frame = line().assign(run=np.arange(60) // 10)
    wide = bootstrap_law(fit_law(LINE, frame), frame, 300, np.random.default_rng(0))
    four = pd.concat([line()] * 4, ignore_index=True).assign(run=np.tile(np.arange(60), 4))
    honest = bootstrap_law(fit_law(LINE, four), four, 300, np.random.default_rng(0)).standard_errors()["b"]
    naive = bootstrap_law(fit_law(LINE, four), four.drop(columns="run"), 300, np.random.default_rng(0))
    assert wide.standard_errors()["b"] > 0
    assert naive.standard_errors()["b"] < 0.65 * honest  # a half, but for the noise of 300 draws


def test_its_columns_are_found_by_name_and_bad_rows_are_said():
    frame = line().rename(columns={"x": "steps"})
    frame.loc[3, "loss"] = np.nan
    frame = pd.concat([frame, frame.iloc[[0]]])
    table, words = law_table(LINE, frame, {"x": "steps"})
    assert len(table) == 59
    assert any("NaN rows dropped: 1 of 61" in w for w in words)
    assert any("duplicated runs dropped: 1" in w for w in words)
    with pytest.raises(UserError, match="no column for x; name it with --column x=NAME"):
        law_table(LINE, frame, {})
    with pytest.raises(UserError, match="'many' is not a number"):
        law_table(LINE, frame.assign(steps="many"), {"x": "steps"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.iloc[:2], "2 runs; law line has 2 parameters"),
        (lambda f: f.assign(loss=3.0), "all 60 values equal 3"),
        (lambda f: f.assign(loss=-f["loss"]), "column loss"),
        (lambda f: f.drop(columns="x"), "missing: x"),
    ],
)
def test_bad_tables(change, message):
    with pytest.raises(UserError, match=message):
        fit_law(LINE, change(line()))
