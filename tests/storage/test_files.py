"""Files that are whole or absent: errors, crashes, and many who write one at the same time."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llamax.storage.bucket import open_bucket
from llamax.storage.copies import Copy
from llamax.storage.files import beside, replacing, write_atomic
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
    there, _ = open_bucket(bucket)
    for name in range(4):
        there.write(f"s/{name}", b"x" * 100)
    gate = threading.Barrier(6, timeout=60)

    def refresh(_: int) -> None:
        for _ in range(5):
            gate.wait()
            copy = Copy(view_of(f"{bucket}/s"), f"{bucket}/s")
            copy.pull(copy.objects())
            gate.wait()
            copy.forget_notes()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(refresh, range(6)))
