"""Optima and shifts of a transfer study: recovery of a known shift, coverage of the interval, edges and bad input."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from llamax.errors import UserError
from llamax.scaling import lr_optima, lr_shift, transfer_summary


def table(slope: float, noise: float = 0.0, seeds: int = 3, rng: int = 0, sizes: tuple[int, ...] = (32, 64, 128, 256)):
    """Valleys 2 + (log2 lr - best)^2 / 50 with best = -6 + slope log2(width / 32), moved by noise in log2 a seed."""
    draw = np.random.default_rng(rng)
    rows = []
    for width in sizes:
        for seed in range(seeds):
            best = -6 + slope * math.log2(width / 32) + noise * draw.normal()
            for k in range(-10, -2):
                loss = 2 + (k - best) ** 2 / 50
                rows.append({"parametrization": "mup", "width": width, "lr": 2.0**k, "seed": seed, "loss": loss})
    return pd.DataFrame(rows)


def test_a_parabola_is_found_exactly() -> None:
    optima = lr_optima(table(-0.37), "width")
    assert np.log2(optima["lr"]).to_numpy() == pytest.approx(-6 - 0.37 * np.log2(optima["width"] / 32).to_numpy())
    assert optima["loss"].to_numpy() == pytest.approx(2.0)
    assert optima["interior"].all()
    (shift,) = lr_shift(table(-0.37), "width")
    assert shift.per_doubling == pytest.approx(-0.37)
    assert (shift.sizes, shift.dof) == ((32, 64, 128, 256), 8)
    assert shift.interval == pytest.approx((-0.37, -0.37))
    assert shift.cost == pytest.approx(
        (-6 + 7.11) ** 2 / 50 - (-7 + 7.11) ** 2 / 50
    )  # at 2^-6; the grid's best is 2^-7


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    held = 0
    for trial in range(200):
        (shift,) = lr_shift(table(-0.2, noise=0.2, seeds=2, rng=trial), "width")
        assert shift.interval is not None
        held += shift.interval[0] <= -0.2 <= shift.interval[1]
    assert 180 <= held <= 199  # 190 of 200, +- 3 standard deviations


def test_an_optimum_at_the_edge_is_told_and_not_used() -> None:
    frame = table(-1.3)  # the widest would be best at 2^-9.9, next to the grid's edge at 2^-10
    summary = transfer_summary(frame, "width")
    assert summary["shifts"][0]["sizes"] == (32, 64, 128)
    assert any("width 256" in word and "edge" in word for word in summary["warnings"])


def test_a_divergence_beside_the_best_is_no_optimum() -> None:
    frame = table(0.0)
    frame.loc[frame["lr"] > 2.0**-6, "loss"] = np.nan
    optima = lr_optima(frame, "width")
    assert not optima["interior"].any()
    assert (optima["lr"] == 2.0**-6).all()
    summary = transfer_summary(frame, "width")
    assert math.isnan(summary["shifts"][0]["per_doubling"])
    assert any("have no loss" in word for word in summary["warnings"])


def test_one_seed_has_no_interval() -> None:
    (shift,) = lr_shift(table(0.1, seeds=1), "width")
    assert shift.interval is None
    assert any("one seed" in word for word in transfer_summary(table(0.1, seeds=1), "width")["warnings"])


def test_a_rate_that_diverges_at_the_largest_costs_everything() -> None:
    frame = table(-0.5)
    frame.loc[(frame["width"] == 256) & (frame["lr"] >= 2.0**-6.5), "loss"] = np.nan
    (shift,) = lr_shift(frame, "width")
    assert shift.cost == math.inf


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: f.drop(columns="loss"), "need column 'loss'"),
        (lambda f: f.assign(lr=-1.0), "must be positive"),
        (lambda f: pd.concat([f, f.head(1)]), "two runs are one cell"),
        (lambda f: f.assign(loss=np.nan), "no run of"),
    ],
)
def test_bad_tables_are_refused(change, words: str) -> None:
    with pytest.raises(UserError, match=words):
        lr_shift(change(table(0.0)), "width")
