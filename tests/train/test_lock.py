"""One process trains in a run directory: what the operating system holds, and what a beat says of another machine."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from llamax.errors import UserError
from llamax.train import lock
from llamax.train.lock import LOCK, locked

BEAT = 0.1


def mark(path: Path) -> dict:
    return json.loads((path / LOCK).read_text() or "{}")


def test_the_holder_beats_and_releases(tmp_path: Path):
    with locked(tmp_path, BEAT):
        first = mark(tmp_path)
        assert first["beat"] == 0
        for _ in range(200):
            if mark(tmp_path)["beat"] > 1:
                break
            threading.Event().wait(BEAT)
        assert mark(tmp_path)["beat"] > 1
        assert {**mark(tmp_path), "beat": 0} == first
    assert mark(tmp_path) == {}
    with locked(tmp_path, beat_seconds=1000.0):  # a released one is not watched
        pass


def test_a_dead_holder_of_this_machine_is_not_waited_for(tmp_path: Path):
    (tmp_path / LOCK).write_text(json.dumps({"pid": 1, "machine": lock.machine(), "beat": 5}))
    with locked(tmp_path, beat_seconds=1000.0):
        pass


def test_a_silent_mark_of_another_machine_is_taken_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / LOCK).write_text(json.dumps({"pid": 7, "machine": "elsewhere", "beat": 5}))
    with locked(tmp_path, BEAT):
        assert mark(tmp_path)["machine"] == lock.machine()
    assert "was left by another machine; watching it" in capsys.readouterr().err


def test_a_beating_mark_of_another_machine_keeps_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The file system does not pass locks on: only the mark is seen."""
    monkeypatch.setattr(lock.fcntl, "flock", lambda *_: None)
    path, stop = tmp_path / LOCK, threading.Event()

    def beat() -> None:
        count = 0
        while not stop.wait(BEAT / 2):
            count += 1
            path.write_text(json.dumps({"pid": 7, "machine": "elsewhere", "beat": count}))

    path.write_text(json.dumps({"pid": 7, "machine": "elsewhere", "beat": 0}))
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        message = r"a job on another machine is using this run directory \(process 7 there\)"
        with pytest.raises(UserError, match=message), locked(tmp_path, beat_seconds=10.0):
            pass
    finally:
        stop.set()
        thread.join()
