"""S1, S2 and the drops of a learning-rate trace, by loops; and bad traces."""

import math

import numpy as np
import pytest

from llamax.errors import UserError
from llamax.scaling.registry import law
from llamax.scaling.traces import annealing_columns, power_columns

STEPS, WARMUP = 240, 20


def schedule(kind: str, peak: float = 3e-4) -> np.ndarray:
    """Learning rates of 240 steps, 20 of them warm-up."""
    t = np.arange(STEPS)
    x = np.clip((t - WARMUP) / (STEPS - WARMUP), 0, 1)
    shape = {
        "cosine": 0.1 + 0.9 * 0.5 * (1 + np.cos(math.pi * x)),
        "wsd": np.clip((1 - x) / 0.2, 0.05, 1),
        "constant": np.ones(STEPS),
        "step": np.where(x < 0.5, 1.0, np.where(x < 0.8, 0.3, 0.1)),
        "cycle": 0.6 + 0.4 * np.cos(6 * math.pi * x),  # rises too
    }[kind]
    return peak * shape * np.minimum((t + 1) / WARMUP, 1)


SCHEDULES = [schedule(kind) for kind in ("cosine", "wsd", "constant", "step")] + [schedule("cosine", 9e-4)]


@pytest.mark.parametrize("kind", ["cosine", "wsd", "step", "cycle"])
@pytest.mark.parametrize("warmup", [0, WARMUP])
def test_areas_are_those_of_the_double_sum(kind: str, warmup: int) -> None:
    lr, at = schedule(kind), [0, 1, 19, 21, 100, 239]
    found = annealing_columns(lr, at, warmup=warmup, memory=0.97)
    for row, s in enumerate(at):
        s1 = sum(lr[i] for i in range(s + 1))
        s2 = sum(
            (lr[k - 1] - lr[k]) * 0.97 ** (i - k) for i in range(1, s + 1) for k in range(max(1, warmup + 1), i + 1)
        )
        assert found["s1"][row] == pytest.approx(s1, rel=1e-12)
        assert found["s2"][row] == pytest.approx(s2, rel=1e-9, abs=1e-18)


@pytest.mark.parametrize("kind", ["cosine", "wsd", "step", "cycle", "constant"])
def test_multipower_is_its_sum_over_steps(kind: str) -> None:
    lr, at = schedule(kind), [25, 100, 180, 239]
    spec = law("multipower")
    p = dict(spec.published["Luo et al. 2025, 100M"])
    columns = power_columns(lr, at, warmup=WARMUP)
    found = spec.predict(p, columns)
    for row, t in enumerate(at):
        s1 = lr[: t + 1].sum()
        drop = 0.0
        for k in range(WARMUP + 1, t + 1):
            since = lr[k : t + 1].sum()
            x = lr[k] ** -p["gamma"] * since
            drop += (lr[k - 1] - lr[k]) * (1 - (p["C"] * x + 1) ** -p["beta"])
        assert found[row] == pytest.approx(p["L0"] + p["A"] * s1 ** -p["alpha"] - p["B"] * drop, rel=1e-10)
    assert columns["lr_drop"].shape == (4, np.count_nonzero(np.diff(lr[WARMUP:])))


def test_annealing_lowers_the_loss_and_a_constant_rate_has_none() -> None:
    params = {"L0": 2.6, "A": 0.4, "alpha": 0.5, "C": 3.0}
    constant = annealing_columns(schedule("constant"), [239], warmup=WARMUP)
    assert constant["s2"][0] == 0
    decayed = annealing_columns(schedule("wsd"), [239], warmup=WARMUP)
    same_area = {"s1": decayed["s1"], "s2": np.zeros(1)}
    spec = law("annealing")
    assert spec.predict(params, decayed)[0] < spec.predict(params, same_area)[0]
    assert spec.predict(params, constant)[0] == pytest.approx(2.6 + 0.4 * constant["s1"][0] ** -0.5)


def test_bad_traces() -> None:
    lr = schedule("cosine")
    for bad in ([], [1.0, -1.0], [1.0, math.nan]):
        with pytest.raises(UserError, match="lr: give the learning rate of every step"):
            power_columns(np.asarray(bad, float), [0])
    with pytest.raises(UserError, match="the trace has steps 0 to 239"):
        annealing_columns(lr, [3, 240])
    with pytest.raises(UserError, match="memory: 1"):
        annealing_columns(lr, [3], memory=1.0)
