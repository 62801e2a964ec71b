"""Workers under faults: two schedules by hand, and that the verdicts can fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llamax.storage import leases
from llamax.sweep.claim import claim
from llamax.sweep.study import open_study, record_failure
from tests.sweep.lease_faults import ACTS, LATE, TERM, draw, of_log, of_study, read, run
from tests.sweep.studies import seeds_plan

CALM: dict[str, Any] = {"machine": "m0", "faults": []}


def test_schedules_are_data_of_their_seed():
    schedules = [draw(seed) for seed in range(100)]
    assert schedules == [json.loads(json.dumps(draw(seed))) for seed in range(100)]
    faults = [fault for schedule in schedules for worker in schedule["workers"] for fault in worker["faults"]]
    assert {fault["do"] for fault in faults} == set(ACTS)
    assert all(schedule["workers"][0]["faults"] == [] for schedule in schedules)


def test_a_dead_a_silent_and_a_leaving_worker_are_replaced(tmp_path: Path):
    """On machines of their own; the clock of the one that goes on is days off."""
    stop = {"do": "stop", "nth": 3, "seconds": 2 * TERM}
    workers = [
        {"machine": "m0", "faults": [{"do": "clock", "nth": 1, "seconds": 1e6}]},
        {"machine": "m1", "faults": [{"do": "kill", "nth": 3}]},
        {"machine": "m2", "faults": [stop]},
        {"machine": "m0", "faults": [{"do": "term", "nth": 2}]},
    ]
    log = tmp_path / "log"
    assert run({"seed": 0, "cells": 4, "workers": workers}, tmp_path / "study", log) == []
    events = read(log)
    assert {one["do"] for one in events} >= {*ACTS, "lost", "left"}, "the silent one was robbed, and noticed"
    assert sum(one["do"] == "result" for one in events) == 4


def test_what_is_wrong_with_a_study_is_found(tmp_path: Path, monkeypatch: Any):
    study = tmp_path / "study"
    open_study(study, seeds_plan(2))
    assert of_study(study) == ["s0 is not done", "s1 is not done"]
    record_failure(study, "s0", ValueError("x"))
    monkeypatch.setattr(leases, "alive", lambda record: None)
    assert claim(study, "s1") is not None
    found = of_study(study)
    assert found[0].startswith("s0 failed:")
    assert found[1] == "s1 is not done"
    assert found[2].startswith("s1 is still held:")


def test_what_is_wrong_between_workers_is_found():
    def event(time: float, worker: int, do: str, **more: Any) -> dict[str, Any]:
        return {"time": time, "worker": worker, "do": do, "seconds": None, **more}

    def found(*events: dict[str, Any], near: bool = True, machines: tuple[str, str] = ("a", "b")) -> str:
        return "; ".join(of_log(sorted(events, key=lambda one: one["time"]), machines, near))

    first, second = event(0, 0, "start", name="s0"), event(5, 1, "start", name="s0")
    stop = event(1, 0, "stop")
    stop["seconds"] = 6.0
    assert "alive and not silent" in found(first, second)
    assert "alive and not silent" in found(first, {**stop, "time": 4.5}, second)
    assert found(first, stop, second) == ""
    assert "lives on the same machine" in found(first, stop, second, machines=("a", "a"))
    assert found(first, event(1, 0, "kill"), second) == ""
    steps = [event(7.0 + i, 0, "step", cell="s0-12345678") for i in range(2)]
    assert found(first, stop, second, steps[0]) == ""
    assert "which went on: ['step', 'step']" in found(first, stop, second, *steps)
    assert found(first, stop, second, *steps, near=False) == ""
    late = event(8 + TERM + LATE, 0, "step", cell="s0-12345678")
    assert "long after it woke" in found(first, stop, second, late, near=False)
    assert "which went on: ['result']" in found(first, stop, second, event(7, 0, "result", cell="s0-12345678"))
    slow = event(2 + TERM + LATE, 1, "start", name="s0")
    waited = event(0.5, 1, "waiting", name="s0")
    assert "after it was free, and worker 1 had waited" in found(first, event(1, 0, "kill"), waited, slow)
    assert found(first, event(1, 0, "kill"), waited, event(4, 1, "gap"), slow) == ""
    assert found(first, event(1, 0, "kill"), event(0.5, 1, "step", cell="s1-12345678"), slow) == ""
