"""Known parameters of every law, back from data: by the library from noise-free columns; by the command from a table
under other names and with noise; and how often the intervals hold them over many such tables.

Where a check can fail by chance alone, all of its kind together do so with probability ALARM, by Bonferroni over what
is tested.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom, chi2, norm
from typer.testing import CliRunner

from llamax.cli import app
from llamax.scaling import LAWS, LawFit, bootstrap_law, fit_law, law
from llamax.scaling.traces import TRACED

from .test_lawbook import columns, truth
from .test_traces import SCHEDULES

RUNS = 32
NOISE = {"multipower": 1e-5}  # its seven parameters trade off: at more noise some end at their bounds
HEAVY = {"repeated", "moe", "granularity", "precision", "quantized", "annealing", "multipower"}
OWN = ("chinchilla", "coupled")  # the command's own fits of these two: tests/test_fitting.py
CASES = [pytest.param(name, marks=[pytest.mark.slow] if name in HEAVY else []) for name in LAWS if name not in OWN]
PARAMETERS = sum(len(law(name).names) for name in LAWS if name not in OWN)
STUDIES, DRAWS, ALARM = 100, 100, 0.01
OPTIONS = ("n", "d", "loss")  # have options of their own; the rest goes by --column


def chosen(size: int) -> np.ndarray:
    """Which rows of a design are kept: enough to determine every parameter, few enough to be quick."""
    return np.sort(np.random.default_rng(0).permutation(size)[:RUNS])


def made(name: str, noise: float = 0.0) -> dict[str, np.ndarray]:
    """Some rows of the law's design and its target there, with normal noise of that size in the logarithm."""
    spec = law(name)
    data = spec.read(columns(name), target=False)
    data = {key: values[chosen(len(values))] for key, values in data.items()}
    target = spec.evaluate(spec.vector(truth(name))[None], data)[0]
    return data | {spec.target: target * np.exp(noise * np.random.default_rng(5).normal(size=len(target)))}


def save(name: str, data: dict[str, np.ndarray], path: Path) -> list[str]:
    """Write the columns under other names; what the command is then told. Laws of curves get the curves themselves."""
    if TRACED & set(data):
        at = np.arange(40, len(SCHEDULES[0]), 17)
        curves = pd.DataFrame(
            {"job": i, "step": np.arange(1, len(lr) + 1), "rate": lr, "nll": np.nan} for i, lr in enumerate(SCHEDULES)
        )
        curves = curves.explode(["step", "rate"], ignore_index=True)
        steps = len(SCHEDULES[0])
        rows = np.concatenate([i * steps + at for i in range(len(SCHEDULES))])
        curves.loc[rows[chosen(len(rows))], "nll"] = data["loss"]
        curves.to_csv(path, index=False)
        return ["--loss=nll", "--column=lr=rate", "--group=job"]
    pd.DataFrame({f"my {key}": values for key, values in data.items()}).to_csv(path, index=False)
    return [f"--{key}=my {key}" if key in OPTIONS else f"--column={key}=my {key}" for key in data]


@functools.cache
def exact(name: str) -> LawFit:
    """The fit of the noise-free design."""
    return fit_law(law(name), made(name), starts=8)


def coordinates(name: str, params: Mapping[str, float | np.ndarray]) -> np.ndarray:
    """Parameters `[..., parameters]` as the fit counts them: in logarithms where the law says so."""
    return np.stack([np.log(params[p.name]) if p.log else params[p.name] for p in law(name).parameters], axis=-1)


def refits(
    name: str, at: np.ndarray, count: int, seed: int | tuple[int, int]
) -> tuple[np.ndarray, dict[str, list[float]]]:
    """Of `count` tables drawn with noise from the law at `at`: the parameters fitted to each, and their intervals."""
    frame = pd.DataFrame({key: list(values) for key, values in made(name).items()})
    fit, rng = replace(exact(name), u=at), np.random.default_rng(seed)
    draws = bootstrap_law(fit, frame, count, rng, seed_noise=NOISE.get(name, 1e-3))
    return coordinates(name, draws.params), draws.intervals()


@pytest.mark.parametrize("name", LAWS)
def test_known_parameters_come_back(name: str) -> None:
    found = exact(name)
    assert found.params == pytest.approx(truth(name), rel=1e-6)
    assert found.objective < 1e-20


@pytest.mark.parametrize("name", CASES)
def test_known_parameters_come_back_by_the_command(name: str, tmp_path: Path) -> None:
    """All parameters of a law at once: their distance from the truth, measured by the covariance of its estimates, is
    that of a chi-square of as many degrees of freedom. The command's numbers are the library's."""
    noise = NOISE.get(name, 1e-3)
    data = made(name, noise)
    told = save(name, data, tmp_path / "runs.csv")
    draws = ["--bootstrap=40", "--seed=1", f"--seed-noise={noise}"]
    done = CliRunner().invoke(app, ["fit", str(tmp_path / "runs.csv"), f"--law={name}", *told, *draws, "--json"])
    assert done.exception is None, done.output
    result = json.loads(done.stdout)
    assert result["n_points"] == len(data[law(name).target])
    assert result["bounds_hit"] == []
    true = coordinates(name, truth(name))
    covariance = np.cov(refits(name, true, 10 * DRAWS, 0)[0].T).reshape(2 * [len(true)])
    off = coordinates(name, result["params"]) - true
    assert off @ np.linalg.solve(covariance, off) < chi2.isf(ALARM / len(CASES), len(off)), (result["params"], off)
    _, intervals = refits(name, coordinates(name, result["params"]), 40, (1, 3))
    for key, ends in intervals.items():
        assert result["intervals"][key] == pytest.approx(ends, rel=1e-5), key


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LAWS if name not in OWN])
def test_intervals_hold_known_parameters(name: str) -> None:
    """Of STUDIES tables drawn from the law: the intervals hold each parameter as often as they say, and its error over
    its standard error has mean 0 and variance 1. Intervals half as wide fail, and so do those twice as wide."""
    true = coordinates(name, truth(name))
    held, off = [], []
    for seed, at in enumerate(refits(name, true, STUDIES, STUDIES)[0]):
        found, intervals = refits(name, at, DRAWS, seed)
        held.append([low <= truth(name)[key] <= high for key, (low, high) in intervals.items()])
        off.append((at - true) / found.std(0))
    hits, sums, squares = np.sum(held, 0), np.sum(off, 0), np.square(off).sum(0)
    rate = ALARM / PARAMETERS / 4
    said = dict(zip(truth(name), zip(hits, sums / STUDIES, squares / STUDIES, strict=True), strict=True))
    assert hits.min() >= binom.ppf(rate, STUDIES, 95 / (DRAWS + 1)), said  # from the 3rd of 100 draws to the 98th
    assert np.abs(sums).max() < norm.isf(rate / 2) * STUDIES**0.5, said
    assert chi2.ppf(rate, STUDIES) < squares.min(), said
    assert squares.max() < chi2.isf(rate, STUDIES), said
