"""The ledger: one row a run directory, as a DataFrame. What is not known is missing (nan or None), never zero."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamax.errors import UserError
from llamax.report.branching import BRANCHING, TRAINED, branching, saving
from llamax.report.read import cells_by_directory, find_runs, flatten, number, read_lines, read_object
from llamax.storage.copies import at_hand
from llamax.storage.files import arriving

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

TEXTS = ("run", "study", "name", "hash", "status", "cause")
TAGS = ("budget", "size", "seed")
# result.json's numbers, in the order of the columns; steps and tokens of an unfinished run are those logged so far
SIZES = ("n", "params_total", "params_active", "steps", "tokens", "unique_tokens", "epochs")
LOSSES = ("train_loss", "eval_loss", "eval_bits_per_byte", "eval_tokens", "last_loss")
COSTS = ("flops_6n", "flops_chinchilla", "flops_palm", "flops_causal", "seconds", "tokens_per_second")
FIELDS = (
    *("model.d_model", "model.layers", "model.vocab_size", "model.attention.heads"),
    *("model.mlp.kind", "model.position.kind"),
    *("optimizer.kind", "optimizer.lr", "optimizer.weight_decay", "schedule.kind"),
    *("train.batch_size", "train.seq_len", "train.grad_accumulation", "train.seed"),
    *("data.corpus", "data.store", "data.tokenizer.kind"),
)
VARYING = (
    "model.",
    "data.",
    "optimizer.",
    "schedule.",
    "train.",
)  # sections whose other fields are columns when runs differ
HEARTBEAT_SECONDS = 180.0
NAMED = 8  # runs that a warning names


def ledger(path: str | Path) -> pd.DataFrame:
    """One row a run directory under `path` (a run, a study, a folder of studies), finished or not.

    Columns: `run` (path relative to `path`), `study`, `name`, `hash`, `status` ("done", "diverged", "failed",
    "running", "unfinished"), `cause`; the study's tags (`budget`, `size`, `seed`, ...; `tag.<x>` where the name is
    taken); the numbers of result.json (losses in nats per token, `n` the parameters that plans and fits use);
    `stage` ("trunk", "branch", or "whole" for a run of its own), `trunk` (the hash of the trunk, also of a trunk),
    `branch_step`, and `trained_tokens` and `trained_flops_*`, the cost of a run's own steps, where steps, tokens and
    `flops_*` of a branch are of its whole horizon, as if it had been trained from scratch (see report/branching.py);
    `last_loss`, the last logged training loss; config fields by dotted name, the usual ones and every one in which the
    runs differ; `fingerprint`; `warnings` (text, None when all was readable). An unfinished run has no train_loss or
    eval_loss.

    Raises:
        UserError: `path` is not a folder.
    """
    import pandas as pd

    root = _folder(path)
    records = [_record(root, run) for run in find_runs(root)]
    flats = [record.pop("config") for record in records]
    names = [*FIELDS, *_differing(flats)]
    rows = [record | {name: flat.get(name) for name in names} for record, flat in zip(records, flats, strict=True)]
    tags = list(dict.fromkeys(key for row in rows for key in row["tags"]))
    for row in rows:
        given = row.pop("tags")
        row |= {_tag_column(tag, names): given.get(tag) for tag in (*TAGS, *tags)}
    extra = [column for tag in tags if (column := _tag_column(tag, names)) not in TAGS]
    columns = [*TEXTS, *TAGS, *extra, *SIZES, *LOSSES, *COSTS, *BRANCHING, *names, "fingerprint", "warnings"]
    frame = pd.DataFrame(rows, columns=pd.Index(columns))
    for column in (*SIZES, *LOSSES, *COSTS, "branch_step", *TRAINED):
        frame[column] = frame[column].astype(float)
    for column in (*TAGS, *extra, *names):
        frame[column] = _numbers_if_all(frame[column])
    return frame


def curves(path: str | Path, *, evals: bool = False) -> pd.DataFrame:
    """Every logged row of every run under `path` in long form: `run`, `step`, `tokens`, `loss`, `seconds`, `flops_*`...

    evals: read evals.jsonl (held-out loss) instead of metrics.jsonl (training loss). Losses in nats per token. Values
    that are not numbers are nan. Unreadable lines are left out; `frame.attrs["warnings"]` says how many, by run.

    Raises:
        UserError: `path` is not a folder.
    """
    import pandas as pd

    root = _folder(path)
    first = ["run", "step", "tokens", "loss", "seconds"]
    rows, words = [], {}
    for run in find_runs(root):
        lines, warning = read_lines(run / ("evals.jsonl" if evals else "metrics.jsonl"))
        name = _relative(root, run)
        rows += [{"run": name} | {key: number(value) for key, value in line.items() if key != "run"} for line in lines]
        if warning:
            words[name] = warning
    frame = pd.DataFrame(rows)
    others = [column for column in frame.columns if column not in first]
    frame = frame.reindex(columns=pd.Index(first + others))
    frame.attrs["warnings"] = words
    return frame


def usable_runs(frame: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The finished runs of a ledger that a law may be fitted to, and in words which were left out."""
    import pandas as pd

    words = []
    if "stage" not in frame:  # a table of another version, or of somebody else
        frame = frame.assign(stage=None)
    good = (frame["status"] == "done") & (frame["stage"] != "trunk")
    if (~good).any():
        why = frame["status"].where(frame["status"] != "done", "a trunk: its learning rate has not decayed")
        names = frame["run"] if "run" in frame else pd.Series([f"row {i}" for i in frame.index], index=frame.index)
        left = [f"{name} ({reason})" for name, reason in zip(names[~good], why[~good], strict=True)]
        shown = ", ".join(left[:NAMED]) + (f" and {len(left) - NAMED} more" if len(left) > NAMED else "")
        words.append(f"left out of the fit: {len(left)} of {len(frame)} rows: {shown}")
    return frame[good], words


