"""Workers of a study under random faults: `python -m tests.sweep.lease_faults --seed 0 --schedules 100`.

A schedule is data, drawn from its seed: workers on one to three machines (each a process here that takes itself for
one), and what becomes of each at its nth step: killed, stopped for longer or shorter than the term of its leases, asked
to end, or its clock moved. Training is a stand-in that writes down who made which step of which cell, and when. In the
end every cell must be done, no cell have failed, no lease be held; nobody may have taken a cell from a holder that was
alive and heard of, a robbed holder may have made the one step that it was in, and a cell whose holder was gone must
have been taken within the term of the lease by a worker that had nothing else to do.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llamax.config.run import RunConfig
from llamax.storage import identity
from llamax.storage.bucket import open_bucket
from llamax.storage.places import address_of
from llamax.sweep import worker
from llamax.sweep.claim import holder
from llamax.sweep.process import die_with
from llamax.sweep.study import failure_path, is_finished, open_study, read_study
from llamax.train.progress import Progress
from tests.sweep.studies import seeds_plan

FORK = multiprocessing.get_context("fork")
TERM, POLL, STEP_SECONDS = 3.0, 0.1, 0.03
LATE = 8.0  # seconds beyond the term that a busy machine may take to see that a lease is free
ACTS = ("kill", "stop", "term", "clock")
LIMIT = 600.0  # seconds after which workers count as hanging; they may share their processor with many

Schedule = dict[str, Any]
Event = Mapping[str, Any]


def draw(seed: int) -> Schedule:
    """Two to four workers, at least one of which nothing happens to."""
    rng = random.Random(seed)
    workers: list[dict[str, Any]] = []
    for number in range(rng.randint(2, 4)):
        faults = [_fault(rng) for _ in range(rng.choice((1, 1, 2)))] if number else []
        workers.append({"machine": f"m{rng.randrange(3)}", "faults": faults})
    return {"seed": seed, "cells": rng.randint(3, 6), "workers": workers}


def _fault(rng: random.Random) -> dict[str, Any]:
    act = rng.choice(ACTS)
    fault: dict[str, Any] = {"do": act, "nth": rng.randint(1, 15)}
    if act in ("stop", "clock"):
        fault["seconds"] = rng.choice((0.5, 2 * TERM)) if act == "stop" else rng.choice((-1e6, -3600, 3600, 1e6))
    return fault


# ---------------------------------------------------------------- a worker
def _work(study: Path, index: int, machine: str, faults: Sequence[Event], log: Path) -> None:
    """Until nothing is left, or until its fault. `log` gets what it does, a line each."""
    stopping: list[int] = []
    die_with(os.getppid(), lambda: None, 0.0)
    signal.signal(signal.SIGTERM, lambda number, _: stopping.append(number))
    identity.machine = lambda: machine  # type: ignore[assignment]
    worker.BUCKET_POLL_SECONDS = worker.POLL_SECONDS = POLL
    worker.claim = _watching(worker.claim, lambda: note("gap"))
    steps = 0

    def note(do: str, **more: Any) -> None:
        line = json.dumps({"worker": index, "do": do, "time": time.monotonic(), **more})
        with open(log, "ab", buffering=0) as file:
            file.write(line.encode() + b"\n")

    def act(fault: Event) -> None:
        note(fault["do"], seconds=fault.get("seconds"))
        if fault["do"] == "clock":
            now = time.time
            time.time = lambda: now() + fault["seconds"]
        else:
            number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}[fault["do"]]
            os.kill(os.getpid(), number)

    def train(config: RunConfig, run_dir: Path, *, report: Callable[[Progress], None]) -> dict[str, Any]:
        nonlocal steps
        total = config.train.steps or 0
        for step in range(total):
            steps += 1
            time.sleep(STEP_SECONDS)
            for fault in faults:
                if fault["nth"] == steps:
                    act(fault)
            note("step", cell=run_dir.name, step=step)
            report(Progress(step + 1, total, 8 * step, 5.0, 1e4, 1.0, "train"))
        note("result", cell=run_dir.name)
        return _write_result(run_dir, total)

    def on_event(kind: str, cell: str, details: dict[str, Any]) -> None:
        if kind != "progress":
            note(kind, name=cell)

    try:
        worker.work(study, train=train, on_event=on_event, lease_seconds=TERM, should_stop=lambda: bool(stopping))
    except KeyboardInterrupt:
        note("left")
    note("end")


def _watching(claim: Callable[..., Any], gap: Callable[[], None]) -> Callable[..., Any]:
    """`claim`, with a note where looks were so far apart that a watch of a lease in a bucket may have begun anew."""
    looked: dict[str, float] = {}

    def watched(study: Path, name: str, **more: Any) -> Any:
        before, looked[name] = looked.get(name), time.monotonic()
        found = claim(study, name, **more)
        if before is not None and time.monotonic() - before > TERM / 2:
            gap()
        return found

    return watched


def _write_result(run_dir: Path, steps: int) -> dict[str, Any]:
    result = {"status": "done", "steps": steps, "tokens": 8 * steps, "eval_loss": 1.5}
    if (where := address_of(run_dir)) is None:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "result.json").write_text(json.dumps(result))
    else:
        bucket, key = open_bucket(where)
        bucket.write(f"{key}/result.json", json.dumps(result).encode())
    return result


# ---------------------------------------------------------------- running
def run(schedule: Schedule, study: Path, log: Path) -> list[str]:
    """What is wrong after a schedule: nothing, where all is well. `study`: a folder, or the view of one in a bucket."""
    open_study(study, seeds_plan(schedule["cells"]))
    processes = [
        FORK.Process(target=_work, args=(study, i, each["machine"], each["faults"], log))
        for i, each in enumerate(schedule["workers"])
    ]
    for process in processes:
        process.start()
    until, woken = time.monotonic() + LIMIT, 0
    while any(process.is_alive() for process in processes) and time.monotonic() < until:
        time.sleep(0.02)
        stops = [one for one in read(log) if one["do"] == "stop"]
        if woken < len(stops) and time.monotonic() > stops[woken]["time"] + stops[woken]["seconds"]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(processes[stops[woken]["worker"]].pid or 0, signal.SIGCONT)
            woken += 1
    hanging = [i for i, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    if hanging:
        return [f"workers {hanging} hang after {LIMIT:g} s"]
    machines = [each["machine"] for each in schedule["workers"]]
    return of_study(study) + of_log(read(log), machines, near=address_of(study) is None)


def read(log: Path) -> list[dict[str, Any]]:
    """What happened, in order."""
    lines = log.read_text().splitlines() if log.exists() else []
    return sorted(map(json.loads, lines), key=lambda one: one["time"])


# ---------------------------------------------------------------- what is wrong
def of_study(study: Path) -> list[str]:
    """Every cell is done, none has failed, no lease is held."""
    problems = []
    for cell in read_study(study).cells:
        if failure_path(study, cell.name).exists():
            problems.append(f"{cell.name} failed: {failure_path(study, cell.name).read_text()[:300]}")
        elif not is_finished(study, cell):
            problems.append(f"{cell.name} is not done")
        found = holder(study, cell.name)
        if found is not None and found.held:
            problems.append(f"{cell.name} is still held: {found.record}")
    return problems


def of_log(events: Sequence[Event], machines: Sequence[str], near: bool) -> list[str]:
    """Who took a cell from whom, and when. `near`: leases on a disk, where a robbed holder looks at every report."""
    problems = []
    for name in sorted({one["name"] for one in events if one["do"] == "start"}):
        starts = [one for one in events if one["do"] == "start" and one["name"] == name]
        for before, after in itertools.pairwise(starts):
            if before["worker"] != after["worker"]:
                problems += _of_change(events, before, after, machines, near)
    return problems


def _of_change(events: Sequence[Event], before: Event, after: Event, machines: Sequence[str], near: bool) -> list[str]:
    name, taken, problems = before["name"], after["time"], []
    his = [one for one in events if one["worker"] == before["worker"] and one["time"] > before["time"]]
    ended = next((one["time"] for one in his if one["do"] in ("kill", "left", "done", "lost")), float("inf"))
    who = f"worker {after['worker']} took {name} from worker {before['worker']}"
    if ended <= taken:
        for idle in {one["worker"] for one in events} - {before["worker"]}:
            did = [one for one in events if one["worker"] == idle and one["time"] < taken]
            last = [one["do"] for one in did if one["do"] != "gap"][-1:]
            if last == ["waiting"] and (late := taken - max(ended, did[-1]["time"])) > TERM + LATE:
                problems.append(f"{who} {late:.1f} s after it was free, and worker {idle} had waited")
        return problems
    if machines[before["worker"]] == machines[after["worker"]]:
        return [f"{who}, which lives on the same machine"]
    silent = [one["time"] for one in his if one["do"] == "stop" and one["time"] < taken]
    if not silent or taken - silent[-1] < TERM * 2 / 3:
        problems.append(f"{who}, which was alive and not silent for a term")
    late = [one for one in his if one["time"] > taken and one.get("cell", "").startswith(f"{name}-")]
    if near and (len(late) > 1 or any(one["do"] == "result" for one in late)):
        problems.append(f"{who}, which went on: {[one['do'] for one in late]}")
    awake = max(one["time"] + (one["seconds"] or 0) for one in his if one["do"] == "stop") if silent else taken
    if not near and any(one["time"] > awake + TERM / 6 + LATE for one in late):
        problems.append(f"{who}, which went on long after it woke")
    return problems


# ---------------------------------------------------------------- the command
def main() -> int:
    """Run schedules; a line for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of the first schedule; the next ones follow")
    parser.add_argument("--schedules", type=int, default=100)
    asked = parser.parse_args()
    failed = 0
    for seed in range(asked.seed, asked.seed + asked.schedules):
        folder, begun = Path(tempfile.mkdtemp(prefix="llamax-leases-")), time.monotonic()
        problems = run(draw(seed), folder / "study", folder / "log.jsonl")
        acts = [one["do"] for one in read(folder / "log.jsonl") if one["do"] in ACTS]
        seconds = time.monotonic() - begun
        verdict = "FAILED" if problems else "ok"
        print(f"{seed:4} {verdict:6} in {seconds:5.1f} s: {', '.join(acts) or 'nothing'}", flush=True)
        if problems:
            failed += 1
            print(json.dumps(draw(seed)), *problems, f"see {folder}", sep="\n  ", file=sys.stderr, flush=True)
        else:
            shutil.rmtree(folder)
    print(f"{asked.schedules} schedules, {failed} failed", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
