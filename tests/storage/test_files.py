"""Files that are whole or absent: errors, crashes, and many who write one at the same time."""

from __future__ import annotations

import fcntl
import os
import signal
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llamax.errors import UserError
from llamax.storage.bucket import open_bucket
from llamax.storage.copies import Copy
from llamax.storage.files import beside, clear_leftovers, locked, replacing, write_atomic
from llamax.storage.places import view_of


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_atomic(path, "old")

    def interrupted() -> None:
        with replacing(path) as file:
            file.write(b"half of the new")
            file.flush()
            assert path.read_text() == "old"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (path.read_text(), os.listdir(tmp_path)) == ("old", ["a"])
    write_atomic(path, "größer")
    assert path.read_bytes() == "größer".encode()


def test_what_the_disk_says_is_raised_and_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomic(tmp_path / "a", "old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(tmp_path / "a", "new")
    assert ((tmp_path / "a").read_text(), os.listdir(tmp_path)) == ("old", ["a"])
    write_atomic(tmp_path / "a", "new", durable=False)  # asks nothing of the disk
    assert (tmp_path / "a").read_text() == "new"


def test_the_order_that_survives_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes, then the name, then the folder that holds the name."""
    done: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append(_kind(handle)), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("name"), replace(a, b)))
    write_atomic(tmp_path / "a", "x")
    assert done == ["file", "name", "folder"]
    write_atomic(tmp_path / "a", "y", durable=False)
    assert done[3:] == ["name"]


def _kind(handle: int) -> str:
    return "folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file"


def test_a_new_file_has_the_rights_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_atomic(tmp_path / "a", "")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_many_who_write_one_file_each_write_it_whole(tmp_path: Path) -> None:
    """Threads share a process id, and so do the first processes of two pods that mount one disk."""
    path, gate = tmp_path / "a", threading.Barrier(8, timeout=60)

    def write(who: int) -> None:
        gate.wait()
        for _ in range(50):
            write_atomic(path, str(who) * 5000, durable=False)
            text = path.read_text()
            assert text == text[:1] * 5000

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    assert os.listdir(tmp_path) == ["a"]
    assert len({beside(path) for _ in range(1000)}) == 1000


def test_threads_that_refresh_one_copy_do_not_disturb_each_other(bucket: str) -> None:
    """And see no change that nobody made, for which a command that only reads would write to the bucket."""
    there, _ = open_bucket(bucket)
    gate = threading.Barrier(6, timeout=60)
    copies = [Copy(view_of(f"{bucket}/s"), f"{bucket}/s") for _ in range(6)]

    def refresh(copy: Copy) -> None:
        try:
            for turn in range(10):
                if gate.wait() == 0:
                    for name in range(4):
                        there.write(f"s/{name}", f"{turn}".encode())
                copy.pull(copy.objects())  # the one who writes may be met in the middle: versions differ
                gate.wait()
                copy.pull(copy.objects())
                gate.wait()
                assert copy.changed() == []
                assert [(copy.local / str(name)).read_text() for name in range(4)] == [str(turn)] * 4
        except BaseException:
            gate.abort()
            raise

    with ThreadPoolExecutor(6) as pool:
        errors = [future.exception() for future in [pool.submit(refresh, copy) for copy in copies]]
    assert [error for error in errors if not isinstance(error, threading.BrokenBarrierError | None)] == []


def test_a_lock_keeps_threads_out_and_says_so(tmp_path: Path) -> None:
    inside, most, waited = [0], [0], threading.Event()

    def enter(_: int) -> None:
        for _ in range(20):
            with locked(tmp_path / ".lock", waiting=waited.set):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.0005)
                inside[0] -= 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(enter, range(4)))
    assert (most[0], waited.is_set()) == (1, True)


def test_without_locks_one_message_and_copies_work(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    open_bucket(bucket)[0].write("s/a", b"1")
    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(UserError, match=r"\.lock: its file system has no locks \(Function .*; use a folder elsewhere"):
        locked(tmp_path / ".lock").__enter__()
    copy = Copy(view_of(f"{bucket}/s"), f"{bucket}/s")
    copy.pull(copy.objects())
    assert ((copy.local / "a").read_bytes(), copy.changed()) == (b"1", [])


def test_a_lock_ends_with_its_block_though_a_child_has_its_file_open(tmp_path: Path) -> None:
    with locked(tmp_path / ".lock"):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    try:
        with locked(tmp_path / ".lock", waiting=lambda: pytest.fail("still held")):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_leftovers_of_the_killed_are_cleared(tmp_path: Path) -> None:
    for name in ("kept", ".kept", "kept.tmp"):
        (tmp_path / name).touch()
    (tmp_path / "inner").mkdir()
    for lost in (tmp_path / "lost", tmp_path / "inner" / "lost"):
        beside(lost).touch()
    clear_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".kept", "inner", "kept", "kept.tmp"]
    assert os.listdir(tmp_path / "inner") == []


def test_names_as_long_as_the_disk_allows(tmp_path: Path) -> None:
    path = tmp_path / ("ä" * 127)  # 254 bytes of 255
    write_atomic(path, "x")
    assert path.read_text() == "x"
