"""A design axis becomes the study it pays for; what it says of it, and what it refuses."""

from __future__ import annotations

import io
import json
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from llamax.config.load import validate
from llamax.config.sweep import Isoflop, Seeds, SweepConfig, load_sweep
from llamax.errors import UserError
from llamax.scaling import ChinchillaLaw, CoupledLaw, fit_frame
from llamax.scaling.design import expected_errors
from llamax.sweep.design import candidates, ladder_of, prior_law, resolve_design
from llamax.sweep.expand import expand
from llamax.sweep.plan import Plan, load_plan, make_plan, save_plan
from llamax.sweep.study import open_study
from llamax.sweep.tables import plan_tables
from tests.scaling.synthetic import TINY, isoflop

BASE = {"model": {"base": "ladder/d32", "max_seq_len": 128}, "train": {"steps": 10, "seq_len": 128, "batch_size": 8}}
SMALL = {
    "budgets": [3, 4],
    "decades": [1.0, 2.0],
    "sizes_per_budget": [5, 6],
    "width": [4.0, 8.0],
    "replicates": [1, 2],
}
DESIGN: dict[str, Any] = {
    "kind": "design", "prior": TINY.as_dict(), "seed_noise": 0.005, "total_flops": 1e14, "target_flops": 1e16,
    "draws": 40, **SMALL,
}  # fmt: skip


def spec_of(*others: dict, rules: dict | None = None, **changes: Any) -> SweepConfig:
    axes = [DESIGN | changes, *others]
    return validate(SweepConfig, {"name": "s", "base": BASE, "axes": axes, "rules": rules or {}}, "test")


@lru_cache
def designed() -> Plan:
    return make_plan(spec_of(), devices=1)


def test_the_plan_is_the_isoflop_study_that_the_report_names() -> None:
    plan = designed()
    chosen = plan.design["chosen"]
    iso = next(axis for axis in plan.spec.axes if isinstance(axis, Isoflop))
    assert list(iso.budgets) == chosen["budgets"]
    assert [list(row) for row in iso.sizes] == chosen["sizes"]
    seeds = [axis for axis in plan.spec.axes if isinstance(axis, Seeds)]
    assert (seeds[0].count if seeds else 1) == chosen["replicates"]
    assert len(plan.cells) == chosen["runs"]
    assert sum(6 * cell.n * cell.tokens for cell in plan.cells) == pytest.approx(chosen["flops_6n"], rel=1e-12)
    assert chosen["flops_6n"] <= 1e14
    assert chosen["flops_6n"] > 0.97e14, "a design spends what it may"
    assert min(cell.steps for cell in plan.cells) >= 100
    assert not any("off the grid" in word for word in plan.warnings)


def test_the_same_spec_is_the_same_study_and_plan_json_keeps_the_report(tmp_path: Path) -> None:
    plan = designed()
    again = make_plan(spec_of(), devices=1)
    assert again.as_dict() == plan.as_dict()
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json").design == json.loads(json.dumps(plan.design))
    open_study(tmp_path / "study", plan)
    assert open_study(tmp_path / "study", again).spec == plan.spec


def test_every_candidate_is_paid_for_and_what_was_shown_is_its_expected_error() -> None:
    spec = spec_of()
    design = spec.axes[0]
    found = list(candidates(design, TINY, ladder_of(spec, "ladder"), spec, 1e14))
    assert len(found) > 10
    for one in found:
        assert one.runs.flops() == one.cost <= 1e14
        assert all(len(set(row)) == len(row) for row in one.sizes)
        assert list(one.budgets) == sorted(one.budgets)
    chosen = designed().design["chosen"]
    match = next(c for c in found if list(c.budgets) == chosen["budgets"] and c.replicates == chosen["replicates"])
    errors = expected_errors(TINY, match.runs, 0.005, 1e16)
    assert chosen["expected"] == {f"approach{k}": e.as_dict() for k, e in errors.items()}


