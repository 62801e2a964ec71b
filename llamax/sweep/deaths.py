"""A cell that kills its workers: counted, so that it cannot take all of them with it, one after the other.

    attempts/<cell>.json    of each attempt that is going on or ended in a death: the step it began from

An attempt that ends in words (done, failed, stopped, lost) takes its entry back. Deaths with a new checkpoint between
them do not add up: a node that is lost now and then is not the cell's fault.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llamax.errors import UserError
from llamax.storage.copies import publish
from llamax.storage.files import write_atomic
from llamax.sweep.plan import Cell
from llamax.sweep.study import read_json
from llamax.train.run_dir import CHECKPOINTS

DEATHS = 5  # without a new checkpoint between them


@contextmanager
def counted(study: Path, cell: Cell) -> Iterator[None]:
    """An attempt at a cell. Raises UserError, and forgets the deaths, if `DEATHS` attempts ended in one before it."""
    path = study / "attempts" / f"{cell.name}.json"
    begins = _newest_checkpoint(study / cell.run_name)
    deaths = [step for step in (read_json(path) or {}).get("began", []) if step == begins]
    if len(deaths) >= DEATHS:
        _write(path, [])
        raise UserError(
            f"{len(deaths)} workers died in this cell, all from step {begins:,} on and before another checkpoint; "
            "out of memory? --retry-failed tries it again"
        )
    _write(path, [*deaths, begins])
    try:
        yield
    finally:
        _write(path, deaths)


def _newest_checkpoint(run_dir: Path) -> int:
    steps = [int(path.name) for path in (run_dir / CHECKPOINTS).glob("*") if path.name.isdigit()]
    return max(steps, default=0)


def _write(path: Path, began: list[int]) -> None:
    path.parent.mkdir(exist_ok=True)
    if began:
        write_atomic(path, json.dumps({"began": began}))
    else:
        path.unlink(missing_ok=True)
    publish(path, over=True, seconds=0.0)
