"""`llamax sweep`: plan, run, status; everything heavy imported inside."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from llamax.console import Json, Overrides, StudyPath, print_json, show

app = typer.Typer(no_args_is_help=True, help="Plan a sweep, run it with any number of workers, watch it.")
SweepSpec = Annotated[str, typer.Argument(metavar="SWEEP", help="A shipped sweep, a YAML path, or a study directory.")]
Packing = Annotated[
    str, typer.Option(help="Train cells of one shape together: auto (where a gain is expected), never, or at most N.")
]


@app.command("plan")
def sweep_plan(
    sweep: SweepSpec,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Write the plan as a study directory, ready to run.")] = None,
    corpus_tokens: Annotated[int | None, typer.Option(help="Training tokens of the corpus, for epochs.")] = None,
    workers: Annotated[int, typer.Option(help="Workers to estimate the time for.")] = 1,
    pack: Packing = "auto",
    as_json: Json = False,
) -> None:
    """Print every cell with its derived numbers and the rules that made them, before a FLOP is spent."""
    from llamax.config.sweep import load_sweep
    from llamax.sweep.packing import groups, parse_pack
    from llamax.sweep.plan import make_plan
    from llamax.sweep.process import cores
    from llamax.sweep.study import open_study, read_study
    from llamax.sweep.tables import plan_tables

    how = parse_pack(pack)
    if (Path(sweep) / "plan.json").is_file():
        plan = read_study(Path(sweep))
    else:
        plan = make_plan(load_sweep(sweep, overrides or []), corpus_tokens=corpus_tokens)
    if out is not None:
        open_study(out, plan)
    each = max(1, len(cores()) // max(1, workers))
    packed = groups(plan.cells, how, workers=max(1, workers), cores=each)
    if as_json:
        print_json(plan.as_dict() | {"populations": [group.as_dict() for group in packed]})
    else:
        show(*plan_tables(plan, workers, packed))


@app.command("run")
def sweep_run(
    sweep: SweepSpec,
    overrides: Overrides = None,
    directory: Annotated[Path | None, typer.Option("--dir", help="Study directory; default runs/<name>.")] = None,
    workers: Annotated[int, typer.Option(help="Worker processes on this machine.")] = 1,
    retry_failed: Annotated[bool, typer.Option(help="Try failed cells again.")] = False,
    pack: Packing = "auto",
    as_json: Json = False,
) -> None:
    """Train the cells of a sweep; any number of these commands may race on one study."""
    from llamax.config.sweep import load_sweep
    from llamax.sweep.live import live
    from llamax.sweep.local import run_local
    from llamax.sweep.packing import parse_pack
    from llamax.sweep.plan import make_plan
    from llamax.sweep.study import open_study
    from llamax.sweep.tables import status_table

    how = parse_pack(pack)
    path = Path(sweep)
    if not (path / "plan.json").is_file():
        spec = load_sweep(sweep, overrides or [])
        path = directory or Path("runs") / spec.name
        open_study(path, make_plan(spec))
    with live() as watch:
        found = run_local(path, workers=workers, report=watch, retry_failed=retry_failed, pack=how)
    if as_json:
        print_json(found)
    else:
        show(status_table(found))
    if found["counts"].get("failed"):
        sys.exit(1)


@app.command("status")
def sweep_status(study: StudyPath, as_json: Json = False) -> None:
    """What is done, running, failed and pending."""
    from llamax.sweep.status import status
    from llamax.sweep.tables import status_table

    found = status(study)
    if as_json:
        print_json(found)
    else:
        show(status_table(found))
