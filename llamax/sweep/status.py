"""Where a study stands, read from its files alone, at any time, on any machine."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from llamax.errors import UserError
from llamax.storage.copies import at_hand, refresh
from llamax.sweep.attempt import progress_path
from llamax.sweep.claim import holder, shared_now
from llamax.sweep.study import failure_path, read_json
from llamax.sweep.throughput import wall_seconds
from llamax.train.goodput import total
from llamax.train.run_dir import CHECKPOINTS, TIME

STATES = ("done", "diverged", "running", "failed", "pending")
SHOWN = ("step", "tokens", "loss", "tokens_per_second", "seconds_left", "phase")


def status(study: Path, only: Iterable[str] | None = None) -> dict[str, Any]:
    """The state of every cell of a study (or of those in `only`), and an estimate of the time left.

    `cells` holds a row a cell: name, run, state (of `STATES`), tags, step, first_step (a branch's), steps, tokens,
    loss (held-out once done), tokens_per_second, seconds, seconds_left, estimate_seconds, error (first line), attempts
    (claims so far), spent (seconds by kind, see train/goodput.py).
    `counts` by state; `spent` by kind, the sum of the cells'; `left` cells neither finished nor failed; `seconds_left`
    for all of them with the workers now running.

    Raises:
        UserError: `study` has no readable plan.
    """
    study = at_hand(study)
    refresh(study)
    chosen = None if only is None else set(only)
    cells = [cell for cell in _planned(study) if chosen is None or cell["name"] in chosen]
    now = shared_now(study) if (study / "leases").is_dir() else 0.0
    rows = [_row(study, cell, now) for cell in cells]
    counts = Counter(row["state"] for row in rows)
    left = [row for row in rows if row["state"] in ("running", "pending")]
    return {
        "study": study.name,
        "cells": rows,
        "counts": {state: counts[state] for state in STATES},
        "spent": total(row["spent"] for row in rows),
        "left": len(left),
        "seconds_left": _seconds_left(rows, left),
    }


def _row(study: Path, cell: Mapping[str, Any], now: float) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": cell["name"],
        "state": "pending",
        "tags": cell["tags"],
        "run": cell["run"],
        "step": 0,
        "first_step": (_branch(cell) or {}).get("step", 0),
    }
    row |= {
        "steps": cell["steps"],
        "tokens": 0,
        "loss": None,
        "tokens_per_second": None,
        "seconds": None,
        "seconds_left": None,
    }
    row |= {"phase": None, "estimate_seconds": cell["seconds"], "error": None, "attempts": 0}
    row["spent"] = (read_json(study / cell["run"] / TIME) or {}).get("seconds", {})
    result = study / cell["run"] / "result.json"
    if (done := _parsed(result)) is not None:
        taken = {key: done.get(key) for key in ("tokens", "tokens_per_second", "seconds")}
        state = "diverged" if done.get("status") == "diverged" else "done"
        return (
            row
            | taken
            | {"state": state, "step": done.get("steps"), "loss": done.get("eval_loss"), "error": done.get("cause")}
        )
    lease = holder(study, cell["name"], now)
    progress = read_json(progress_path(study, cell["name"])) or {}
    row |= {key: progress[key] for key in SHOWN if progress.get(key) is not None}
    row["attempts"] = 0 if lease is None else lease.number + 1
    if (failure := read_json(failure_path(study, cell["name"]))) is not None:
        return row | {
            "state": "failed",
            "error": (str(failure.get("error", "")).splitlines() or [""])[0],
            "seconds_left": None,
        }
    if lease is not None and lease.held:
        return row | {"state": "running"}
    return row | {"tokens_per_second": None, "seconds_left": None, "phase": _waits(study, cell)}


def _branch(cell: Mapping[str, Any]) -> dict[str, Any] | None:
    return (cell.get("config") or {}).get("branch")


def _waits(study: Path, cell: Mapping[str, Any]) -> str | None:
    """Of a branch whose trunk has not come to it: what it waits for."""
    branch = _branch(cell)
    if branch is None or (study / branch["trunk"] / CHECKPOINTS / str(branch["step"])).is_dir():
        return None
    return f"waits for {cell['trunk']} at step {branch['step']:,}"


def _seconds_left(rows: list[dict[str, Any]], left: list[dict[str, Any]]) -> float:
    """Running cells by their own estimate, pending ones by the plan's, corrected by how long finished cells took."""
    done = [row for row in rows if row["state"] == "done" and row["seconds"] and row["estimate_seconds"]]
    scale = sum(row["seconds"] for row in done) / sum(row["estimate_seconds"] for row in done) if done else 1.0

    def needs(row: dict[str, Any]) -> float:
        if row["seconds_left"] is not None:
            return row["seconds_left"]
        own = row["steps"] - row["first_step"]
        return row["estimate_seconds"] * scale * (1 - max(row["step"] - row["first_step"], 0) / max(own, 1))

    workers = sum(row["state"] == "running" for row in left)
    return wall_seconds([needs(row) for row in left], workers)


def _planned(study: Path) -> list[dict[str, Any]]:
    path = study / "plan.json"
    try:
        stat = path.stat()
        return _read_cells(path, stat.st_mtime_ns, stat.st_size)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: no readable plan ({error}); is {study} a study directory?") from None


@lru_cache(maxsize=8)
def _read_cells(path: Path, mtime: int, size: int) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def _parsed(path: Path) -> dict[str, Any] | None:
    """result.json, read once: it is written once."""
    return _read_result(path, path.stat().st_mtime_ns) if path.exists() else None


@lru_cache(maxsize=4096)
def _read_result(path: Path, mtime: int) -> dict[str, Any] | None:
    return read_json(path)
