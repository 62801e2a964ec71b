"""The next budget of a study is centred on what was measured, and says what it is worth."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from llamax.cli import main
from llamax.config.load import validate
from llamax.config.sweep import Isoflop, SweepConfig, load_sweep
from llamax.errors import UserError
from llamax.report.study import load_study
from llamax.scaling import ChinchillaLaw, CoupledLaw, optimal_allocation
from llamax.scaling.design import moved
from llamax.sweep.design import ladder_of
from llamax.sweep.design_report import next_tables
from llamax.sweep.next import find_centre, next_cells, next_spec, propose, study_sizes
from llamax.sweep.plan import make_plan
from llamax.sweep.study import open_study, read_study
from tests.scaling.synthetic import BENT, TINY, isoflop
from tests.sweep.finished import finish

BASE = {"model": {"base": "ladder/d32", "max_seq_len": 128}, "train": {"steps": 10, "seq_len": 128, "batch_size": 8}}
STEP = 1.4  # the largest ratio of N between neighbours of the ladder, away from its first few sizes


def spec_of(*budgets: float, sizes: tuple[str, ...] = ("ladder/d64", "ladder/d128"), **more: Any) -> SweepConfig:
    axes = [{"kind": "isoflop", "budgets": list(budgets), "sizes": list(sizes)}]
    return validate(SweepConfig, {"name": "s", "base": BASE, "axes": axes, **more}, "test")


Command = Callable[..., tuple[int, str, str]]
SPEC = spec_of(1e13)
LADDER = ladder_of(SPEC, "ladder")


@pytest.mark.parametrize("off", [0.25, 4.0])
@pytest.mark.parametrize("law", [TINY, BENT])
def test_a_first_budget_off_by_four_is_recentred_to_within_a_ladder_step(
    law: ChinchillaLaw | CoupledLaw, off: float
) -> None:
    """The prior was wrong by four in N; its first budget has the minimum at or beyond the edge of the grid."""
    runs = isoflop(law, (1e13,), sizes=6, span=4.0, shift=off, noise=0.003, seed=1)
    prior = moved(law, off)
    found = propose(runs, LADDER, SPEC, prior=prior, seed_noise=0.003, target=1e16)
    best = float(optimal_allocation(law, found.flops).n)
    assert 1 / STEP < found.centre.n / best < STEP
    middle = math.sqrt(found.n[0] * found.n[-1])
    assert 1 / STEP < middle / best < STEP
    assert found.n[0] < best < found.n[-1]
    assert any("times those of the prior" in word for word in found.centre.warnings)
    low, high = found.centre.interval or (0.0, 0.0)
    assert low < best < high


def test_three_measured_valleys_need_no_prior_and_overrule_it() -> None:
    runs = isoflop(TINY, (1e12, 4e12, 1.6e13), sizes=7, span=6.0, noise=0.002)
    found = propose(runs, LADDER, SPEC, target=1e16)
    misled = propose(runs, LADDER, SPEC, target=1e16, prior=moved(TINY, 8.0), seed_noise=0.002)
    assert found.flops == 6.4e13, "goes on by the last ratio"
    assert found.centre.n == misled.centre.n
    best = float(optimal_allocation(TINY, 6.4e13).n)
    assert 1 / STEP < found.centre.n / best < STEP
    assert "approach 2" in found.centre.rule
    assert found.centre.noise == pytest.approx(0.002, rel=0.6)
    assert found.before is not None
    assert found.after is not None
    for approach in (2, 3):
        assert found.after[approach].n_sd < found.before[approach].n_sd
        assert found.after[approach].loss_sd < found.before[approach].loss_sd
    assert len(found.sizes) == 7


def test_without_a_prior_one_valley_is_carried_on_and_an_edge_is_passed() -> None:
    inside = find_centre(isoflop(TINY, (1e12,), sizes=7), 4e12)
    assert inside.n == pytest.approx(2 * float(optimal_allocation(TINY, 1e12).n), rel=0.1)
    assert "^0.5" in inside.rule
    assert inside.law is None
    for shift in (0.05, 20.0):
        runs = isoflop(TINY, (1e12,), sizes=5, span=2.0, shift=shift)
        beyond = find_centre(runs, 1e12)
        edge = runs["n"].max() if shift < 1 else runs["n"].min()
        assert (beyond.n > edge) == (shift < 1)
        assert 1 < max(beyond.n / edge, edge / beyond.n) <= 4.0001
        assert any("beyond the sizes" in word for word in beyond.warnings)


def test_bad_input_is_refused_in_words() -> None:
    empty = isoflop().iloc[:0]
    with pytest.raises(UserError, match="no finished run"):
        propose(empty, LADDER, SPEC)
    flat = isoflop(TINY, (1e12,)).assign(loss=2.0)
    with pytest.raises(UserError, match="train more sizes"):
        propose(flat, LADDER, SPEC)
    two = isoflop(TINY, (1e12,), sizes=2)
    with pytest.raises(UserError, match="three different sizes"):
        propose(two, LADDER, SPEC)
    with pytest.raises(UserError, match="choose another --flops"):
        propose(isoflop(TINY, (1e12,)), LADDER, SPEC, flops=1e24)
    with pytest.raises(UserError, match="no isoflop axis"):
        study_sizes(validate(SweepConfig, {"name": "s", "base": BASE}, "test"))


def test_sizes_come_from_the_studys_own_ladder() -> None:
    assert study_sizes(SPEC) == "ladder"
    assert study_sizes(spec_of(1e12, sizes=("ladder/d64@gemma3",))) == "ladder@gemma3"
    assert study_sizes(spec_of(1e12, sizes=("llama3/8b", "llama3/70b"))) == ("llama3/8b", "llama3/70b")


def test_the_spec_of_the_next_budget_keeps_the_rest() -> None:
    lrs = {"kind": "product", "fields": {"optimizer.lr": [1e-3, 3e-3]}}
    spec = validate(SweepConfig, SPEC.as_dict() | {"axes": [*SPEC.as_dict()["axes"], lrs]}, "test")
    found = propose(pd.concat([isoflop(TINY, (1e13,), noise=0.01, seed=s) for s in (0, 1)]), LADDER, spec)
    made = next_spec(spec, found, "later")
    assert found.replicates == 2
    assert [axis.kind for axis in made.axes] == ["isoflop", "product", "seeds"]
    assert (made.name, made.base, made.rules) == ("later", spec.base, spec.rules)
    cells = make_plan(made, devices=1).cells
    assert len(cells) == 4 * len(found.sizes)
    assert {cell.n for cell in cells} == set(found.n)
    assert {cell.tokens for cell in cells} == set(found.tokens)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """command("DIR", ...) runs `llamax sweep next DIR ...` here; its exit code, output and errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["llamax", "sweep", "next", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


def test_the_command_extends_a_study_from_its_ledger(tmp_path: Path, command: Command) -> None:
    study = tmp_path / "study"
    sizes = ("ladder/d32", "ladder/d48", "ladder/d64", "ladder/d96", "ladder/d128")
    plan = open_study(study, make_plan(spec_of(1e12, 4e12, sizes=sizes), devices=1))
    assert finish(study, plan, TINY.loss, noise=0.001) == 10
    out = tmp_path / "next.yaml"
    code, text, errors = command(str(study), "--add", "--out", str(out), "--json")
    assert code == 0, errors
    result = json.loads(text)
    assert result["flops"] == 1.6e13
    best = float(optimal_allocation(TINY, 1.6e13).n)
    assert 1 / STEP < result["n_opt"] / best < STEP
    added = [cell for cell in read_study(study).cells if cell.extra]
    assert [cell.n for cell in added] == result["n"]
    assert {cell.tags["role"] for cell in added} == {"next"}
    spec = load_sweep(out)
    assert isinstance(spec.axes[0], Isoflop)
    assert list(spec.axes[0].sizes) == result["sizes"]
    again = command(str(study), "--add", "--json", "--flops", "1.6e13")
    assert json.loads(again[1])["sizes"] == result["sizes"], "the same command adds nothing new"
    assert len(read_study(study).cells) == len(plan.cells) + len(added)
    finish(study, read_study(study), TINY.loss, noise=0.001, seed=1)
    code, text, errors = command(str(study), "--target", "1e15")
    assert code == 0, errors
    assert "those finished" in text
    assert "6.4e13" in text
    assert load_study(study).held_out is None, "runs of the next budget are fitted, not predicted"
    assert command(str(study), "--flops", "-1")[2].startswith("error: --flops -1.0")
    assert command(str(tmp_path / "nowhere"))[0] == 2


def test_tables_fit_a_hundred_columns() -> None:
    runs = isoflop(TINY, (1e12, 4e12, 1.6e13), sizes=7, span=6.0, noise=0.002)
    console = Console(width=100, file=io.StringIO(), legacy_windows=False)
    for part in next_tables(propose(runs, LADDER, SPEC, target=1e16).as_dict()):
        console.print(part)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    for word in ("with the next", "95 % interval", "N / N*"):
        assert word in text


def test_next_cells_are_tagged() -> None:
    plan = make_plan(SPEC, devices=1)
    found = propose(isoflop(TINY, (1e13,)), LADDER, SPEC)
    cells = next_cells(plan, found)
    assert {cell.tags["budget"] for cell in cells} == {found.flops}
    assert {cell.tags["role"] for cell in cells} == {"next"}
