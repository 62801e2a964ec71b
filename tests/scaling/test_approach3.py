import numpy as np
import pytest

from llamax.errors import UserError
from llamax.scaling import fit_approach3, optimal_allocation
from llamax.scaling.approach3 import check_runs, refit, residual_scale
from llamax.scaling.centred import huber_objective

from .published import chinchilla_runs, expected
from .synthetic import CHINCHILLA, TINY, isoflop


def columns(frame):
    return tuple(frame[c].to_numpy(float) for c in ("n", "d", "loss"))


@pytest.mark.parametrize("delta", [1e-3, 0.5])
def test_gradient_is_the_finite_difference(delta):
    n, d, loss = columns(isoflop(noise=0.01))
    logs = np.log(n), np.log(d), np.log(loss)
    theta = np.array([3.9, 6.2, -0.2, 0.36, 0.41])
    value, gradient = huber_objective(theta, *logs, delta)
    # Written out here from the paper, by a loop, as the independent source.
    total = 0.0
    for x, y, z in zip(*logs, strict=True):
        r = abs(np.log(np.exp(theta[0] - theta[3] * x) + np.exp(theta[1] - theta[4] * y) + np.exp(theta[2])) - z)
        total += r * r / 2 if r <= delta else delta * (r - delta / 2)
    assert value == pytest.approx(total, rel=1e-12)
    for i in range(5):
        step = np.zeros(5)
        step[i] = 1e-6
        slope = (huber_objective(theta + step, *logs, delta)[0] - huber_objective(theta - step, *logs, delta)[0]) / 2e-6
        assert gradient[i] == pytest.approx(slope, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("law", [TINY, CHINCHILLA])
def test_recovers_a_known_law(law):
    budgets = (3e11, 7e11, 1.5e12, 3e12) if law is TINY else (1e17, 1e18, 1e19, 1e20, 1e21)
    fit = fit_approach3(*columns(isoflop(law, budgets, sizes=7)))
    for name, value in law.as_dict().items():
        assert fit.as_dict()["params"][name] == pytest.approx(value, rel=1e-4), name
    assert fit.objective < 1e-12
    assert fit.search.starts_at_best > fit.search.starts / 2
    assert fit.warnings == ()


def test_optimum_is_stationary_and_below_every_neighbour():
    n, d, loss = columns(isoflop(noise=0.01, sizes=7))
    fit = fit_approach3(n, d, loss)
    logs = np.log(n), np.log(d), np.log(loss)
    value, gradient = huber_objective(fit.theta, *logs)
    assert value == pytest.approx(fit.objective, rel=1e-9)
    assert np.abs(gradient).max() < 1e-5 * np.abs(huber_objective(fit.theta + 0.1, *logs)[1]).max()
    rng = np.random.default_rng(0)
    for scale in (1e-4, 1e-2, 1e-1):
        for _ in range(50):
            assert huber_objective(fit.theta + scale * rng.normal(size=5), *logs)[0] >= value
    assert residual_scale(fit) == pytest.approx(0.01, rel=0.5)


def test_one_outlier_does_not_move_the_fit():
    n, d, loss = columns(isoflop(sizes=7))
    spoiled = loss.copy()
    spoiled[3] *= 1.3  # one diverged run
    fit = fit_approach3(n, d, spoiled)
    assert fit.law.alpha == pytest.approx(TINY.alpha, rel=5e-3)  # least squares moves it by far more
    assert float(fit.law.loss(1e6, 1e7)) == pytest.approx(float(TINY.loss(1e6, 1e7)), rel=1e-3)


def test_matches_the_published_chinchilla_fit():
    check, runs = expected("chinchilla_a3_huber"), chinchilla_runs()
    fit = fit_approach3(*runs)
    found = fit.as_dict()["params"] | {"objective": fit.objective}
    for name, tolerance in check["tol_rel"].items():
        assert found[name] == pytest.approx(check["reference"][name], rel=tolerance), name
    assert fit.n_points == check["reference"]["n"]
    best = optimal_allocation(fit.law, check["derived"]["chinchilla_compute"]["C"])
    assert best.n == pytest.approx(check["derived"]["chinchilla_compute"]["N_opt"], rel=1e-3)
    assert best.loss == pytest.approx(check["derived"]["chinchilla_compute"]["loss"], rel=1e-5)


def test_small_delta_is_the_headline_of_the_replication():
    check = expected("chinchilla_a3_published_headline")
    found = fit_approach3(*chinchilla_runs(), delta=1e-8).as_dict()["params"]
    for name, tolerance in check["tol_rel"].items():
        assert found[name] == pytest.approx(check["reference"][name], rel=tolerance), name


def test_the_five_dropped_runs_matter_as_published():
    check = expected("chinchilla_a3_all245")
    fit = fit_approach3(*chinchilla_runs(keep_all=True))
    found = fit.as_dict()["params"]
    for name, tolerance in check["tol_rel"].items():
        assert found[name] == pytest.approx(check["reference"][name], rel=tolerance), name


def test_hoffmann_objective_on_the_published_runs():
    check = expected("hoffmann_published")
    logs = tuple(np.log(v) for v in chinchilla_runs())
    rounded = np.array([np.log(406.4), np.log(410.7), np.log(1.69), 0.34, 0.28])
    exact = np.array(check["published"]["unrounded_logA_logB_logE_alpha_beta"])
    assert huber_objective(rounded, *logs)[0] == pytest.approx(
        check["reference"]["objective_on_epoch240_rounded"], rel=1e-6
    )
    assert huber_objective(exact, *logs)[0] == pytest.approx(
        check["reference"]["objective_on_epoch240_unrounded"], rel=1e-6
    )


def test_refit_with_weights_is_a_fit_of_repeated_rows():
    n, d, loss = columns(isoflop(noise=0.01))
    fit = fit_approach3(n, d, loss)
    counts = np.random.default_rng(3).multinomial(len(n), np.full(len(n), 1 / len(n)), size=4)
    laws, objectives = refit(fit, n, d, loss, counts.astype(float))
    for i, row in enumerate(counts):
        repeated = fit_approach3(*(np.repeat(v, row) for v in (n, d, loss)))
        assert objectives[i] == pytest.approx(repeated.objective, rel=1e-3)
        assert laws.loss(1e5, 1e7)[i] == pytest.approx(float(repeated.law.loss(1e5, 1e7)), rel=2e-3)


def test_what_the_data_cannot_tell_is_said_in_words():
    words = " ".join(fit_approach3(*columns(isoflop(budgets=(1e12, 2e12), sizes=5, noise=0.02))).warnings)
    assert "only 10 runs" in words
    n, d, _ = columns(isoflop(sizes=6))
    same_data = fit_approach3(n, d, 1.0 + 50 / n**0.3 * np.exp(0.001 * np.random.default_rng(0).normal(size=len(n))))
    assert {"B", "beta"} & set(same_data.search.bounds_hit)
    assert any("ran into its bound" in w for w in same_data.warnings)
    narrow = isoflop(span=1.2, budgets=(1e12, 1.3e12, 1.5e12), sizes=6, noise=1e-3)
    assert any("spans less than a factor" in w for w in fit_approach3(*columns(narrow)).warnings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n, d, y: (n[:5], d[:5], y[:5]), "5 runs"),
        (lambda n, d, y: (-n, d, y), "column n"),
        (lambda n, d, y: (n, d * 0, y), "column d"),
        (lambda n, d, y: (n, d, np.where(y == y.max(), np.nan, y)), "column loss"),
        (lambda n, d, y: (n, d, y * 0 + 3.0), "all 24 values equal 3"),
        (lambda n, d, y: (n * 0 + 1e5, d, y), "vary the model size"),
        (lambda n, d, y: (n, d * 0 + 1e7, y), "vary the tokens"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(UserError, match=message):
        fit_approach3(*change(*columns(isoflop())))


def test_unequal_columns_are_refused():
    n, d, loss = columns(isoflop())
    with pytest.raises(UserError, match="24, 23 and 24 values"):
        check_runs(n, d[:-1], loss)


def test_integers_are_numbers():
    assert optimal_allocation(TINY, 10**13).n == optimal_allocation(TINY, 1e13).n
    assert TINY.loss(10**6, 10**8) == pytest.approx(float(TINY.loss(1e6, 1e8)))
