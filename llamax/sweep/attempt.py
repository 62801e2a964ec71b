"""Training claimed cells, one alone or several as a population, and writing down how each ended."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llamax.config.run import RunConfig
from llamax.errors import Interrupted
from llamax.storage.bucket import StorageError
from llamax.storage.copies import publish, refresh
from llamax.storage.files import write_atomic
from llamax.storage.places import address_of
from llamax.sweep.claim import Lease, LeaseLost
from llamax.sweep.deaths import counted
from llamax.sweep.plan import Cell
from llamax.sweep.process import me
from llamax.sweep.study import record_failure
from llamax.train.progress import Progress

Train = Callable[..., Any]
Held = Sequence[tuple[Lease, Cell]]
OnEvent = Callable[[str, str, dict[str, Any]], None]
ShouldStop = Callable[[], bool]
End = dict[str, Any] | BaseException


class Stopped(KeyboardInterrupt):
    """The worker was asked to stop (SIGTERM, parent gone) while a cell was training; the cell resumes later."""


def train_cells(study: Path, held: Held, train: Train, emit: OnEvent, should_stop: ShouldStop) -> list[str]:
    """Trains claimed cells, several as one population; for each "done", "failed" or "lost". Interruptions pass through.

    Where the population as a whole fails (its program does not compile, or memory does not suffice), its cells are
    trained one by one, so that only those that fail alone are recorded as failed.
    """
    if len(held) > 1 and (ends := _together(study, held, emit, should_stop)) is not None:
        return [_settle(study, lease, cell, end, emit) for (lease, cell), end in zip(held, ends, strict=True)]
    return [
        _settle(study, lease, cell, _alone(study, lease, cell, train, emit, should_stop), emit) for lease, cell in held
    ]


def progress_path(study: Path, cell: str) -> Path:
    """Where a cell's newest report is."""
    return study / "progress" / f"{cell}.json"


def _alone(study: Path, lease: Lease, cell: Cell, train: Train, emit: OnEvent, should_stop: ShouldStop) -> End:
    try:
        report = _reporter(study, lease, cell, emit, should_stop)
        with counted(study, cell):
            return _trained(train, cell.config, study / cell.run_name, report)
    except Interrupted as stop:  # the training loop caught the signal itself, and has saved
        raise Stopped(str(stop)) from None
    except (Exception, LeaseLost) as error:
        return error


def _together(study: Path, held: Held, emit: OnEvent, should_stop: ShouldStop) -> Sequence[End] | None:
    """How each member ended; None if the population failed as a whole."""
    from llamax.train.packed import train_packed

    configs, folders = [cell.config for _, cell in held], [study / cell.run_name for _, cell in held]
    reports = [_reporter(study, lease, cell, emit, should_stop) for lease, cell in held]
    try:
        return train_packed(configs, folders, reports=reports)
    except Interrupted as stop:
        raise Stopped(str(stop)) from None
    except Exception as error:
        cells = f"{held[0][1].name} and {len(held) - 1} more"
        print(f"the population of {cells} failed, training them one by one: {error}", file=sys.stderr, flush=True)
        return None


def _settle(study: Path, lease: Lease, cell: Cell, end: End, emit: OnEvent) -> str:
    if isinstance(end, dict):
        emit("done", cell.name, end)
        return "done"
    if isinstance(end, LeaseLost) or lease.lost.is_set() or lease.taken():
        emit("lost", cell.name, {})
        return "lost"
    if not isinstance(end, Exception) or isinstance(end, StorageError):
        raise end  # a bucket that was away is no failure of the cell
    record_failure(study, cell.name, end)
    emit("failed", cell.name, {"error": str(end) or type(end).__name__})
    return "failed"


def _reporter(
    study: Path, lease: Lease, cell: Cell, emit: OnEvent, should_stop: ShouldStop
) -> Callable[[Progress], None]:
    """The cell's report to the loop: saves progress; raises LeaseLost or Stopped where it must not go on."""
    emit("start", cell.name, {"steps": cell.steps})
    save = _Saver(study, cell.name)

    def report(progress: Progress) -> None:
        lease.check()
        if should_stop():
            raise Stopped
        save(progress)
        emit("progress", cell.name, asdict(progress))

    return report


def _trained(train: Train, config: RunConfig, run_dir: Path, report: Callable[[Progress], None]) -> dict[str, Any]:
    result = train(config, run_dir, report=report)
    refresh(run_dir)
    if not (run_dir / "result.json").exists():
        raise RuntimeError(f"{run_dir.name}: training returned without writing result.json")
    return result if isinstance(result, dict) else {}


class _Saver:
    """Writes a cell's newest report, at most twice a second and at every change of phase; into a bucket every 10 s."""

    def __init__(self, study: Path, cell: str) -> None:
        self.path, self.due, self.phase = progress_path(study, cell), 0.0, ""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.started = time.time()
        self.seconds = 0.5 if address_of(study) is None else 10.0

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if now < self.due and progress.phase == self.phase:
            return
        self.due, self.phase = now + self.seconds, progress.phase
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(progress).items()}
        text = json.dumps({**finite, "pid": me()["pid"], "started": self.started, "time": time.time()})
        write_atomic(self.path, text, durable=False)  # losing a report in a power cut is no loss
        with suppress(StorageError):  # the next report is as good
            publish(self.path, over=True, seconds=0.0)
