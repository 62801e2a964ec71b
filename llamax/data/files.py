"""One builder at a time in a folder, and a full disk in words."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llamax.errors import UserError


@contextmanager
def locked(folder: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Holds `folder`'s lock; calls `waiting()` first if another process has it. The lock ends with the process."""
    import fcntl

    with open(folder / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turns a full or read-only disk into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{what}: no space left on the disk; free some and run again, finished parts are kept"
            ) from None
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise UserError(f"{what}: {error.strerror}; choose a folder you can write to") from None
        raise
