"""What is wrong with a session, or with a run that finished after faults: sentences, none where all is well."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llamax.errors import UserError
from llamax.mesh.job import PEER_LOST
from llamax.train.checkpoints import find_checkpoints
from llamax.train.digests import Damaged, verify_digests
from llamax.train.lock import locked
from llamax.train.run_dir import read_evals, read_metrics, read_result, read_time
from tests.processes.forked import left_over
from tests.processes.harness import Job

DEADLY = ("kill", "stop", "drop", "mute")  # the others see a process die, or fall silent, or miss it
RELATIVE = 1e-5  # of losses on another mesh


def of_session(
    job: Job, events: Sequence[Mapping[str, Any]], pids: Sequence[int], run_dir: Path, end_seconds: float
) -> tuple[list[str], float]:
    """(what is wrong, seconds that the others took to end after a death).

    `events` are the faults that fired; `pids` the processes started so far, of which none may be left.
    """
    codes, problems, seconds = job.wait(1), [], 0.0
    serious = [one for one in events if one["do"] not in ("sleep", "clock")]
    if not serious and set(codes) != {0}:
        problems.append(f"ended with {codes} though nothing ended it: {_last_words(job)}")
    if serious and (first := serious[0])["do"] in DEADLY:
        others = [i for i in range(len(codes)) if i != first["process"]]
        seconds = max(job.ended[i] for i in others) - first["time"]
        if first["at"] == "start":
            problems += _of_absence(job, first["process"], others) if len(serious) == 1 else []
        else:
            problems += _of_death(job, first, others, seconds, end_seconds, alone=len(serious) == 1)
    if serious and all(one["do"] == "full" for one in serious) and not _full_in_words(job, codes):
        problems.append(f"a full disk ended it with {codes}, and not in words: {_last_words(job)}")
    if left := left_over(pids):
        problems.append(f"processes {left} are left")
    return problems + _of_lock(run_dir), seconds


def _of_death(
    job: Job, death: Mapping[str, Any], others: list[int], seconds: float, end_seconds: float, alone: bool
) -> list[str]:
    """The others end in time, with the code that says so, and name the process."""
    problems, who = [], f"process {death['process']} (pid {job.processes[death['process']].pid} on "
    codes = [job.processes[i].returncode for i in others]
    if seconds > end_seconds:
        problems.append(f"the others ended {seconds:.1f} s after {death['do']} at {death['at']}")
    if alone and set(codes) != {PEER_LOST}:
        problems.append(f"after {death['do']} at {death['at']} the others ended with {codes}: {_last_words(job)}")
    said = [text for text in job.errors() if who in text and re.search("died|no sign of life", text)]
    if alone and not said:
        problems.append(f"nobody said that process {death['process']} is lost: {_last_words(job)}")
    return problems


def _of_absence(job: Job, absent: int, others: list[int]) -> list[str]:
    """One that never came: the others end as for bad input, and say who is missing."""
    codes = [job.processes[i].returncode for i in others]
    words = f"missing {absent};" if absent else "found no process 0 at"
    if set(codes) == {2} and any(words in text for text in job.errors()):
        return []
    return [f"process {absent} did not come and the others ended with {codes}: {_last_words(job)}"]


def _full_in_words(job: Job, codes: Sequence[int | None]) -> bool:
    """Ended as for bad input with the disk's words, or untouched because nothing large was written any more."""
    said = any(re.search("could not be saved|cannot be written", text) for text in job.errors())
    return set(codes) == {0} or (set(codes) == {2} and said)


def _of_lock(run_dir: Path) -> list[str]:
    """The directory of a run without processes is free at once."""
    if not run_dir.is_dir():
        return []
    try:
        with locked(run_dir):
            return []
    except UserError as error:
        return [f"the run directory is not free: {error}"]


def of_run(run_dir: Path, undisturbed: Path, steps: int, every: int, exact: bool) -> list[str]:
    """A finished run against the one that nothing disturbed; `exact`: bit for bit."""
    if (result := read_result(run_dir)) is None:
        return ["the run did not finish"]
    problems = [] if (result["status"], result["steps"]) == ("done", steps) else [f"the result is {result}"]
    problems += _of_losses(read_metrics(run_dir), read_metrics(undisturbed), exact, "metrics.jsonl")
    problems += _of_losses(read_evals(run_dir), read_evals(undisturbed), exact, "evals.jsonl")
    known = read_result(undisturbed) or {}
    for name in ("eval_loss", "train_loss"):
        if not _same(result[name], known[name], exact):
            problems.append(f"{name} of the result is {result[name]!r} and not {known[name]!r}")
    return problems + _of_checkpoints(run_dir, range(every, steps + 1, every)) + _of_files(run_dir)


def _of_losses(rows: list[Any], known: list[Any], exact: bool, name: str) -> list[str]:
    steps = [[row["step"] for row in some] for some in (rows, known)]
    if steps[0] != steps[1]:
        return [f"{name} has steps {steps[0]} and not {steps[1]}"]
    return [
        f"{name}: step {row['step']} has loss {row['loss']!r} and not {other['loss']!r}"
        for row, other in zip(rows, known, strict=True)
        if not _same(row["loss"], other["loss"], exact)
    ]


def _same(loss: float, known: float, exact: bool) -> bool:
    return loss == known if exact else abs(loss - known) <= RELATIVE * abs(known)


def _of_checkpoints(run_dir: Path, due: Sequence[int]) -> list[str]:
    found = find_checkpoints(run_dir / "checkpoints")
    kept = {one.step: one.path for one in found if one.permanent}
    problems = [f"the permanent checkpoint of step {step} is lost" for step in due if step not in kept]
    if others := [one.path.name for one in found if not one.permanent]:
        problems.append(f"checkpoints {others} were to be deleted")
    for step, path in kept.items():
        try:
            verify_digests(path)
        except Damaged as damage:
            problems.append(f"the permanent checkpoint of step {step} is damaged: {damage}")
    return problems


def _of_files(run_dir: Path) -> list[str]:
    names = [path.name for path in run_dir.iterdir()]
    problems = [] if names.count("result.json") == 1 else ["there is not one result.json"]
    spent = (read_time(run_dir) or {}).get("seconds", {})
    if not spent or min(spent.values()) < -1e-6:
        problems.append(f"the time of the run is {spent}")
    return problems


def _last_words(job: Job) -> str:
    lines = [text for i in range(len(job.processes)) for text in job.logs[i].read_text(errors="replace").splitlines()]
    errors = [text for text in lines if re.match("error:|[A-Za-z.]*Error", text)]
    return " | ".join(errors or lines[-3:])[:600]
