"""Failures of the disk in words."""

from __future__ import annotations

import errno
import functools
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llamax.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)


def disk_cause(error: BaseException | None) -> str | None:
    """What the disk said, if `error` or one of its causes comes from the disk: `no space left on device`.

    Orbax reports the disk's errors as a ValueError that carries the number in its text.
    """
    while error is not None:
        code = error.errno if isinstance(error, OSError) else None
        if code is None and (found := re.search(r"os_error_code='(\d+)'", str(error))):
            code = int(found[1])
        if code is not None:
            return os.strerror(code).lower() + (", free some space" if code in _FULL else "")
        if isinstance(error, OSError):
            return str(error)
        error = error.__cause__
    return None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the disk's errors while writing `path` into one message."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written: {disk_cause(error)}; what was saved before is intact; "
            "put it right and give the same command again"
        ) from error


@functools.cache
def hush_closed_loops() -> None:
    """When a write fails Orbax closes its event loop, and TensorStore then complains of it once for every other array:
    dozens of tracebacks in front of the one message. This hides the complaint from then on, whoever makes it; what else
    cannot be raised is shown as before."""
    shown = sys.unraisablehook

    def hook(failure: Any) -> None:
        if not (isinstance(failure.exc_value, RuntimeError) and str(failure.exc_value) == "Event loop is closed"):
            shown(failure)

    sys.unraisablehook = hook
