"""Tables of runs from files: CSV as programs and spreadsheets write it, TSV, JSON lines, Parquet."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path

import pandas as pd

from llamax.errors import UserError

SEPARATORS = {".csv": ",;\t|", ".tsv": "\t,;|"}  # the usual one first: it wins a tie
KINDS = (*SEPARATORS, ".jsonl", ".parquet")
DECIMAL_COMMA = r"[+-]?\d+,\d+(?:[eE][+-]?\d+)?"


def read_table(path: str | Path) -> pd.DataFrame:
    """Read a table of runs: .csv, .tsv (the separator is found from the header), .jsonl (an object a line), .parquet.

    Column names are stripped of spaces. What was taken for granted is said in `frame.attrs["warnings"]`, a list.
    Raises UserError naming the file and the fix.
    """
    path = Path(path)
    choices = f"{', '.join(KINDS[:-1])} or {KINDS[-1]}"
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a {choices} table with one row per run")
    kind, words = path.suffix.lower(), list[str]()
    try:
        if kind == ".parquet":
            frame = pd.read_parquet(path)
        elif kind == ".jsonl":
            frame = pd.read_json(path, lines=True)
        elif kind in SEPARATORS:
            frame, words = _read_text(path, SEPARATORS[kind])
        else:
            raise UserError(f"{path}: unknown kind of table {path.suffix!r}; give {choices}")
    except ImportError as error:
        raise UserError(f"{path}: reading Parquet needs pyarrow; pip install 'llamax[parquet]'") from error
    except UnicodeError as error:
        raise UserError(f"{path}: not a readable table: its text is not UTF-8; save it as CSV UTF-8") from error
    except (ValueError, OSError, csv.Error) as error:  # pandas and pyarrow parser errors are ValueErrors
        raise UserError(f"{path}: not a readable table ({str(error).splitlines()[0]})") from error
    if frame.empty:
        raise UserError(f"{path}: the table has no rows")
    frame.columns = pd.Index([str(name).strip() for name in frame.columns])
    if again := frame.columns[frame.columns.duplicated()].tolist():
        raise UserError(f"{path}: column {again[0]!r} is there twice; rename one of them")
    frame.attrs["warnings"] = words
    return frame


def _read_text(path: Path, separators: str) -> tuple[pd.DataFrame, list[str]]:
    """The table of a text file, and in words by which separator and decimal sign it was read if not the usual ones."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        head = next((line for line in file if line.strip()), "")
    headers = {mark: next(csv.reader([head], delimiter=mark), []) for mark in separators}
    mark = max(separators, key=lambda mark: len(headers[mark]))
    names = [name.strip() for name in headers[mark]]
    if again := [name for name in names if name and names.count(name) > 1]:
        raise UserError(f"{path}: column {again[0]!r} is there twice; rename one of them")
    words = [] if mark == separators[0] else [f"{path.name}: columns are separated by {mark!r}"]
    try:
        with warnings.catch_warnings():  # a row longer than the header would lose its end, or shift into an index
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = pd.read_csv(path, sep=mark, index_col=False, encoding="utf-8-sig")
    except pd.errors.ParserWarning:
        raise UserError(
            f"{path}: rows have more fields than the header has names ({len(names)}: {', '.join(names[:6])}); the "
            "first line must name every column"
        ) from None
    if mark == ",":
        return frame, words
    for name in frame.columns:  # a comma that separates no columns is a spreadsheet's decimal sign
        texts = frame[name].dropna().astype(str).str.strip()
        commas = texts.str.contains(",", regex=False)
        if commas.any() and texts[commas].str.fullmatch(DECIMAL_COMMA).all():
            frame[name] = frame[name].astype(object).where(frame[name].isna(), texts.str.replace(",", "."))
            words.append(f"column {name!r}: its commas are read as decimal points, {texts[commas].iloc[0]!r} and so on")
    return frame, words
