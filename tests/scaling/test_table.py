import numpy as np
import pandas as pd
import pytest

from llamax.errors import UserError
from llamax.scaling import read_table
from llamax.scaling.table import clean

from .synthetic import isoflop


def test_reads_csv_tsv_and_parquet(tmp_path):
    frame = isoflop()
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    for name in ("a.csv", "a.tsv"):
        pd.testing.assert_frame_equal(read_table(tmp_path / name), frame)
    pytest.importorskip("pyarrow")
    frame.to_parquet(tmp_path / "a.parquet")
    pd.testing.assert_frame_equal(read_table(str(tmp_path / "a.parquet")), frame)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.csv", None, "no such file"),
        ("a.xlsx", b"x", "unknown kind"),
        ("a.csv", b"", "not a readable table"),
        ("a.csv", b"n,d,loss\n", "no rows"),
        ("a.csv", b"n,d, n\n1,2,3\n", "'n' is there twice"),
        ("a.csv", b"n,d,loss\n0,1,2,3\n", r"more fields than the header has names .3: n, d, loss.; the first line"),
        ("a.csv", "n,d\n1,2\n".encode("utf-16"), "not UTF-8"),
        ("a.csv", b"n,d\n\xff\xfe,1\n", "not a readable table"),
        ("a.csv", b'n,d\n1,2\n3,4,5\n"', "not a readable table"),
        ("a.parquet", b"not parquet", "not a readable table"),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, content, message):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_table(tmp_path / name)
    assert name in str(error.value)


@pytest.mark.parametrize("name", ["A.CSV", "a.tsv", "a.jsonl"])
def test_reads_what_spreadsheets_and_programs_write(tmp_path, name):
    frame = isoflop().rename(columns={"n": "Model size, M"})
    if name.endswith("jsonl"):
        frame.to_json(tmp_path / name, orient="records", lines=True, double_precision=15)
    else:
        text = frame.to_csv(index=False, sep=";", decimal=",").replace("budget;", " budget ;", 1)
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    found = read_table(tmp_path / name)
    assert list(found.columns) == list(frame.columns)
    read, _ = clean(found, n="Model size, M", budget="budget")
    assert read["loss"].to_numpy() == pytest.approx(frame["loss"].to_numpy())
    said = " ".join(found.attrs["warnings"])
    assert ("separated by ';'" in said and "column 'loss': its commas are read as decimal" in said) or not said


def test_thousands_are_read_where_they_can_be_nothing_else():
    frame = isoflop()
    texts = [f"{round(v):,}" for v in 1000 * frame["n"]]
    assert clean(frame.assign(n=texts), flops=None)[0]["n"].to_numpy() == pytest.approx(1000 * frame["n"], rel=1e-3)
    for text in ("71M", "7_100_000", "3,145"):
        with pytest.raises(UserError, match=f"'{text}' is not a number .24 such rows.; write plain numbers"):
            clean(frame.assign(n=text))


def test_renames_and_keeps_order():
    frame = isoflop().rename(columns={"n": "Model Size", "loss": "final"}).assign(other="x")
    table, words = clean(frame, n="Model Size", loss="final", budget="budget")
    pd.testing.assert_frame_equal(
        table[["n", "d", "flops", "loss", "budget"]], isoflop()[["n", "d", "flops", "loss", "budget"]]
    )
    assert words == []


def test_derives_flops_or_tokens_in_words():
    frame = isoflop()
    table, words = clean(frame.drop(columns="flops"), flops=None)
    assert table["flops"].to_numpy() == pytest.approx(frame["flops"].to_numpy())
    assert "6·n·d" in words[0]
    table, words = clean(frame.drop(columns="d"), d=None)
    assert table["d"].to_numpy() == pytest.approx(frame["d"].to_numpy())
    assert "tokens taken as" in words[0]
    with pytest.raises(UserError, match="d and flops"):
        clean(frame, d=None, flops=None)


def test_drops_and_counts_what_is_missing_or_repeated():
    frame = isoflop()
    frame.loc[2, "loss"], frame.loc[5, "loss"], frame.loc[7, "budget"] = np.nan, np.inf, np.nan
    frame = pd.concat([frame, frame.iloc[[0, 1]]]).assign(name=[f"run{i}" for i in range(26)])
    table, words = clean(frame, budget="budget", run="name")
    assert len(table) == 21
    assert any("NaN rows dropped: 3 of 26" in w for w in words)
    assert any("duplicated runs dropped: 2" in w for w in words)


def test_units_are_questioned():
    frame = isoflop()
    swapped = clean(frame.rename(columns={"n": "d", "d": "n"}))[1]
    assert any("the right way round" in w for w in swapped)
    assert not clean(frame)[1]
    assert any("check the units" in w for w in clean(frame.assign(flops=frame["flops"] / 1e9))[1])
    assert any("n never exceeds" in w for w in clean(frame.assign(n=frame["n"] / 1e6), flops=None)[1])
    millions = frame.assign(n=frame["n"] / 100, d=frame["d"] / 100)
    assert any("goes down to" in w for w in clean(millions, flops=None)[1])


def test_a_column_that_is_no_loss_is_questioned():
    frame = isoflop()
    assert any("not that of nats" in w for w in clean(frame.rename(columns={"loss": "val_bpb"}), loss="val_bpb")[1])
    rising = frame.assign(loss=1 / frame["loss"])
    assert any("rises with compute" in w for w in clean(rising)[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.drop(columns="n"), "'n'.*it has budget, d"),
        (lambda f: f.assign(n=-f["n"]), "'n': -.*must be positive"),
        (lambda f: f.assign(d=0.0), "'d': 0 .*must be positive"),
        (lambda f: f.assign(flops=-1e12), "'flops': -1e"),
        (lambda f: f.assign(loss=-0.5), "'loss': -0.5"),
        (lambda f: f.assign(loss="n/a?"), "'loss': 'n/a\\?' is not a number"),
        (lambda f: f.assign(loss=2.5), "all losses equal"),
        (lambda f: f.assign(loss=np.nan), "no usable rows of 24"),
    ],
)
def test_bad_values(change, message):
    with pytest.raises(UserError, match=message):
        clean(change(isoflop()))


def test_one_column_has_one_meaning():
    with pytest.raises(UserError, match="'n': named for both n and d"):
        clean(isoflop(), n="n", d="n")
