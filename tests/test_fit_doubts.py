"""What `llamax fit` says of tables that look right and are not, and of intervals that would have no width."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from llamax.errors import UserError
from llamax.fitting import FitOptions, fit_data
from tests.test_fitting import NAMES, fit, table, words


@pytest.mark.parametrize("change", [lambda loss: loss / 1e9, lambda loss: np.where(loss.index < 3, loss / 1e9, loss)])
def test_losses_off_by_a_billion_are_questioned(tmp_path: Path, change: Any) -> None:
    for law in ("chinchilla", "overtraining"):
        frame = table().assign(nll=lambda f: change(f["nll"]))
        assert "loss goes down to" in words(fit(frame, tmp_path, law=law)), law
        assert "loss goes down to" not in words(fit(table(), tmp_path, law=law)), law


def test_copies_with_other_digits_are_questioned(tmp_path: Path) -> None:
    frame = table()
    copies = frame.iloc[:3].assign(nll=frame["nll"].iloc[:3].round(5))
    assert "duplicated runs? 3 rows" in words(fit(pd.concat([frame, copies]), tmp_path, law="chinchilla"))
    seeds = frame.assign(nll=frame["nll"] * np.exp(0.003 * np.random.default_rng(1).normal(size=len(frame))))
    assert "duplicated" not in words(fit(pd.concat([frame, seeds]), tmp_path, law="chinchilla"))
    rounded = pd.concat([frame, seeds]).assign(nll=lambda f: f["nll"].round(2), seed=lambda f: range(len(f)))
    assert "duplicated runs?" not in words(fit(rounded, tmp_path, law="chinchilla"))


def test_a_study_without_runs_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run is finished; it holds no run yet"):
        fit_data(tmp_path, FitOptions())


def test_intervals_have_a_width_where_each_group_is_a_budget(tmp_path: Path) -> None:
    """Drawn within its budget, a run that is alone there would be in every resample once."""
    frame = table().assign(cluster=lambda f: f["level"], own=lambda f: f["compute"] * (1 + 1e-3 * f.index))
    for options in ({"group": "cluster", "columns": NAMES}, {"columns": {**NAMES, "budget": "own"}}):
        low, high = fit(frame, tmp_path, law="chinchilla", bootstrap=40, **options)["intervals"]["alpha"]
        assert high - low > 1e-3, options


def test_the_target_of_approach_1_is_checked_too(tmp_path):
    sizes, parts = np.geomspace(1e7, 1e9, 12), np.geomspace(1e-3, 1, 60)
    runs = pd.DataFrame([(f"r{i}", n, 2000 * (1e7 * n) ** 0.5 * part) for i, n in enumerate(sizes) for part in parts])
    runs.columns = ["run", "n", "d"]
    runs["loss"] = 1.7 + 400 / runs["n"] ** 0.34 + 1100 / runs["d"] ** 0.29
    options = {"columns": {}, "approaches": (1,), "group": "run"}
    assert "long extrapolation" in words(fit(runs, tmp_path, at=1e40, **options))
    for flops in (-1.0, float("nan")):
        with pytest.raises(UserError, match="give a positive number of training FLOPs"):
            fit(runs, tmp_path, at=flops, **options)


def test_registry_laws_are_doubted_as_the_others_are(tmp_path):
    frame = table(sizes=8).assign(cluster=lambda f: f["level"])
    said = words(fit(frame, tmp_path, law="overtraining", group="cluster", at=1e20, bootstrap=20))
    for word in ("only 4 groups", "span under 1.5 decades", "long extrapolation"):
        assert word in said, word
    for law in ("overtraining", "chinchilla"):
        with pytest.raises(UserError, match="seed noise: -1"):
            fit(frame, tmp_path, law=law, seed_noise=-1.0, bootstrap=20)
