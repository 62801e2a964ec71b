"""The prediction ledger: what was claimed, from which data, before the run existed; a chain that shows any edit.

One JSON object a line, appended and never changed. Each has its own `sha256` (of its other fields) and that of the
line before (`previous`); the head file beside it says how many lines there are and what the last one's hash is, so that
cutting the end off shows too. Whoever rewrites every line and the head is not found out by the files alone: keep the
last hash elsewhere, in a commit or a message.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamax.errors import UserError
from llamax.scaling.laws import Scalar
from llamax.scaling.prediction import score
from llamax.scaling.reading import KINDS
from llamax.storage.copies import at_hand, publish
from llamax.storage.files import write_atomic
from llamax.train.files import writing

if TYPE_CHECKING:
    import pandas as pd

NAME = "predictions.jsonl"
FIRST = "0" * 64  # what the first record follows
NEAR = 1.05  # compute, or N, that differ by less than this factor are the same
Record = dict[str, Any]


def ledger_path(data: str | Path) -> Path:
    """Where predictions about `data` live: in a study's folder, or beside a table of runs under its name."""
    data = at_hand(data)
    return data.with_name(f"{data.stem}.{NAME}") if data.suffix.lower() in KINDS else data / NAME


def digest(content: Mapping[str, Any]) -> str:
    """sha256 of a record's fields, `sha256` aside, as JSON with sorted keys and no spaces."""
    rest = {name: value for name, value in content.items() if name != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def data_digest(frame: pd.DataFrame) -> str:
    """sha256 of the numbers a fit used: `n,d,flops,loss` of every row, shortest exact decimals, sorted lines."""
    lines = sorted(
        ",".join(repr(float(row[name])) for name in ("n", "d", "flops", "loss")) for _, row in frame.iterrows()
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


# ---------------------------------------------------------------- reading
def read_predictions(path: str | Path) -> list[Record]:
    """Every record of a prediction ledger, oldest first, after its chain was verified; none without a file.

    Raises:
        UserError: a record that was edited, removed, moved, repeated or cut; says which.
    """
    path = Path(path)
    if not path.exists():
        _check_head(path, [])
        return []
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        return _verified(path, file.read())


def _verified(path: Path, raw: bytes) -> list[Record]:
    lines = raw.split(b"\n")
    if lines[-1]:
        raise _broken(path, f"line {len(lines)} is cut off: its writing was interrupted; remove it")
    records = [_parsed(path, number, line) for number, line in enumerate(lines[:-1], 1)]
    for number, record in enumerate(records, 1):
        if record["sha256"] != digest(record):
            raise _broken(path, f"record {record['index']} (line {number}) was edited: its content is not its sha256's")
    order = [record["index"] for record in records]
    if repeated := sorted({index for index in order if order.count(index) > 1}):
        raise _broken(path, f"record {repeated[0]} is there {order.count(repeated[0])} times")
    if gone := sorted(set(range(max(order, default=-1) + 1)) - set(order)):
        raise _broken(path, f"record {', '.join(map(str, gone))} was removed")
    if order != sorted(order):
        first = next(i for i, index in enumerate(order) if index != i)
        raise _broken(path, f"records were reordered: line {first + 1} holds record {order[first]}")
    before = FIRST
    for record in records:
        if record["previous"] != before:
            index = record["index"]
            raise _broken(path, f"record {index} does not follow record {index - 1}: one of them was replaced")
        before = record["sha256"]
    _check_head(path, records)
    return records


def _parsed(path: Path, number: int, line: bytes) -> Record:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    known = isinstance(record, dict) and isinstance(record.get("index"), int) and record["index"] >= 0
    if not known or not {"sha256", "previous"} <= set(record):
        raise _broken(path, f"line {number} was edited: it is no record")
    return record


def _check_head(path: Path, records: Sequence[Record]) -> None:
    """The head may be one record behind: a process can die between the line and the head."""
    head = _head(path)
    if not head.exists():
        if len(records) > 1:
            raise _broken(path, f"its head file {head.name} was removed")
        return
    try:
        count, last = json.loads(head.read_text())
    except (ValueError, TypeError):
        raise _broken(path, f"its head file {head.name} was edited: it is not [records, sha256]") from None
    if len(records) < count:
        which = f"record {len(records)}" if count == len(records) + 1 else f"records {len(records)} to {count - 1}"
        raise _broken(path, f"{which} was removed from the end")
    if count and records[count - 1]["sha256"] != last:
        raise _broken(path, f"record {count - 1} was replaced: its sha256 is not the one in {head.name}")
    if len(records) > count + 1:
        raise _broken(path, f"its head file {head.name} was edited: it knows {count} of {len(records)} records")


def _head(path: Path) -> Path:
    return path.with_name(f"{path.name}.head")


def _broken(path: Path, what: str) -> UserError:
    return UserError(
        f"{path}: {what}; nothing in it can be trusted until it is restored from a copy, and nothing is added to it"
    )


# ---------------------------------------------------------------- writing
def register(
    path: str | Path, claim: Mapping[str, Any], *, check: Callable[[Sequence[Record]], None] = lambda records: None
) -> Record:
    """Append `claim` (JSON values) to the ledger with its date and place in the chain; returns the record.

    `check` sees the verified records while no other process can append, and raises to refuse. Any number of processes
    may register at once: each waits for the lock, and a record is on the disk when this returns.

    Raises:
        UserError: a broken chain, a value that JSON has no word for (nan), or the disk refuses.
    """
    path = Path(path)
    with writing(path), _locked(path) as file:
        records = _verified(path, file.read())
        check(records)
        record = dict(claim) | {
            "index": len(records),
            "registered": datetime.now(UTC).isoformat(timespec="seconds"),
            "previous": records[-1]["sha256"] if records else FIRST,
        }
        try:
            record["sha256"] = digest(record)
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: the claim holds a value that cannot be recorded ({error})") from None
        line = json.dumps(record, separators=(",", ":"), allow_nan=False) + "\n"
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())
        write_atomic(_head(path), json.dumps([len(records) + 1, record["sha256"]]) + "\n")
    publish(path)  # first the one that decides between two who append to a bucket
    publish(_head(path), over=True)
    return record


@contextmanager
def _locked(path: Path) -> Iterator[Any]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        yield file


# ---------------------------------------------------------------- joining
def near(a: Scalar, b: Scalar) -> bool:
    """Whether two amounts of compute, or two sizes, count as the same: within 5 %."""
    return a > 0 and b > 0 and abs(math.log(a / b)) < math.log(NEAR)


def scores(records: Sequence[Mapping[str, Any]], runs: pd.DataFrame) -> list[Record]:
    """Each record with how it did: one row a finished run that answers it, or one with `measured` None.

    runs: columns `run`, `n`, `flops`, `loss`, finished runs only. A record that names its `run` is answered by that run
    alone, any other by every run whose compute and N are within 5 % of the claim's.
    """
    rows: list[Record] = []
    for record in records:
        if record.get("run") is not None:
            hits = runs[runs["run"] == record["run"]]
        else:
            close = [
                near(f, record["flops"]) and near(n, record["n"]) for f, n in zip(runs["flops"], runs["n"], strict=True)
            ]
            hits = runs[close]
        for row in hits.to_dict("records"):
            rows.append(dict(record) | score(record, row["loss"]).as_dict() | {"run": row["run"]})
        if hits.empty:
            rows.append(dict(record) | {"measured": None, "miss_percent": None, "inside": None, "words": "not run yet"})
    return rows
