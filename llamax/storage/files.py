"""Files that are whole or absent, whoever else on this machine or another writes them at the same time; locks."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from llamax.errors import UserError

SUFFIX, SHOWN = ".tmp", 40  # characters of a name that are kept in a temporary one: file systems allow 255 bytes


def beside(path: Path) -> Path:
    """A new hidden name in the folder of `path`: by chance, as pods that share a disk often share a process id."""
    return path.with_name(f".{path.name[:SHOWN]}.{os.urandom(8).hex()}{SUFFIX}")


@contextmanager
def arriving(path: Path) -> Iterator[Path]:
    """The name of a file to be made, which takes the place of `path` once the block ends without an error.

    Raises:
        OSError: the disk's; the old file is untouched.
    """
    temporary = beside(path)
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path`, whole, once the block ends without an error.

    A crash at any moment leaves the old file or the new one; if `durable`, also after a power cut.

    Raises:
        OSError: the disk's; the old file is untouched.
    """
    with arriving(path) as temporary, open(temporary, "xb") as file:
        yield file
        if durable:
            file.flush()
            os.fsync(file.fileno())
    if durable:
        sync_folder(path.parent)


def write_atomic(path: Path, text: str, *, durable: bool = True) -> None:
    """Put `text` at `path` in UTF-8 (`replacing`)."""
    with replacing(path, durable=durable) as file:
        file.write(text.encode())


def clear_leftovers(folder: Path) -> None:
    """Delete what killed processes left of files in and below `folder`, where nobody else may be writing."""
    for path in folder.rglob(f".*{SUFFIX}"):
        with suppress(OSError):
            path.unlink()


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable, on file systems that can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def locked(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Holds the lock that the file `path` stands for, against threads too; calls `waiting()` first if another has it.

    The lock ends with the process.

    Raises:
        OSError: `path` cannot be opened.
        UserError: its file system has no locks.
    """
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            words = "use a folder elsewhere, or mount this one with locks (Lustre: -o flock)"
            raise UserError(f"{path}: its file system has no locks ({error.strerror}); {words}") from None
        try:
            yield
        finally:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)  # closing would not do: a child forked meanwhile has it open too
