"""Files that are whole or absent, whoever else on this machine or another writes them at the same time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def beside(path: Path) -> Path:
    """A new hidden name in the folder of `path`: by chance, as pods that share a disk often share a process id."""
    return path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path`, whole, once the block ends without an error.

    A crash at any moment leaves the old file or the new one; if `durable`, also after a power cut.

    Raises:
        OSError: the disk's; the old file is untouched.
    """
    temporary = beside(path)
    try:
        with open(temporary, "xb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    if durable:
        sync_folder(path.parent)


def write_atomic(path: Path, text: str, *, durable: bool = True) -> None:
    """Put `text` at `path` in UTF-8 (`replacing`)."""
    with replacing(path, durable=durable) as file:
        file.write(text.encode())


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable, on file systems that can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