def test_the_bias_shown_is_that_of_a_fit_of_the_plans_own_cells_without_noise() -> None:
    plan = designed()
    cells = [(c.tags["budget"], c.n, c.tokens, 6 * c.n * c.tokens) for c in plan.cells if c.config.train.seed == 0]
    frame = isoflop().iloc[:0].copy()
    for i, (budget, n, d, flops) in enumerate(cells):
        frame.loc[i] = (budget, n, d, flops, TINY.loss(n, d))
    fit = fit_frame(frame, bootstrap=0)
    best = plan.design["target"]
    shown = plan.design["chosen"]["expected"]
    assert fit.approach2 is not None
    assert fit.approach2.n is not None
    assert math.log(fit.approach2.n.at(1e16) / best["n"]) == pytest.approx(shown["approach2"]["n_bias"], abs=1e-9)
    assert fit.approach3 is not None
    assert float(fit.approach3.law.alpha) == pytest.approx(TINY.alpha, abs=1e-3)
    assert abs(shown["approach3"]["n_bias"]) < 1e-9


def test_the_chosen_design_beats_what_was_not_chosen() -> None:
    table = designed().design["table"]
    finalists = [row for row in table if row["simulated"]]
    assert [row["simulated_error"] for row in finalists] == sorted(row["simulated_error"] for row in finalists)
    spec = spec_of()
    found = candidates(spec.axes[0], TINY, ladder_of(spec, "ladder"), spec, 1e14)
    errors = [expected_errors(TINY, one.runs, 0.005, 1e16) for one in found]
    worst = max(errors, key=lambda e: max(e[2].rms("loss"), e[3].rms("loss")))
    chosen = table[0]["expected"]
    assert chosen["approach2"]["loss_sd"] < worst[2].loss_sd
    assert table[0]["error"] < max(worst[2].rms("loss"), worst[3].rms("loss"))


def test_other_axes_share_the_budget_and_seeds_are_the_designs() -> None:
    lrs = {"kind": "product", "fields": {"optimizer.lr": [1e-3, 3e-3]}}
    plan = make_plan(spec_of(lrs, total_flops=2e14), devices=1)
    assert plan.design["total_flops"] == 1e14
    assert plan.design["chosen"]["budgets"] == designed().design["chosen"]["budgets"]
    assert 1.9e14 < plan.totals["flops_6n"] <= 2e14
    with pytest.raises(UserError, match="drop the other axes"):
        make_plan(spec_of({"kind": "seeds", "count": 2}))
    with pytest.raises(UserError, match="drop the other axes"):
        make_plan(spec_of(DESIGN))
    with pytest.raises(UserError, match="no cells until its axes are chosen"):
        expand(spec_of())


def test_limits_of_a_run_are_kept() -> None:
    batch = {"kind": "power_law", "coefficient": 0.02, "d_exponent": 0.5, "min": 2, "max": 16}
    rules = {"batch": batch, "min_steps": 200}
    plan = make_plan(spec_of(max_tokens=3e8, min_steps=200, minimize="n", approaches=[2], rules=rules), devices=1)
    assert max(cell.tokens for cell in plan.cells) <= 3e8
    assert min(cell.steps for cell in plan.cells) >= 200
    assert sum(6 * cell.n * cell.tokens for cell in plan.cells) == pytest.approx(plan.design["chosen"]["flops_6n"])
    with pytest.raises(UserError, match=r"no design of 1e\+08 FLOPs .* raise total_flops"):
        make_plan(spec_of(total_flops=1e8))


def test_sizes_of_a_ladder_or_of_a_list() -> None:
    spec = spec_of()
    widths = [int(name.rpartition("/d")[2]) for name in ladder_of(spec, "ladder").names]
    assert widths[:10] == [8, 16, 24, 32, 40, 48, 56, 64, 72, 80]
    assert {128, 144, 256, 288, 1024, 1152} <= set(widths)
    assert not {136, 264, 1032} & set(widths)
    named = ladder_of(spec, ["ladder/d64", "ladder/d16"])
    assert named.names == ("ladder/d16", "ladder/d64")
    assert named.n[0] < named.n[1]
    with pytest.raises(UserError, match="no such ladder; use ladder"):
        ladder_of(spec, "stairs")


def test_sizes_lie_around_the_centre() -> None:
    ladder = ladder_of(spec_of(), "ladder")
    rows = ladder.around(1e6, 4.0, 6)
    assert rows is not None
    n = ladder.n[list(rows)]
    assert n[0] == pytest.approx(2.5e5, rel=0.2)
    assert n[-1] == pytest.approx(4e6, rel=0.2)
    assert np.std(np.diff(np.log(n))) < 0.15
    assert ladder.around(1e3, 4.0, 6) is None
    assert ladder.around(1e6, 1.1, 9) is None


