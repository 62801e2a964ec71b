"""`llamax launch`: what it will take, then workers for a sweep's cells, here or on a cluster."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llamax.console import Json, NewAtHand, Overrides, as_addresses, emit, lines, print_json, show
from llamax.sweeping import SweepSpec, planned

if TYPE_CHECKING:
    from llamax.launch.estimate import Estimate

On = Annotated[str, typer.Option(help="local, slurm or jobset, or a YAML file of settings that names its launcher.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="A setting of the launcher, a.b=value; may be repeated.")]


def launch(
    sweep: SweepSpec,
    overrides: Overrides = None,
    on: On = "local",
    settings: Set = None,
    directory: Annotated[Path | None, NewAtHand("--dir", help="Study directory; default runs/<name>.")] = None,
    workers: Annotated[
        int | None, typer.Option(help="Workers that share the cells; short for --set workers=N.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be submitted; write nothing.")] = False,
    add: Annotated[bool, typer.Option("--add", help="Add workers to those of a launch that still runs.")] = False,
    retry_failed: Annotated[bool, typer.Option(help="Try failed cells again.")] = False,
    as_json: Json = False,
) -> None:
    """Hand a sweep's cells to workers, here or on a cluster; shows devices, hours and cost first."""
    from llamax.launch import launch as launches
    from llamax.launch.protocol import load_settings
    from llamax.storage.copies import at_hand
    from llamax.sweep.status import status
    from llamax.sweep.tables import status_table

    texts = [*(settings or []), *([] if workers is None else [f"workers={workers}"])]
    launcher, chosen = load_settings(on, texts)
    plan = planned(sweep, overrides, None)
    named = at_hand(sweep)
    study = named if (named / "plan.json").is_file() else directory or Path("runs") / plan.spec.name
    result: dict[str, object] = {"study": str(study), "launcher": launcher}
    if dry_run:
        found, text = launches.preview(study, plan, launcher, chosen)
        if as_json:
            print_json({**result, **found.as_dict(), "jobs": [], "text": text})
        else:
            _say(study, launcher, found)
            print(text, end="")
        return
    say = (lambda found: None) if as_json else (lambda found: _say(study, launcher, found))
    found, ids = launches.launch(study, plan, launcher, chosen, add=add, retry_failed=retry_failed, say=say)
    state = status(study)
    if as_json:
        print_json({**result, **found.as_dict(), "jobs": ids, "status": state})
    elif ids:
        emit(
            {**result, "jobs": ids, "watch": f"llamax sweep status {study}", "end": f"llamax sweep cancel {study}"},
            False,
        )
    else:
        show(status_table(state))
    if not ids and state["counts"].get("failed"):
        sys.exit(1)


def _say(study: Path, launcher: str, found: Estimate) -> None:
    """The estimate and its rules on stderr, so that what is submitted can be piped."""
    import textwrap

    def number(value: float | None, unit: str = "h") -> str:
        return "unknown" if value is None else f"{value:,.3g} {unit}"

    rows = {
        "launch": f"{found.cells} cells of {study} on {launcher}",
        "devices": f"{found.devices:,} x {found.kind}",
        "hours": f"{number(found.hours)} until the last cell is done",
        f"{found.kind} hours": number(found.device_hours),
        "cost": "unknown" if found.dollars is None else f"${found.dollars:,.2f}",
    }
    text = [as_addresses(line) for line in lines(rows)]
    for name, rule in found.rules.items():
        text += textwrap.wrap(f"{name}: {rule}", 98, initial_indent="  ", subsequent_indent="    ")
    print("\n".join(text), file=sys.stderr)
