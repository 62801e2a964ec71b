"""Leases: one winner among racers, dead holders replaced at once, live ones never."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from llamax.storage import leases
from llamax.sweep.claim import Lease, LeaseLost, claim, holder
from llamax.sweep.process import alive, me, share, started

FORK = multiprocessing.get_context("fork")


def plant(study: Path, cell: str, record: dict, age: float = 0.0, number: int = 0) -> Path:
    """A lease as another process would have left it."""
    folder = study / "leases"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (f"{cell}~{number}.json" if number else f"{cell}.json")
    path.write_text(json.dumps({"cell": cell, "lease_seconds": 60.0, **record}))
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def dead_record() -> dict:
    """The identity of a process that has ended."""
    code = "import json; from llamax.sweep.process import me; print(json.dumps(me()))"
    return json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)


ELSEWHERE = {"machine": "another", "pid": 1, "started": "1"}


def _racer(study: Path, cells: list[str], start: object, end: object, out: object) -> None:
    start.wait()  # type: ignore[attr-defined]
    won = [cell for cell in cells if claim(study, cell) is not None]
    out.put((os.getpid(), won))  # type: ignore[attr-defined]
    end.wait()  # type: ignore[attr-defined]  # winners stay alive until all have tried


def race(study: Path, cells: list[str], racers: int) -> list[tuple[int, list[str]]]:
    start, end, out = FORK.Barrier(racers), FORK.Barrier(racers), FORK.Queue()
    processes = [FORK.Process(target=_racer, args=(study, cells, start, end, out)) for _ in range(racers)]
    for process in processes:
        process.start()
    wins = [out.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    return wins


def test_of_many_processes_one_wins_each_cell(tmp_path: Path) -> None:
    cells = [f"c{i}" for i in range(25)]
    wins = race(tmp_path, cells, racers=12)
    assert sorted(cell for _, won in wins for cell in won) == sorted(cells)
    assert not [p for p in (tmp_path / "leases").iterdir() if p.name.startswith(".")], "no temporary files stay"


def test_of_many_processes_one_takes_over_each_dead_lease(tmp_path: Path) -> None:
    cells = [f"c{i}" for i in range(10)]
    record = dead_record()
    for cell in cells:
        plant(tmp_path, cell, record)
    for attempt in range(1, 5):  # each round's winners have died by the next
        wins = race(tmp_path, cells, racers=12)
        assert sorted(cell for _, won in wins for cell in won) == sorted(cells)
        for cell in cells:
            found = holder(tmp_path, cell)
            assert found is not None
            assert found.number == attempt
            assert found.record["pid"] == next(pid for pid, won in wins if cell in won)


def test_of_many_threads_one_wins(tmp_path: Path) -> None:
    for i in range(20):
        plant(tmp_path, f"c{i}", ELSEWHERE, age=61)
        barrier, won = threading.Barrier(8), []

        def racer(cell: str = f"c{i}", barrier: threading.Barrier = barrier, won: list = won) -> None:
            barrier.wait()
            won.append(claim(tmp_path, cell))

        threads = [threading.Thread(target=racer) for _ in range(8)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert sum(lease is not None for lease in won) == 1


def test_a_slow_racer_cannot_hit_a_successor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It looked when the lease was dead, and acts after another took it over and that one died and was replaced too."""
    plant(tmp_path, "c", dead_record())
    stale = holder(tmp_path, "c")
    first = claim(tmp_path, "c")
    assert first is not None
    assert stale is not None
    assert not stale.held
    monkeypatch.setattr(leases, "holder", lambda *_: stale)
    assert claim(tmp_path, "c") is None
    monkeypatch.undo()
    assert first.beat()


def test_another_machine_is_judged_by_its_heartbeat(tmp_path: Path) -> None:
    plant(tmp_path, "young", ELSEWHERE, age=50)
    plant(tmp_path, "old", ELSEWHERE, age=61)
    plant(tmp_path, "patient", {**ELSEWHERE, "lease_seconds": 600.0}, age=61)
    assert claim(tmp_path, "young") is None
    assert claim(tmp_path, "patient") is None
    lease = claim(tmp_path, "old")
    assert lease is not None
    assert lease.path.name == "old~1.json"


