"""The operations on a bucket that llamax is built of, tried again with growing pauses while it does not answer.

Conditional writes are what stands in for the atomic rename of a disk: `write(..., expect=ABSENT)` creates an object or
raises Conflict, `expect=version` replaces exactly that version. S3 has them as If-None-Match and If-Match, Google Cloud
Storage as ifGenerationMatch; both list, read and overwrite with strong consistency.
"""

from __future__ import annotations

import functools
import os
import random
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from llamax.errors import UserError
from llamax.storage.files import arriving
from llamax.storage.places import parts

T = TypeVar("T")
ABSENT = ""  # the version of an object that is not there
LONGEST_PAUSE = 15.0


def retry_seconds() -> float:
    """For how long a command tries again before it gives up, and after which a run says that it waits.

    30, or LLAMAX_STORAGE_SECONDS.
    """
    try:
        return float(os.environ.get("LLAMAX_STORAGE_SECONDS", 30.0))
    except ValueError:
        raise UserError(
            f"LLAMAX_STORAGE_SECONDS={os.environ['LLAMAX_STORAGE_SECONDS']!r}: give a number of seconds"
        ) from None


class Object(NamedTuple):
    """What a listing tells of an object: `version` changes with every write, `modified` is the bucket's own clock."""

    key: str
    size: int
    version: str
    modified: float


class StorageError(UserError):
    """A bucket refuses or does not answer; `passing` if the same request may succeed later unchanged."""

    def __init__(self, message: str, passing: bool = False) -> None:
        super().__init__(message)
        self.passing = passing


class Conflict(Exception):
    """The object is not the version that was expected: somebody else wrote it."""


class Missing(Exception):
    """No such object."""


class Reply(NamedTuple):
    """What an error of a client library means: Missing, Conflict, or words; `passing` errors are worth trying again."""

    kind: type[Missing] | type[Conflict] | type[StorageError]
    words: str = ""
    passing: bool = False


class Client(Protocol):
    """One bucket through its provider's library, one request a call. Thread-safe."""

    def list(self, prefix: str) -> list[Object]: ...
    def read(self, key: str) -> tuple[bytes, str]: ...
    def stat(self, key: str) -> Object: ...
    def write(self, key: str, data: bytes, expect: str | None) -> Object: ...
    def upload(self, key: str, path: Path) -> None: ...
    def download(self, key: str, path: Path) -> None: ...
    def delete(self, key: str) -> None: ...
    def meaning(self, error: Exception) -> Reply | None: ...


class Bucket:
    """A bucket whose operations are tried again for `seconds` where an error may pass, then raise StorageError.

    `seconds` may be infinite: a worker then waits, and says so once.
    """

    def __init__(self, root: str, client: Client, seconds: float | None = None) -> None:
        self.root, self._client = root, client
        self._seconds = retry_seconds() if seconds is None else seconds

    def list(self, prefix: str) -> list[Object]:
        """Every object whose key begins with `prefix`, in the order of their keys."""
        return self._tried(prefix, "listed", lambda: self._client.list(prefix))

    def read(self, key: str) -> tuple[bytes, str]:
        """(content, version). Raises Missing."""
        return self._tried(key, "read", lambda: self._client.read(key))

    def stat(self, key: str) -> Object | None:
        """The object, or None where there is none."""
        try:
            return self._tried(key, "read", lambda: self._client.stat(key))
        except Missing:
            return None

    def write(self, key: str, data: bytes, expect: str | None = None) -> Object:
        """Put `data` at `key`, whole: over anything (None), over that version alone, or where nothing is (ABSENT).

        A write whose answer got lost is told from a rival's by reading back: `data` of rivals must differ.

        Raises:
            Conflict: another version is there.
        """

        def once() -> Object:
            try:
                return self._client.write(key, data, expect)
            except Exception as error:
                reply = self._client.meaning(error)
                if expect is None or reply is None or reply.kind not in (Conflict, Missing):
                    raise
                if (mine := self._written(key, data)) is not None:
                    return mine
                raise Conflict(f"{self.root}/{key}") from None

        return self._tried(key, "written", once)

    def _written(self, key: str, data: bytes) -> Object | None:
        """The object, if it holds `data`."""
        try:
            return self._client.stat(key) if self._client.read(key)[0] == data else None
        except Exception as error:
            reply = self._client.meaning(error)
            if reply is not None and reply.kind is Missing:
                return None
            raise

    def upload(self, key: str, path: Path) -> None:
        """Put a file of any size at `key`. Raises OSError if the file cannot be read."""
        self._tried(key, "written", lambda: self._client.upload(key, path))

    def fetch(self, key: str, file: Path) -> None:
        """Fetch an object of any size into a file of the caller's, which may hold a part if this raises.

        Raises:
            Missing: no such object.
            OSError: the disk's.
        """
        self._tried(key, "read", lambda: self._client.download(key, file))

    def download(self, key: str, path: Path) -> None:
        """Fetch an object of any size into a file that appears when it is whole. Raises Missing, or OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with arriving(path) as file:
            self.fetch(key, file)

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects, in order; one that is not there is no error."""
        for key in keys:
            self._tried(key, "deleted", functools.partial(self._client.delete, key))

    def _tried(self, key: str, done: str, action: Callable[[], T]) -> T:
        start, pause, said = time.monotonic(), 0.25, self._seconds <= retry_seconds()
        while True:
            try:
                return action()
            except Exception as error:
                reply, cause = self._client.meaning(error), error
                if reply is None:
                    raise
            where = f"{self.root}/{key}".rstrip("/")
            if reply.kind is not StorageError:
                raise reply.kind(where) from cause
            waited = time.monotonic() - start
            if not reply.passing and self._seconds <= retry_seconds():
                raise StorageError(f"{where}: cannot be {done}: {reply.words}") from cause
            if waited + pause > self._seconds:
                tried = f"; tried for {waited:.0f} s" if waited >= 1 else ""
                raise StorageError(f"{where}: cannot be {done}: {reply.words}{tried}", True) from cause
            if not said and waited > retry_seconds():
                print(f"waiting: {where}: {reply.words}; goes on by itself when it is back", file=sys.stderr)
                said = True
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, LONGEST_PAUSE)


def open_bucket(path: str, seconds: float | None = None) -> tuple[Bucket, str]:
    """The bucket of an address and the key in it. Raises UserError: the client library or its credentials are missing.

    `seconds`: see `Bucket`; None is `retry_seconds()`.
    """
    scheme, name, key = parts(path)
    return Bucket(f"{scheme}://{name}", _client(scheme, name, os.getpid()), seconds), key


@functools.lru_cache(maxsize=16)
def _client(scheme: str, name: str, pid: int) -> Client:
    """One client a bucket and process: a forked child must not share its parent's connections."""
    library, extra = ("boto3", "s3") if scheme == "s3" else ("google-cloud-storage", "gcs")
    try:
        if scheme == "s3":
            from llamax.storage.s3 import S3

            return S3(name)
        from llamax.storage.gcs import GCS

        return GCS(name)
    except ImportError:
        raise StorageError(f"{scheme}://{name}: needs {library}; pip install 'llamax[{extra}]'") from None
