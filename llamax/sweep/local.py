"""Several workers on this machine, each on its own cores, watched until the study is settled."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llamax.sweep
from llamax.errors import UserError
from llamax.mesh.cpu import cores
from llamax.storage.bucket import StorageError
from llamax.storage.places import address_of
from llamax.sweep.claim import holder
from llamax.sweep.crew import ASKED
from llamax.sweep.packing import AUTO, NEVER, Pack
from llamax.sweep.process import me, share
from llamax.sweep.status import status
from llamax.sweep.study import clear_failures, is_finished, read_study, record_failure, select

GRACE_SECONDS = 10.0
BUCKET_SECONDS = 5.0  # between two looks at a study in a bucket
CRASHES = 3  # of one cell's worker before the cell counts as failed
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass
class _Worker:
    index: int
    process: subprocess.Popen[bytes]
    log: Path
    since: int  # bytes of the log that earlier workers wrote
    packs: bool  # trains populations where the plan says so


def run_local(
    study: Path,
    *,
    workers: int = 1,
    threads_per_worker: int | None = None,
    report: Callable[[dict[str, Any]], None] | None = None,
    retry_failed: bool = False,
    only: Iterable[str] | None = None,
    train: str | None = None,
    report_seconds: float = 0.25,
    pack: Pack = AUTO,
) -> dict[str, Any]:
    """Trains a study with `workers` processes, each pinned to its share of the cores; returns the final `status`.

    A worker that dies (kill -9, out of memory) is replaced and its cell resumes; a cell whose workers died `CRASHES`
    times is recorded as failed. A worker that was sent SIGTERM leaves. Ctrl-C and SIGTERM here pass on as SIGTERM, wait
    up to 10 s, and leave everything resumable. A worker that dies while it trains a population is replaced by one that
    trains one by one, so that the cell that kills it is found.

    Args:
        threads_per_worker: cores a worker (None: the cores this process may use / workers).
        report: called with `status(study)` every `report_seconds`.
        train: "module:function" in place of llamax's training loop.
        pack: which cells train together (see packing.py); never with `train`.

    Raises:
        UserError: no study, workers < 1, or the workers cannot start (the end of their log is quoted).
        KeyboardInterrupt: interrupted; the same call continues.
    """
    if workers < 1:
        raise UserError(f"workers={workers}: give 1 or more")
    names = None if only is None else list(only)
    cells = select(read_study(study), names)
    if retry_failed:
        clear_failures(study, cells)
    arguments = ["--only", ",".join(names)] if names is not None else []
    arguments += ["--train", train] if train is not None else []
    spawn = _spawner(study, workers, threads_per_worker, arguments, NEVER if train is not None else pack)
    left = status(study, names)["left"]
    with _stoppable(), _ended_workers() as running:
        running.extend(spawn(i) for i in range(min(workers, left)))
        crashes: Counter[str] = Counter()
        due = 0.0
        while running:
            time.sleep(report_seconds)
            for worker in [w for w in running if w.process.poll() is not None]:
                running.remove(worker)
                if worker.process.returncode not in (0, ASKED):
                    packed = _after_crash(study, worker, crashes)
                    running.append(spawn(worker.index, not packed and worker.packs))
            if report is not None and time.monotonic() >= due:
                with contextlib.suppress(StorageError):  # the workers wait for it, and say so in their logs
                    report(status(study, names))
                due = time.monotonic() + (0.0 if address_of(study) is None else BUCKET_SECONDS)
    return status(study, names)


def _spawner(
    study: Path, workers: int, threads: int | None, arguments: list[str], pack: Pack
) -> Callable[..., _Worker]:
    available = cores()
    package = str(Path(llamax.sweep.__path__[0]).parents[1])
    (study / "logs").mkdir(exist_ok=True)

    def spawn(index: int, packs: bool = True) -> _Worker:
        mine = share(available, index, workers, threads)
        env = os.environ | {name: str(len(mine)) for name in THREADS}
        env["LLAMAX_PROCESSES"] = "1"  # a worker by itself, whatever has started this process
        env["PYTHONPATH"] = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        if workers > 1:
            env.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several workers share one accelerator's memory
        command = [sys.executable, "-m", "llamax.sweep.worker", str(study), "--parent", str(os.getpid())]
        command += ["--cores", ",".join(map(str, mine)), *arguments]
        command += ["--pack", str(pack if packs else NEVER), "--workers", str(workers)]
        log = study / "logs" / f"worker-{index}.log"
        with log.open("ab") as file:
            since = file.tell()
            # A session of its own: Ctrl-C reaches this process alone, which passes it on once.
            process = subprocess.Popen(
                command, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
            )
        return _Worker(index, process, log, since, packs)

    return spawn


def _after_crash(study: Path, worker: _Worker, crashes: Counter[str]) -> bool:
    """Counts a death against the cell it happened in, or against none and returns True if it was in a population.

    Raises UserError for a worker that died outside any cell.
    """
    code, said = worker.process.returncode, _tail(worker)
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    held = _cells_of(study, worker.process.pid)
    if len(held) > 1:
        return True
    cell = held[0] if held else None
    if cell is None and code < 0:
        cell = ""  # killed between cells
    if cell is None:
        raise UserError(f"a sweep worker ended with {how} outside any cell; see {worker.log}\n{said}".rstrip())
    crashes[cell] += 1
    if crashes[cell] >= CRASHES:
        if not cell:
            raise UserError(f"sweep workers ended with {how} {CRASHES} times between cells; see {worker.log}")
        hint = "; out of memory?" if code == -signal.SIGKILL else ""
        record_failure(study, cell, f"its worker ended with {how} {CRASHES} times{hint}", said)
    return False


def _cells_of(study: Path, pid: int) -> list[str]:
    """The unfinished cells whose newest lease a process of this machine holds, or held when it died."""
    cells = []
    for cell in read_study(study).cells:
        found = None if is_finished(study, cell) else holder(study, cell.name)
        if found and found.record.get("pid") == pid and found.record.get("machine") == me()["machine"]:
            cells.append(cell.name)
    return cells


def _tail(worker: _Worker, lines: int = 20) -> str:
    with worker.log.open("rb") as file:
        file.seek(worker.since)
        return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])


@contextlib.contextmanager
def _ended_workers() -> Iterator[list[_Worker]]:
    """A list of workers, all ended when the block is left: SIGTERM, 10 s, SIGKILL."""
    running: list[_Worker] = []
    try:
        yield running
    finally:
        for worker in running:
            worker.process.terminate()
        until = time.monotonic() + GRACE_SECONDS
        for worker in running:
            try:
                worker.process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM as KeyboardInterrupt, so that it ends the workers as Ctrl-C does; main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
