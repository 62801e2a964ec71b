"""Which column of a table of runs is what: those named, else the usual names; and which of its rows are finished."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from llamax.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

LEDGER_COLUMNS = {"n": "n", "d": "tokens", "loss": "eval_loss", "flops": "flops_6n", "budget": "budget"}
# Where no column is named, the first of these that the table has, with anything in it.
USUAL = {
    "n": ("n", "params", "N"),
    "d": ("tokens", "d", "D"),
    "loss": ("eval_loss", "loss"),
    "flops": ("flops_6n", "flops", "C"),
    "budget": ("budget",),
    "run": (),  # never guessed: `checkpoint_words` says when one should be named
}
COUNTS = {"matmul": "n", "total": "params_total", "active": "params_active"}  # conventions of a ledger, by column
FLOPS = {name: f"flops_{name}" for name in ("6n", "chinchilla", "palm", "causal")}
STATUSES = {"done", "diverged", "failed", "running", "unfinished"}  # of a ledger


def read_runs(path: Path) -> pd.DataFrame:
    """Every run of a study directory or a table, finished or not; what reading it took for granted is in
    `attrs["warnings"]`. Raises UserError where there is no such table."""
    from llamax.report.ledger import ledger
    from llamax.scaling import read_table

    return ledger(path) if path.is_dir() else read_table(path)


def finished_runs(frame: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The rows that a law may be fitted to, and in words which were left out: of a ledger, also one saved as a table,
    the finished runs without trunks; of a table whose `status` means something else, or that has none, all."""
    from llamax.report.ledger import usable_runs

    if "status" not in frame:
        return frame, []
    seen = set(frame["status"].dropna())
    if not seen <= STATUSES:
        return frame, [f"column 'status' ({', '.join(sorted(map(str, seen))[:4])}) is not read: all rows are used"]
    return usable_runs(frame)


def runs_to_fit(path: Path, table: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The finished runs of a table that `read_runs` read from `path`, and in words what was taken for granted and left
    out. Raises UserError where none is finished."""
    frame, words = finished_runs(table)
    if frame.empty:
        raise UserError(f"{path}: no run is finished; {words[-1] if words else 'it holds no run yet'}")
    return frame, [*table.attrs.get("warnings", []), *words]


def find_columns(
    frame: pd.DataFrame,
    asked: Mapping[str, str | None],
    *,
    count: str | None = None,
    flop_count: str | None = None,
) -> dict[str, str | None]:
    """Columns of n, d, loss, flops, budget, run: those asked for, else of the convention, else the first usual name.

    Raises:
        UserError: one that was asked for is not in the table, or no such convention.
    """
    asked = dict(asked)
    for role, chosen, table in (("n", count, COUNTS), ("flops", flop_count, FLOPS)):
        if chosen is None:
            continue
        if chosen not in table:
            raise UserError(f"convention {chosen!r}: choose from {', '.join(table)}")
        if table[chosen] not in frame:
            raise UserError(f"convention {chosen}: the table has no column {table[chosen]!r}; name one of its columns")
        asked[role] = asked.get(role) or table[chosen]
    names = ", ".join(map(str, frame.columns))
    if wrong := [f"{name!r} (for {role})" for role, name in asked.items() if name and name not in frame]:
        raise UserError(f"column {', '.join(wrong)}: not in the table; it has {names}")
    return {
        role: asked.get(role) or next((name for name in usual if name in frame and frame[name].notna().any()), None)
        for role, usual in USUAL.items()
    }


def need_columns(frame: pd.DataFrame, columns: Mapping[str, str | None], how: str) -> None:
    """Raises UserError unless n, loss and one of d and flops were found; `how` names one, as in `--{role} COLUMN`."""
    missing = [role for role in ("n", "loss") if not columns[role]]
    missing += ["d"] if not columns["d"] and not columns["flops"] else []
    if missing:
        options = ", ".join(how.format(role=role) for role in missing)
        names = ", ".join(map(str, frame.columns))
        raise UserError(f"no column for {', '.join(missing)}: the table has {names}; name it: {options}")
