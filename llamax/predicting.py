"""`llamax predict`: a claim written down before its run exists, and how the claims of a study did."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llamax.columns import USUAL, find_columns, finished_runs, need_columns, read_runs, runs_to_fit
from llamax.console import AtHand, Json, print_json, show
from llamax.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from llamax.scaling import Prediction, ScalingFit

ENDED = ("done", "diverged")


def predict(
    data: Annotated[Path, AtHand(metavar="DIR", help="A study directory, or a table of runs.")],
    flops: Annotated[float | None, typer.Option(help="Training FLOPs of the run to predict, 6 N D.")] = None,
    n: Annotated[
        float | None, typer.Option("--params", help="Its parameters; default what the fit recommends there.")
    ] = None,
    score: Annotated[bool, typer.Option("--score", help="How every claim so far did, instead of a new one.")] = False,
    columns: Annotated[
        str, typer.Option(help="Columns of a table, such as n=params,d=tokens,loss=ce; default the usual names.")
    ] = "",
    bootstrap: Annotated[int, typer.Option(help="Resamples for the interval.")] = 300,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    as_json: Json = False,
) -> None:
    """Register a predicted loss before its run exists, or score what was registered; the ledger is a hash chain."""
    if score == (flops is not None):
        raise UserError("predict: give --flops C to register a prediction, or --score to see how they did")
    if score:
        rows = score_all(data, columns)
        if as_json:
            print_json({"predictions": rows})
        else:
            show(*score_tables(rows))
        return
    record = register_prediction(data, flops or 0.0, n=n, columns=columns, bootstrap=bootstrap, seed=seed)
    if as_json:
        print_json(record)
    else:
        show(*claim_lines(record, data))


def register_prediction(
    data: Path, flops: float, *, n: float | None = None, columns: str = "", bootstrap: int = 300, seed: int = 0
) -> dict[str, Any]:
    """Fit what is finished, predict the run at `flops`, and append the claim to the study's ledger, with every doubt
    about the table and the fits among its `warnings`.

    Raises:
        UserError: a run at that compute (within 5 %) exists already, a broken chain, data that cannot be fitted, or an
            `n` that leaves less than one token.
    """
    from llamax.scaling import fit_frame, predict, recommend
    from llamax.scaling.caveats import checkpoint_words, run_words
    from llamax.scaling.laws import check_flops
    from llamax.scaling.records import ledger_path, register

    check_flops(flops)
    frame, names = runs_of(data, columns)
    rows, words = runs_to_fit(data, frame)
    words += checkpoint_words(rows, names) + run_words(rows)
    approaches = (2, 3) if names["budget"] else (3,)
    fit = fit_frame(rows, approaches, **names, bootstrap=bootstrap, seed=seed)  # type: ignore[arg-type]
    refuse_if_known(data, columns, flops)
    size = recommend(fit, flops).n if n is None else n
    tokens = float(fit.cost.tokens(flops, size))
    if n is not None and n > 0 and tokens < 1:
        raise UserError(
            f"--params {n:g}: {flops:g} FLOPs pay for {tokens:.3g} tokens of a model that large; give fewer"
        )
    claim = predict(fit, flops=flops, n=size, d=tokens)
    doubts = dict.fromkeys([*words, *fit.all_warnings(), *claim.warnings])
    return register(ledger_path(data), claim_of(claim, fit) | {"warnings": list(doubts)})


def claim_of(claim: Prediction, fit: ScalingFit) -> dict[str, Any]:
    """What is recorded of a prediction: its numbers, the law with its parameters, and the data behind them."""
    from llamax import __version__
    from llamax.scaling.records import data_digest

    return claim.as_dict() | {
        "params": fit.laws[claim.law].fit.as_dict()["params"],
        "data": {"runs": len(fit.runs), "sha256": data_digest(fit.runs)},
        "llamax": __version__,
    }


def refuse_if_known(data: Path, columns: str, flops: float) -> None:
    """Raises UserError when a run at `flops` is finished, or under way: what is seen is not predicted."""
    from llamax.scaling.records import near

    known = [f"{at:.4g}" for at in measured(data, columns)["flops"] if near(at, flops)]
    if known:
        raise UserError(
            f"prediction at {flops:g} FLOPs: {data} already has {len(known)} finished runs at that compute "
            f"({known[0]} FLOPs); a prediction is made before its run, so give a compute that was not trained"
        )
    frame = runs_of(data, columns)[0]
    if {"status", "steps"} <= set(frame):
        begun = frame[~frame["status"].isin(ENDED) & (frame["steps"] > 0)]
        for row in begun.to_dict("records"):
            if near(planned_flops(data, row), flops):
                raise UserError(
                    f"prediction at {flops:g} FLOPs: run {row['run']} at that compute has begun "
                    f"({row['steps']:.0f} steps logged); a prediction is made before its run"
                )


def planned_flops(data: Path, row: Mapping[Any, Any]) -> float:
    """6 N D that a run will have spent, by the plan of its study; nan where no plan says."""
    from llamax.report.read import cells_by_directory, number

    cell = cells_by_directory(data).get(Path(str(row["run"])).name, {})
    spent = cell.get("flops")
    return number(spent.get("6n")) if isinstance(spent, Mapping) else number(row.get("budget"))


# ---------------------------------------------------------------- the runs
def runs_of(data: Path, columns: str = "") -> tuple[pd.DataFrame, dict[str, str | None]]:
    """(every run of a study directory or a table, which of its columns are n, d, loss, flops and budget)."""
    if data.is_dir() and columns:
        raise UserError(f"--columns {columns}: {data} is a study and has its own; drop the option")
    frame, asked = read_runs(data), dict[str, str | None]()
    for part in filter(None, columns.split(",")):
        key, equals, name = (text.strip() for text in part.partition("="))
        if not equals or key not in USUAL:
            raise UserError(f"--columns {part!r}: give {', '.join(f'{key}=COLUMN' for key in USUAL)}")
        asked[key] = name
    names = find_columns(frame, asked)
    need_columns(frame, names, "--columns {role}=COLUMN")
    return frame, names


def measured(data: Path, columns: str = "") -> pd.DataFrame:
    """`run`, `n`, `flops`, `loss` of the finished runs that have all of these, as `scores` takes them."""
    from llamax.scaling.table import as_numbers

    frame, names = runs_of(data, columns)
    rows = finished_runs(frame)[0]
    found = rows[["run"]].copy() if "run" in rows else rows[[]].assign(run=[f"row {i}" for i in rows.index])
    for role in ("n", "d", "flops", "loss"):
        if column := names[role]:
            found[role] = as_numbers(rows[column], column)
    if not names["flops"]:
        found["flops"] = 6 * found["n"] * found["d"]
    return found[["run", "n", "flops", "loss"]].dropna(subset=["n", "flops", "loss"])


def score_all(data: Path, columns: str = "") -> list[dict[str, Any]]:
    """Every claim of the ledger of `data`, each with the finished runs that answer it.

    Raises:
        UserError: no ledger there, or a broken chain.
    """
    from llamax.scaling.records import ledger_path, read_predictions, scores

    records = read_predictions(ledger_path(data))
    if not records:
        raise UserError(
            f"{ledger_path(data)}: no prediction was registered; `llamax predict {data} --flops C` makes one"
        )
    return scores(records, measured(data, columns))


# ---------------------------------------------------------------- telling
def claim_lines(record: dict[str, Any], data: Path) -> list[Any]:
    """A registered claim for a person, with the rule that made it."""
    from rich.text import Text

    from llamax.report.words import count, interval

    ahead = record["recommendation"]
    lines = [
        f"registered as record {record['index']} at {record['registered']}",
        f"at {record['flops']:.4g} FLOPs: N = {count(record['n'])}, D = {count(record['d'])} "
        f"(recommended {count(ahead['n'])} and {count(ahead['d'])})",
        f"predicted loss {record['loss']:.4f} nats per token, one new run within {interval(record['interval'])}",
        f"by {record['law']}, {record['data']['runs']} runs, data sha256 {record['data']['sha256'][:16]}",
        record["rule"],
        *(f"warning: {word}" for word in record["warnings"]),
        f"sha256 {record['sha256']} (keep it elsewhere, such as in a commit)",
        f"score it, when the run is done: llamax predict {data} --score",
    ]
    return [Text(line) for line in lines]


def score_tables(rows: list[dict[str, Any]]) -> list[Any]:
    """How the claims did, and what the chain's last hash is."""
    from rich.table import Table
    from rich.text import Text

    from llamax.report.words import count, decimals, interval, power

    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("#", "registered", "FLOPs", "N", "predicted", "interval", "measured", "miss", "inside"):
        table.add_column(name, justify="left" if name == "registered" else "right", no_wrap=True)
    for row in rows:
        known = row["measured"] is not None
        miss = f"{100 * (row['measured'] / row['loss'] - 1):+.2f} %" if known else "not run yet"
        inside = {True: "yes", False: "NO", None: "-"}[row["inside"]]
        table.add_row(
            str(row["index"]), row["registered"][:16], power(row["flops"], 3), count(row["n"]),
            decimals(row["loss"], 4), interval(row["interval"]), decimals(row["measured"], 4), miss, inside,
        )  # fmt: skip
    head = max(rows, key=lambda row: row["index"])
    return [table, Text(f"chain verified to record {head['index']}, sha256 {head['sha256']}")]
