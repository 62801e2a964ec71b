"""A run whose directory is in a bucket: it trains in a staging folder on this disk and is sent there behind the loop.

What the bucket holds is a run at every moment: rows go before the checkpoint that counts on them, the files of a
checkpoint before its digests, whose presence makes it whole, and result.json last. Rows are sent as whole files, each
over the version sent before, so a process that lost the run cannot overwrite its successor's.

A bucket that does not answer leaves state and files here as they are. After `retry_seconds` the loop waits, says so,
and goes on by itself. The next start on this machine sends what the last one could not.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from llamax.config.files import cache_dir
from llamax.config.run import Branch
from llamax.errors import UserError
from llamax.mesh.job import ALONE, Job
from llamax.storage.bucket import LONGEST_PAUSE, Conflict, StorageError, retry_seconds
from llamax.storage.copies import CHECKPOINTS, DIGESTS, LEASES, Copy, needed
from llamax.storage.leases import Lease, LeaseLost, claim, holder
from llamax.storage.places import address_of, is_staged, staging_of
from llamax.train.lock import LOCK

RESULT, SENDING, STAGED = "result.json", ".sending-", ".staged-"
SEND_SECONDS = 10.0  # between two looks at what changed
RUN_LEASE_SECONDS = 30.0
VISIBLE_SECONDS = 30.0  # in which a file on a shared file system is seen by other machines
_WHOLE = re.compile(r"\d+(\.temporary)?")


def stage(run_dir: str | Path, branch: Branch | None = None, job: Job = ALONE) -> Path:
    """Where a run trains: `run_dir`, or for an address in a bucket its staging folder, brought up to date.

    The trunk of a `branch` is brought along. What only this machine has is kept, unless the run went on elsewhere.

    The leader of a job does it for all its processes, which must see its cache folder.

    Raises:
        UserError: the bucket refuses or does not answer, or the processes of a job do not share the cache folder.
    """
    where = address_of(run_dir)
    if where is None or is_staged(Path(run_dir)):
        return Path(run_dir)
    local, mark = staging_of(where), f"{STAGED}{os.urandom(6).hex()}"
    if job.leader:
        if branch is not None:
            _bring(f"{where.rpartition('/')[0]}/{branch.trunk}", branch.step)
        _catch_up(where)
        if job.count > 1:
            for old in local.glob(f"{STAGED}*"):
                old.unlink(missing_ok=True)
            (local / mark).touch()
    mark = job.agree(mark)
    if job.count > 1 and not _appears(local / mark):
        raise UserError(
            f"{where}: process {job.index} does not see the folder in which process 0 prepares the run; "
            f"set LLAMAX_CACHE (here {cache_dir()}) to a folder that all processes of the job share"
        )
    return local


def _appears(path: Path) -> bool:
    """Whether a file is there, or comes: shared file systems may show it to other machines a little later."""
    until = time.monotonic() + VISIBLE_SECONDS
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def _bring(trunk: str, step: int) -> None:
    """Have a trunk's checkpoint here, if it is anywhere; a process of this machine may be training or fetching it."""
    until = time.monotonic() + retry_seconds()
    while not (staging_of(trunk) / CHECKPOINTS / str(step)).is_dir():
        if _catch_up(trunk) or time.monotonic() > until:
            return
        time.sleep(0.1)


