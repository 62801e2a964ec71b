"""The run directory: one folder that is the whole record of a run, and all that anything downstream reads.

    config.yaml     resolved and complete        env.json       versions, devices, flags, git; each start
    metrics.jsonl   one row a logged step        evals.jsonl    one row an evaluation
    checkpoints/    see checkpoints.py           result.json    written once, last; its presence means done
    tokenizer/      the tokenizer files of an imported model
    time.json       where the time went so far, as of the last sign of life (goodput.py)
    lock            held by the process that trains (lock.py)
    leases/         in its place where the run is in a bucket (mirror.py)

Every file is whole or absent at any moment, except that a crash may cut the last line of a .jsonl file.
"""

from __future__ import annotations

import datetime
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llamax.config.files import read_yaml
from llamax.config.load import diff, dump_yaml, validate
from llamax.config.run import IDENTITY, RunConfig
from llamax.errors import UserError
from llamax.storage.files import write_atomic
from llamax.train.env import environment
from llamax.train.files import writing
from llamax.train.lock import locked
from llamax.train.mirror import Mirror, mirrored
from llamax.train.mirror import stage as stage
from llamax.train.rows import append_rows, drop_rows_after, plain, read_rows, repair_tail

CONFIG, ENV, RESULT, TIME = "config.yaml", "env.json", "result.json", "time.json"
METRICS, EVALS, CHECKPOINTS, TOKENIZER = "metrics.jsonl", "evals.jsonl", "checkpoints", "tokenizer"


