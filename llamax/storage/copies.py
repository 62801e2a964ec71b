"""A folder of the cache that follows a prefix of a bucket, and sends back what changed here if nobody changed it there.

For every file a note beside the cache says which version of the object it is, and the size and time it then had: a file
that no longer agrees with its note was changed here, an object that no longer does was changed there.

Views leave out what is large and not needed to read a run: of checkpoints only the digests come, whose presence makes a
checkpoint whole, and `fill` fetches the arrays when somebody restores them. Leases are read in the bucket itself.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from llamax.errors import UserError
from llamax.storage.bucket import ABSENT, Conflict, Missing, Object, open_bucket
from llamax.storage.files import arriving, locked, write_atomic
from llamax.storage.places import address, address_of, is_address, is_staged, notes_of, notes_root, parts, view_of

T = TypeVar("T")
THREADS = 16
CHECKPOINTS, DIGESTS, LEASES = "checkpoints", "digests.json", "leases"
NOT_READ = {LEASES, "logs"}
NOT_SENT = {*NOT_READ, CHECKPOINTS, "progress"}  # with a folder: each has its own way, or none
HERE_ALONE = {"lock", ".plan.lock"}  # files that mean something on one machine


class Note(NamedTuple):
    """Which version of its object a file is, and what the file looked like then."""

    version: str
    size: int
    time_ns: int


def needed(name: str) -> bool:
    """Whether readers need the object of this name, relative to a run, a study or a folder of them."""
    *folders, last = name.split("/")
    if NOT_READ & set(folders) or last in HERE_ALONE:
        return False
    if CHECKPOINTS in folders:
        return last == DIGESTS
    return "profile" not in folders or last.endswith((".json", ".md"))


class Copy:
    """The folder `local` as a copy of `address`. Several processes may refresh one copy: files change whole."""

    def __init__(self, local: Path, address: str, seconds: float | None = None) -> None:
        self.local, self.address = local, address
        self.bucket, self.prefix = open_bucket(address, seconds)

    def objects(self) -> dict[str, Object]:
        """What is in the bucket, by name relative to the copy."""
        start = len(self.prefix) + 1 if self.prefix else 0
        prefix = f"{self.prefix}/" if self.prefix else ""
        found = {item.key[start:]: item for item in self.bucket.list(prefix)}
        return {name: item for name, item in found.items() if _plain(name)}

    def pull(self, objects: dict[str, Object], want: Callable[[str], bool] = needed) -> None:
        """Fetch what changed there, and drop what is gone from there. Raises UserError."""
        stale = [name for name, item in objects.items() if want(name) and not self._has(name, item)]
        _in_threads(lambda name: self._fetch(name, objects[name]), stale)
        for name in list(self.noted()):
            if name not in objects:
                self._drop(name)

    def fetch(self, name: str) -> bool:
        """Bring one file up to date; False where there is none."""
        item = self.bucket.stat(self.key(name))
        if item is not None and not self._has(name, item):
            self._fetch(name, item)
        return item is not None

    def push(self, name: str, *, over: bool = False) -> None:
        """Send one file over the version it was made from (`over`: over anything), or delete the object if it is gone.

        Of rows (.jsonl) a last line that is still growing stays behind.

        Raises:
            Conflict: somebody else wrote it since.
        """
        path = self.local / name
        with self._alone():
            note = self.note(name)
            try:
                stat, data = path.stat(), path.read_bytes()  # in this order: what is written later is sent later
            except FileNotFoundError:
                data = None
        if data is None:
            return self.remove(name)
        if name.endswith(".jsonl"):
            data = data[: data.rfind(b"\n") + 1]
        version = None if over else ABSENT if note is None else note.version
        written = self.bucket.write(self.key(name), data, version)
        self._keep(name, Note(written.version, stat.st_size, stat.st_mtime_ns))

    def remove(self, name: str) -> None:
        """Delete an object, and know no more of it."""
        self.bucket.delete([self.key(name)])
        self._note_path(name).unlink(missing_ok=True)

    def put(self, name: str, data: bytes) -> None:
        """Write an object, over anything, of which the file may be gone."""
        self.adopt(name, self.bucket.write(self.key(name), data))

    def changed(self) -> list[str]:
        """The files, but for checkpoints and what means nothing elsewhere, that differ from what the bucket has."""
        names: list[str] = []
        for folder, inner, files in os.walk(self.local):
            inner[:] = [name for name in inner if name not in NOT_SENT and not name.startswith(".")]
            names += [Path(folder, name).relative_to(self.local).as_posix() for name in files if _travels(name)]
        return [name for name in names if self.differs(name)]

    def differs(self, name: str) -> bool:
        """Whether a file was changed here since it was fetched or sent."""
        if not self._disagrees(name):
            return False
        with self._alone():  # not in the middle of somebody's fetch
            return self._disagrees(name)

    def _disagrees(self, name: str) -> bool:
        note = self.note(name)
        with suppress(OSError):
            stat = (self.local / name).stat()
            return note is None or (stat.st_size, stat.st_mtime_ns) != (note.size, note.time_ns)
        return note is not None

    def key(self, name: str) -> str:
        """The object of a file."""
        return f"{self.prefix}/{name}" if self.prefix else name

    def note(self, name: str) -> Note | None:
        """What is known of a file, None if it never was in the bucket as far as this machine knows."""
        try:
            return Note(*json.loads(self._note_path(name).read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def noted(self) -> Iterator[str]:
        """The files that have a note."""
        root = notes_of(self.local)
        for folder, _, files in os.walk(root):
            yield from (Path(folder, file).relative_to(root).as_posix() for file in files if not file.startswith("."))

    def adopt(self, name: str, item: Object) -> None:
        """Take a file for a changed copy of an object."""
        self._keep(name, Note(item.version, -1, -1))

    def forget_notes(self) -> None:
        """Know of no object that a file here is a copy of it."""
        shutil.rmtree(notes_of(self.local), ignore_errors=True)

    def _has(self, name: str, item: Object) -> bool:
        note = self.note(name)
        return note is not None and note.version == item.version and (self.local / name).exists()

    def _fetch(self, name: str, item: Object) -> None:
        path = self.local / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with ExitStack() as together:
                with arriving(path) as file:
                    self.bucket.fetch(item.key, file)
                    together.enter_context(self._alone())  # until the note is written, also where two fetch at once
                    stat = file.stat()
                self._keep(name, Note(item.version, stat.st_size, stat.st_mtime_ns))
        except Missing:  # deleted since the listing
            return
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written: {error.strerror}; a copy of {self.address} goes there"
            ) from None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else puts a file and its note in place, or takes them away, meanwhile."""
        root = notes_root()
        root.mkdir(parents=True, exist_ok=True)
        with ExitStack() as held:
            with suppress(UserError):  # a cache without locks works too, but for the rare meeting
                held.enter_context(locked(root / ".lock"))
            yield

    def _keep(self, name: str, note: Note) -> None:
        path = self._note_path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(note), durable=False)

    def _drop(self, name: str) -> None:
        path = self.local / name
        with self._alone():
            self._note_path(name).unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        if path.name == DIGESTS and path.parent.parent.name == CHECKPOINTS:
            shutil.rmtree(path.parent, ignore_errors=True)

    def _note_path(self, name: str) -> Path:
        return notes_of(self.local) / name


