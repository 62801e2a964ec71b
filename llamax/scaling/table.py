"""From a table of runs to clean columns: reading, renaming, and everything that is wrong with it said in words."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from llamax.errors import UserError

FLOPS_PER_ND = (0.5, 500.0)  # training FLOPs over n·d: about 6 in most conventions; far outside, the units disagree

TOKENS_PER_PARAM = (1e-3, 1e6)  # far outside any run that was made
UNIT_GAP, HIGHEST_LOSS = 1e6, 15.0


def read_table(path: str | Path) -> pd.DataFrame:
    """Read a CSV (.csv, .tsv) or Parquet (.parquet) file. Raises UserError naming the file and the fix."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a .csv, .tsv or .parquet table with one row per run")
    try:
        if path.suffix == ".parquet":
            frame = pd.read_parquet(path)
        elif path.suffix in (".csv", ".tsv"):
            frame = pd.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",")
        else:
            raise UserError(f"{path}: unknown kind of table {path.suffix!r}; give .csv, .tsv or .parquet")
    except ImportError as error:
        raise UserError(f"{path}: reading Parquet needs pyarrow; pip install 'llamax[parquet]'") from error
    except (ValueError, OSError) as error:  # pandas and pyarrow parser errors are ValueErrors, encodings too
        raise UserError(f"{path}: not a readable table ({str(error).splitlines()[0]})") from error
    if frame.empty:
        raise UserError(f"{path}: the table has no rows")
    return frame


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
    for name in numbers:
        bad = table[name] <= 0
        if bad.any():
            worst, count = table[name][bad].iloc[0], int(bad.sum())
            raise UserError(f"column {named[name]!r}: {worst:g} ({count} such rows); {name} must be positive")
    words += _derive(table)
    if len(table) > 1 and np.ptp(table["loss"]) <= 1e-12 * table["loss"].max():
        raise UserError(f"column {loss!r}: all losses equal ({table['loss'].iloc[0]:.6g}); nothing to fit")
    return table, words + unit_words(table)


def as_numbers(column: pd.Series, name: str) -> pd.Series:
    """The column as floats. Raises UserError naming the column, `name` in the table, for text in it."""
    values = pd.to_numeric(column, errors="coerce")
    text = values.isna() & column.notna()
    if text.any():
        raise UserError(f"column {name!r}: {column[text].iloc[0]!r} is not a number ({int(text.sum())} such rows)")
    return values.astype(float)


def drop_rows(table: pd.DataFrame, numbers: list[str]) -> tuple[pd.DataFrame, list[str]]:
    """The table without rows in which something is missing or a number not finite, and without repeats of `numbers`;
    in words, how many. Raises UserError when no row is left."""
    words = []
    keep = np.isfinite(table[numbers].to_numpy(float)).all(1) & table.notna().all(axis=1).to_numpy()
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


def _derive(table: pd.DataFrame) -> list[str]:
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
    if table["n"].max() < 1000 or table["d"].max() < 1000:
        words.append("n or d never exceeds 1000: check the units (parameters and tokens, not millions or billions)")
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
    return words
