"""Known parameters of every law, back from data: by the library from noise-free columns, and by the command, from a
table under other names and with noise, with intervals that hold them."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from llamax.cli import app
from llamax.scaling import LAWS, fit_law, law
from llamax.scaling.traces import TRACED

from .test_lawbook import columns, truth
from .test_traces import SCHEDULES

RUNS = 32
NOISE = {"multipower": 1e-5}  # its seven parameters trade off: at more noise some end at their bounds
HEAVY = {"repeated", "moe", "granularity", "precision", "quantized", "annealing", "multipower"}
OWN = ("chinchilla", "coupled")  # the command's own fits of these two: tests/test_fitting.py
CASES = [pytest.param(name, marks=[pytest.mark.slow] if name in HEAVY else []) for name in LAWS if name not in OWN]
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


@pytest.mark.parametrize("name", LAWS)
def test_known_parameters_come_back(name: str) -> None:
    found = fit_law(law(name), made(name), starts=8)
    assert found.params == pytest.approx(truth(name), rel=1e-6)
    assert found.objective < 1e-20


@pytest.mark.parametrize("name", CASES)
def test_known_parameters_come_back_by_the_command(name: str, tmp_path: Path) -> None:
    noise = NOISE.get(name, 1e-3)
    data = made(name, noise)
    told = save(name, data, tmp_path / "runs.csv")
    draws = ["--bootstrap=40", "--seed=1", f"--seed-noise={noise}"]
    done = CliRunner().invoke(app, ["fit", str(tmp_path / "runs.csv"), f"--law={name}", *told, *draws, "--json"])
    assert done.exception is None, done.output
    result = json.loads(done.stdout)
    assert result["n_points"] == len(data[law(name).target])
    assert result["bounds_hit"] == []
    for key, value in truth(name).items():
        low, high = result["intervals"][key]
        slack = 0.4 * (high - low)  # 40 draws of one data set; the rate is measured in test_coverage.py
        assert low - slack < value < high + slack, (key, low, value, high)
