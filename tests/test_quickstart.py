"""The main job in miniature: the whole loop, interrupted and not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

import llamax
from llamax.config.sweep import load_sweep
from llamax.quickstart import nearest_size
from llamax.scaling.records import ledger_path, read_predictions
from llamax.sweep.plan import make_plan

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", ["quickstart", "quickstart-fast"])
def test_no_budget_is_off_the_corpus(name: str) -> None:
    plan = make_plan(load_sweep(name), corpus_tokens=25_000_000)
    assert all(cell.epochs is not None and cell.epochs < 1 for cell in plan.cells)


def test_the_grid_is_as_wide_as_promised() -> None:
    cells = pd.DataFrame([{"budget": c.tags["budget"], "n": c.n} for c in make_plan(load_sweep("quickstart")).cells])
    groups = cells.groupby("budget")["n"]
    assert len(groups) >= 3
    assert groups.nunique().min() >= 5
    assert (groups.max() / groups.min()).min() >= 16


def test_nearest_size_is_nearest() -> None:
    spec = load_sweep("quickstart")
    assert nearest_size(spec, 68_000) == "ladder/d48"
    assert nearest_size(spec, 635_000) == "ladder/d128"


def start(directory: Path, cache: Path) -> subprocess.Popen[str]:
    """A fast quickstart as a person starts it, outside the eight simulated devices of these tests."""
    environment = {**os.environ, "LLAMAX_CACHE": str(cache), "XLA_FLAGS": ""}
    # A shell's background job ignores SIGINT, and so would what these tests start from one.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from llamax.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "quickstart", "--fast", "--dir", str(directory), "--json"]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_the_loop_closes_and_an_interruption_changes_nothing(tmp_path: Path) -> None:
    whole = start(tmp_path / "whole", tmp_path / "cache")
    out, err = whole.communicate(timeout=600)
    assert whole.returncode == 0, err
    result = json.loads(out)
    assert result["cells"] == 12
    assert result["prediction"]["flops"] >= 3 * 4e10
    assert result["prediction"]["miss_percent"] == pytest.approx(
        100 * abs(result["prediction"]["measured"] / result["prediction"]["loss"] - 1)
    )
    assert {"approach2", "approach3"} == set(result["fit"])
    assert Path(result["report"]).stat().st_size > 50_000
    assert (tmp_path / "whole" / "report.md").exists()
    (registered,) = read_predictions(ledger_path(tmp_path / "whole"))
    run = tmp_path / "whole" / registered["run"]
    sessions = json.loads((run / "env.json").read_text())["sessions"]  # the predicted run is a run like any other
    assert registered["registered"] <= sessions[0]["started"]

    for seconds, number in ((15, signal.SIGINT), (25, signal.SIGKILL)):
        broken = start(tmp_path / "broken", tmp_path / "cache")
        time.sleep(seconds)
        broken.send_signal(number)
        broken.communicate(timeout=60)
    resumed = start(tmp_path / "broken", tmp_path / "cache")
    out, err = resumed.communicate(timeout=600)
    assert resumed.returncode == 0, err
    again = json.loads(out)
    assert again["fit"] == result["fit"]
    assert {k: v for k, v in again["prediction"].items()} == result["prediction"]
    columns = ["run", "eval_loss", "train_loss", "tokens"]
    pd.testing.assert_frame_equal(
        llamax.ledger(tmp_path / "whole")[columns].reset_index(drop=True),
        llamax.ledger(tmp_path / "broken")[columns].reset_index(drop=True),
    )
