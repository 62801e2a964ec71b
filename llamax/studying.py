"""`llamax study`: a question that takes one sweep, planned, run, measured and drawn by one command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from llamax.console import Json, OnDisk, Overrides, print_json, show

app = typer.Typer(no_args_is_help=True, help="Ask one question: plan, run, measure and draw the sweep it takes.")
LRS = ",".join(f"{2.0**k:g}" for k in range(-9, -2))


@app.callback()
def _group() -> None:
    """Keeps `lr-transfer` a subcommand while it is the only one."""


@app.command("lr-transfer")
def lr_transfer(
    overrides: Overrides = None,
    directory: Annotated[Path, OnDisk("--dir", help="Study directory; an existing one continues.")] = Path(
        "runs/lr-transfer"
    ),
    widths: Annotated[str, typer.Option(help="Ladder widths, or one.")] = "32,64,128,256",
    depths: Annotated[str, typer.Option(help="Layers; several where there is one width.")] = "2",
    lrs: Annotated[str, typer.Option(help="Peak learning rates.")] = LRS,
    parametrizations: Annotated[
        str, typer.Option(help="standard, mup, completep, in the order of the panels.")
    ] = "standard,mup,completep",
    seeds: Annotated[int, typer.Option(help="Seeds a cell; the interval comes from them.")] = 2,
    base: Annotated[str, typer.Option(help="Train config of every cell.")] = "quickstart",
    steps: Annotated[int, typer.Option(help="Steps of every cell, so that all see the same tokens.")] = 150,
    base_width: Annotated[int | None, typer.Option(help="Width of the base model; default the smallest.")] = None,
    base_depth: Annotated[int | None, typer.Option(help="Layers of the base model; default the fewest.")] = None,
    workers: Annotated[int, typer.Option(help="Worker processes on this machine.")] = 1,
    pack: Annotated[str, typer.Option(help="Train cells of one shape together: auto, never, or at most N.")] = "auto",
    plan_only: Annotated[bool, typer.Option("--plan", help="Print the plan and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Draw loss against learning rate across widths (or depths) under each parametrization, and say how the best rate
    moves.

    Fields of the cells are settings: train.batch_size=16 model.attention.qk_norm=null. Writes runs.parquet,
    lr-transfer.svg and summary.json into the study directory.
    """
    from llamax.sweep.plan import make_plan
    from llamax.sweep.transfer import transfer_spec

    spec = transfer_spec(
        widths=[int(value) for value in _numbers("--widths", widths)],
        depths=[int(value) for value in _numbers("--depths", depths)],
        lrs=_numbers("--lrs", lrs),
        parametrizations=[name.strip() for name in parametrizations.split(",") if name.strip()],
        seeds=seeds,
        base=base,
        base_width=base_width,
        base_depth=base_depth,
        overrides=[f"train.steps={steps}", *(overrides or [])],
    )
    plan = make_plan(spec)
    if plan_only:
        from llamax.sweep.tables import plan_tables

        print_json(plan.as_dict()) if as_json else show(*plan_tables(plan, workers))
        return
    from llamax.sweep.live import live
    from llamax.sweep.local import run_local
    from llamax.sweep.packing import parse_pack
    from llamax.sweep.study import open_study

    how = parse_pack(pack)
    open_study(directory, plan)
    with live() as watch:
        run_local(directory, workers=workers, report=watch, pack=how)
    found = measure(directory, "width" if len(_numbers("--widths", widths)) > 1 else "depth")
    if as_json:
        print_json(found)
    else:
        show(*_tables(found))
    if found["failed"]:
        sys.exit(1)


def measure(study: Path, size: str) -> dict[str, Any]:
    """Reads a transfer study, writes runs.parquet, lr-transfer.svg and summary.json into it, returns the summary.

    Raises:
        UserError: no study, or a size and seed none of whose runs has a loss.
    """
    from llamax.report.ledger import save_ledger
    from llamax.report.plots_transfer import transfer_picture
    from llamax.scaling import transfer_summary
    from llamax.storage.files import write_atomic
    from llamax.sweep.transfer import transfer_runs

    runs = transfer_runs(study)
    found = transfer_summary(runs, size)
    found |= {"study": str(study), "failed": int((runs["status"] == "failed").sum())}
    found |= {"runs": str(save_ledger(runs, study / "runs.parquet")), "figure": str(study / "lr-transfer.svg")}
    write_atomic(study / "lr-transfer.svg", transfer_picture(runs, found).standalone())
    found = json.loads(json.dumps(_plain(found)))
    write_atomic(study / "summary.json", json.dumps(found, indent=1))
    return found


def _tables(found: dict[str, Any]) -> list[Any]:
    from rich.table import Table
    from rich.text import Text

    size = found["size"]
    table = Table("parametrization", size, "seed", "best lr", "log2", "loss", "inside the grid", title="Optima")
    for row in found["optima"]:
        cells = (row["parametrization"], row[size], row["seed"], f"{row['lr']:.3g}", f"{_log2(row['lr']):.2f}")
        table.add_row(*map(str, cells), f"{row['loss']:.4f}", "yes" if row["interior"] else "no")
    moves = Table("parametrization", "log2 lr a doubling", "95 % interval", "cost, nats", title=f"Shift along {size}")
    for row in found["shifts"]:
        shift = "-" if row["per_doubling"] is None else f"{row['per_doubling']:+.3f}"
        pair = "-" if row["interval"] is None else "[{:+.3f}, {:+.3f}]".format(*row["interval"])
        moves.add_row(row["parametrization"], shift, pair, "-" if row["cost"] is None else f"{row['cost']:.4f}")
    rule = (
        "shift: slope of log2 of the best rate (vertex of a parabola through the best and its neighbours) in log2 "
        f"{size}; interval: scatter of seeds, pooled over sizes, Student's t.\ncost: what the largest loses at the "
        "grid's rate nearest to the smallest's optimum, against its own best."
    )
    warnings = [Text(f"warning: {word}", style="yellow") for word in found["warnings"]]
    return [table, moves, Text(rule), Text(f"figure: {found['figure']}"), *warnings]


def _log2(value: float) -> float:
    import math

    return math.log2(value)


def _numbers(option: str, text: str) -> list[float]:
    from llamax.errors import UserError

    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UserError(f"{option} {text}: give numbers with commas between, such as 32,64,128") from None


def _plain(value: Any) -> Any:
    """Data as JSON has it: numbers of NumPy as Python's, nan and infinities as None."""
    import math

    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
