"""Reading a run directory that may be unfinished or damaged: what can be read, and in words what cannot.

The training loop refuses a damaged file, because it would build on it; a ledger must show the run all the same.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

RUN_FILES = ("config.yaml", "metrics.jsonl", "result.json")
SKIPPED = {"checkpoints", "leases", "failures", "report_files", "__pycache__"}


def find_runs(root: Path) -> Iterator[Path]:
    """Run directories at or under `root`, in sorted order; runs, hidden folders and links are not searched."""
    if any((root / name).is_file() for name in RUN_FILES):
        yield root
        return
    planned = set(cells_by_directory(root))
    folders = (
        sorted(e.name for e in os.scandir(root) if e.is_dir(follow_symlinks=False)) if os.access(root, os.R_OK) else []
    )
    for name in folders:
        if name in SKIPPED or name.startswith("."):
            continue
        if name in planned:
            yield root / name
        else:
            yield from find_runs(root / name)


def read_object(path: Path) -> tuple[dict[str, Any], str | None]:
    """A JSON or YAML mapping and no warning; `{}` and None if there is no file, `{}` and a warning if damaged."""
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except FileNotFoundError:
        return {}, None
    except (OSError, ValueError, yaml.YAMLError) as error:
        return {}, f"{path.name}: not readable ({str(error).splitlines()[0]})"
    return (data, None) if isinstance(data, dict) else ({}, f"{path.name}: not a mapping of fields")


def read_lines(path: Path) -> tuple[list[dict[str, Any]], str | None]:
    """The rows of a JSONL file in order of step, of a repeated step the last one, and what was wrong."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return [], None
    except OSError as error:
        return [], f"{path.name}: not readable ({error.strerror})"
    rows: dict[Any, dict[str, Any]] = {}
    bad = repeated = 0
    for line in raw.splitlines():
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:  # cut, or not UTF-8
            bad += 1
            continue
        if not isinstance(row, dict) or not math.isfinite(number(row.get("step"))):
            bad += 1
            continue
        repeated += row["step"] in rows
        rows[row["step"]] = row
    words = [f"{bad} unreadable lines left out"] if bad else []
    words += [f"{repeated} repeated steps, the later rows kept"] if repeated else []
    return [rows[step] for step in sorted(rows)], f"{path.name}: {', '.join(words)}" if words else None


def number(value: Any) -> float:
    """`value` as a float; nan for anything that is not a number (null, text, a truth value, a mapping)."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted names; lists become compact JSON text, so that every value is a scalar."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(value) if isinstance(value, (list, tuple)) else value
    return flat


def cells_by_directory(study: Path) -> dict[str, dict[str, Any]]:
    """The cells of `study`/plan.json by their run directory's name, `<name>-<hash8>`; none without a readable plan."""
    cells = read_object(study / "plan.json")[0].get("cells")
    good = [c for c in cells if isinstance(c, dict) and "name" in c and "hash" in c] if isinstance(cells, list) else []
    return {f"{cell['name']}-{str(cell['hash'])[:8]}": cell for cell in good}