def test_priors_from_fits(tmp_path: Path) -> None:
    fit = fit_frame(isoflop(noise=0.001), bootstrap=0).as_dict()
    path = tmp_path / "fits.json"
    path.write_text(json.dumps(fit))
    law = prior_law(str(path), "x")
    assert law.as_dict() == fit[fit["law"]]["params"]
    coupled = {"law": "coupled", "coupled": {"params": TINY.as_dict() | {"gamma": 0.5}}}
    path.write_text(json.dumps(coupled))
    assert prior_law(str(path), "x") == CoupledLaw(**TINY.as_dict(), gamma=0.5)
    path.write_text(json.dumps({"params": TINY.as_dict()}))
    assert prior_law(str(path), "x") == TINY
    assert isinstance(prior_law(spec_of().axes[0].prior, "x"), ChinchillaLaw)
    for text, match in (("{}", "no fitted law"), ("no", "no fitted law"), ('{"params": {"E": 1}}', "no fitted law")):
        path.write_text(text)
        with pytest.raises(UserError, match=match):
            prior_law(str(path), "x")
    with pytest.raises(UserError, match=r"x.prior = 'nowhere.json'"):
        prior_law("nowhere.json", "x")
    bad = dict.fromkeys(("E", "A", "B", "alpha", "beta"), 1.0) | {"alpha": -1.0}
    path.write_text(json.dumps({"params": bad}))
    with pytest.raises(UserError, match="positive"):
        prior_law(str(path), "x")


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("seed_noise", 0.0, "axes.0.seed_noise = 0.0"),
        ("seed_noise", 3.0, "axes.0.seed_noise = 3.0"),
        ("total_flops", -1.0, "axes.0.total_flops = -1.0"),
        ("prior", {"E": 1.0}, r"axes.0.prior"),
        ("approaches", [4], "axes.0.approaches.0 = 4"),
        ("minimize", "money", "axes.0.minimize = 'money'"),
        ("width", [1.0], "axes.0.width.0 = 1.0"),
        ("target", 1.0, "did you mean target_flops"),
    ],
)
def test_bad_fields_are_named(field: str, value: Any, match: str) -> None:
    with pytest.raises(UserError, match=match):
        spec_of(**{field: value})


def test_tables_fit_a_hundred_columns_and_say_the_rules() -> None:
    console = Console(width=100, file=io.StringIO(), legacy_windows=False)
    for part in plan_tables(designed()):
        console.print(part)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    for word in ("simulated", "N* A2", "loss A3", "Chosen of", "bias = ", "error = "):
        assert word in text


def test_the_shipped_design_resolves() -> None:
    spec = load_sweep("designed", ["axes.0.draws=20"])
    told: list[str] = []
    resolved, report = resolve_design(spec, lambda what, done, total: told.append(what))
    assert report is not None
    assert report["chosen"]["flops_6n"] <= 1e13
    assert {"designs", "simulated"} <= set(told)
    assert isinstance(resolved.axes[0], Isoflop)
    assert resolve_design(resolved) == (resolved, None)


def test_a_design_that_noise_hides_is_refused() -> None:
    """In simulation approach 2 finds no valley, so the error that decides is infinite, and no number for a plan."""
    one = {"budgets": [3], "decades": [1.0], "sizes_per_budget": [5], "width": [4.0], "replicates": [1], "draws": 20}
    spec = spec_of(approaches=[2], prior={**TINY.as_dict(), "E": 1e9}, **one)
    with pytest.raises(UserError, match="the noise hides the valleys of this prior"):
        resolve_design(spec)


def test_a_total_beyond_the_largest_size_is_to_be_lowered() -> None:
    with pytest.raises(UserError, match=r"N = .*: lower total_flops, or add sizes"):
        resolve_design(spec_of(total_flops=1e30))


def test_the_prior_of_a_fit_is_the_law_that_predicts(tmp_path: Path) -> None:
    """As `llamax fit --json` prints it: params are those of --law, and another law may predict."""
    bent = {"params": {**TINY.as_dict(), "gamma": 0.5}}
    record = {"law": "chinchilla", "params": TINY.as_dict(), "approach3": {"params": TINY.as_dict()}, "coupled": bent}
    path = tmp_path / "fit.json"
    for name, wanted in (("coupled", CoupledLaw(**bent["params"])), ("chinchilla", TINY)):
        path.write_text(json.dumps(record | {"law_that_predicts": name}))
        assert prior_law(str(path), "x") == wanted