def save_ledger(frame: pd.DataFrame, file: str | Path) -> Path:
    """Write a ledger as CSV or Parquet, by the suffix of `file`; the parent folder is made.

    Raises:
        UserError: another suffix, or Parquet without pyarrow.
    """
    file = Path(file)
    if file.suffix not in (".csv", ".parquet"):
        raise UserError(f"{file}: unknown kind of table {file.suffix!r}; give a name ending in .csv or .parquet")
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with arriving(file) as part:
            if file.suffix == ".csv":
                frame.to_csv(part, index=False)
            else:
                frame.to_parquet(part, index=False)
    except ImportError:
        raise UserError(
            f"{file}: writing Parquet needs pyarrow; pip install 'llamax[parquet]', or give a .csv name"
        ) from None
    return file


def ledger_table(frame: pd.DataFrame) -> Table:
    """The ledger as a rich table of at most 100 columns: who, how big, how long, which loss."""
    from rich.table import Table
    from rich.text import Text

    from llamax.report.words import count, decimals, power

    table = Table(title=None, box=None, header_style="bold", pad_edge=False)
    table.add_column("run", max_width=30, overflow="ellipsis", no_wrap=True)
    for name in ("status", "budget", "N", "D", "lr", "steps", "train", "eval", "bits/B", "sec"):
        table.add_column(name, justify="left" if name == "status" else "right", no_wrap=True)
    colours = {"done": "green", "diverged": "red", "failed": "red", "running": "cyan", "unfinished": "yellow"}
    for row in frame.to_dict("records"):
        budget = row["budget"]
        table.add_row(
            Text(row["run"]),
            Text(row["status"] + ("!" if isinstance(row["warnings"], str) else ""), style=colours[row["status"]]),
            power(budget) if isinstance(budget, (int, float)) else Text(str(budget or "")),
            *(count(row[key]) for key in ("n", "tokens")),
            decimals(row["optimizer.lr"], significant=2),
            decimals(row["steps"], 0),
            *(decimals(row[key], 4) for key in ("train_loss", "eval_loss", "eval_bits_per_byte")),
            decimals(row["seconds"], 0),
        )
    if frame["stage"].eq("branch").any():
        table.caption = saving(frame)
    return table


# ---------------------------------------------------------------- one run
def _record(root: Path, run: Path) -> dict[str, Any]:
    """One run as columns, with its flat config under `config` and its study tags under `tags`."""
    config, w1 = read_object(run / "config.yaml")
    result, w2 = read_object(run / "result.json")
    lines, w3 = read_lines(run / "metrics.jsonl")
    cell, study = _cell(run)
    last = lines[-1] if lines else {}
    row: dict[str, Any] = dict.fromkeys(TEXTS)
    row |= {"run": _relative(root, run), "study": _relative(root, study) if study else None}
    row["name"] = _text(result.get("name")) or _text(cell.get("name")) or run.name.rpartition("-")[0] or run.name
    row["hash"] = _text(result.get("hash")) or _text(cell.get("hash")) or run.name.rpartition("-")[2]
    row["status"], row["cause"] = _status(run, study, result, damaged=w2 is not None)
    row |= {key: number(result.get(key)) for key in (*SIZES, *LOSSES, *COSTS)}
    row["last_loss"] = number(last.get("loss"))
    if not result:  # the log knows how far it came; result.json alone knows the final losses
        row |= {"steps": number(last.get("step"))}
        row |= {key: number(last.get(key)) for key in ("tokens", "tokens_per_second", "seconds", *COSTS[:4])}
        row["n"], w4 = _planned_size(cell, config)
    else:
        w4 = None
    row |= branching(config, row)
    row["fingerprint"] = _text(result.get("fingerprint") or read_object(run / "env.json")[0].get("fingerprint"))
    missing = None if (config or w1) else "config.yaml: missing"
    row["warnings"] = "; ".join(w for w in (w1, w2, w3, w4, missing) if w) or None
    tags = cell.get("tags")
    row["tags"] = {k: v for k, v in flatten(tags).items()} if isinstance(tags, Mapping) else {}
    row["config"] = flatten(config) | _layers(config)
    return row


