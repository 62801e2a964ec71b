"""Populations of a sweep: which cells form one, what is expected, and that the ledger cannot tell."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import llamax
from llamax.config.load import validate
from llamax.config.sweep import SweepConfig
from llamax.errors import UserError
from llamax.sweep import packing
from llamax.sweep.claim import claim
from llamax.sweep.local import run_local
from llamax.sweep.packing import AUTO, NEVER, Measured, Pack, groups, parse_pack, step_ratio
from llamax.sweep.plan import Plan, make_plan
from llamax.sweep.status import status
from llamax.sweep.study import open_study
from llamax.sweep.worker import work
from tests.train.conftest import build
from tests.train.runs import RUN, write_texts

AXES = [
    {"kind": "product", "fields": {"model.d_model": [16, 32]}},
    {"kind": "product", "fields": {"optimizer.lr": [1e-2, 3e-3]}},
    {"kind": "seeds", "count": 2},
]
CLOCKS = ["seconds", "data_seconds", "tokens_per_second", "started"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return build(write_texts(folder / "texts"), folder / "store").path


def plan_of(store: Path | str = "none", axes: Any = AXES, **train: Any) -> Plan:
    base = {**RUN, "data": {"store": str(store)}, "train": {**RUN["train"], **train}}
    return make_plan(validate(SweepConfig, {"name": "study", "base": base, "axes": axes}, "test"))


# ---------------------------------------------------------------- which, and how many
def test_cells_that_differ_in_arrays_of_the_state_are_grouped():
    found = groups(plan_of().cells, Pack("most", 8))
    assert [(len(group.cells), group.size) for group in found] == [(4, 4), (4, 4)]
    assert all("d_model16" in name for name in found[0].cells)
    fields = {"optimizer.kind": ["adamw", "lion"], "train.steps": [12, 13]}
    assert groups(plan_of(axes=[{"kind": "product", "fields": fields}]).cells, Pack("most", 8)) == []


def test_workers_share_a_group():
    assert [g.size for g in groups(plan_of().cells, Pack("most", 8), workers=2)] == [2, 2]
    assert [g.size for g in groups(plan_of().cells, Pack("most", 3), workers=1)] == [3, 3]
    assert [g.size for g in groups(plan_of().cells, NEVER)] == [1, 1]


def test_the_rule_on_a_cpu_is_the_measured_table(monkeypatch: pytest.MonkeyPatch):
    cells = plan_of().cells
    monkeypatch.setattr(packing, "MEASURED", (Measured(10**6, 2, 0.6), Measured(10**7, 2, 1.0)))
    monkeypatch.setattr(packing, "STARTUP", packing.Startup(run=2.0, member=2.0))
    monkeypatch.setattr(packing, "COMPILE_SECONDS", 1.0)
    assert step_ratio(10**5, 2) == step_ratio(10**6, 4) == 0.6
    assert step_ratio(2 * 10**6, 2) == 1.0
    assert step_ratio(10**8, 2) is step_ratio(10**5, 1) is None
    found = groups(cells, AUTO, cores=2)[0]
    training = cells[0].seconds - 5.0
    assert found.expected == pytest.approx((4 * 0.6 * training + 12) / (4 * training + 11))
    assert found.size == 1, "start-up takes longer than these steps"
    monkeypatch.setattr(packing, "STARTUP", packing.Startup(run=2.0, member=0.5))
    assert groups(cells, AUTO, cores=2)[0].size == 4


def test_an_accelerator_is_filled_by_the_memory_estimate():
    cells = plan_of().cells
    room = cells[0].memory_bytes * 3 / packing.MEMORY_SHARE * 1.01
    assert groups(cells, AUTO, accelerators=[int(room)])[0].size == 3
    assert groups(cells, AUTO, accelerators=[int(room)] * 2)[0].size == 4
    assert groups(cells, AUTO, accelerators=[1000])[0].size == 1


def test_an_accelerator_s_expected_gain_is_the_measured_one(monkeypatch: pytest.MonkeyPatch):
    """A population of the measured size has the measured ratio; alone it is 1; devices share members; and beyond the
    largest measured model nothing is said."""
    cells = plan_of().cells
    row = packing.Filled(10**6, 4, 0.4)
    monkeypatch.setattr(packing, "FILLED", (row, packing.Filled(10**9, 4, 0.9)))
    assert (row.at(4), row.at(1)) == (pytest.approx(0.4), pytest.approx(1.0))
    assert row.at(8) == pytest.approx(0.2 + 0.8 / 8)  # 1.6 steps' time for four: 0.8 shared, 0.2 for each
    one = groups(cells, AUTO, accelerators=[10**12])[0]
    assert (one.size, one.expected) == (4, pytest.approx(0.4))
    assert one.rule.endswith("4 members of N <= 1,000,000 measured 0.4 on one H200 in bfloat16")
    two = groups(cells, AUTO, accelerators=[10**12] * 2)[0]
    assert two.expected == pytest.approx(2 * row.at(2) / 4)
    assert two.rule.endswith(", 2 by Amdahl's law")
    monkeypatch.setattr(packing, "FILLED", (packing.Filled(1, 4, 0.4),))
    assert groups(cells, AUTO, accelerators=[10**12])[0].expected is None


def test_the_shipped_table_has_its_rule():
    assert all(0 < row.ratio < 1 for row in packing.FILLED)
    assert packing.MEASURED
    assert all(0 < row.ratio <= 1.05 for row in packing.MEASURED)


@pytest.mark.parametrize("text", ["0", "1", "-2", "some", "2.5", ""])
def test_bad_pack(text: str):
    with pytest.raises(UserError, match=f"--pack {text}.*auto, never"):
        parse_pack(text)
    assert str(parse_pack("4")) == "4"
    assert parse_pack("auto") == AUTO


def test_bad_pack_on_the_command_line(tmp_path: Path):
    for verb in ("plan", "run"):
        words = [sys.executable, "-m", "llamax.cli", "sweep", verb, "quickstart", "--pack", "often"]
        done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=_environment())
        assert done.returncode == 2
        assert "error: --pack often: give auto, never" in done.stderr
        assert list(tmp_path.iterdir()) == []


def test_the_plan_says_what_packs(tmp_path: Path):
    spec = {"name": "study", "base": RUN, "axes": AXES}
    (tmp_path / "study.yaml").write_text(json.dumps(spec))  # JSON is YAML
    words = [sys.executable, "-m", "llamax.cli", "sweep", "plan", str(tmp_path / "study.yaml"), "--pack", "4"]
    shown = subprocess.run(words, capture_output=True, text=True, env=_environment(), check=True).stdout
    assert "4 at a time as one population" in " ".join(shown.split())
    assert max(map(len, shown.splitlines())) <= 100
    found = json.loads(subprocess.run([*words, "--json"], capture_output=True, env=_environment(), check=True).stdout)
    assert [group["size"] for group in found["populations"]] == [4, 4]


# ---------------------------------------------------------------- training
def ledger_of(study: Path) -> Any:
    frame = llamax.ledger(study)
    return frame.drop(columns=[c for c in frame.columns if any(clock in c for clock in CLOCKS)]).sort_values("name")


def test_packed_and_not_give_the_same_ledger(store: Path, tmp_path: Path):
    import pandas as pd

    plan = plan_of(store, steps=20)
    for name, pack in (("packed", Pack("most", 8)), ("alone", NEVER)):
        open_study(tmp_path / name / "study", plan)
        starts: list[str] = []
        ended = work(tmp_path / name / "study", pack=pack, on_event=lambda kind, cell, _, to=starts: to.append(kind))
        assert sorted(ended["done"]) == sorted(cell.name for cell in plan.cells)
        order = [kind for kind in starts if kind in ("start", "done")]
        assert (order[:2] == ["start", "start"]) == (name == "packed")
        assert status(tmp_path / name / "study")["counts"]["done"] == 8
    frames = [ledger_of(tmp_path / name / "study").reset_index(drop=True) for name in ("packed", "alone")]
    paths = [c for c in frames[0].columns if frames[0][c].map(str).str.contains(str(tmp_path)).any()]
    pd.testing.assert_frame_equal(*(frame.drop(columns=paths) for frame in frames), rtol=1e-5)


def test_a_bad_member_fails_alone(store: Path, tmp_path: Path):
    """One cell's folder holds another run; one is claimed elsewhere; the rest train."""
    plan = plan_of(store, axes=AXES[1:])
    study = tmp_path / "study"
    open_study(study, plan)
    folder = study / plan.cells[0].run_name
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    elsewhere = claim(study, plan.cells[3].name)
    assert elsewhere is not None
    names = [cell.name for cell in plan.cells]
    ended = work(study, pack=Pack("most", 8), only=names[:3])
    assert ended == {"done": names[1:3], "failed": names[:1]}
    elsewhere.release()


