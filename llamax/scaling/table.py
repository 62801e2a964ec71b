"""From a table of runs to clean columns: renaming, and everything that is wrong with it said in words."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from itertools import combinations

import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype

from llamax.errors import UserError

FLOPS_PER_ND = (0.5, 500.0)  # training FLOPs over n·d: about 6 in most conventions; far outside, the units disagree

TOKENS_PER_PARAM = (1e-3, 1e6)  # far outside any run that was made
UNIT_GAP, HIGHEST_LOSS, LOWEST_LOSS = 1e6, 15.0, 0.05
SMALLEST = 1000  # parameters or tokens of the least run that anybody trains
RISING = 0.3
ALL_EQUAL = 1e-6  # losses that agree this well are copies of one number
SAME_RUN = 3e-6  # log losses this close at one n and d: copies with fewer digits; seeds differ by thousands of it
THOUSANDS = r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d*)?"
NOT_NATS = {"bit", "bits", "bpb", "bpc", "perplexity", "ppl", "acc", "accuracy"}  # words in the name of a column


def clean(
    frame: pd.DataFrame,
    *,
    n: str = "n",
    d: str | None = "d",
    loss: str = "loss",
    flops: str | None = "flops",
    budget: str | None = None,
    run: str | None = None,
) -> tuple[pd.DataFrame, list[str]]:
    """Columns `n, d, flops, loss` as floats (and `budget`, `run` if named), one row a measurement; warnings in words.

    `d=None` derives tokens from flops / (6 n), `flops=None` derives 6 n d. Rows with a missing or non-finite value are
    dropped and counted; exact repeats are kept once and counted. Raises UserError for a missing column, text in a
    number column, a value that is zero or negative, or losses that are all equal.
    """
    wanted = {"n": n, "d": d, "flops": flops, "loss": loss, "budget": budget, "run": run}
    if d is None and flops is None:
        raise UserError("columns d and flops: both absent; name at least one")
    named = {name: column for name, column in wanted.items() if column is not None}
    missing = [f"{column!r} (for {name})" for name, column in named.items() if column not in frame]
    if missing:
        raise UserError(f"column {', '.join(missing)}: not in the table; it has {', '.join(map(str, frame.columns))}")
    for one, other in combinations(("n", "d", "loss", "flops"), 2):
        if one in named and named[one] == named.get(other):
            raise UserError(f"column {named[one]!r}: named for both {one} and {other}; give each its own column")
    table = pd.DataFrame({name: frame[column].to_numpy() for name, column in named.items()})
    numbers: list[str] = [name for name in ("n", "d", "flops", "loss") if name in named]
    for name in numbers:
        table[name] = as_numbers(table[name], str(named[name]))
    table, words = drop_rows(table, numbers)
    amounts = [*numbers, "budget"] if "budget" in table and is_numeric_dtype(table["budget"]) else numbers
    check_positive(table, {name: str(named[name]) for name in amounts})
    words += derive(table)
    if len(table) > 1 and np.ptp(table["loss"]) <= ALL_EQUAL * table["loss"].max():
        raise UserError(f"column {loss!r}: all losses equal ({table['loss'].iloc[0]:.6g}); nothing to fit")
    return table, words + unit_words(table) + loss_words(table, loss)


def check_positive(table: pd.DataFrame, named: Mapping[str, str]) -> None:
    """Raises UserError for a value of the columns `named` (by their names in the user's table) that is not positive."""
    for name, column in named.items():
        bad = table[name] <= 0
        if bad.any():
            worst, count = table[name][bad].iloc[0], int(bad.sum())
            raise UserError(f"column {column!r}: {worst:g} ({count} such rows); {name} must be positive")


def as_numbers(column: pd.Series, name: str) -> pd.Series:
    """The column as floats; thousands separators are read where they cannot be decimal commas (1,234,567).

    Raises UserError naming the column, `name` in the table, for any other text in it.
    """
    values = pd.to_numeric(column, errors="coerce")
    text = values.isna() & column.notna()
    if text.any():
        texts = column[text].astype(str).str.strip()
        if texts.str.fullmatch(THOUSANDS).all() and texts.str.count(",").max() > 1:
            return pd.to_numeric(column.astype(str).str.replace(",", ""), errors="coerce").astype(float)
        raise UserError(
            f"column {name!r}: {column[text].iloc[0]!r} is not a number ({int(text.sum())} such rows); write plain "
            "numbers such as 7.1e7, and nothing where a value is missing"
        )
    return values.astype(float)


def drop_rows(table: pd.DataFrame, numbers: list[str], endless: Collection[str] = ()) -> tuple[pd.DataFrame, list[str]]:
    """The table without rows in which something is missing or a number not finite, and without repeats of `numbers`;
    in words, how many. `endless` columns may hold +inf. Raises UserError when no row is left."""
    words = []
    finite = np.isfinite(table[numbers].to_numpy(float)) | [name in endless for name in numbers]
    keep = finite.all(1) & table.notna().all(axis=1).to_numpy()
    if not keep.all():
        words.append(f"NaN rows dropped: {int((~keep).sum())} of {len(keep)} (missing or not finite)")
    table = table[keep]
    if table.empty:
        raise UserError(f"data: no usable rows of {len(keep)}; every one has a missing or non-finite value")
    repeated = table.duplicated(numbers)  # equal to the last bit is the same run, whatever its name
    if repeated.any():
        words.append(
            f"duplicated runs dropped: {int(repeated.sum())} rows repeat the numbers of another and are kept once"
        )
    return table[~repeated].reset_index(drop=True), words


def derive(table: pd.DataFrame) -> list[str]:
    """Adds the one of `d` and `flops` that the table has not, from the other and `n`; in words, how."""
    if "flops" not in table:
        table["flops"] = 6 * table["n"] * table["d"]
        return ["no flops column: training FLOPs taken as 6·n·d"]
    if "d" not in table:
        table["d"] = table["flops"] / (6 * table["n"])
        return ["no tokens column: tokens taken as flops / (6·n)"]
    return []


def unit_words(table: pd.DataFrame) -> list[str]:
    """What is odd about the units of `n, d, flops, loss`, in words."""
    ratio = (table["flops"] / (table["n"] * table["d"])).to_numpy()
    low, high = float(ratio.min()), float(ratio.max())
    words = []
    if low < FLOPS_PER_ND[0] or high > FLOPS_PER_ND[1]:
        words.append(
            f"flops / (n·d) runs from {low:.3g} to {high:.3g}, usually about 6: check the units (numbers, not billions)"
        )
    for name, unit in (("n", "parameters"), ("d", "tokens")):
        least, most = float(table[name].min()), float(table[name].max())
        if most < 1000:
            words.append(f"{name} never exceeds {most:.3g}: check the units ({unit}, not millions or billions)")
        elif least < SMALLEST:
            words.append(f"{name} goes down to {least:.3g}: check the units ({unit}, not millions)")
    ratio = (table["d"] / table["n"]).to_numpy()
    if ratio.min() < TOKENS_PER_PARAM[0] or ratio.max() > TOKENS_PER_PARAM[1]:
        words.append(
            f"tokens per parameter run from {ratio.min():.3g} to {ratio.max():.3g}: check the units of n and d "
            "(numbers, not billions)"
        )
    if np.median(ratio) < 1:
        words.append("most runs have fewer tokens than parameters: are the columns of n and d the right way round?")
    for name in ("n", "d", "flops"):
        values = np.sort(table[name].to_numpy())
        if len(values) > 1 and (values[1:] / values[:-1]).max() > UNIT_GAP:
            words.append(f"{name} jumps by more than {UNIT_GAP:g} between two runs: check that all are in one unit")
    if table["loss"].max() > HIGHEST_LOSS:
        words.append(f"loss goes up to {table['loss'].max():.3g}: nats per token seldom pass 12; is it a perplexity?")
    if (low := float(table["loss"].min())) < LOWEST_LOSS:
        words.append(f"loss goes down to {low:.3g}: no model of text is that good; check the units (nats per token)")
    return words


def loss_words(table: pd.DataFrame, name: str) -> list[str]:
    """Doubts about the column of losses, called `name` in the user's table: its unit, whether it is a loss, copies."""
    words = []
    cells = pd.DataFrame({c: np.log(table[c].to_numpy(float)) for c in ("n", "d", "loss")}).round({"n": 6, "d": 6})
    apart = cells.sort_values("loss").groupby(["n", "d"])["loss"].diff()
    close = (apart > 0) & (apart < SAME_RUN)  # equal ones are seeds whose losses have few digits
    if close.mean() > 0.01:  # one in a large table of seeds is chance
        words.append(
            f"duplicated runs? {int(close.sum())} rows have the n and d of another and almost its loss: a copy "
            "with other digits counts twice, so drop it"
        )
    if NOT_NATS & set(re.split(r"[^a-z]+", name.lower())):
        words.append(
            f"column {name!r}: its name is not that of nats per token; the law, E and predictions are in its own unit"
        )
    rank = table["flops"].rank().corr(table["loss"].rank()) if table["flops"].nunique() > 2 else 0.0
    if rank > RISING and len(table) > 5:
        words.append(f"the loss rises with compute (rank correlation {rank:.2f}): is column {name!r} a loss?")
    return words
