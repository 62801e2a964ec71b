"""The lock of a run directory: one process trains there, on whatever machine.

On one machine, and on shared file systems that pass locks on, the operating system holds the lock and releases it
however the process ends. Elsewhere the holder's beat in the file keeps others out: who finds another machine's mark
watches it for a while, which needs no clocks that agree, and takes over when it does not move.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llamax.errors import UserError
from llamax.storage.identity import machine
from llamax.train.files import writing

LOCK = "lock"
BEAT_SECONDS = 5.0
BEATS_MISSED = 3


@contextmanager
def locked(folder: Path, beat_seconds: float = BEAT_SECONDS) -> Iterator[None]:
    """Hold the lock of a run directory for a block.

    Raises:
        UserError: another process holds it, on this machine or elsewhere; or the disk refuses.
    """
    path = folder / LOCK
    with writing(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    stop = threading.Event()
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _mark(path).get("pid", "unknown")
            raise UserError(
                f"{folder}: process {holder} is using this run directory; wait for it, stop it, or give another folder"
            ) from None
        except OSError:  # a file system without locks: the beat alone protects
            pass
        _wait_for_silence(folder, beat_seconds)
        with writing(path):
            _write(handle, 0)
        thread = threading.Thread(target=_beat, args=(handle, stop, beat_seconds), name="lock", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            os.ftruncate(handle, 0)  # released: nobody needs to watch it
    finally:
        os.close(handle)


def _wait_for_silence(folder: Path, beat_seconds: float) -> None:
    """Return when nobody on another machine beats. Raises UserError when somebody does."""
    first = _mark(folder / LOCK)
    if not first or first.get("machine") == machine():  # free, or of a process here that the system knows is dead
        return
    seconds = BEATS_MISSED * beat_seconds
    print(f"note: {folder} was left by another machine; watching it for {seconds:g} s", file=sys.stderr)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(beat_seconds / 5)
        if _mark(folder / LOCK) != first:
            raise UserError(
                f"{folder}: a job on another machine is using this run directory (process {first.get('pid')} there); "
                "wait for it, stop it, or give another folder"
            )


def _beat(handle: int, stop: threading.Event, seconds: float) -> None:
    count = 0
    while not stop.wait(seconds):
        count += 1
        try:
            _write(handle, count)
        except OSError:  # a full disk: rows and checkpoints say so
            continue


def _write(handle: int, count: int) -> None:
    text = json.dumps({"pid": os.getpid(), "machine": machine(), "beat": count}) + "\n"
    os.pwrite(handle, text.encode(), 0)
    os.ftruncate(handle, len(text))


def _mark(path: Path) -> dict[str, object]:
    """What the holder wrote, read anew from the file system; {} if nobody holds it."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
