"""A launch from a plan to its jobs: what it will take, whether it can be, the submission and its record."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from llamax.errors import UserError
from llamax.launch.estimate import Estimate, estimate
from llamax.launch.protocol import Settings, find_launcher
from llamax.launch.records import count, jobs, record
from llamax.storage.files import beside
from llamax.storage.places import address_of
from llamax.sweep.plan import Plan
from llamax.sweep.study import clear_failures, is_finished, is_settled, open_study
from llamax.train.files import writing


def preview(study: Path, plan: Plan, on: str, settings: Settings) -> tuple[Estimate, str]:
    """What a launch would take, and what it would submit. Writes nothing. Raises UserError for impossible settings."""
    launcher = find_launcher(on)
    text = launcher.script(address(study), settings, count(study))
    left = [cell for cell in plan.cells if not is_finished(study, cell)]
    return estimate(left, launcher.shape(settings), settings), text


def launch(
    study: Path,
    plan: Plan,
    on: str,
    settings: Settings,
    *,
    add: bool = False,
    retry_failed: bool = False,
    say: Callable[[Estimate], None] = lambda found: None,
) -> tuple[Estimate, list[str]]:
    """Creates or continues the study and starts workers on it; returns what it should take and the ids of the jobs.

    `say` is told the estimate before anything is submitted. Workers of an earlier launch that still run are an error
    unless `add` is set: any number may share a study, but launching twice is mostly a mistake, and costs twice.

    Raises:
        UserError: bad settings, no client or credentials, storage that cannot be written, a study of another spec, a
            live launch, nothing left, or the scheduler refuses.
    """
    launcher = find_launcher(on)
    launcher.script(address(study), settings, 0)  # what is wrong with the settings is said first
    launcher.check(settings)
    with writing(study):
        plan = open_study(study, plan)
        for folder in ("launches", "logs"):
            (study / folder).mkdir(exist_ok=True)
        probe = beside(study / "launches" / "probe")
        probe.write_bytes(b"")
        probe.unlink()
    live = [job for job in jobs(study) if job["live"]]
    if live and not add:
        names = ", ".join(f"{job['id']} ({job['state']})" for job in live[:4]) + (", ..." if len(live) > 4 else "")
        raise UserError(
            f"{study} has workers already: {live[0]['launcher']} {names}; `llamax sweep status {study}` watches them, "
            f"`llamax sweep cancel {study}` ends them, and --add starts more beside them"
        )
    if retry_failed:
        clear_failures(study, plan.cells)
    found, text = preview(study, plan, on, settings)
    say(found)
    if all(is_settled(study, cell) for cell in plan.cells):
        raise UserError(
            f"{study}: no cell is left; --retry-failed tries failed ones again, `llamax report` shows the rest"
        )
    ids = launcher.submit(address(study), settings, count(study))
    if ids:
        record(study, on, settings, ids, text)
    return found, ids


def address(study: Path) -> str:
    """The study as a worker on another machine finds it: its bucket, or the same path there."""
    return address_of(study) or str(study.absolute())