def test_a_population_that_fails_is_trained_one_by_one(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    plan = plan_of(store, axes=AXES[1:2])
    open_study(tmp_path / "study", plan)

    def explode(*_: Any) -> Any:
        raise RuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr("llamax.train.population.Population._start", explode)
    assert len(work(tmp_path / "study", pack=Pack("most", 2))["done"]) == 2
    assert "failed, training them one by one: " in capsys.readouterr().err


@pytest.mark.slow
def test_kill_9_of_a_packing_worker_loses_nothing(store: Path, tmp_path: Path):
    """Killed, the worker process resumes what it held; the numbers are those of a population nothing interrupted.

    Of one that is packed too: over so many steps the roundings of another program grow to other losses.
    """
    plan = plan_of(store, axes=AXES[1:], steps=3000)
    study = tmp_path / "study"
    open_study(study, plan)
    words = [sys.executable, "-m", "llamax.sweep.worker", str(study), "--pack", "4"]
    first = study / plan.cells[0].run_name
    for rows in (3, 60):
        child = subprocess.Popen(words, env=_environment())
        while child.poll() is None and _rows(first) < rows:
            time.sleep(0.05)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    assert run_local(study, workers=1, pack=Pack("most", 4))["counts"]["done"] == 4
    open_study(tmp_path / "whole", plan)
    assert run_local(tmp_path / "whole", workers=1, pack=Pack("most", 4))["counts"]["done"] == 4
    for cell in plan.cells:
        ours, theirs = [_loss(p / cell.run_name) for p in (study, tmp_path / "whole")]
        assert len(ours) == 3000
        assert ours == theirs


def _rows(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def _loss(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