# ---------------------------------------------------------------- views
def at_hand(path: str | Path, *, new: bool = False, seconds: float | None = None) -> Path:
    """`path` itself, or of an address the folder, or file, that shows what is there now. `new`: a folder that may be
    there or not.

    Raises:
        UserError: nothing there, or the bucket refuses or does not answer.
    """
    if not is_address(path):
        return Path(path)
    view = view_of(path)
    if refresh(view, seconds) or new:
        view.mkdir(parents=True, exist_ok=True)
    elif not parts(path)[2] or not Copy(view.parent, address(path).rpartition("/")[0], seconds).fetch(view.name):
        raise UserError(f"{address(path)}: nothing is there; correct the address")
    return view


def refresh(path: Path, seconds: float | None = None) -> bool:
    """Bring a view up to date; whether anything is in the bucket there. Any other folder is left alone.

    Raises:
        UserError: the bucket refuses, or does not answer for `seconds`.
    """
    where = address_of(path)
    if where is None or is_staged(path):
        return path.exists()
    copy = Copy(path, where, seconds)
    objects = copy.objects()
    copy.pull(objects)
    return bool(objects)


def publish(path: Path, *, over: bool = False, seconds: float | None = None) -> None:
    """Send a changed file of a view, or all of a folder's, to the bucket, deletions of a named file included.

    Any other path is left alone. `over`: whatever is there gives way.

    Raises:
        UserError: somebody else changed the file meanwhile, or the bucket refuses or does not answer.
    """
    where = address_of(path)
    if where is None or is_staged(path):
        return
    whole = path.is_dir()
    copy = Copy(path if whole else path.parent, where if whole else where.rpartition("/")[0], seconds)
    for name in copy.changed() if whole else [path.name]:
        try:
            copy.push(name, over=over)
        except Conflict as conflict:
            raise UserError(f"{conflict}: somebody else changed it meanwhile; give the same command again") from None


def fill(folder: Path) -> None:
    """Fetch the rest of a checkpoint of which only the digests are here. Any other folder is left alone.

    What arrives is for the caller to verify. Raises UserError: the bucket refuses or does not answer.
    """
    where = address_of(folder)
    if where is None:
        return
    try:
        listed = json.loads((folder / DIGESTS).read_bytes())["files"]
        lacking = [name for name, (size, _) in listed.items() if not _is_whole(folder / name, size)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # what verifies the checkpoint says so in words
    if lacking:
        bucket, prefix = open_bucket(where)

        def fetch(name: str) -> None:
            with suppress(Missing):
                bucket.download(f"{prefix}/{name}", folder / name)

        _in_threads(fetch, [name for name in lacking if _plain(name)])


def _is_whole(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def _plain(name: str) -> bool:
    """Whether an object's name is one of a file inside the copy: others' tools make names like `a/` and `../a`."""
    return bool(name) and all(part not in ("", ".", "..") for part in name.split("/"))


def _travels(name: str) -> bool:
    """Whether a file of this name means anything elsewhere."""
    return not name.startswith(".") and name not in HERE_ALONE


def _in_threads(function: Callable[[T], Any], items: Iterable[T]) -> None:
    items = list(items)
    with ThreadPoolExecutor(min(THREADS, len(items) or 1)) as pool:
        for _ in pool.map(function, items):
            pass
