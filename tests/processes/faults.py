"""Runs under random faults: `python -m tests.processes.faults --seed 0 --schedules 100`.

A schedule is data, drawn from its seed: sessions of a job of two to four processes on some mesh, what goes wrong in
each (moments.py), and what happens to the newest checkpoint between two of them. The job is started again until it
finishes, and then the run must be the one that nothing disturbed: the same losses, bit for bit where the mesh was
the same and to 1e-5 where it changed, every permanent checkpoint due and whole, one result, no process left, the
directory free. Where a process died or fell silent, the others must have ended in time and said which and why.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llamax.config.load import dump_yaml
from llamax.train.checkpoints import find_checkpoints
from tests.processes.harness import ROOT, Job, start
from tests.processes.moments import fired
from tests.processes.verdicts import of_run, of_session
from tests.train.conftest import build
from tests.train.runs import run_config, write_texts

STEPS, EVERY = 12, 3
RUN = (
    f"train.steps={STEPS}",
    "train.batch_size=12",
    "train.steps_per_dispatch=1",
    "train.eval_every_steps=6",
    "data.eval_tokens=400",
    f"checkpoint.every_steps={EVERY}",
    "model.segments=[{repeat: 1}]",
)
SHAPES: dict[str, tuple[int, tuple[str, ...]]] = {  # processes, mesh
    "2 data": (2, ("mesh.data=2",)),
    "2 fsdp": (2, ("mesh.data=1", "mesh.fsdp=2")),
    "2 tensor": (2, ("mesh.data=1", "mesh.tensor=2")),
    "3 data": (3, ("mesh.data=3",)),
    "4 data": (4, ("mesh.data=4",)),
    "4 fsdp": (4, ("mesh.data=2", "mesh.fsdp=2")),
    "4 fsdp tensor": (4, ("mesh.data=1", "mesh.fsdp=2", "mesh.tensor=2")),
}
PEER_SECONDS, START_SECONDS = 15, 60
EXTRA = 3  # sessions beyond the schedule's, in which nothing is put in the way
LIMIT = 900.0  # seconds of one session; a machine may be slow

Schedule = dict[str, Any]


# ---------------------------------------------------------------- schedules
def draw(seed: int) -> Schedule:
    """One to three disturbed sessions and a last one, from a seed."""
    rng = random.Random(seed)
    shapes = [rng.choice(list(SHAPES))]
    for _ in range(rng.choice((1, 1, 2, 3))):
        shapes.append(rng.choice(list(SHAPES)) if rng.random() < 0.35 else shapes[-1])
    sessions = []
    for number, shape in enumerate(shapes):
        last = number == len(shapes) - 1
        faults = [] if last else [_fault(rng, SHAPES[shape][0], number > 0) for _ in range(rng.choice((1, 1, 2)))]
        damage = rng.choice(DAMAGES) if number and rng.random() < 0.4 else None
        sessions.append({"shape": shape, "damage": damage, "faults": faults})
    return {"seed": seed, "sessions": sessions}


def _fault(rng: random.Random, processes: int, resumed: bool) -> dict[str, Any]:
    moment = rng.choice(["dispatch"] * 3 + ["save"] * 2 + ["digest", "named", "start"] + ["restore"] * 2 * resumed)
    process = 0 if moment in ("digest", "named") else rng.randrange(processes)  # only the leader does these
    act = rng.choice(["kill"] * 3 + ["term"] * 2 + ["stop", "drop", "mute", "full", "raise", "sleep", "clock"])
    if moment == "start" and act in ("drop", "mute", "stop", "raise", "full"):
        act = "kill"  # there is no job yet: a peer that never comes
    fault: dict[str, Any] = {"process": process, "at": moment, "do": act}
    if moment in ("dispatch", "save", "digest", "named"):
        fault["nth"] = rng.randint(1, 2 * EVERY if moment == "dispatch" else 2)
    if act in ("sleep", "clock"):
        fault["seconds"] = rng.choice((2, 6)) if act == "sleep" else rng.choice((-86400, 86400, -3600, 1e9))
    return fault


# ---------------------------------------------------------------- what happens to the newest checkpoint
def _flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def _cut(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


DAMAGE = {"flip": _flip, "cut": _cut, "remove": lambda path, rng: path.unlink()}
DAMAGES = tuple(DAMAGE)


def damage(run_dir: Path, how: str, seed: int) -> bool:
    """Damage one file of the newest checkpoint; not the only one, which the run could not do without."""
    found, rng = find_checkpoints(run_dir / "checkpoints"), random.Random(seed)
    if len(found) < 2:
        return False
    files = sorted(path for path in found[0].path.rglob("*") if path.is_file() and path.stat().st_size)
    DAMAGE[how](rng.choice(files), rng)
    return True


# ---------------------------------------------------------------- running
class Bench:
    """Where schedules run: a config, a store, and the undisturbed run of every mesh, made when first needed."""

    def __init__(self, folder: Path, peer_seconds: float = PEER_SECONDS) -> None:
        self.folder, self.sessions = folder, 0
        self.limits = ("--peer-seconds", peer_seconds, "--start-seconds", START_SECONDS)
        os.environ.setdefault("LLAMAX_CACHE", str(folder / "cache"))
        store = folder / "store"
        if not store.exists():
            build(write_texts(folder / "texts"), store)
        self.config = folder / "c.yaml"
        self.config.write_text(dump_yaml(run_config(*RUN, store=store)))

    def reference(self, shape: str) -> Path:
        """The run of `shape` that nothing disturbed."""
        path = self.folder / "undisturbed" / shape.replace(" ", "-")
        if not (path / "result.json").exists():
            job = self.start(path, shape, [], path.parent / f"{path.name}-logs")
            codes = job.wait(LIMIT)
            assert set(codes) == {0}, f"the undisturbed run ended with {codes}\n{job.said()}"
        return path

    def start(self, run_dir: Path, shape: str, faults: Sequence[Mapping[str, Any]], logs: Path) -> Job:
        """A session of a run."""
        count, mesh = SHAPES[shape]
        self.sessions += 1
        of = {i: [fault for fault in faults if fault["process"] == i] for i in range(count)}
        asked = {i: {"faults": mine, "log": str(logs / "fired.jsonl")} for i, mine in of.items() if mine}
        words = ["train", self.config, *mesh, "--run-dir", run_dir, *self.limits]
        return start(logs, words, count, faults=asked, fork=True)

    def run(self, schedule: Schedule, end_seconds: float = 30.0) -> dict[str, Any]:
        """What became of a schedule: `problems` is empty where all is well."""
        begun, home = time.monotonic(), self.folder / f"schedule-{schedule['seed']}"
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        run_dir, first = home / "run", schedule["sessions"][0]["shape"]
        problems: list[str] = []
        happened, slowest, pids = [], 0.0, []
        same = all(session["shape"] == first for session in schedule["sessions"])
        calm = [{**schedule["sessions"][-1], "damage": None, "faults": []}] * EXTRA
        for number, session in enumerate([*schedule["sessions"], *calm]):
            logs = home / f"session-{number}"
            if session["damage"] and damage(run_dir, session["damage"], schedule["seed"]):
                happened.append(session["damage"])
            job = self.start(run_dir, session["shape"], session["faults"], logs)
            pids += [process.pid for process in job.processes]
            watch(job, logs / "fired.jsonl")
            events = fired(logs / "fired.jsonl")
            happened += [f"{one['do']}@{one['at']}" for one in events]
            found, seconds = of_session(job, events, pids, run_dir, end_seconds)
            problems += [f"session {number}: {problem}" for problem in found]
            slowest = max(slowest, seconds)
            if (run_dir / "result.json").exists():
                break
        problems += of_run(run_dir, self.reference(first), STEPS, EVERY, exact=same)
        if not problems:
            shutil.rmtree(home)
        return {
            "seed": schedule["seed"],
            "shapes": [session["shape"] for session in schedule["sessions"]],
            "happened": happened,
            "restarts": number,
            "slowest_end": round(slowest, 1),
            "seconds": round(time.monotonic() - begun, 1),
            "problems": problems,
        }


def watch(job: Job, log: Path) -> None:
    """Until all have ended. A process that was stopped goes on when it is the last, as after a machine's long pause."""
    until = time.monotonic() + LIMIT
    while (running := set(job.running())) and time.monotonic() < until:
        if running <= {one["process"] for one in fired(log) if one["do"] == "stop"}:
            for index in running:
                job.signal(index, signal.SIGCONT)
            break
        time.sleep(0.05)
    job.wait(120)