def test_this_machine_is_judged_by_its_processes(tmp_path: Path) -> None:
    plant(tmp_path, "asleep", me(), age=9999)  # a laptop that slept
    assert claim(tmp_path, "asleep") is None
    plant(tmp_path, "dead", dead_record())  # no waiting for expiry
    assert claim(tmp_path, "dead") is not None
    plant(tmp_path, "reused", {**me(), "started": "12345"})  # the process id belongs to somebody else now
    assert claim(tmp_path, "reused") is not None


def test_a_zombie_is_dead(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    record = {**me(), "pid": process.pid, "started": started(process.pid)}
    assert alive(record) is True
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended, not reaped
    assert alive(record) is False
    process.wait()
    process.stdin.close()  # type: ignore[union-attr]
    assert alive(record) is False


def test_a_released_lease_is_free_at_once(tmp_path: Path) -> None:
    lease = claim(tmp_path, "c")
    assert lease is not None
    with lease:
        assert claim(tmp_path, "c") is None
    again = claim(tmp_path, "c")
    assert again is not None
    assert again.path.name == "c~1.json"


def test_the_heartbeat_renews_the_lease(tmp_path: Path) -> None:
    lease = claim(tmp_path, "c", lease_seconds=0.6)
    assert lease is not None
    os.utime(lease.path, (0, 0))
    with lease:
        until = time.monotonic() + 10
        while lease.path.stat().st_mtime == 0 and time.monotonic() < until:
            time.sleep(0.02)
    assert lease.path.stat().st_mtime > time.time() - 60


def test_a_lost_lease_says_so(tmp_path: Path) -> None:
    lease = claim(tmp_path, "c", lease_seconds=0.6)
    assert lease is not None
    lease.check()
    with lease:
        plant(tmp_path, "c", ELSEWHERE, number=1)
        assert lease.lost.wait(10)
        with pytest.raises(LeaseLost):
            lease.check()
    found = holder(tmp_path, "c")
    assert found is not None
    assert found.held, "the loser's release leaves the winner's lease alone"
    assert found.record["machine"] == "another"


def test_a_disk_that_takes_no_beats_loses_the_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = claim(tmp_path, "c", lease_seconds=0.3)
    assert lease is not None

    def full(self: Lease) -> bool:
        raise OSError(errno.EIO, "gone")

    monkeypatch.setattr(Lease, "beat", full)
    with lease:
        assert lease.lost.wait(10)


def test_an_unreadable_lease_expires(tmp_path: Path) -> None:
    plant(tmp_path, "c", ELSEWHERE).write_text("{")
    assert claim(tmp_path, "c") is None
    os.utime(tmp_path / "leases" / "c.json", (1, 1))
    assert claim(tmp_path, "c") is not None


def test_without_hard_links_creation_is_still_exclusive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links")

    monkeypatch.setattr(os, "link", none)
    assert sum(len(won) for _, won in race(tmp_path, ["a", "b"], racers=6)) == 2


def test_names_with_dots_do_not_meet_takeovers(tmp_path: Path) -> None:
    for name in ("lr0", "lr0.1", "lr0-1"):
        assert claim(tmp_path, name) is not None
        assert claim(tmp_path, name) is None


def test_shares_of_the_cores() -> None:
    assert [share([0, 1, 2, 3], i, 2, None) for i in range(2)] == [[0, 1], [2, 3]]
    assert [share([4, 5, 6], i, 2, None) for i in range(2)] == [[4], [5]]
    assert [share([0, 1], i, 4, None) for i in range(4)] == [[0], [1], [0], [1]]
    assert [share([0, 1, 2, 3], i, 2, 3) for i in range(2)] == [[0, 1, 2], [0, 1, 3]]
    assert share([0, 1], 0, 1, 8) == [0, 1]
