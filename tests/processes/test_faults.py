"""The fault-injection harness: a schedule from end to end, and that its verdicts can fail."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llamax.train.loop import train
from tests.processes.faults import DAMAGES, EVERY, RUN, SHAPES, STEPS, draw
from tests.processes.forked import left_over
from tests.processes.harness import ROOT, Job
from tests.processes.moments import MOMENTS
from tests.processes.verdicts import of_run, of_session
from tests.train.conftest import build
from tests.train.runs import run_config, write_texts


def command(folder: Path, *words: object) -> tuple[int, list[dict[str, Any]], str]:
    """The command in a process of its own, which must not have a backend: (exit code, outcomes, what it said)."""
    words = (sys.executable, "-m", "tests.processes.faults", "--folder", folder, "--json", *words)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*map(str, words)], env=env, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


KILLED = 200  # the seed of a schedule in which the second of two dies in a collective of step 6
ACTS = ("kill", "term", "stop", "drop", "mute", "full", "raise", "sleep", "clock")


def session(*faults: dict[str, Any], damage: str | None = None) -> dict[str, Any]:
    return {"shape": "2 data", "damage": damage, "faults": list(faults)}


def fault(process: int, do: str, at: str, nth: int = 1, **more: Any) -> dict[str, Any]:
    return {"process": process, "at": at, "do": do, "nth": nth, **more}


EVERY_KIND = [  # a checkpoint is there for certain when the one after it has begun
    {
        "seed": 1,
        "sessions": [
            session(
                fault(1, "sleep", "start", seconds=2),
                fault(0, "clock", "dispatch", 2, seconds=86400),
                fault(1, "kill", "dispatch", 7),
            ),
            session(fault(1, "stop", "restore")),
            session(fault(0, "term", "save")),
            session(fault(1, "drop", "dispatch")),
            session(damage="flip"),
        ],
    },
    {
        "seed": 2,
        "sessions": [
            session(fault(0, "full", "save")),
            session(fault(0, "kill", "named", 2)),
            session(fault(0, "raise", "digest", 2), damage="cut"),
            session(fault(1, "mute", "dispatch"), damage="remove"),
            session(),
        ],
    },
]


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the schedules' config that nothing disturbed."""
    folder = tmp_path_factory.mktemp("right")
    store = build(write_texts(folder / "texts"), folder / "store").path
    train(run_config(*RUN, "mesh.data=1", store=store), folder / "run")
    return folder / "run"


def test_what_is_wrong_with_a_run_is_found(right: Path, tmp_path: Path):
    """Each of these alone, in a copy of a run that was right."""
    assert of_run(right, right, STEPS, EVERY, exact=True) == []

    def found(name: str, exact: bool = True) -> str:
        return "; ".join(of_run(tmp_path / name, right, STEPS, EVERY, exact))

    def copy(name: str) -> Path:
        return shutil.copytree(right, tmp_path / name)

    metrics = copy("loss") / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    for factor, exact, fails in ((1 + 1e-9, True, True), (1 + 1e-6, False, False), (1 + 1e-4, False, True)):
        changed = [{**row, "loss": row["loss"] * (factor if row["step"] == 5 else 1)} for row in rows]
        metrics.write_text("".join(json.dumps(row) + "\n" for row in changed))
        assert ("metrics.jsonl: step 5 has loss" in found("loss", exact)) == fails
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows[:4] + rows[3:]))
    assert "has steps [1, 2, 3, 4, 4, 5" in found("loss")
    shutil.rmtree(copy("lost") / f"checkpoints/{EVERY}")
    assert f"permanent checkpoint of step {EVERY} is lost" in found("lost")
    file = next(path for path in (copy("flipped") / f"checkpoints/{EVERY}/state").rglob("*") if path.is_file())
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    assert f"permanent checkpoint of step {EVERY} is damaged" in found("flipped")
    shutil.copytree(right / f"checkpoints/{EVERY}", copy("old") / "checkpoints/2.temporary")
    assert "['2.temporary'] were to be deleted" in found("old")
    (copy("open") / "result.json").unlink()
    assert found("open") == "the run did not finish"


class Ended:
    """A process that has ended."""

    def __init__(self, pid: int, code: int) -> None:
        self.pid, self.returncode = pid, code

    def poll(self) -> int:
        """The exit code."""
        return self.returncode


