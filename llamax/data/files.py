"""A full disk in words."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from llamax.errors import UserError


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
