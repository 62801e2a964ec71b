"""The study directory: its spec, its plan, and which cells are finished, failed or left.

runs/<study>/
  study.yaml    the spec          plan.json           cells, rules, warnings
  leases/       who trains what   failures/<cell>.json   error and traceback
  progress/<cell>.json  newest report                 logs/      output of local workers
  <cell>-<hash8>/       run directories

A study in a bucket is its view in the cache: what is written there is published at once, and `refresh` brings the rest.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from llamax.config.load import diff, dump_yaml, validate
from llamax.config.run import RunConfig
from llamax.config.sweep import SweepConfig
from llamax.errors import UserError
from llamax.storage.copies import publish
from llamax.storage.files import locked, write_atomic
from llamax.sweep.plan import Cell, Plan, load_plan, save_plan
from llamax.train.run_dir import CHECKPOINTS


def open_study(study: Path, plan: Plan) -> Plan:
    """Creates a study, or continues one of the same spec; returns its plan, cells added later included.

    Raises:
        UserError: the directory holds a study of another spec, or its cells resolved otherwise; names the fields.
    """
    study.mkdir(parents=True, exist_ok=True)
    with locked(study / ".plan.lock"):
        if (study / "study.yaml").exists():
            _same_spec(study, plan.spec)
        if (study / "plan.json").exists():
            return _same_cells(study, plan)
        save_plan(plan, study / "plan.json")
        write_atomic(study / "study.yaml", dump_yaml(plan.spec))
        publish(study / "study.yaml")
        publish(study / "plan.json")
    return plan


def read_study(study: Path) -> Plan:
    """The plan of a study directory, read again only when the file changes. Raises UserError if it is none."""
    path = study / "plan.json"
    try:
        stat = path.stat()
    except OSError:
        return load_plan(path)
    return _read_once(path, stat.st_mtime_ns, stat.st_ino)


@lru_cache(maxsize=4)
def _read_once(path: Path, mtime: int, inode: int) -> Plan:
    return load_plan(path)


def add_cells(study: Path, cells: Sequence[Cell]) -> Plan:
    """Appends cells to a study beyond its spec's own; a cell already there, of the same config, is left as it is.

    Raises:
        UserError: a cell of that name with another config.
    """
    with locked(study / ".plan.lock"):
        plan = read_study(study)
        known = {cell.name: cell for cell in plan.cells}
        new = []
        for cell in cells:
            if cell.name in known and known[cell.name].hash != cell.hash:
                changed = _differences(known[cell.name], cell)
                raise UserError(
                    f"{study}: cell {cell.name} exists with another config ({changed}); choose another name"
                )
            if cell.name not in known:
                new.append(cell)
        if new:
            plan = replace(plan, cells=(*plan.cells, *(replace(cell, extra=True) for cell in new)))
            save_plan(plan, study / "plan.json")
            publish(study / "plan.json")
    return plan


def select(plan: Plan, only: Iterable[str] | None) -> list[Cell]:
    """The named cells in the order given, each trunk before the first of its branches, or all, longest first; what a
    trunk holds up counts as its own.

    Raises:
        UserError: a name that is no cell of the plan.
    """
    cells = {cell.name: cell for cell in plan.cells}
    if only is None:
        after = dict.fromkeys(cells, 0.0)
        for cell in cells.values():
            if cell.trunk is not None:
                after[cell.trunk] = max(after[cell.trunk], cell.seconds)
        return sorted(cells.values(), key=lambda cell: -(cell.seconds + after[cell.name]))
    names = list(only)
    if missing := [name for name in names if name not in cells]:
        raise UserError(f"cell {missing[0]!r} is not in the plan; cells: {', '.join(list(cells)[:12])}")
    ordered = dict.fromkeys(known for name in names for known in (cells[name].trunk, name) if known is not None)
    return [cells[name] for name in ordered]


# ---------------------------------------------------------------- state of a cell
def is_finished(study: Path, cell: Cell) -> bool:
    """Whether the run's result.json, written last, exists."""
    return (study / cell.run_name / "result.json").exists()


