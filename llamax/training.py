"""`llamax train`: one run, by one process or by one of several; everything heavy imported inside."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llamax.console import Json, Overrides, TrainProgress, emit, print_run_plan
from llamax.errors import Interrupted, UserError

if TYPE_CHECKING:
    from llamax.config.run import RunConfig
    from llamax.mesh.job import Job

PANEL = "Several processes (SLURM and Cloud TPU are found by themselves)"


def train(
    config: Annotated[str, typer.Argument(help="A shipped config (tiny) or a YAML path.")],
    overrides: Overrides = None,
    run_dir: Annotated[Path | None, typer.Option(help="Where the run goes; the same command resumes it.")] = None,
    coordinator: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Process 0, as all reach it.", rich_help_panel=PANEL)
    ] = None,
    processes: Annotated[int | None, typer.Option(help="How many there are.", rich_help_panel=PANEL)] = None,
    process: Annotated[int | None, typer.Option(help="Which this is, from 0.", rich_help_panel=PANEL)] = None,
    bind: Annotated[
        str | None, typer.Option(metavar="ADDR", help="Where process 0 listens; default HOST.", rich_help_panel=PANEL)
    ] = None,
    peer_seconds: Annotated[
        float | None, typer.Option(help="A process silent for so long ends the others.", rich_help_panel=PANEL)
    ] = None,
    start_seconds: Annotated[
        float | None, typer.Option(help="So long may they take to come together.", rich_help_panel=PANEL)
    ] = None,
    as_json: Json = False,
) -> None:
    """Train one run, or resume it; SIGTERM saves and exits.

    Several processes train one run together when each is given --coordinator, --processes and --process, or the
    variables LLAMAX_COORDINATOR, LLAMAX_PROCESSES, LLAMAX_PROCESS.
    """
    from llamax.mesh.job import start_processes
    from llamax.mesh.processes import find_processes
    from llamax.storage.places import written

    plan = find_processes(
        coordinator=coordinator,
        processes=processes,
        process=process,
        bind=bind,
        peer_seconds=peer_seconds,
        start_seconds=start_seconds,
    )
    command = " ".join(["train", config, *(overrides or []), *([f"--run-dir {run_dir}"] if run_dir else [])])
    try:
        with start_processes(plan, {} if plan is None else facts(command)) as job:
            resolved = _load(config, overrides or [], job)
            where = run_dir or Path("runs") / Path(config).stem / f"{Path(config).stem}-{resolved.hash8}"
            result = _train(resolved, where, job, quiet=as_json)
    except Interrupted as stop:
        if job.leader:
            print(f"{stop}; the same command resumes {written(where)}", file=sys.stderr)
        sys.exit(stop.exit_code)
    if job.leader:
        emit({**result, "run_dir": written(where)}, as_json)
    if result["status"] == "diverged":
        if job.leader:
            print(f"the run diverged: {result['cause']}", file=sys.stderr)
        sys.exit(1)


def facts(command: str) -> dict[str, Any]:
    """What must be the same in all processes of a job: versions, source, and the command."""
    import llamax
    from llamax.train.env import git_state, versions

    git = git_state(Path(llamax.__file__)) or {}
    return {**versions(), "the commit of llamax": git.get("commit"), "the command": command}


def _load(config: str, overrides: list[str], job: Job) -> RunConfig:
    """The run; raises UserError in a process whose config files are not the leader's."""
    from llamax.config.load import diff, load_run

    resolved = load_run(config, overrides)
    leaders = job.agree(resolved.as_dict())
    if differ := diff(leaders, resolved.as_dict()):
        name, there, here = differ[0]
        raise UserError(
            f"{config}: {name} is {here!r} in process {job.index} and {there!r} in process 0; give all the same file"
        )
    return resolved


def _train(config: RunConfig, where: Path, job: Job, quiet: bool) -> dict[str, Any]:
    from llamax.train.loop import train as train_run
    from llamax.train.replicas import use_cores

    if job.count == 1:
        use_cores(config)
    if not job.leader:
        return train_run(config, where, job=job)
    if not quiet:
        from llamax.storage.places import written

        print_run_plan(config, written(where))
    with TrainProgress() as progress:
        return train_run(config, where, report=progress, job=job)