def test_what_is_wrong_with_a_session_is_found(tmp_path: Path):
    """Exit codes, messages, seconds and processes."""
    lost = "error: process 1 (pid 11 on here) died: its connection closed without a word; all 2 end"
    kill = {"process": 1, "at": "dispatch", "do": "kill", "time": 100.0}

    def found(events: list[Any], codes: tuple[int, int], said: str = "", ended: float = 101.0) -> str:
        (tmp_path / "0.err").write_text(said)
        (tmp_path / "1.err").write_text("")
        processes: Any = [Ended(10 + i, code) for i, code in enumerate(codes)]
        job = Job(processes, [tmp_path / "0.err", tmp_path / "1.err"], {0: ended, 1: 100.0})
        return "; ".join(of_session(job, events, [], tmp_path / "run", 30.0)[0])

    assert found([], (0, 0)) == ""
    assert "ended with [1, 1] though nothing ended it: ValueError: x" in found([], (1, 1), "ValueError: x")
    assert found([kill], (75, -9), lost) == ""
    assert "ended 31.0 s after kill at dispatch" in found([kill], (75, -9), lost, ended=131.0)
    assert "the others ended with [-6]" in found([kill], (-6, -9), lost)
    assert "nobody said that process 1 is lost" in found([kill], (75, -9), lost.replace("process 1", "process 2"))
    absent, missing = {**kill, "at": "start"}, "error: after 60 s only 1 of 2 processes have come: missing 1; start"
    assert found([absent], (2, -9), missing) == ""
    assert "process 1 did not come and the others ended with [2]" in found([absent], (2, -9), "error: missing 2;")
    full = {"process": 1, "at": "save", "do": "full", "time": 100.0}
    assert found([full], (2, 2), "error: checkpoint of step 3 could not be saved in x: file too large") == ""
    assert "a full disk ended it with [1, 1]" in found([full], (1, 1), "OSError: [Errno 27]")


def test_a_process_that_is_left_is_found():
    process = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        assert left_over([process.pid]) == [process.pid]
    finally:
        process.kill()
        process.wait()
    assert left_over([process.pid]) == []


def test_schedules_are_data_of_their_seed():
    schedules = [draw(seed) for seed in range(100)]
    assert schedules == [json.loads(json.dumps(draw(seed))) for seed in range(100)]
    sessions = [session for schedule in schedules for session in schedule["sessions"]]
    faults = [fault for session in sessions for fault in session["faults"]]
    assert {session["shape"] for session in sessions} == set(SHAPES)
    assert {session["damage"] for session in sessions} == {None, *DAMAGES}
    assert {fault["at"] for fault in faults} == set(MOMENTS)
    assert {fault["do"] for fault in faults} == set(ACTS)
    assert all(schedule["sessions"][-1]["faults"] == [] for schedule in schedules)


def test_what_was_right_before_is_not_run_again(tmp_path: Path):
    rows = [{"seed": 7, "problems": []}, {"seed": 8, "problems": ["the run did not finish"]}]
    (tmp_path / "outcomes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, outcomes, said = command(tmp_path, "--only", 7)
    assert (code, outcomes) == (0, [])
    assert "0 schedules, 0 failed, 0 sessions, 1 right before" in said
    code, outcomes, said = command(tmp_path, "--seed", 7, "--schedules", 2, "--minutes", 0)
    assert "1 right before" in said


@pytest.mark.slow
def test_every_kind_of_fault_in_a_run_of_two(tmp_path: Path):
    """Two schedules by hand: between them every act, every moment and every damage of the random ones."""
    file = tmp_path / "schedules.jsonl"
    file.write_text("".join(json.dumps(schedule) + "\n" for schedule in EVERY_KIND))
    words = ("--file", file, "--end-seconds", 60)
    code, outcomes, said = command(tmp_path / "faults", *words)
    assert (code, [outcome["problems"] for outcome in outcomes]) == (0, [[], []]), said
    happened = [happening for outcome in outcomes for happening in outcome["happened"]]
    assert {text for one in happened for text in one.split("@")} == {*ACTS, *MOMENTS, *DAMAGES}
    assert max(outcome["slowest_end"] for outcome in outcomes) > 0


@pytest.mark.slow
def test_one_of_two_is_killed_in_a_collective(tmp_path: Path):
    code, (outcome,), said = command(tmp_path, "--only", KILLED, "--end-seconds", 120)
    assert (code, outcome["problems"]) == (0, []), said
    assert outcome["happened"] == ["kill@dispatch"]
    assert outcome["restarts"] == 1
    assert outcome["slowest_end"] > 0
    assert [path.name for path in (tmp_path / "undisturbed").iterdir() if (path / "lock").exists()] == ["2-data"]


@pytest.mark.slow
def test_six_schedules(tmp_path: Path):
    code, outcomes, said = command(tmp_path, "--seed", 1000, "--schedules", 6, "--end-seconds", 120)
    assert (code, len(outcomes)) == (0, 6), said
