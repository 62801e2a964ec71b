"""Worker processes: pinned, watched, replaced, interrupted; nothing is orphaned."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamax.errors import UserError
from llamax.sweep.live import live
from llamax.sweep.local import run_local
from llamax.sweep.process import alive, started
from llamax.sweep.status import status
from llamax.sweep.study import read_study
from llamax.sweep.tables import status_table
from tests.sweep.fake_train import starts

FAKE = "tests.sweep.fake_train:train"
Make = Callable[..., Path]


def wait_for(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := condition():
            return found
        time.sleep(0.02)
    pytest.fail("nothing happened")


def holders(study: Path) -> list[dict]:
    """The records of leases that live processes hold."""
    records = [json.loads(path.read_text()) for path in (study / "leases").glob("[!.]*.json")]
    return [record for record in records if alive(record)]


def worker_pids(study: Path) -> set[int]:
    return {record["pid"] for record in holders(study)}


def test_workers_share_the_cells_and_the_cores(make_study: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    study = make_study(6)
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.05")
    seen: list[dict] = []
    final = run_local(study, workers=2, threads_per_worker=1, train=FAKE, report=seen.append, report_seconds=0.05)
    assert final["counts"]["done"] == 6
    lines = [line for each in starts(study).values() for line in each]
    assert len(lines) == 6, "each cell started once"
    assert len({line[0] for line in lines}) == 2, "both workers worked"
    assert {line[3] for line in lines} == {"1"}
    available = sorted(os.sched_getaffinity(0))
    assert {line[2] for line in lines} == {str([core]) for core in available[:2]}
    assert any(row["state"] == "running" and row["step"] for state in seen for row in state["cells"])
    assert seen[-1]["left"] == 0
    assert run_local(study, workers=2, train=FAKE)["counts"]["done"] == 6, "again: nothing to do"
    assert len([line for each in starts(study).values() for line in each]) == 6


def test_a_killed_worker_is_replaced_and_its_cell_resumes(make_study: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    study = make_study(2)
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.1")
    victims: list[int] = []

    def kill_once(state: dict) -> None:
        running = [row for row in state["cells"] if row["state"] == "running" and row["step"] >= 3]
        if running and not victims:
            record = next(r for r in holders(study) if r["cell"] == running[0]["name"])
            victims.append(record["pid"])
            os.kill(record["pid"], signal.SIGKILL)

    final = run_local(study, workers=1, train=FAKE, report=kill_once, report_seconds=0.05)
    assert final["counts"]["done"] == 2
    lines = list(starts(study).values())
    assert sorted(map(len, lines)) == [1, 2]
    again = next(each for each in lines if len(each) == 2)
    assert int(again[1][1]) >= 3, "resumed, not repeated"


@pytest.mark.slow
def test_a_cell_that_kills_its_workers_fails_alone(make_study: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    study = make_study(3)
    monkeypatch.setenv("FAKE_CRASH", "1")
    final = run_local(study, workers=1, train=FAKE, report_seconds=0.05)
    assert final["counts"] == {"done": 2, "diverged": 0, "running": 0, "failed": 1, "pending": 0}
    assert "its worker ended with signal SIGKILL 3 times; out of memory?" in final["cells"][1]["error"]
    monkeypatch.setenv("FAKE_CRASH", "")
    assert run_local(study, train=FAKE, retry_failed=True)["counts"]["done"] == 3


def test_workers_that_cannot_start_say_why(make_study: Make) -> None:
    with pytest.raises(UserError, match=r"(?s)ended with exit code 1 outside any cell.*No module named 'not_there'"):
        run_local(make_study(1), train="not_there:train", report_seconds=0.05)
    with pytest.raises(UserError, match="workers=0"):
        run_local(make_study(1), workers=0)


def start_parent(study: Path, workers: int = 2) -> subprocess.Popen:
    code = (
        "import signal, sys; from pathlib import Path; from llamax.sweep.local import run_local\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job would ignore it
        f"try: run_local(Path({str(study)!r}), workers={workers}, train={FAKE!r})\n"
        "except KeyboardInterrupt: sys.exit(130)"
    )
    return subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"FAKE_STEP_SECONDS": "0.2"})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_ends_its_workers_and_continues_later(
    make_study: Make, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    study = make_study(2)
    parent = start_parent(study)
    wait_for(lambda: (study / "leases").exists() and len(worker_pids(study)) == 2 and all_started(study))
    pids = worker_pids(study)
    before = time.monotonic()
    parent.send_signal(number)
    assert parent.wait(15) == 130
    assert time.monotonic() - before < 10
    assert all(started(pid) == "" for pid in pids)
    state = status(study)
    assert state["counts"]["pending"] == 2
    assert all(row["step"] > 0 for row in state["cells"])
    assert not (study / "failures").exists()
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.01")
    assert run_local(study, workers=2, train=FAKE)["counts"]["done"] == 2
    assert all(int(lines[1][1]) > 0 for lines in starts(study).values()), "resumed"


def test_kill_9_of_the_parent_orphans_nobody(make_study: Make) -> None:
    study = make_study(2)
    parent = start_parent(study)
    wait_for(lambda: (study / "leases").exists() and len(worker_pids(study)) == 2 and all_started(study))
    pids = worker_pids(study)
    parent.kill()
    parent.wait()
    wait_for(lambda: all(started(pid) == "" for pid in pids), seconds=10)
    assert status(study)["counts"]["pending"] == 2, "the leases are free at once"


def all_started(study: Path) -> bool:
    return all(row["step"] > 0 for row in status(study)["cells"])


def test_a_worker_sent_sigterm_leaves_and_is_not_replaced(make_study: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    study = make_study(1)
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.1")

    def ask(state: dict) -> None:
        if state["cells"][0]["step"]:
            for record in holders(study):
                os.kill(record["pid"], signal.SIGTERM)

    final = run_local(study, workers=1, train=FAKE, report=ask, report_seconds=0.05)
    assert final["counts"]["pending"] == 1
    assert final["cells"][0]["step"] > 0


def test_run_local_works_outside_the_main_thread(make_study: Make) -> None:
    study, result = make_study(1), []
    thread = threading.Thread(target=lambda: result.append(run_local(study, train=FAKE)))
    thread.start()
    thread.join(60)
    assert result[0]["counts"]["done"] == 1


def test_plain_lines_where_there_is_no_terminal(make_study: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    study, out = make_study(2), io.StringIO()
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.05")
    monkeypatch.setenv("FAKE_FAIL", "1")
    with live(out) as report:
        run_local(study, train=FAKE, report=report, report_seconds=0.05)
    text = out.getvalue()
    assert "s0 running" in text
    assert "s0 done, step 10/10, loss 1.5000" in text
    assert "[2/2] s1 failed" in text
    assert "seed 1 is not to be trained" in text
    assert "\x1b" not in text


def test_a_live_table_on_a_terminal(make_study: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    study, out = make_study(2), Terminal()
    with live(out) as report:
        run_local(study, train=FAKE, report=report)
    assert "\x1b[" in out.getvalue()
    assert "2 done" in out.getvalue()


def test_the_status_table_fits_and_keeps_what_matters(make_study: Make) -> None:
    from rich.console import Console

    study = make_study(30)
    spent = ({"step": 90.0, "idle": 4.0}, {"step": 3.0, "compile": 3.0})
    for cell, seconds in zip(read_study(study).cells, spent, strict=False):
        (study / cell.run_name).mkdir()
        (study / cell.run_name / "time.json").write_text(json.dumps({"time": 1.0, "step": 3, "seconds": seconds}))
    state = status(study)
    state["cells"][17] |= {"state": "running", "step": 5, "loss": 2.5, "tokens_per_second": 1.2e5, "seconds_left": 61.0}
    state["cells"][17]["phase"] = "training"
    state["cells"][3] |= {"state": "failed", "error": "disk [full] " + "x" * 300}
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(status_table(state, most=6))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 100
    assert any(line.split()[:5] == ["s17", "running", "5/10", "2.5000", "120k"] and "1m01s" in line for line in lines)
    assert any("s3" in line and "disk [full]" in line for line in lines)
    assert any("time of all cells: 93 % step, 4 % idle, 3 % compile" in line for line in lines)
    assert sum(" pending " in line for line in lines) == 4