def _status(run: Path, study: Path | None, result: Mapping[str, Any], *, damaged: bool) -> tuple[str, str | None]:
    if damaged:
        return "failed", "result.json is damaged; move it away and run again to finish"
    if result:
        return ("diverged" if result.get("status") == "diverged" else "done"), _text(result.get("cause"))
    notes = [(study or run.parent) / "failures" / f"{name}.json" for name in (run.name, run.name.rpartition("-")[0])]
    for note in notes:
        if note.is_file():
            failure, _ = read_object(note)
            return "failed", _text(failure.get("error") or failure.get("cause")) or "recorded without a message"
    return ("running" if _active(run, study) else "unfinished"), None


def _active(run: Path, study: Path | None) -> bool:
    """Whether there was a sign of life in the last minutes: the heartbeat of a lease not released, or a logged row."""
    leases = (study or run.parent) / "leases"
    cell = run.name.rpartition("-")[0]
    files = [*leases.glob(f"{cell}.json"), *leases.glob(f"{cell}~*.json"), run / "metrics.jsonl"]
    recent = [file for file in files if file.is_file() and time.time() - file.stat().st_mtime < HEARTBEAT_SECONDS]
    return any(file.suffix == ".jsonl" or not read_object(file)[0].get("released") for file in recent)


def _planned_size(cell: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[float, str | None]:
    """N of a run without a result: the plan's, or counted from its config."""
    if cell.get("n") is not None:
        return number(cell["n"]), None
    if not config:
        return number(None), None
    from llamax.accounting.params import count_params
    from llamax.config.load import validate
    from llamax.config.run import RunConfig

    try:
        return float(count_params(validate(RunConfig, dict(config), "config.yaml").model).active_matmul), None
    except UserError as error:
        return number(None), str(error).splitlines()[0]


def _cell(run: Path) -> tuple[dict[str, Any], Path | None]:
    """The planned cell of a run and the study it belongs to; the nearest plan.json above the run counts."""
    for study in list(run.resolve().parents)[:3]:
        if (study / "plan.json").is_file():
            return cells_by_directory(study).get(run.name, {}), study
    return {}, None


def _layers(config: Mapping[str, Any]) -> dict[str, Any]:
    """`model.layers`: blocks in the stack, from the segments."""
    try:
        segments = config["model"]["segments"]
        return {"model.layers": sum(s["repeat"] * len(s.get("unit", [{}])) for s in segments)}
    except (KeyError, TypeError, AttributeError):
        return {}


# ---------------------------------------------------------------- columns
def _differing(flats: list[dict[str, Any]]) -> list[str]:
    """Config fields outside FIELDS whose value is not the same in every readable config."""
    read = [flat for flat in flats if flat]
    names = dict.fromkeys(name for flat in read for name in flat if name.startswith(VARYING) and name not in FIELDS)
    return [name for name in names if len({json.dumps(flat.get(name), default=str) for flat in read}) > 1]


def _tag_column(tag: str, fields: list[str]) -> str:
    taken = {*TEXTS, *SIZES, *LOSSES, *COSTS, *BRANCHING, *fields, "fingerprint", "warnings", "config", "tags"}
    return f"tag.{tag}" if tag in taken else tag


def _numbers_if_all(column: pd.Series) -> pd.Series:
    """A float column when every value is a number or missing; as it is otherwise."""
    known = [v for v in column if v is not None]
    if any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in known):
        return column
    if not known:
        return column
    return column.astype(int if len(known) == len(column) and all(isinstance(v, int) for v in known) else float)


def _relative(root: Path, path: Path) -> str:
    try:
        relative = path.resolve().relative_to(root.resolve())
    except ValueError:  # the study lies above `root`
        return path.name
    return str(relative) if relative.parts else root.resolve().name


def _folder(path: str | Path) -> Path:
    root = at_hand(path).expanduser()
    if not root.is_dir():
        raise UserError(f"{path}: no such folder; give a run directory, a study or a folder of studies")
    return root


def _text(value: Any) -> str | None:
    return str(value) if value not in (None, "") else None