def is_settled(study: Path, cell: Cell) -> bool:
    """Whether a cell is finished or failed, so that nobody is to train it."""
    return is_finished(study, cell) or failure_path(study, cell.name).exists()


def can_begin(study: Path, config: RunConfig) -> bool:
    """Whether a run's state before its first step is there: of a branch, the trunk's checkpoint, whole by its name."""
    branch = config.branch
    return branch is None or (study / branch.trunk / CHECKPOINTS / str(branch.step)).is_dir()


def orphaned(study: Path, plan: Plan, cell: Cell) -> str | None:
    """Why a branch will never begin, or None: its trunk came to its end without the checkpoint."""
    trunk = next((other for other in plan.cells if other.name == cell.trunk), None)
    if trunk is None or cell.config.branch is None or not is_settled(study, trunk) or can_begin(study, cell.config):
        return None
    failure, step = read_json(failure_path(study, trunk.name)), cell.config.branch.step
    if failure is not None:
        first = (str(failure.get("error", "")).splitlines() or [""])[0]
        return f"its trunk {trunk.name} failed before step {step:,}: {first}; both are tried again with --retry-failed"
    result = read_json(study / trunk.run_name / "result.json") or {}
    if result.get("status") == "diverged":
        return f"its trunk {trunk.name} diverged before step {step:,}: {result.get('cause')}; lower the learning rate"
    return (
        f"its trunk {trunk.name} is finished and keeps no checkpoint of step {step:,}; delete {trunk.run_name} and "
        "retry to train it again"
    )


def failure_path(study: Path, cell: str) -> Path:
    """Where a cell's failure is recorded."""
    return study / "failures" / f"{cell}.json"


def record_failure(study: Path, cell: str, error: BaseException | str, detail: str = "") -> None:
    """Writes failures/<cell>.json: the error's text and its traceback."""
    if isinstance(error, BaseException):
        detail = "".join(traceback.format_exception(error))
        text, kind = str(error) or type(error).__name__, type(error).__name__
    else:
        text, kind = error, "WorkerDied"
    path = failure_path(study, cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"cell": cell, "kind": kind, "error": text, "traceback": detail, "time": time.time()}
    write_atomic(path, json.dumps(record, indent=1))
    publish(path, over=True)


def clear_failures(study: Path, cells: Iterable[Cell]) -> None:
    """Forgets the recorded failures of some cells, so that they are claimed again."""
    for cell in cells:
        if (path := failure_path(study, cell.name)).exists():
            path.unlink(missing_ok=True)
            publish(path)


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is none to read."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


# ---------------------------------------------------------------- the same study
def _same_spec(study: Path, spec: SweepConfig) -> None:
    path = study / "study.yaml"
    old = validate(SweepConfig, yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
    if changed := diff(_by_index(old.as_dict()), _by_index(spec.as_dict())):
        fields = "; ".join(f"{name}: {a!r} there, {b!r} now" for name, a, b in changed[:4])
        raise UserError(f"{study} holds a study of another spec ({fields}); choose another directory")


def _by_index(value: Any) -> Any:
    """Lists as mappings by index, so that a difference names the entry."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return {str(i): _by_index(item) for i, item in enumerate(value)}
    return {key: _by_index(item) for key, item in value.items()} if isinstance(value, dict) else value


def _same_cells(study: Path, plan: Plan) -> Plan:
    """The stored plan, if the spec's cells still resolve to its configs (the base config may have changed since)."""
    stored = read_study(study)
    old = {cell.name: cell for cell in stored.cells if not cell.extra}
    if list(old) != [cell.name for cell in plan.cells]:
        odd = next(iter(set(old) ^ {cell.name for cell in plan.cells}), "their order")
        raise UserError(f"{study} was planned with other cells ({odd}); choose another directory")
    for cell in plan.cells:
        if old[cell.name].hash != cell.hash:
            changed = _differences(old[cell.name], cell)
            raise UserError(f"{study}: cell {cell.name} was planned otherwise ({changed}); choose another directory")
    return stored


def _differences(old: Cell, new: Cell) -> str:
    changed = diff(old.config.as_dict(), new.config.as_dict())
    return "; ".join(f"{name}: {a!r} there, {b!r} now" for name, a, b in changed[:4])
