"""The study directory: the same spec continues, another is refused by name, cells can be added."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llamax.config.load import load_run
from llamax.errors import UserError
from llamax.sweep.plan import make_cell
from llamax.sweep.status import status
from llamax.sweep.study import add_cells, open_study, read_study
from tests.sweep.studies import seeds_plan


def test_the_same_spec_continues(tmp_path: Path) -> None:
    plan = seeds_plan(3)
    assert open_study(tmp_path / "deep" / "study", plan) == plan
    assert open_study(tmp_path / "deep" / "study", seeds_plan(3)) == plan
    assert read_study(tmp_path / "deep" / "study") == plan
    assert (tmp_path / "deep" / "study" / "study.yaml").read_text().startswith("name: study\n")


def test_another_spec_is_refused_by_its_fields(tmp_path: Path) -> None:
    open_study(tmp_path, seeds_plan(3))
    with pytest.raises(UserError, match=r"another spec \(axes.0.count: 3 there, 4 now\)"):
        open_study(tmp_path, seeds_plan(4))
    with pytest.raises(UserError, match=r"rules.min_steps: None there, 5 now"):
        open_study(tmp_path, seeds_plan(3, rules={"min_steps": 5}))


def test_a_base_that_changed_is_noticed(tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    base.write_text("model: ladder/d16\ntrain: {steps: 10, seq_len: 8, batch_size: 1}\n")
    open_study(tmp_path / "study", seeds_plan(2, base=str(base)))
    base.write_text("model: ladder/d16\ntrain: {steps: 11, seq_len: 8, batch_size: 1}\n")
    with pytest.raises(UserError, match=r"cell s0 was planned otherwise \(train.steps: 10 there, 11 now\)"):
        open_study(tmp_path / "study", seeds_plan(2, base=str(base)))


def test_added_cells_stay(tmp_path: Path) -> None:
    plan = open_study(tmp_path, seeds_plan(2))
    config = load_run("quickstart", ["train.flops=1e10"])
    cell = make_cell("prediction", config, tags={"budget": 1e10, "role": "held_out"})
    longer = add_cells(tmp_path, [cell])
    assert [c.name for c in longer.cells] == ["s0", "s1", "prediction"]
    assert longer.cells[2].extra
    assert add_cells(tmp_path, [cell]) == longer, "adding it again changes nothing"
    assert open_study(tmp_path, plan) == longer, "continuing the spec keeps it"
    assert longer.totals["flops_6n"] == pytest.approx(plan.totals["flops_6n"] + cell.flops["6n"])
    assert status(tmp_path)["cells"][2]["tags"] == {"budget": 1e10, "role": "held_out", "seed": 0}
    other = make_cell("prediction", load_run("quickstart", ["train.flops=2e10"]))
    with pytest.raises(UserError, match=r"cell prediction exists with another config \(train.flops: 1"):
        add_cells(tmp_path, [other])


def test_a_crash_between_the_two_files_is_repaired(tmp_path: Path) -> None:
    plan = open_study(tmp_path, seeds_plan(2))
    (tmp_path / "study.yaml").unlink()
    open_study(tmp_path, seeds_plan(2))
    (tmp_path / "plan.json").unlink()
    assert open_study(tmp_path, seeds_plan(2)) == plan
    assert json.loads((tmp_path / "plan.json").read_text())["name"] == "study"
