"""Cells' numbers against arithmetic done here; rules, warnings, tables, plan.json."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from llamax.accounting import count_params, memory_bytes, training_flops_per_token
from llamax.cli import app
from llamax.config.load import load_model, load_run, validate
from llamax.config.sweep import SweepConfig, load_sweep
from llamax.errors import UserError
from llamax.sweep.plan import Plan, load_plan, make_cell, make_plan, save_plan
from llamax.sweep.tables import duration, plan_tables, si
from llamax.sweep.throughput import Throughput, guess, measured, wall_seconds

ISO = {"kind": "isoflop", "budgets": [1e11, 4e11], "sizes": ["ladder/d16", "ladder/d32", "ladder/d64"]}
BASE = {"model": {"base": "ladder/d32", "max_seq_len": 128}, "train": {"steps": 10, "seq_len": 128, "batch_size": 8}}
SLOW = Throughput(lambda n, tokens: 1e9, 3.0, "one GFLOP/s")


def plan(*axes: dict, corpus_tokens: int | None = None, devices: int | None = None, **more: object) -> Plan:
    spec = validate(SweepConfig, {"name": "s", "base": BASE, "axes": list(axes), **more}, "test")
    return make_plan(spec, corpus_tokens=corpus_tokens, throughput=SLOW, devices=devices)


def test_numbers_of_a_cell_are_accountings() -> None:
    cells = plan(ISO, {"kind": "seeds", "values": [5]}, corpus_tokens=1_000_000).cells
    assert [c.name for c in cells] == [f"C{c}-d{d}-s5" for c in ("1e11", "4e11") for d in (16, 32, 64)]
    for cell in cells:
        model = load_model(f"ladder/{cell.tags['size']}")
        n = count_params(model).active_matmul
        steps = round(cell.tags["budget"] / (6 * n) / (8 * 128))
        assert (cell.n, cell.steps, cell.tokens) == (n, steps, steps * 1024)
        assert cell.flops["6n"] == pytest.approx(6 * n * cell.tokens)
        assert cell.flops == {k: v * cell.tokens for k, v in training_flops_per_token(cell.config.model, 128).items()}
        assert cell.tokens_per_param == cell.tokens / n
        assert cell.epochs == cell.tokens / 1e6
        assert cell.seconds == pytest.approx(3.0 + 6 * n * cell.tokens / 1e9)
        assert cell.memory_bytes == memory_bytes(cell.config)["total"]
        assert cell.tags["seed"] == cell.config.train.seed == 5
        assert cell.config.model.max_seq_len == 128, "the base's own model fields survive the size axis"
        assert cell.run_name == f"{cell.name}-{cell.config.hash8}"


@pytest.mark.parametrize("tokens", [0, -5])
def test_a_corpus_of_no_tokens_is_refused(tokens: int) -> None:
    with pytest.raises(UserError, match=f"corpus tokens: {tokens}; give the number"):
        plan(ISO, corpus_tokens=tokens)


def test_workers_that_are_none_are_refused(tmp_path: Path) -> None:
    """Before anything is written."""
    for words in (["plan", "quickstart-fast"], ["run", "quickstart-fast", "--dir", str(tmp_path / "study")]):
        done = CliRunner().invoke(app, ["sweep", *words, "--workers", "-3"])
        assert "--workers -3: give 1 or more" in str(done.exception)
    assert not (tmp_path / "study").exists()


def test_overrides_of_a_cell_rebuild_it(tmp_path: Path) -> None:
    spec = load_sweep("quickstart")
    for cell in make_plan(spec).cells:
        assert load_run("quickstart", cell.overrides) == cell.config


def test_power_laws_are_resolved_into_the_config() -> None:
    rules = {
        "lr": {"kind": "power_law", "coefficient": 0.3, "n_exponent": -0.3, "d_exponent": 0.05, "max": 0.03},
        "batch": {"kind": "power_law", "coefficient": 0.02, "d_exponent": 0.5, "min": 2, "max": 16},
    }
    for cell in plan(ISO, rules=rules).cells:
        d = cell.tags["budget"] / (6 * cell.n)
        lr = min(0.3 * cell.n**-0.3 * d**0.05, 0.03)
        assert cell.lr == cell.config.optimizer.lr == pytest.approx(lr, rel=5e-3)
        powers = [2, 4, 8, 16]
        wanted = min(max(0.02 * d**0.5, 2), 16)
        assert cell.batch == cell.config.train.batch_size
        assert cell.batch == min(powers, key=lambda b: abs(math.log2(b / wanted)))
        assert f"x {cell.n:,}^-0.3" in cell.rules["lr"]
        assert cell.rules["lr"].endswith(f"{cell.lr:g}")
        assert cell.rules["batch"].endswith(f": {cell.batch}")
        assert f"= {cell.steps:,}" in cell.rules["steps"]


def test_batch_in_tokens_rounds_to_a_multiple() -> None:
    batch = {"kind": "power_law", "coefficient": 3.0, "d_exponent": 0.5, "unit": "tokens", "multiple": 3}
    for cell in plan(ISO, rules={"batch": batch}).cells:
        sequences = 3.0 * (cell.tags["budget"] / (6 * cell.n)) ** 0.5 / 128
        assert cell.batch % 3 == 0
        assert cell.batch == 3 or abs(cell.batch - sequences) <= 1.5


def test_fixed_rules_and_minimum_steps() -> None:
    fixed = {"lr": {"kind": "fixed", "value": 0.02}, "batch": {"kind": "fixed", "value": 64}, "min_steps": 100}
    cells = plan(ISO, rules=fixed).cells
    assert {c.lr for c in cells} == {0.02}
    for cell in cells:
        tokens = cell.tags["budget"] / (6 * cell.n)
        assert cell.steps >= 100
        assert cell.batch == 64 or round(tokens / (2 * cell.batch * 128)) < 100, "lowered no further than needed"
    lowered = [c for c in cells if c.batch < 64]
    assert lowered
    assert all("for at least 100 steps" in c.rules["batch"] for c in lowered)
    assert all("for at least" not in c.rules["batch"] for c in cells if c.batch == 64)


def test_a_rule_may_be_an_axis() -> None:
    axis = {"kind": "product", "fields": {"rules.lr.coefficient": [0.1, 0.2]}}
    cells = plan(axis, rules={"lr": {"kind": "power_law", "coefficient": 1.0}}).cells
    assert [c.lr for c in cells] == [0.1, 0.2]
    assert [c.name for c in cells] == ["coefficient0.1", "coefficient0.2"]


def test_a_batch_law_needs_a_horizon_in_tokens() -> None:
    with pytest.raises(UserError, match=r"cell s: rules.batch: kind power_law needs D, and train.steps=10"):
        plan(rules={"batch": {"kind": "power_law", "coefficient": 1, "d_exponent": 0.5}})


def test_a_bad_cell_is_named() -> None:
    with pytest.raises(UserError, match=r"sweep s, cell norm_frobnorm: .*frobnorm"):
        plan({"kind": "product", "fields": {"model.norm.kind": ["rmsnorm", "frobnorm"]}})
    with pytest.raises(UserError, match="exactly one of"):
        plan(ISO, {"kind": "product", "fields": {"train.steps": [3]}})
    with pytest.raises(UserError, match=r"C1e3-d64: train\.flops=1000 is less than one step"):
        plan({**ISO, "budgets": [1e3], "sizes": ["ladder/d64"]})


# ---------------------------------------------------------------- warnings
def words(p: Plan) -> str:
    return "\n".join(p.warnings)


def test_warns_of_an_optimum_off_the_grid() -> None:
    small = words(plan({**ISO, "budgets": [1e13]}))
    assert "C = 1e+13: the optimum is likely off the grid" in small
    assert "every size is too small; add larger sizes" in small
    large = words(plan({**ISO, "budgets": [1e9]}))
    assert "every size is too large; add smaller sizes" in large
    five = [f"ladder/d{d}" for d in (16, 32, 48, 64, 80)]
    both = words(plan({**ISO, "budgets": [1.5e11], "sizes": five}))
    assert "off the grid" not in both
    assert "sizes;" not in both
    assert "3 sizes; a parabola" in words(plan({**ISO, "budgets": [1.5e11]}))
    assert "bracket the expected 3000" in words(plan({**ISO, "budgets": [1.5e11]}, optimum_tokens_per_param=3000.0))


def test_warns_of_few_steps_and_of_epochs() -> None:
    text = words(plan({**ISO, "budgets": [5e10, 4e11]}, corpus_tokens=500_000))
    few = [c for c in plan({**ISO, "budgets": [5e10, 4e11]}).cells if c.steps < 100]
    assert few
    assert f"fewer than 100 steps, too short to compare: {few[0].name} ({few[0].steps})" in text
    assert "more than 4 epochs" in text
    assert "more tokens than the corpus has" in text
    assert "epoch" not in words(plan(ISO, corpus_tokens=10**9))


def test_warns_of_identical_cells_and_of_the_mesh() -> None:
    twice = plan({"kind": "product", "fields": {"train.seed": [1, 1]}})
    assert "identical cells: seed1, seed1-2" in words(twice)
    odd = {"kind": "product", "fields": {"train.batch_size": [6]}}
    assert "6 sequences does not divide over data x fsdp x expert = 4 devices" in words(plan(odd, devices=4))
    assert "divide" not in words(plan(odd, devices=2))
    for axes in (["mesh.data=2", "mesh.fsdp=2"], ["mesh.data=2", "mesh.expert=2"]):
        assert "= 4 devices" in words(plan(odd, overrides=axes)), "the rules cut a batch over all three"


# ---------------------------------------------------------------- throughput
def test_measured_rates_are_met_and_interpolated_between() -> None:
    rate = measured([(1000, 512, 1e9), (100_000, 512, 1e11), (1000, 2048, 4e9)]).flops_per_second
    assert rate(1000, 512) == pytest.approx(1e9)
    assert rate(10_000, 512) == pytest.approx(1e10), "straight in log-log"
    assert rate(1000, 1024) == pytest.approx(2e9)
    assert rate(10**9, 512) == pytest.approx(1e11), "constant beyond the ends"
    with pytest.raises(UserError, match="all positive"):
        measured([(0, 512, 1e9)])
    with pytest.raises(UserError, match="all positive"):
        measured([])


def test_the_guess_grows_with_size_batch_and_cores() -> None:
    rate = guess(cores=2).flops_per_second
    assert rate(10_000, 1024) < rate(100_000, 1024) < rate(10**7, 1024) < 140e9
    assert rate(10_000, 128) < rate(10_000, 4096)
    assert guess(cores=4).flops_per_second(10**6, 1024) == pytest.approx(2 * rate(10**6, 1024))


def test_wall_time_of_workers() -> None:
    assert wall_seconds([5, 4, 3, 3, 3], 2) == 10  # 5+3+... : longest first, to the worker free first
    assert wall_seconds([5, 4], 8) == 5
    assert wall_seconds([], 2) == 0


# ---------------------------------------------------------------- printing and plan.json
def test_tables_fit_a_hundred_columns() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    p = make_plan(load_sweep("quickstart"), corpus_tokens=28_000_000)
    for part in plan_tables(p, workers=2):
        console.print(part)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 100
    for cell in p.cells:
        assert sum(cell.name in line.split() for line in text.splitlines()) == 2, "whole in both tables"
        assert f"{cell.steps:,}" in text
    assert "…" not in text
    for word in ("D/N", "lr = 0.53 x N^-0.3333", "D = C / (6 N)", "chinchilla", "palm", "causal"):
        assert word in text


def test_quickstart_specs_span_what_they_promise() -> None:
    for name, least, span in (("quickstart", 5, 16), ("quickstart-fast", 4, 8)):
        budgets: dict[float, list[int]] = {}
        for cell in make_plan(load_sweep(name)).cells:
            budgets.setdefault(cell.tags["budget"], []).append(cell.n)
        assert len(budgets) >= 3
        for sizes in budgets.values():
            assert len(set(sizes)) >= least
            assert max(sizes) / min(sizes) >= span


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    p = plan(ISO, corpus_tokens=10**6, rules={"lr": {"kind": "fixed", "value": 0.01}})
    save_plan(p, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == p
    data = json.loads((tmp_path / "plan.json").read_text())
    assert data["cells"][0]["hash"] == p.cells[0].config.hash8
    assert data["cells"][0]["tags"] == {"budget": 1e11, "size": "d16", "seed": 0}
    with pytest.raises(UserError, match="no such plan"):
        load_plan(tmp_path / "none.json")
    (tmp_path / "plan.json").write_text('{"cells": [')
    with pytest.raises(UserError, match="not a plan"):
        load_plan(tmp_path / "plan.json")


def test_cell_names_are_file_names() -> None:
    config = load_run("quickstart")
    for name in ("a/b", "../x", "a~1", ".x"):
        with pytest.raises(UserError, match="a name is letters"):
            make_cell(name, config)


def test_units_in_words() -> None:
    assert [si(v) for v in (34_976, 7.15e6, 999, 0.5)] == ["35k", "7.15M", "999", "0.5"]
    assert [duration(v) for v in (None, 8, 125, 4200, 273_600)] == ["", "8s", "2m05s", "1h10m", "3d4h"]


def test_planning_imports_no_jax() -> None:
    code = (
        "import sys; from llamax.config.sweep import load_sweep; from llamax.sweep.plan import make_plan; "
        "import llamax.sweep.worker, llamax.sweep.local, llamax.sweep.status, llamax.sweep.live; "
        "make_plan(load_sweep('quickstart-fast')); assert 'jax' not in sys.modules and 'rich' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
