"""Where the time of a run went: kinds that add up, over sessions and kills."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamax.train.goodput import KINDS, Spent, busy, carried, shares, total
from llamax.train.loop import train
from llamax.train.run_dir import read_time
from tests.train.runs import run_config
from tests.train.test_loop import LOOP, Killed, stop_at


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_kinds_add_up_to_the_clock():
    clock = Clock()
    spent = Spent(clock)
    clock.now += 2
    with spent.on("compile"):
        clock.now += 5
    spent.now("step")
    clock.now += 10
    with spent.on("checkpoint"):
        clock.now += 1
        with spent.on("evaluation"):
            clock.now += 3
        clock.now += 1
    spent.take("data", 0.5)
    expected = {"start": 2, "compile": 5, "step": 9.5, "data": 0.5, "checkpoint": 2, "evaluation": 3}
    assert spent.seconds() == {**dict.fromkeys(KINDS, 0.0), **expected}
    assert sum(spent.seconds().values()) == clock.now - 100


def test_a_kill_costs_what_came_after_the_checkpoint():
    """100 s to the checkpoint, 40 s more, killed; 60 s later the next session takes 7 s to start and is killed after
    3 s of training; 10 s later a third one starts from the same checkpoint."""
    saved = {"start": 10.0, "compile": 20.0, "step": 70.0}
    last = {"time": 1000.0, "step": 9, "seconds": {**saved, "step": 105.0, "evaluation": 5.0}}
    before = carried(saved, last, now=1060.0)
    assert before == {**dict.fromkeys(KINDS, 0.0), **saved, "restart": 40.0, "idle": 60.0}
    clock = Clock()
    spent = Spent(clock)
    clock.now += 7
    spent.resume(before)
    spent.now("step")
    clock.now += 3
    second = spent.seconds()
    assert second == {**before, "restart": 47.0, "step": 73.0}
    third = carried(saved, {"time": 1070.0, "step": 7, "seconds": second}, now=1080.0)
    assert third == {**before, "restart": 50.0, "idle": 70.0}
    assert busy(third) == 150  # 140 s of the first session and 10 of the second


def test_the_first_session_and_one_without_a_checkpoint():
    assert carried({}, None, now=5.0) == dict.fromkeys(KINDS, 0.0)
    last = {"time": 100.0, "step": 3, "seconds": {"start": 4.0, "step": 6.0, "idle": 2.0}}
    assert carried({}, last, now=99.0) == {**dict.fromkeys(KINDS, 0.0), "restart": 10.0, "idle": 2.0}  # clocks differ


def test_in_words():
    assert shares({"step": 93.0, "compile": 5.0, "data": 1.6, "idle": 0.4}) == "93 % step, 5 % compile, 2 % data"
    assert shares({}) == ""
    assert total([{"step": 1.0}, {}, {"step": 2.0, "idle": 3.0}]) == {"step": 3.0, "idle": 3.0}


def test_a_run_accounts_for_all_its_sessions(store: Path, tmp_path: Path):
    """Killed after step 12, with a checkpoint of step 8; the whole time of both sessions and between is there."""
    path, config = tmp_path / "run", run_config(*LOOP, "checkpoint.every_steps=8", store=store)
    with pytest.raises(Killed):
        train(config, path, report=stop_at(12, kill=True))
    train(config, path)
    found = (read_time(path) or {})["seconds"]
    assert set(found) == set(KINDS)
    assert all(value >= 0 for value in found.values())
    assert all(found[kind] > 0 for kind in ("compile", "step", "checkpoint", "evaluation", "restart"))
    assert (read_time(path) or {})["step"] == 24
