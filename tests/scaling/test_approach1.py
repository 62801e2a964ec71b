"""The envelope of training curves: against loops, against the law the curves follow, and what it refuses."""

import math

import numpy as np
import pandas as pd
import pytest

from llamax.errors import UserError
from llamax.scaling import ChinchillaLaw, fit_approach1, optimal_allocation

from .synthetic import CHINCHILLA

LAW = ChinchillaLaw(E=1.8, A=480.0, B=2100.0, alpha=0.35, beta=0.37)


def curves(law: ChinchillaLaw = LAW, sizes: int = 40, points: int = 60) -> pd.DataFrame:
    """Training curves of a ladder of sizes, each on the law at every point."""
    rows = []
    for i, n in enumerate(np.geomspace(1e7, 1e10, sizes)):
        for d in np.geomspace(n, 400 * n, points):
            rows.append((f"run{i}", n, d, 6 * n * d, float(law.loss(n, d))))
    return pd.DataFrame(rows, columns=["run", "n", "d", "flops", "loss"])


@pytest.mark.parametrize("law", [LAW, CHINCHILLA])
def test_the_envelope_has_the_laws_exponents_and_allocation(law: ChinchillaLaw) -> None:
    fit = fit_approach1(curves(law))
    total = law.alpha + law.beta
    assert fit.n.exponent == pytest.approx(law.beta / total, abs=0.01)
    assert fit.d.exponent == pytest.approx(law.alpha / total, abs=0.01)
    assert fit.n.exponent + fit.d.exponent == pytest.approx(1, abs=1e-6)
    assert float(fit.n.at(1e20)) == pytest.approx(float(optimal_allocation(law, 1e20).n), rel=0.05)
    assert float(fit.d.at(1e20)) == pytest.approx(float(optimal_allocation(law, 1e20).d), rel=0.05)


def test_every_level_is_the_least_of_all_curves_there() -> None:
    frame = curves(sizes=9, points=15)
    found = fit_approach1(frame, levels=40).envelope
    by_run = {name: rows for name, rows in frame.groupby("run")}
    for flops, n, d, loss, run, edge in zip(*vars(found).values(), strict=True):
        here = {}
        for name, rows in by_run.items():
            c, y = rows["flops"].to_numpy(), rows["loss"].to_numpy()
            for left, right, y0, y1 in zip(c, c[1:], y, y[1:], strict=False):
                if left * (1 - 1e-12) <= flops <= right * (1 + 1e-12):
                    share = math.log(flops / left) / math.log(right / left)
                    here[name] = y0 + share * (y1 - y0)
        assert run == min(here, key=here.__getitem__)
        assert loss == pytest.approx(here[run], rel=1e-12)
        assert d == pytest.approx(flops / (6 * n), rel=1e-9)
        measured = [by_run[name]["n"].iloc[0] for name in here]
        assert edge == (n in (min(measured), max(measured)))


def test_edges_are_left_out_and_named() -> None:
    frame = curves(sizes=6)
    record = fit_approach1(frame).as_dict()
    assert record["edge_levels"] > 0
    assert record["levels"] + record["edge_levels"] <= 1500
    assert {"n", "flops", "edge"} == set(record["sizes"][0])
    small = fit_approach1(frame[frame["n"] < 3e8])
    assert any("smallest or largest one measured" in w for w in small.warnings)


def test_two_sizes_give_no_exponent() -> None:
    fit = fit_approach1(curves()[lambda f: f["run"].isin(["run3", "run4"])])
    assert fit.n is None
    assert fit.as_dict()["n_exponent"] is None
    assert any("no exponent" in w for w in fit.warnings)


def test_noise_is_named() -> None:
    frame = curves()
    noisy = frame.assign(loss=frame["loss"] * np.exp(0.05 * np.random.default_rng(0).normal(size=len(frame))))
    assert any("smooth them first" in w for w in fit_approach1(noisy).warnings)


def test_bad_input() -> None:
    frame = curves(sizes=4, points=5)
    with pytest.raises(UserError, match="columns run: missing"):
        fit_approach1(frame.drop(columns="run"))
    with pytest.raises(UserError, match="approach 1 needs curves of at least two sizes"):
        fit_approach1(frame.groupby("run").head(1))
    with pytest.raises(UserError, match="column n: run all"):
        fit_approach1(frame.assign(run="all"))
    apart = frame[frame["run"].isin(["run0", "run3"])]
    apart = apart.assign(flops=apart["flops"].where(apart["run"] == "run0", apart["flops"] * 1e9))
    with pytest.raises(UserError, match="curves must overlap"):
        fit_approach1(apart)
    with pytest.raises(UserError, match="levels: 1"):
        fit_approach1(frame, levels=1)
