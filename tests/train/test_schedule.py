"""Schedules against optax's and against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llamax.config.run import Schedule
from llamax.train.schedule import learning_rate, schedule_hyperparameters

PEAK = 3e-3


def curve(schedule: Schedule, steps: int) -> np.ndarray:
    hyper = schedule_hyperparameters(schedule, steps) | {"lr": np.float32(PEAK)}
    return np.asarray(jax.vmap(lambda s: learning_rate(schedule.kind, s, hyper))(jnp.arange(steps)))


def test_cosine_is_optax_warmup_cosine():
    ours = curve(Schedule(kind="cosine", warmup=0.1, final=0.1), 100)
    optaxs = optax.warmup_cosine_decay_schedule(PEAK / 10, PEAK, warmup_steps=9, decay_steps=99, end_value=0.1 * PEAK)
    np.testing.assert_allclose(ours, [optaxs(s) for s in range(100)], rtol=1e-5)


def test_linear_is_optax_join_of_two_lines():
    ours = curve(Schedule(kind="linear", warmup=0.25, final=0.2), 40)
    up, down = optax.linear_schedule(PEAK / 10, PEAK, 9), optax.linear_schedule(PEAK, 0.2 * PEAK, 30)
    optaxs = optax.join_schedules([up, down], [9])
    np.testing.assert_allclose(ours, [optaxs(s) for s in range(40)], rtol=1e-5)


def test_wsd_holds_then_falls_over_its_last_steps():
    ours = curve(Schedule(kind="wsd", warmup=0.1, final=0.0, decay=0.2), 50) / PEAK
    expected = [(s + 1) / 5 for s in range(5)] + [1.0] * 35 + [1 - k / 10 for k in range(1, 11)]
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_constant_stays_at_the_peak():
    ours = curve(Schedule(kind="constant", warmup=0.2, final=0.0), 10) / PEAK
    np.testing.assert_allclose(ours, [0.5] + [1.0] * 9, rtol=1e-6)


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5])
def test_peak_and_final_are_reached_exactly_once(kind, warmup):
    ours = curve(Schedule(kind=kind, warmup=warmup, final=0.25, decay=1.0 - warmup), 20) / PEAK
    peak = max(round(20 * warmup), 1) - 1
    assert np.argmax(ours) == peak
    np.testing.assert_allclose([ours[peak], ours[-1]], [1.0, 0.25], rtol=1e-6)
    assert (np.diff(ours[peak:]) < 0).all()
    assert (np.diff(ours[: peak + 1]) > 0).all()


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_one_step_and_warmup_over_everything_end_on_the_peak(kind):
    np.testing.assert_allclose(curve(Schedule(kind=kind, warmup=0.0), 1), [PEAK], rtol=1e-6)
    rising = Schedule(kind=kind, warmup=1.0, decay=0.0)
    np.testing.assert_allclose(curve(rising, 1), [PEAK], rtol=1e-6)
    np.testing.assert_allclose(curve(rising, 4), PEAK * np.arange(1, 5) / 4, rtol=1e-6)


def test_rates_stay_at_the_end_when_asked_beyond_it():
    hyper = schedule_hyperparameters(Schedule(final=0.1), 10) | {"lr": np.float32(1.0)}
    np.testing.assert_allclose(learning_rate("cosine", 1000, hyper), 0.1, rtol=1e-6)


def test_horizons_are_arrays():
    traces = 0

    @jax.jit
    def rate(step, hyper):
        nonlocal traces
        traces += 1
        return learning_rate("wsd", step, hyper)

    for steps in (10, 200, 4000):
        hyper = schedule_hyperparameters(Schedule(kind="wsd", warmup=0.1, final=0.5), steps) | {"lr": np.float32(2.0)}
        np.testing.assert_allclose(rate(steps - 1, hyper), 1.0, rtol=1e-6)
    assert traces == 1


def test_unknown_kind_is_named():
    with pytest.raises(ValueError, match="'triangle' is not one of"):
        learning_rate("triangle", 0, schedule_hyperparameters(Schedule(), 10) | {"lr": 1.0})
