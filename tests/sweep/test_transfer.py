"""The sweep of a transfer study: its cells, what it refuses, and its runs as a table and a figure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llamax.config.parametrization import CompleteP, MuP, Standard
from llamax.errors import UserError
from llamax.studying import measure
from llamax.sweep.plan import make_plan
from llamax.sweep.study import open_study
from llamax.sweep.transfer import transfer_runs, transfer_spec

LRS = (0.004, 0.008, 0.016)
STEPS = ("train.steps=4", "train.batch_size=2")


def spec(**changes):
    return transfer_spec(**{"widths": (32, 64), "depths": (2,), "lrs": LRS, "overrides": STEPS} | changes)


def test_every_size_rate_seed_and_parametrization() -> None:
    cells = make_plan(spec()).cells
    assert len(cells) == 3 * 2 * 3 * 2
    rules = {"standard": Standard(), "mup": MuP(kind="mup", base_width=32, base_head_dim=16)}
    rules["completep"] = CompleteP(kind="completep", base_width=32, base_head_dim=16, base_depth=2)
    assert {cell.config.model.parametrization for cell in cells} == set(rules.values())
    assert {(c.config.model.d_model, len(c.config.model.layers), c.steps) for c in cells} == {(32, 2, 4), (64, 2, 4)}
    deep = make_plan(spec(widths=(32,), depths=(2, 8), parametrizations=("completep",))).cells
    assert {cell.config.model.layers[0].residual_factor for cell in deep} == {1.0, 0.25}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"widths": (32,)}, "several of one and one of the other"),
        ({"depths": (2, 4)}, "several of one and one of the other"),
        ({"lrs": (0.1, 0.2)}, "3 or more different"),
        ({"lrs": (0.1, 0.1, 0.2)}, "different positive"),
        ({"widths": (30, 64)}, "multiples of 8"),
        ({"parametrizations": ("sp",)}, "'sp': choose among standard, mup, completep"),
        ({"parametrizations": ()}, "choose among"),
        ({"seeds": 0}, "count"),
    ],
)
def test_what_cannot_answer_is_refused(change, words: str) -> None:
    with pytest.raises(UserError, match=words):
        spec(**change)


def test_runs_and_figure_of_a_study(tmp_path: Path) -> None:
    """Results written by hand: valleys at 0.008, one cell diverged, one pending."""
    plan = open_study(tmp_path, make_plan(spec()))
    for cell in plan.cells[1:]:
        folder = tmp_path / cell.run_name
        folder.mkdir()
        loss = 2.0 + (0.2 if cell.lr != 0.008 else 0.0) + 0.01 * cell.config.train.seed
        bad = cell is plan.cells[-1]
        result = {"status": "diverged" if bad else "done", "eval_loss": None if bad else loss, "seconds": 1.0}
        (folder / "result.json").write_text(json.dumps(result))
    runs = transfer_runs(tmp_path)
    assert runs["status"].value_counts().to_dict() == {"done": 34, "pending": 1, "diverged": 1}
    assert runs["loss"].isna().sum() == 2
    found = measure(tmp_path, "width")
    assert [row["parametrization"] for row in found["shifts"]] == ["standard", "mup", "completep"]
    assert found["shifts"][1]["per_doubling"] == pytest.approx(0.0, abs=1e-9)
    svg = (tmp_path / "lr-transfer.svg").read_text()
    assert svg.count("<svg") == 1
    assert "CompleteP" in svg
    assert json.loads((tmp_path / "summary.json").read_text())["warnings"]
    import pandas as pd

    assert len(pd.read_parquet(tmp_path / "runs.parquet")) == 36
