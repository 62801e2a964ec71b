"""`llamax sweep`: plan, run, status; everything heavy imported inside."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llamax.console import Json, NewAtHand, Overrides, StudyPath, emit, print_json, show
from llamax.errors import UserError

if TYPE_CHECKING:
    from llamax.sweep.packing import Pack
    from llamax.sweep.plan import Plan

app = typer.Typer(no_args_is_help=True, help="Plan a sweep, run it with any number of workers, watch it.")
SweepSpec = Annotated[str, typer.Argument(metavar="SWEEP", help="A shipped sweep, a YAML path, or a study directory.")]
Packing = Annotated[
    str, typer.Option(help="Train cells of one shape together: auto (where a gain is expected), never, or at most N.")
]


@app.command("plan")
def sweep_plan(
    sweep: SweepSpec,
    overrides: Overrides = None,
    out: Annotated[Path | None, NewAtHand(help="Write the plan as a study directory, ready to run.")] = None,
    corpus_tokens: Annotated[int | None, typer.Option(help="Training tokens of the corpus, for epochs.")] = None,
    workers: Annotated[int, typer.Option(help="Workers to estimate the time for.")] = 1,
    pack: Packing = "auto",
    as_json: Json = False,
) -> None:
    """Print every cell with its derived numbers and the rules that made them, before a FLOP is spent."""
    from llamax.mesh.cpu import cores
    from llamax.sweep.packing import groups, parse_pack
    from llamax.sweep.study import open_study
    from llamax.sweep.tables import plan_tables

    check_workers(workers)
    how = parse_pack(pack)
    plan = planned(sweep, overrides, corpus_tokens)
    if out is not None:
        open_study(out, plan)
    each = max(1, len(cores()) // workers)
    packed = groups(plan.cells, how, workers=workers, cores=each)
    if as_json:
        print_json(plan.as_dict() | {"populations": [group.as_dict() for group in packed]})
    else:
        show(*plan_tables(plan, workers, packed))


def planned(sweep: str, overrides: list[str] | None, corpus_tokens: int | None) -> Plan:
    """The plan of a study directory, or, with progress, of a sweep by name or path. Raises UserError as these do."""
    from llamax.config.sweep import load_sweep
    from llamax.console import step_progress
    from llamax.storage.copies import at_hand
    from llamax.sweep.plan import make_plan
    from llamax.sweep.study import read_study

    if ((study := at_hand(sweep)) / "plan.json").is_file():
        return read_study(study)
    with step_progress() as progress:
        return make_plan(load_sweep(sweep, overrides or []), corpus_tokens=corpus_tokens, progress=progress)


@app.command("run")
def sweep_run(
    sweep: SweepSpec,
    overrides: Overrides = None,
    directory: Annotated[Path | None, NewAtHand("--dir", help="Study directory; default runs/<name>.")] = None,
    workers: Annotated[int, typer.Option(help="Worker processes on this machine.")] = 1,
    retry_failed: Annotated[bool, typer.Option(help="Try failed cells again.")] = False,
    pack: Packing = "auto",
    as_json: Json = False,
) -> None:
    """Train the cells of a sweep; any number of these commands may race on one study."""
    from llamax.sweep.packing import parse_pack

    how = parse_pack(pack)
    check_workers(workers)  # before there is a directory
    train_cells(opened(sweep, overrides, directory), workers, retry_failed, how, as_json)


def check_workers(workers: int) -> None:
    """Raises UserError for fewer than one."""
    if workers < 1:
        raise UserError(f"--workers {workers}: give 1 or more")


def opened(
    sweep: str,
    overrides: list[str] | None,
    directory: Path | None,
    plan: Callable[[str, list[str] | None, int | None], Plan] | None = None,
) -> Path:
    """The study directory that `sweep` is, or the one where its `plan` is written: `directory`, or runs/<name>."""
    from llamax.storage.copies import at_hand
    from llamax.sweep.study import open_study

    path = at_hand(sweep)
    if not (path / "plan.json").is_file():
        made = (plan or planned)(sweep, overrides, None)
        path = directory or Path("runs") / made.spec.name
        open_study(path, made)
    return path


def train_cells(study: Path, workers: int, retry_failed: bool, pack: Pack, as_json: bool) -> None:
    """Train what is left of a study and print what became of it; exit code 1 where a cell failed."""
    from llamax.sweep.live import live
    from llamax.sweep.local import run_local
    from llamax.sweep.tables import status_table

    with live() as watch:
        found = run_local(study, workers=workers, report=watch, retry_failed=retry_failed, pack=pack)
    if as_json:
        print_json(found)
    else:
        show(status_table(found))
    if found["counts"].get("failed"):
        sys.exit(1)


@app.command("status")
def sweep_status(study: StudyPath, as_json: Json = False) -> None:
    """What is done, running, failed and pending, and what the schedulers say of launched workers."""
    from llamax.launch.records import jobs
    from llamax.sweep.status import status
    from llamax.sweep.tables import jobs_table, status_table

    found = status(study)
    launched = jobs(study)
    if as_json:
        print_json(found | {"jobs": launched})
    else:
        show(status_table(found), *([jobs_table(launched)] if launched else []))


@app.command("cancel")
def sweep_cancel(study: StudyPath, as_json: Json = False) -> None:
    """End the launched workers of a study; what they trained is kept, and `launch` goes on from it."""
    from llamax.launch.records import cancel
    from llamax.sweep.study import read_study

    read_study(study)
    emit({"study": str(study), "ended": cancel(study)}, as_json)


@app.command("next")
def sweep_next(
    study: StudyPath,
    flops: Annotated[float | None, typer.Option(help="The budget; default goes on by the last ratio.")] = None,
    target: Annotated[float | None, typer.Option(help="FLOPs where errors are counted; default the design's.")] = None,
    add: Annotated[bool, typer.Option("--add", help="Add these runs to the study, for `sweep run`.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write them as a sweep of their own (YAML).")] = None,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    as_json: Json = False,
) -> None:
    """The next budget of a study, its sizes centred on what the finished runs say."""
    from llamax.columns import LEDGER_COLUMNS
    from llamax.config.load import dump_yaml
    from llamax.report.ledger import ledger, usable_runs
    from llamax.storage.files import write_atomic
    from llamax.sweep.design import ladder_of
    from llamax.sweep.design_report import next_tables
    from llamax.sweep.next import next_cells, next_spec, prior_of, propose, study_sizes
    from llamax.sweep.study import add_cells, read_study

    for name, value in (("--flops", flops), ("--target", target)):
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{name} {value}: give a positive number of training FLOPs")
    plan = read_study(study)
    runs, words = usable_runs(ledger(study))
    runs = runs.rename(columns={column: name for name, column in LEDGER_COLUMNS.items()})
    if "role" in runs:
        runs = runs[runs["role"].isna() | (runs["role"] == "next")]
    prior, noise, goal = prior_of(plan)
    ladder = ladder_of(plan.spec, study_sizes(plan.spec))
    found = propose(
        runs[runs["budget"].notna()],
        ladder,
        plan.spec,
        flops=flops,
        target=target or goal,
        prior=prior,
        seed_noise=noise,
        seed=seed,
    )
    if out is not None:
        write_atomic(out, dump_yaml(next_spec(plan.spec, found, f"{plan.spec.name}-next")))
    if add:
        add_cells(study, next_cells(plan, found))
    result = found.as_dict() | {"left_out": words, "added": add, "written": str(out) if out else None}
    if as_json:
        print_json(result)
    else:
        show(*next_tables(result))
