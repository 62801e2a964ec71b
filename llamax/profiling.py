"""`llamax profile`: from a run or a config to a trace and a page that says where a step's time goes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llamax.console import Json, print_json, step_progress
from llamax.errors import UserError

if TYPE_CHECKING:
    from llamax.config.run import RunConfig

SUMMARY, PAGE, TRACES = "summary.json", "summary.md", "plugins/profile"  # the last is where TensorBoard looks


def profile(
    source: Annotated[str, typer.Argument(metavar="RUN", help="A run directory, a shipped config or a YAML path.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[a.b.c=value]...", help="Config fields to set.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps to trace; default three dispatches as the run has them.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where the profile goes; default RUN/profile, or profile/NAME of a config.")
    ] = None,
    as_json: Json = False,
) -> None:
    """See where a training step spends its time; a run goes on from its newest checkpoint and is not changed."""
    with step_progress() as progress:
        summary = profile_to(source, overrides or [], steps, out, progress)
    if as_json:
        print_json(summary)
        return
    from rich.console import Console

    from llamax.report.profile_page import WIDTH, sections, to_rich

    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    for item in to_rich(sections(summary)):
        console.print(item)


def profile_to(source: str, overrides: list[str], steps: int | None, out: Path | None, progress: Any) -> dict[str, Any]:
    """The summary, written to the folder `out` with the trace; a profile that is there gives way when it is complete.

    Raises:
        UserError: as `llamax.train.profile.record`; no such run or config; a folder that holds something else or
            cannot be written.
    """
    config, run = _open(source, overrides)
    folder = out or (run / "profile" if run else Path("profile") / Path(source).stem)
    before = _earlier(folder)
    from llamax.report.hlo import parse_program
    from llamax.report.profile import summarize
    from llamax.report.trace import read_spans
    from llamax.train.profile import record
    from llamax.train.replicas import use_cores
    from llamax.train.run_dir import read_env

    began = read_env(run) if run else None
    use_cores(config, began["devices"]["count"] if began else None)  # as the run did
    with _workspace(folder) as work:
        recording = record(config, run, steps, work, progress)
        progress("read the trace", 0, 1)
        summary = summarize(recording.figures, parse_program(recording.program), read_spans(work))
        progress("read the trace", 1, 1)
        return _put(summary | {"name": source}, work, folder, before)


def _open(source: str, overrides: list[str]) -> tuple[RunConfig, Path | None]:
    """(the config, the run directory if that is what `source` is)."""
    from llamax.config.load import load_run, run_from_data
    from llamax.train.run_dir import is_run, read_config

    path = Path(source)
    if is_run(path):
        stored = read_config(path)
        return (run_from_data(stored.as_dict(), overrides, where=source) if overrides else stored), path
    if path.is_dir():
        raise UserError(f"{source}: not a run directory, it has no config.yaml; give the --run-dir of a training run")
    if "/" in source and not path.exists() and path.suffix not in (".yaml", ".yml"):
        raise UserError(f"{source}: no such run; give the --run-dir of a training run, a shipped config or a YAML path")
    return load_run(source, overrides), None


# ---------------------------------------------------------------- files
def _earlier(folder: Path) -> dict[str, Any] | None:
    """The summary of the profile in `folder`, if there is one. Raises UserError if its place is taken."""
    path = folder / SUMMARY
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or "traced_steps" not in found:
        raise UserError(f"{path}: not written by llamax profile; move it away, or give another --out")
    return found


@contextlib.contextmanager
def _workspace(folder: Path) -> Iterator[Path]:
    """A folder inside `folder` to record in; gone afterwards, as are the folders made for it if nothing came of it."""
    from llamax.train.files import writing

    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".recording-", dir=folder))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty: the profile is there
            for path in made:
                path.rmdir()


def _put(summary: dict[str, Any], work: Path, folder: Path, before: dict[str, Any] | None) -> dict[str, Any]:
    """Move the trace into `folder`, write the page and the summary, and drop the trace that was there before."""
    from llamax.report.profile_page import sections, to_text
    from llamax.storage.files import write_atomic
    from llamax.train.files import writing

    with writing(folder):
        (trace,) = (work / TRACES).iterdir()
        home = folder / TRACES / trace.name
        home.parent.mkdir(parents=True, exist_ok=True)
        os.replace(trace, home)
        files = {
            "folder": str(folder),
            "perfetto": str(next(home.glob("*.trace.json.gz"))),
            "xplane": str(next(home.glob("*.xplane.pb"))),
            "page": str(folder / PAGE),
            "summary": str(folder / SUMMARY),
        }
        summary = {**summary, "files": files}
        write_atomic(folder / PAGE, to_text(f"A training step of {summary['name']}", sections(summary)))
        write_atomic(folder / SUMMARY, json.dumps(summary, indent=1, allow_nan=False) + "\n")
        if before is not None:
            shutil.rmtree(folder / TRACES / Path(before["files"]["xplane"]).parent.name, ignore_errors=True)
    return summary