class Run:
    """An open run directory. `writer` is False in all but the leader of a job: they write nothing."""

    def __init__(self, path: Path, writer: bool, mirror: Mirror | None = None) -> None:
        self.path, self._writer, self._mirror = path, writer, mirror
        self.newest: dict[str, dict[str, Any]] = {}  # the last row of each file, for a checkpoint to carry

    @property
    def checkpoints(self) -> Path:
        """Where `Checkpoints` belongs."""
        return self.path / CHECKPOINTS

    @property
    def result(self) -> dict[str, Any] | None:
        """The content of result.json, or None while the run is not done."""
        return read_result(self.path)

    def log(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows, each with a `step`, to metrics.jsonl in one write. Raises UserError when the disk refuses.

        Waits for a bucket that has been away for long.
        """
        if self._mirror is not None:
            self._mirror.check()
        if self._writer and rows:
            append_rows(self.path / METRICS, rows)
            self.newest[METRICS] = plain(rows[-1])

    def stopping(self, stopping: Callable[[], bool]) -> None:
        """How to tell that the run was asked to stop, and should wait for no bucket."""
        if self._mirror is not None:
            self._mirror.stopping = stopping

    def log_eval(self, row: Mapping[str, Any]) -> None:
        """Append one row, with a `step`, to evals.jsonl, in place of one of that step: a resumed run evaluates again.

        Raises UserError when the disk refuses.
        """
        if self._writer:
            drop_rows_after(self.path / EVALS, row["step"] - 1)
            append_rows(self.path / EVALS, [row])
            self.newest[EVALS] = plain(row)

    def rewind(self, step: int, newest: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """Drop the rows after `step`, to log those steps again; put back those of `newest` that were cut off.

        `newest` is what `Run.newest` was at `step`. Raises UserError for a damaged line.
        """
        self.newest = {name: dict(row) for name, row in (newest or {}).items()}
        for name in (METRICS, EVALS) if self._writer else ():
            drop_rows_after(self.path / name, step)
            row, rows = self.newest.get(name), read_rows(self.path / name)
            if row is not None and (not rows or rows[-1]["step"] < row["step"]):
                append_rows(self.path / name, [row])

    def sync(self) -> None:
        """Bring the rows to the disk, so that no checkpoint outlives its rows. Raises UserError when it refuses."""
        for name in (METRICS, EVALS) if self._writer else ():
            if (self.path / name).exists():
                with writing(self.path / name), open(self.path / name, "rb") as file:
                    os.fsync(file.fileno())

    def log_time(self, step: int, seconds: Mapping[str, float]) -> None:
        """Put seconds by kind, as of now, into time.json. Raises UserError when the disk refuses."""
        if self._writer:
            _write_json(self.path / TIME, {"time": time.time(), "step": step, "seconds": dict(seconds)})

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write result.json, which ends the run; the rows reach the disk first. Raises UserError when it refuses."""
        self.sync()
        if self._writer:
            _write_json(self.path / RESULT, plain(result))


@contextmanager
def open_run(
    path: Path,
    config: RunConfig,
    fingerprint: str,
    precision: Mapping[str, str] | None = None,
    *,
    writer: bool = True,
) -> Iterator[Run]:
    """Create the run directory, or open it to continue: `with open_run(...) as run:`.

    A run is the same when the sections `IDENTITY` of its config and the `fingerprint` of its data are; the other
    sections may change, and config.yaml then holds the newest. A finished run is opened and left as it is. `precision`,
    the operand type and why, is noted in env.json. With writer=False it is opened to look on: the leader of the job has
    the lock.

    Raises:
        UserError: another run lives there, another process is using it, a damaged row or file, or the disk refuses.
    """
    path = Path(path)
    if not writer:
        yield Run(path, writer=False)
        return
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    with locked(path), mirrored(path) as mirror:
        if is_run(path):
            _check_same_run(path, config, fingerprint)
        else:
            _check_unused(path)
        if read_result(path) is None:
            _start_session(path, config, fingerprint, precision)
        yield Run(path, writer=True, mirror=mirror)


# ---------------------------------------------------------------- readers
def is_run(path: Path) -> bool:
    """Whether a folder holds a run."""
    return (Path(path) / CONFIG).is_file()


def read_config(run_dir: Path) -> RunConfig:
    """The config of a run. Raises UserError if there is none or it is damaged."""
    path = Path(run_dir) / CONFIG
    if not path.is_file():
        raise UserError(
            f"{run_dir}: not a run directory, it has no {CONFIG}; give the folder that `llamax train` wrote"
        )
    return validate(RunConfig, read_yaml(path), str(path))


def read_result(run_dir: Path) -> dict[str, Any] | None:
    """result.json, None while the run is not done; a number that was not finite is None. UserError if damaged."""
    return _read_json(Path(run_dir) / RESULT)


def read_env(run_dir: Path) -> dict[str, Any] | None:
    """env.json, None where there is none. Raises UserError if damaged."""
    return _read_json(Path(run_dir) / ENV)


def read_time(run_dir: Path) -> dict[str, Any] | None:
    """time.json: `time` (since 1970), `step`, `seconds` by kind; None where there is none. UserError if damaged."""
    return _read_json(Path(run_dir) / TIME)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, see `read_rows`."""
    return read_rows(Path(run_dir) / METRICS)


def read_evals(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of evals.jsonl, see `read_rows`."""
    return read_rows(Path(run_dir) / EVALS)


# ---------------------------------------------------------------- opening
def _check_same_run(path: Path, config: RunConfig, fingerprint: str) -> None:
    there, asked = read_config(path).as_dict(), config.as_dict()
    differ = [row for section in IDENTITY for row in diff(there[section] or {}, asked[section] or {}, f"{section}.")]
    fields = [f"{field} is {_shown(old)} there and {_shown(new)} here" for field, old, new in differ]
    known = (read_env(path) or {}).get("fingerprint", fingerprint)
    if known != fingerprint:
        fields.append(f"the data's fingerprint is {known[:12]} there and {fingerprint[:12]} here")
    if fields:
        more = f"; and {len(fields) - 4} more" if len(fields) > 4 else ""
        raise UserError(
            f"{path} holds another run: {'; '.join(fields[:4])}{more}; "
            "give another run directory, ask for the same run, or delete this one"
        )


def _check_unused(path: Path) -> None:
    if found := [name for name in (METRICS, EVALS, CHECKPOINTS, RESULT) if (path / name).exists()]:
        raise UserError(
            f"{path}: {found[0]} is there and {CONFIG} is not, so this is not a run to continue; "
            f"put {CONFIG} back, or give another folder"
        )


def _start_session(path: Path, config: RunConfig, fingerprint: str, precision: Mapping[str, str] | None) -> None:
    """Write env.json, then config.yaml, whose presence makes the folder a run; repair the rows."""
    before = read_env(path) or {}
    now = environment() | ({} if precision is None else {"precision": dict(precision)})
    session: dict[str, Any] = {"started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    if changed := {key: before[key] for key in now if key in before and before[key] != now[key]}:
        session["before"] = changed  # what the previous session ran on, where it differs
    _write_json(path / ENV, {"fingerprint": fingerprint, **now, "sessions": [*before.get("sessions", []), session]})
    text = dump_yaml(config)
    if not is_run(path) or (path / CONFIG).read_text(encoding="utf-8") != text:
        with writing(path / CONFIG):
            write_atomic(path / CONFIG, text)
    for name in (METRICS, EVALS):
        repair_tail(path / name)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _write_json(path: Path, data: Any) -> None:
    with writing(path):
        write_atomic(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); restore it or delete it") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object; restore it or delete it")
    return data
