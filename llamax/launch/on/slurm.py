"""SLURM: one array job, an element a worker, each of one or more nodes.

A worker that is preempted or near its time limit gets SIGTERM, saves, gives its lease back and exits with 143; the
script then puts its element back into the queue, where it resumes bit for bit. A lost node is put back by SLURM itself.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from llamax.errors import UserError
from llamax.launch.clients import call, need
from llamax.launch.protocol import Env, Job, Shape
from llamax.launch.protocol import Settings as Common

Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.,:@&|*\[\]()/=+-]+$")]
OVER = frozenset({"COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "NODE_FAIL"})


class Settings(Common):
    """The resources of one worker in SLURM's words, and how it is started.

    `device` is the kind of GPU for the estimate: h100, h200, or JAX's name of it ("NVIDIA A100-SXM4-80GB"). One process
    a node drives all GPUs of the node unless `tasks_per_node` says otherwise. `signal_seconds` before its time limit a
    worker is asked to save. `tries` is how often one that crashes is started in an allocation. `setup` are shell lines
    before it (module load, source venv/bin/activate); `options` further sbatch options; `python` the interpreter
    (None: the one that submits).
    """

    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    nodes: PositiveInt = 1
    tasks_per_node: PositiveInt = 1
    cpus_per_task: PositiveInt | None = None
    gpus_per_node: NonNegativeInt = 0
    gpu_type: Word | None = None
    device: str | None = None
    memory_gb: PositiveInt | None = None
    hours: PositiveFloat | None = None
    exclusive: bool = False
    signal_seconds: Annotated[int, Field(ge=10, le=65535)] = 120
    tries: PositiveInt = 6
    setup: tuple[str, ...] = ()
    env: Env = Field(default_factory=dict)
    options: tuple[Annotated[str, Field(pattern=r"^--[^\n]+$")], ...] = ()
    python: str | None = None

    @model_validator(mode="after")
    def _whole(self) -> Settings:
        if self.gpus_per_node % self.tasks_per_node:
            raise ValueError(
                f"gpus_per_node={self.gpus_per_node} is not shared evenly by tasks_per_node={self.tasks_per_node}; "
                "make one a multiple of the other"
            )
        if self.hours is not None and self.hours * 3600 <= 2 * self.signal_seconds:
            raise ValueError(
                f"hours={self.hours:g} is at most twice signal_seconds={self.signal_seconds}; a worker would do "
                "little but save: give more hours or fewer signal_seconds"
            )
        return self


def shape(settings: Settings) -> Shape:
    """All GPUs of the worker's nodes, or its cores."""
    processes = settings.nodes * settings.tasks_per_node
    if settings.gpus_per_node:
        gpus = settings.nodes * settings.gpus_per_node
        return Shape(processes, gpus, gpus, settings.device)
    cores = processes * (settings.cpus_per_task or 1)
    return Shape(processes, cores, cores, "cpu")


def script(study: str, settings: Settings, launch: int) -> str:
    """The batch script of a launch."""
    if any(character in study for character in '%"\n'):
        raise UserError(f"study {study!r}: sbatch cannot write logs to such a path; use letters, digits and ._+-")
    name, logs = PurePosixPath(study).name, "." if "://" in study else f"{study}/logs"
    options = [
        f"--job-name=llamax-{name}",
        f"--array=0-{settings.workers - 1}",
        f"--nodes={settings.nodes}",
        f"--ntasks-per-node={settings.tasks_per_node}",
        *(f"--{key.replace('_', '-')}={value}" for key, value in _given(settings)),
        *(["--exclusive"] if settings.exclusive else []),
        "--requeue",
        f"--signal=TERM@{settings.signal_seconds}",  # to the processes of the worker, not to this script
        "--open-mode=append",
        f'--output="{logs}/slurm-%A_%a.log"',
        *settings.options,
    ]
    exports = [f"export {key}={shlex.quote(value)}" for key, value in settings.env.items()]
    cpus = [f"--cpus-per-task={settings.cpus_per_task}"] if settings.cpus_per_task else []
    start = ["srun", "--kill-on-bad-exit=1", *cpus, settings.python or sys.executable, "-m", "llamax.sweep.worker"]
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {option}" for option in options),
            "",
            *settings.setup,
            *exports,
            "try=1",
            f"while [ $try -le {settings.tries} ]; do",
            f"  {shlex.join([*start, study])}",
            "  code=$?",
            *_AFTER.splitlines(),
            "done",
            'exit "$code"',
            "",
        ]
    )


# What the exit codes mean: llamax/sweep/worker.py. A job that ends within the grace of a preemption counts as failed,
# so it is put back here; one that the user cancelled is completing by now, and stays ended.
_AFTER = """\
  case $code in
    0 | 2) exit "$code" ;;
    3) continue ;;
    143)
      case $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) in
        CANCELLED | COMPLETING) ;;
        *) scontrol requeue "$SLURM_JOB_ID" && sleep 600 ;;
      esac
      exit "$code" ;;
  esac
  echo "the worker ended with code $code (try $try)" >&2
  try=$((try + 1))"""


def check(settings: Settings) -> None:
    """sbatch is here and its controller answers."""
    need("sbatch", "run this on a login node of the cluster, or print the script with --dry-run")
    call(["sinfo", "--noheader", "--format=%P"])


def submit(study: str, settings: Settings, launch: int) -> list[str]:
    """`sbatch` of the script."""
    answer = call(["sbatch", "--parsable"], text=script(study, settings, launch))
    return [answer.strip().split(";")[0]]


def jobs(settings: Settings, ids: Sequence[str]) -> list[Job]:
    """A row an array element, from squeue; a job that SLURM has forgotten has ended."""
    found: list[Job] = []
    for id in ids:
        try:
            text = call(["squeue", "--noheader", "--array", "--states=all", f"--jobs={id}", "--format=%i|%T|%R"])
        except UserError as error:
            if "Invalid job id" not in str(error):
                raise
            text = ""
        rows = [line.strip().split("|", 2) for line in text.splitlines() if line.strip()]
        found += [Job(element, state, state not in OVER, note) for element, state, note in sorted(rows, key=_order)]
        found += [] if rows else [Job(id, "ENDED", False)]
    return found


def cancel(settings: Settings, ids: Sequence[str]) -> None:
    """`scancel`: workers save and give their leases back as far as SLURM's KillWait lets them."""
    call(["scancel", *ids])


def _order(row: Sequence[str]) -> tuple[int, ...]:
    """5_2 before 5_10."""
    return tuple(int(part) for part in row[0].split("_") if part.isdigit())


def _given(settings: Settings) -> list[tuple[str, str]]:
    """The options that are set, as (long option, value)."""
    gpus = f"gpu:{settings.gpu_type}:" if settings.gpu_type else "gpu:"
    values = {
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "constraint": settings.constraint,
        "cpus_per_task": settings.cpus_per_task,
        "gres": f"{gpus}{settings.gpus_per_node}" if settings.gpus_per_node else None,
        "mem": f"{settings.memory_gb}G" if settings.memory_gb else None,
        "time": None if settings.hours is None else _clock(settings.hours),
    }
    return [(key, str(value)) for key, value in values.items() if value is not None]


def _clock(hours: float) -> str:
    """D-HH:MM:SS."""
    minutes, seconds = divmod(round(hours * 3600), 60)
    return f"{minutes // 1440}-{minutes // 60 % 24:02}:{minutes % 60:02}:{seconds:02}"
