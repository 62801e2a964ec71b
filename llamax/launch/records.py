"""What was launched: one file a launch in the study, so that any machine that sees the study can ask after its jobs.

launches/<launch>.json    launcher, settings, job ids, time, host; the text that was submitted
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llamax.config.load import validate
from llamax.errors import UserError
from llamax.launch.protocol import Job, Launcher, Settings, find_launcher
from llamax.storage.copies import publish
from llamax.storage.files import write_atomic
from llamax.sweep.study import read_json


def record(study: Path, launcher: str, settings: Settings, ids: Sequence[str], text: str) -> None:
    """Notes a launch. Raises UserError if the storage refuses; the jobs run all the same."""
    data = {
        "launcher": launcher,
        "jobs": list(ids),
        "time": time.time(),
        "host": socket.gethostname(),
        "settings": settings.as_dict(),
        "submitted": text,
    }
    folder = study / "launches"
    folder.mkdir(exist_ok=True)
    path = folder / f"{count(study)}.json"
    write_atomic(path, json.dumps(data, indent=1))
    publish(path)


def count(study: Path) -> int:
    """Launches so far."""
    return len(_records(study))


def jobs(study: Path) -> list[dict[str, Any]]:
    """Every job of a study's launches: launcher, id, state, live, note.

    Where its scheduler cannot be asked from this machine, `live` is None and the note says why.
    """
    rows = []
    for data in _records(study):
        for job in _ask(data):
            rows.append({"launcher": data["launcher"], **vars(job)})
    return rows


def cancel(study: Path) -> list[str]:
    """Ends the live jobs of a study; returns their ids.

    Raises:
        UserError: a scheduler cannot be asked from here, or refuses.
    """
    ended = []
    for data in _records(study):
        launcher, settings = _opened(data)
        if live := [job.id for job in launcher.jobs(settings, data["jobs"]) if job.live]:
            launcher.cancel(settings, data["jobs"])
            ended += live
    return ended


def _ask(data: dict[str, Any]) -> list[Job]:
    try:
        launcher, settings = _opened(data)
        return launcher.jobs(settings, data["jobs"])
    except UserError as error:
        return [Job(id, "unknown", None, str(error)) for id in data["jobs"]]


def _opened(data: dict[str, Any]) -> tuple[Launcher, Settings]:
    launcher = find_launcher(data["launcher"])
    return launcher, validate(launcher.Settings, data["settings"], f"launch on {data['launcher']}")


def _records(study: Path) -> list[dict[str, Any]]:
    """In order; numbered without gaps."""
    found: list[dict[str, Any]] = []
    while (data := read_json(study / "launches" / f"{len(found)}.json")) is not None:
        found.append(data)
    return found