def _catch_up(where: str) -> bool:
    """Bring a staging folder up to date; False if a process of this machine has it, whose files nothing is newer than.

    Raises UserError: the bucket refuses or does not answer.
    """
    local = staging_of(where)
    local.mkdir(parents=True, exist_ok=True)
    with open(local / LOCK, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        _follow(Copy(local, where))
    return True


def _follow(copy: Copy) -> None:
    """Take over what is in the bucket, unless this folder has all of that and more."""
    objects = copy.objects()
    theirs = [name for name in copy.noted() if name not in objects]
    for name, item in objects.items():
        note, path = copy.note(name), copy.local / name
        if needed(name) and path.exists() and (note is None or note.version != item.version):
            if path.read_bytes().startswith(copy.bucket.read(item.key)[0]):
                copy.adopt(name, item)  # sent by a process that was killed before it could note that
            else:
                theirs.append(name)
    if theirs:
        print(f"note: {copy.address} went on elsewhere; continuing from what is there", file=sys.stderr)
        for path in copy.local.iterdir():
            if path.name != LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        copy.forget_notes()
    copy.pull(objects)


@contextmanager
def mirrored(path: Path) -> Iterator[Mirror | None]:
    """Hold and follow the run that `path` is staged for; None where it is staged for none.

    Raises:
        UserError: another process holds the run, or the bucket refuses or does not answer.
    """
    where = address_of(path) if is_staged(path) else None
    if where is None:
        yield None
        return
    with _hold(path, where) as lease:
        copy = Copy(path, where, 0.0)
        _follow(Copy(path, where))  # what its last holder sent before the lease was ours
        mirror = Mirror(copy, lease)
        try:
            yield mirror
        except BaseException as error:
            mirror.close(None if isinstance(error, LeaseLost) else retry_seconds())
            raise
        mirror.close(float("inf"))


def _hold(path: Path, where: str) -> Lease:
    """The run's lease, waited for while its holder may be dead."""
    folder, first = path / LEASES, None
    until = time.monotonic() + 2 * RUN_LEASE_SECONDS
    while (lease := claim(folder, "run", lease_seconds=RUN_LEASE_SECONDS)) is None:
        found = holder(folder, "run")
        record = found.record if found else {}
        if first is None:
            print(f"waiting to see whether the process that had {where} still runs", file=sys.stderr)
            first = record
        if record != first or time.monotonic() > until:
            raise UserError(
                f"{where}: process {record.get('pid', 'unknown')} on machine {record.get('machine', 'unknown')} is "
                "using this run directory; wait for it, stop it, or give another address"
            )
        time.sleep(RUN_LEASE_SECONDS / 15)
    return lease


class Mirror:
    """Sends what changes in a staging folder, in a thread. `stopping` says whether the run was asked to stop."""

    def __init__(self, copy: Copy, lease: Lease) -> None:
        self._copy, self._lease = copy, lease
        self.stopping: Callable[[], bool] = lambda: False
        self._sent = {name.split("/")[1] for name in copy.noted() if name.startswith(f"{CHECKPOINTS}/")}
        self._sending = threading.Lock()
        self._end = threading.Event()
        self._trouble: StorageError | None = None
        self._since, self._rival = 0.0, ""
        for left in (copy.local / CHECKPOINTS).glob(f"{SENDING}*"):
            shutil.rmtree(left)
        self._thread = threading.Thread(target=self._keep, name="mirror", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Between two dispatches: waits while the bucket has been away for long, or until the run is to stop.

        Raises:
            UserError: the run was taken over by another process.
        """
        self._still_ours()
        if self._trouble is None or time.monotonic() - self._since < retry_seconds():
            return
        print(self._paused(), file=sys.stderr, flush=True)
        while self._trouble is not None and not self.stopping():
            time.sleep(0.1)
            self._still_ours()
        if self._trouble is None:
            print(f"note: {self._copy.address} is back, going on", file=sys.stderr, flush=True)

    def close(self, seconds: float | None) -> None:
        """End the thread and send what is left, for at most `seconds`, or nothing more (None).

        Raises:
            UserError: infinite `seconds`, and the run was asked to stop or was taken over.
        """
        self._end.set()
        self._thread.join()
        if seconds is None:
            return
        pause, start, said = 0.25, time.monotonic(), False
        while True:
            try:
                self._send()
                return
            except Conflict as conflict:
                self._rival = str(conflict)
                if seconds == float("inf"):
                    self._still_ours()
                return
            except StorageError as error:
                waited = time.monotonic() - start
                if waited > seconds or self.stopping():
                    text = f"{error}; what is not there yet is kept in {self._copy.local}, give the same command again"
                    if seconds == float("inf"):
                        raise UserError(text) from None
                    print(f"warning: {text}", file=sys.stderr)
                    return
                self._note_trouble(error)
                if waited > retry_seconds() and not said:
                    print(self._paused(), file=sys.stderr, flush=True)
                    said = True
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)

    # ------------------------------------------------------------ the thread
    def _keep(self) -> None:
        pause, again = 0.0, 0.5
        while not self._end.wait(pause):
            start = time.monotonic()
            try:
                self._send()
                self._trouble, again = None, 0.5
                pause = max(SEND_SECONDS, time.monotonic() - start)
            except Conflict as conflict:
                self._rival = str(conflict)
                return
            except StorageError as error:
                self._note_trouble(error)
                pause = again
                again = min(2 * again, LONGEST_PAUSE)

    def _note_trouble(self, error: StorageError) -> None:
        if self._trouble is None:
            self._since = time.monotonic()
        self._trouble = error

    def _send(self) -> None:
        """One pass, in the order that keeps the bucket a run at every moment."""
        with self._sending:
            folder = self._copy.local / CHECKPOINTS
            names = (
                {path.name for path in folder.iterdir() if _WHOLE.fullmatch(path.name)} if folder.is_dir() else set()
            )
            for name in self._copy.changed():
                if name != RESULT:
                    self._copy.push(name)
            for name in sorted(names - self._sent, key=lambda name: int(name.partition(".")[0])):
                if self._send_checkpoint(name):
                    self._sent.add(name)
            for name in sorted(self._sent - names):
                self._delete_checkpoint(name)
                self._sent.discard(name)
            if self._copy.differs(RESULT):
                self._copy.push(RESULT)

    def _send_checkpoint(self, name: str) -> bool:
        """False if it gave way to a newer one before it could be kept for sending."""
        source, kept = self._copy.local / CHECKPOINTS / name, self._copy.local / CHECKPOINTS / f"{SENDING}{name}"
        shutil.rmtree(kept, ignore_errors=True)
        try:
            shutil.copytree(source, kept, copy_function=_link)
            files = sorted(path.relative_to(kept).as_posix() for path in kept.rglob("*") if path.is_file())
            if DIGESTS not in files:
                return False
            with ThreadPoolExecutor(8) as pool:
                for _ in pool.map(
                    lambda file: self._upload(name, file, kept / file), [f for f in files if f != DIGESTS]
                ):
                    pass
            self._copy.put(f"{CHECKPOINTS}/{name}/{DIGESTS}", (kept / DIGESTS).read_bytes())
            return True
        except (FileNotFoundError, shutil.Error):
            return False
        finally:
            shutil.rmtree(kept, ignore_errors=True)

    def _upload(self, name: str, file: str, path: Path) -> None:
        if self._lease.lost.is_set():
            raise Conflict(self._copy.address)
        self._copy.bucket.upload(self._copy.key(f"{CHECKPOINTS}/{name}/{file}"), path)

    def _delete_checkpoint(self, name: str) -> None:
        """Its digests first: without them it is none."""
        self._copy.remove(f"{CHECKPOINTS}/{name}/{DIGESTS}")
        prefix = self._copy.key(f"{CHECKPOINTS}/{name}/")
        self._copy.bucket.delete(item.key for item in self._copy.bucket.list(prefix))

    # ------------------------------------------------------------ words
    def _still_ours(self) -> None:
        if self._rival or self._lease.lost.is_set():
            raise UserError(
                f"{self._copy.address}: another process took this run over; what only this one has is in "
                f"{self._copy.local}"
            )

    def _paused(self) -> str:
        return (
            f"paused: {self._trouble}; nothing is lost: the state is in memory, what was logged and saved is in "
            f"{self._copy.local}; tries again every {LONGEST_PAUSE:.0f} s or sooner and goes on by itself"
        )


def _link(source: str, target: str) -> None:
    """A second name for a file, so that it stays when the first is deleted; a copy where the disk has no such names."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copy2(source, target)
