"""Real processes that train one run together on loopback: start them, signal them, wait for them, read what they said.

    job = start(folder, command_line, count=2)      # `llamax train ...` N times, each told its place
    job.wait_for_step(run, 5); job.signal(1, signal.SIGKILL)
    codes = job.wait()

`faults` of `start` arm the driver (driver.py) of one process. Nothing here is specific to a test.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llamax.train.run_dir import read_metrics
from tests.compiler import flags
from tests.processes.forked import Forked

ROOT = Path(__file__).parents[2]
DRIVER = Path(__file__).with_name("driver.py")
LIMIT = 600.0  # seconds after which a process counts as hanging; it may share its processor with many


def free_port() -> int:
    """A port P of loopback such that P and P + 1 are free just now."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


@dataclass
class Job:
    """Processes of one job, in order of their index, and their logs."""

    processes: list[subprocess.Popen[bytes] | Forked]
    logs: list[Path]
    ended: dict[int, float] = field(default_factory=dict)  # when each was seen to have ended (time.monotonic)

    def signal(self, index: int, number: signal.Signals) -> float:
        """Send a signal to one process; returns when (time.monotonic)."""
        self.processes[index].send_signal(number)
        return time.monotonic()

    def running(self) -> list[int]:
        """Those that have not ended; notes when the others were first seen to."""
        for index, process in enumerate(self.processes):
            if index not in self.ended and process.poll() is not None:
                self.ended[index] = time.monotonic()
        return [index for index in range(len(self.processes)) if index not in self.ended]

    def wait(self, limit: float = LIMIT) -> list[int | None]:
        """The exit codes (negative: the signal). Kills what is left at the limit and fails, with the logs."""
        until = time.monotonic() + limit
        while hanging := self.running():
            if time.monotonic() > until:
                for index in hanging:
                    self.processes[index].kill()
                for index in hanging:
                    self.processes[index].wait()
                raise AssertionError(f"processes {hanging} hang after {limit} s\n{self.said()}")
            time.sleep(0.02)
        return [process.returncode for process in self.processes]

    def wait_for_step(self, run_dir: Path, step: int, limit: float = LIMIT) -> None:
        """Until a row of at least this step is logged."""
        until = time.monotonic() + limit
        while not any(row["step"] >= step for row in read_metrics(run_dir)):
            if time.monotonic() > until or any(process.poll() is not None for process in self.processes):
                raise AssertionError(f"step {step} was not reached\n{self.said()}")
            time.sleep(0.02)

    def error(self, index: int) -> str:
        """What a process said on stderr, as one line."""
        return " ".join(self.logs[index].read_text(errors="replace").split())

    def errors(self) -> list[str]:
        """The lines of all processes that begin with `error:`."""
        text = "\n".join(log.read_text(errors="replace") for log in self.logs)
        return [line for line in text.splitlines() if line.startswith("error:")]

    def out(self, index: int) -> str:
        """What a process said on stdout."""
        return self.logs[index].with_suffix(".out").read_text()

    def said(self) -> str:
        """All logs, for a failure."""
        return "\n".join(f"--- process {i}\n{log.read_text(errors='replace')}" for i, log in enumerate(self.logs))


def start(
    folder: Path,
    words: Sequence[object],
    count: int,
    *,
    devices: int = 1,
    port: int | None = None,
    each: Mapping[int, Mapping[str, str]] | None = None,
    faults: Mapping[int, Mapping[str, object]] | None = None,
    places: bool = True,
    fork: bool = False,
) -> Job:
    """Start `llamax WORDS` in `count` processes of one job, each with `devices` simulated devices.

    `each` adds environment variables to one of them; `faults` tells the driver of one what to do wrong; with
    places=False no process is told its place (`each` does). With fork=True they are forks of this process, which must
    have no backend of JAX (forked.py). Logs go to `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port() if port is None else port
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("LLAMAX_", "SLURM_", "JOB_"))}
    common = {**clean, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags(devices), "PYTHONPATH": str(ROOT)}
    common["LLAMAX_CACHE"] = os.environ["LLAMAX_CACHE"]
    processes: list[subprocess.Popen[bytes] | Forked] = []
    logs = []
    for index in range(count):
        place = {
            "LLAMAX_COORDINATOR": f"127.0.0.1:{port}",
            "LLAMAX_PROCESSES": str(count),
            "LLAMAX_PROCESS": str(index),
        }
        env = {**common, **(place if places else {}), **((each or {}).get(index) or {})}
        log = folder / f"process-{index}.err"
        logs.append(log)
        command = [sys.executable, str(DRIVER), json.dumps((faults or {}).get(index) or {}), *map(str, words)]
        with log.open("wb") as err, log.with_suffix(".out").open("wb") as out:
            if fork:
                processes.append(Forked(command[1:], env, out, err))
                continue
            processes.append(
                subprocess.Popen(command, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
            )
    atexit.register(_kill, processes)
    return Job(processes, logs)


def _kill(processes: list[subprocess.Popen[bytes] | Forked]) -> None:
    """Leave nothing behind, however the tests end."""
    for process in processes:
        if process.poll() is None:
            process.kill()