# ---------------------------------------------------------------- the command
def main() -> int:
    """Run schedules, print a line for each, and the schedule of each that failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of the first schedule; the next ones follow")
    parser.add_argument("--schedules", type=int, default=100)
    parser.add_argument("--only", type=int, help="run the schedule of this seed alone")
    parser.add_argument("--file", type=Path, help="run these schedules, one a line, as a failure prints them")
    parser.add_argument("--folder", type=Path, help="keep everything here, and go on from it; default: a temporary one")
    parser.add_argument("--end-seconds", type=float, default=30.0, help="in which a death must have ended the others")
    parser.add_argument("--peer-seconds", type=float, default=PEER_SECONDS, help="of silence that count as a death")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no schedule after so long")
    parser.add_argument("--json", action="store_true", help="the outcomes as lines of JSON")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of atexit, which leaves no process behind
    schedules = asked_for(asked)
    folder = asked.folder or Path(tempfile.mkdtemp(prefix="llamax-faults-"))
    folder.mkdir(parents=True, exist_ok=True)
    bench, begun, outcomes = Bench(folder, asked.peer_seconds), time.monotonic(), []
    kept = folder / "outcomes.jsonl"
    before = map(json.loads, kept.read_text().splitlines()) if kept.exists() else []
    done = {outcome["seed"] for outcome in before if not outcome["problems"]}
    for schedule in [schedule for schedule in schedules if schedule["seed"] not in done]:
        if time.monotonic() - begun > 60 * asked.minutes:
            break
        try:
            outcome = bench.run(schedule, asked.end_seconds)
        except AssertionError as hanging:
            seed = schedule["seed"]
            outcome = {"seed": seed, "shapes": [], "happened": [], "restarts": 0, "slowest_end": 0.0, "seconds": 0.0}
            outcome["problems"] = [str(hanging).partition("\n")[0] + f"; see {folder / f'schedule-{seed}'}"]
        outcomes.append(outcome)
        with kept.open("a") as file:
            file.write(json.dumps({**outcome, "commit": commit()}) + "\n")
        print(json.dumps(outcome) if asked.json else line(outcome), flush=True)
        if outcome["problems"]:
            print(json.dumps(schedule), *outcome["problems"], sep="\n  ", file=sys.stderr, flush=True)
    failed = [outcome for outcome in outcomes if outcome["problems"]]
    skipped = sum(schedule["seed"] in done for schedule in schedules)
    print(
        f"{len(outcomes)} schedules, {len(failed)} failed, {bench.sessions} sessions, {skipped} right before",
        file=sys.stderr,
    )
    if asked.folder is None and not failed:
        shutil.rmtree(folder)
    return int(bool(failed))


def asked_for(asked: argparse.Namespace) -> list[Schedule]:
    """The schedules of a command line."""
    if asked.file is not None:
        return [json.loads(text) for text in asked.file.read_text().splitlines()]
    return [draw(asked.only)] if asked.only is not None else [draw(asked.seed + i) for i in range(asked.schedules)]


def commit() -> str:
    """Of this checkout, `+` where it has changes; empty where git does not know."""
    words = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def line(outcome: Mapping[str, Any]) -> str:
    """A row of the table: seed, meshes, what happened, restarts, the slowest end, seconds, verdict."""
    verdict = "FAILED" if outcome["problems"] else "ok"
    shapes = " > ".join(dict.fromkeys(outcome["shapes"]))
    return (
        f"{outcome['seed']:4} {verdict:6} restarts {outcome['restarts']} end {outcome['slowest_end']:4.1f} s "
        f"in {outcome['seconds']:5.1f} s  {shapes}: {', '.join(outcome['happened']) or 'nothing'}"
    )


if __name__ == "__main__":
    sys.exit(main())
