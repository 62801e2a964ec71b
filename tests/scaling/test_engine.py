"""The engine against scipy: the same optimum, for every objective, bound, weight and prior."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog, minimize

from llamax.errors import UserError
from llamax.scaling import Objective, fit_approach3
from llamax.scaling.approach3 import refit
from llamax.scaling.centred import Centred, huber_objective
from llamax.scaling.engine import Task

from .published import chinchilla_runs
from .synthetic import isoflop


def line(u, data, weights, target):
    return u[0] + u[1] * data["x"]


def task(objective, *, outlier=0.0, **changes):
    rng = np.random.default_rng(0)
    x = np.linspace(-1, 1, 21)
    y = 2.0 + 0.7 * x + 0.05 * rng.normal(size=21)
    y[3] += outlier
    return Task(line, {"x": x}, y, ("a", "b"), np.array([-9.0, -9.0]), np.array([9.0, 9.0]), objective, **changes)


def test_squares_are_the_normal_equations():
    plain = task(Objective("mse", log=False))
    weights = np.random.default_rng(1).integers(0, 4, (5, 21)).astype(float)
    found, value = plain.minimise(np.zeros((5, 2)), weights)
    basis = np.stack([np.ones(21), plain.data["x"]], axis=1)
    for i, w in enumerate(weights):
        wanted = np.linalg.solve((basis.T * w) @ basis, (basis.T * w) @ plain.target)
        assert found[i] == pytest.approx(wanted, rel=1e-9)
        assert value[i] == pytest.approx((w * (plain.target - basis @ wanted) ** 2).sum(), rel=1e-9)


def test_absolute_values_are_the_linear_programme():
    plain = task(Objective("lad", log=False), outlier=5.0)
    found, value = plain.minimise(np.zeros((1, 2)))
    basis = np.stack([np.ones(21), plain.data["x"]], axis=1)
    eye = np.eye(21)
    program = linprog(
        np.concatenate([np.zeros(2), np.ones(42)]),
        A_eq=np.hstack([basis, eye, -eye]),
        b_eq=plain.target,
        bounds=[(None, None)] * 2 + [(0, None)] * 42,
    )
    assert found[0] == pytest.approx(program.x[:2], rel=1e-6)
    assert value[0] == pytest.approx(program.fun, rel=1e-8)


@pytest.mark.parametrize("log", [True, False])
def test_huber_is_scipys_minimum(log):
    plain = task(Objective("huber", 0.03, log), outlier=3.0)
    found, value = plain.minimise(np.array([[1.0, 0.0]]))

    def total(u):
        fitted = u[0] + u[1] * plain.data["x"]
        r = np.abs(np.log(fitted / plain.target) if log else fitted - plain.target)
        return np.where(r <= 0.03, r**2 / 2, 0.03 * (r - 0.015)).sum()

    wanted = minimize(total, [2.0, 0.7], method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-14})
    assert found[0] == pytest.approx(wanted.x, rel=1e-5)
    assert value[0] == pytest.approx(wanted.fun, rel=1e-9)


def test_bounds_hold_and_are_named_and_may_differ_by_member():
    plain = replace(task(Objective("mse", log=False)), upper=np.array([9.0, 0.5]))
    found, _ = plain.minimise(np.zeros((1, 2)))
    assert found[0, 1] == 0.5
    assert plain.bounds_hit(found[0]) == ("b",)
    fixed = np.array([[-9.0, 0.1], [-9.0, 0.2]])
    found, values = plain.minimise(np.zeros((2, 2)), lower=fixed, upper=np.array([[9.0, 0.1], [9.0, 0.2]]))
    assert found[:, 1].tolist() == [0.1, 0.2]
    assert found[:, 0] == pytest.approx(plain.target.mean(), rel=1e-9)  # x is centred
    assert values[0] > values[1]


def test_a_prior_pulls_by_its_curvature():
    centre, curvature = np.array([0.0, 0.0]), np.array([0.0, 10.0])
    free = task(Objective("mse", log=False))
    found, _ = replace(free, prior=(centre, curvature)).minimise(np.zeros((1, 2)))
    x = free.data["x"]
    slope = (x * free.target).sum() / ((x**2).sum() + 10.0)  # ridge regression, of half the squares
    assert found[0, 1] == pytest.approx(slope, rel=1e-9)
    moved, _ = replace(free, prior=(centre, curvature)).minimise(np.zeros((1, 2)), prior_centre=np.array([[0.0, 3.0]]))
    assert moved[0, 1] == pytest.approx(((x * free.target).sum() + 30) / ((x**2).sum() + 10), rel=1e-9)


def test_more_members_than_a_block_and_the_global_precision_is_left_alone():
    plain = task(Objective("mse", log=False))
    found, _ = plain.minimise(np.random.default_rng(0).normal(size=(70, 2)))
    assert found.shape == (70, 2)
    assert np.ptp(found, axis=0).max() < 1e-8
    assert not jax.config.jax_enable_x64
    assert jnp.ones(1).dtype == jnp.float32


def test_describe_is_the_finite_difference():
    runs = tuple(isoflop(noise=0.01)[c].to_numpy(float) for c in ("n", "d", "loss"))
    problem = Centred.of(*runs, Objective())
    u = problem.starts()[0]
    residuals, jacobian = problem.task.describe(u)
    for i in range(5):
        step = np.zeros(5)
        step[i] = 1e-6
        slope = (problem.task.describe(u - step)[0] - problem.task.describe(u + step)[0]) / 2e-6
        assert jacobian[:, i] == pytest.approx(slope, rel=1e-6, abs=1e-9)
    total = huber_objective(problem.outside(u), *np.log(runs))[0]
    assert problem.task.value(residuals) == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize(
    ("values", "message"), [({"method": "l2"}, "choose huber, lad or mse"), ({"delta": 0.0}, "delta: 0.0")]
)
def test_bad_objectives(values, message):
    with pytest.raises(UserError, match=message):
        Objective(**values)


def test_refits_are_where_bfgs_ends():
    """Resamples of the published runs, each against scipy's BFGS with the analytic gradient."""
    runs = chinchilla_runs()
    logs = tuple(np.log(v) for v in runs)
    counts = np.random.default_rng(0).multinomial(240, np.full(240, 1 / 240), size=6).astype(float)
    law, objectives = refit(fit_approach3(*runs), *runs, counts)
    for i, row in enumerate(counts):
        repeated = tuple(np.repeat(v, row.astype(int)) for v in logs)
        start = [6.0073404, 6.0179186, 0.5267228, 0.33917084, 0.2849083]

        def total(theta, repeated=repeated):
            value, gradient = huber_objective(np.asarray(theta), *repeated)
            return 1e3 * value, 1e3 * gradient

        for _ in range(3):  # again from where it stopped: one line search is not enough at this curvature
            found = minimize(total, start, jac=True, method="BFGS", options={"gtol": 1e-10, "maxiter": 2000})
            start = found.x
        assert objectives[i] <= found.fun / 1e3 * (1 + 1e-9)
        theta = [np.log(law.A[i]), np.log(law.B[i]), np.log(law.E[i]), law.alpha[i], law.beta[i]]
        assert theta == pytest.approx(found.x, rel=1e-4)
