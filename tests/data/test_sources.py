"""What each source lists and reads, and what it says of bad input."""

import gzip
import json
import os
import sys
import sysconfig
import types
from pathlib import Path
from typing import Any

import pytest

from llamax.config.run import HuggingFaceDataset, Jsonl, Parquet, PythonSource, TextFiles
from llamax.data import rows
from llamax.data.pieces import Document, Skip, read_piece
from llamax.data.sources import list_source
from llamax.errors import UserError


def read(source: Any) -> list[Document | Skip]:
    return [item for piece in list_source(source, "sources.0.source").pieces for item in read_piece(piece)]


def texts(source: Any) -> list[str]:
    return [item.text for item in read(source) if isinstance(item, Document)]


# ---------------------------------------------------------------- files and folders
def test_folder_in_order_of_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.txt", "a/z.txt", "a/b/c.md", "A.TXT", "c.bin", ".hidden/x.txt", "__pycache__/y.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    source = TextFiles(paths=(str(tmp_path),))
    expected = ["A.TXT", "a/b/c.md", "a/z.txt", "b.txt"]
    assert texts(source) == expected
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: reversed(list(scandir(path))))
    assert texts(source) == expected
    assert list_source(source, "").other == {".bin": 1}


def test_a_path_given_by_name_is_taken_whatever_its_suffix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notes.weird").write_text("hello")
    monkeypatch.chdir(tmp_path)
    assert texts(TextFiles(paths=("notes.weird",))) == ["hello"]
    assert texts(TextFiles(paths=("./notes.weird", str(tmp_path / "notes.weird")))) == ["hello", "hello"]


def test_symbolic_links_neither_escape_nor_loop(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (outside / "secret.txt").write_text("secret")
    (inside / "a.txt").write_text("a")
    (inside / "loop").symlink_to(inside)
    (inside / "away").symlink_to(outside)
    (inside / "file.txt").symlink_to(outside / "secret.txt")
    (inside / "dangling.txt").symlink_to(outside / "nothing")
    source = TextFiles(paths=(str(inside),))
    assert texts(source) == ["a"]
    assert list_source(source, "").other == {"symbolic link": 4}
    (tmp_path / "link").symlink_to(inside)
    assert texts(TextFiles(paths=(str(tmp_path / "link"),))) == ["a"]


def test_what_is_no_text_is_skipped_with_its_reason(tmp_path: Path) -> None:
    contents = {
        "a.txt": b"fine",
        "b.txt": b"\xff\xfe",
        "c.txt": b"a\0b",
        "d.txt": b"",
        "e.txt": b"\xef\xbb\xbfmarked\r\n",
    }
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    items = read(TextFiles(paths=(str(tmp_path),)))
    assert [i.text for i in items if isinstance(i, Document)] == ["fine", "marked\r\n"]
    assert [(i.name.rpartition("/")[2], i.reason) for i in items if isinstance(i, Skip)] == [
        ("b.txt", "not UTF-8"),
        ("c.txt", "binary"),
        ("d.txt", "empty"),
    ]


def test_a_file_that_vanishes_or_cannot_be_opened_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    piece = list_source(TextFiles(paths=(str(tmp_path),)), "").pieces[0]
    (tmp_path / "a.txt").unlink()
    assert list(read_piece(piece)) == [Skip(piece.name, "unreadable")]


@pytest.mark.parametrize("kind", [TextFiles, Jsonl, Parquet])
def test_missing_path(tmp_path: Path, kind: Any) -> None:
    with pytest.raises(UserError, match=r"sources.0.source.paths.0 = '.*nowhere': No such file"):
        list_source(kind(paths=(str(tmp_path / "nowhere"),)), "sources.0.source")


# ---------------------------------------------------------------- Python
def test_python_source_is_the_standard_library_alone() -> None:
    pieces = list_source(PythonSource(), "").pieces
    names = {piece.name for piece in pieces}
    assert {"stdlib/os.py", "stdlib/json/decoder.py"} <= names
    assert not any("site-packages" in name or "__pycache__" in name for name in names)
    assert [p.name for p in pieces] == sorted((p.name for p in pieces), key=os.fsencode)


def test_python_source_with_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stdlib, site = tmp_path / "lib", tmp_path / "lib" / "site-packages"
    (site / "pkg").mkdir(parents=True)
    (stdlib / "os.py").write_text("os")
    (site / "pkg" / "__init__.py").write_text("pkg")
    paths = {"stdlib": stdlib, "purelib": site, "platlib": site}
    monkeypatch.setattr(sysconfig, "get_path", lambda key: str(paths[key]))
    assert texts(PythonSource()) == ["os"]
    assert texts(PythonSource(packages=True)) == ["os", "pkg"]


# ---------------------------------------------------------------- JSON lines
def write_jsonl(path: Path, documents: list[Any]) -> Path:
    data = "".join(json.dumps(d, ensure_ascii=False) + "\n" for d in documents).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_jsonl(tmp_path: Path, name: str) -> None:
    path = write_jsonl(
        tmp_path / name, [{"text": "a\nb"}, {"text": "é"}, {"text": None}, {"text": ""}, {"text": "z", "k": 1}]
    )
    assert texts(Jsonl(paths=(str(path),))) == ["a\nb", "é", "z"]
    assert texts(Jsonl(paths=(str(tmp_path),))) == ["a\nb", "é", "z"]
    assert [i.reason for i in read(Jsonl(paths=(str(path),))) if isinstance(i, Skip)] == ["empty", "empty"]


@pytest.mark.parametrize("part_bytes", [1, 7, 16, 40, 10_000])
def test_jsonl_ranges_give_each_line_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part_bytes: int) -> None:
    documents = [{"text": "x" * (i % 9) + str(i)} for i in range(40)]
    path = write_jsonl(tmp_path / "rows.jsonl", documents)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\n\n", 5).rstrip(b"\n"))  # blank lines, no last line end
    monkeypatch.setattr(rows, "PART_BYTES", part_bytes)
    source = Jsonl(paths=(str(path),))
    assert len(list_source(source, "").pieces) == -(-path.stat().st_size // part_bytes)
    assert texts(source) == [d["text"] for d in documents]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', r"rows.jsonl, line 3: not JSON"),
        (b'["text"]', r"rows.jsonl, line 3: expected an object, found list"),
        (b'{"body": "x"}', r"rows.jsonl, line 3: no field 'text' among body"),
        (b'{"text": 5}', r"rows.jsonl, line 3: field 'text' is int, not text"),
        (b'{"text": "\xff"}', r"rows.jsonl, line 3: not UTF-8"),
    ],
)
@pytest.mark.parametrize("part_bytes", [15, 10_000])
def test_bad_line_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: bytes, message: str, part_bytes: int
) -> None:
    monkeypatch.setattr(rows, "PART_BYTES", part_bytes)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}\n')
    with pytest.raises(UserError, match=message):
        read(Jsonl(paths=(str(path),)))


def test_half_a_surrogate_pair_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "\\ud800"}\n{"text": "a\\u0000"}\n{"text": "ok"}\n')
    items = read(Jsonl(paths=(str(tmp_path / "rows.jsonl"),)))
    assert [getattr(item, "reason", "kept") for item in items] == ["not UTF-8", "binary", "kept"]


def test_cut_gzip(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl.gz", [{"text": "a" * 1000}] * 50)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"rows.jsonl.gz: not a whole gzip file"):
        read(Jsonl(paths=(str(path),)))


# ---------------------------------------------------------------- Parquet
def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    table = pa.table({"text": ["a", None, "b", "c", ""], "n": range(5)})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet", row_group_size=2)
    source = Parquet(paths=(str(tmp_path),))
    assert len(list_source(source, "").pieces) == 3
    assert texts(source) == ["a", "b", "c"]
    for field, message in (("body", "no column 'body' among text, n"), ("n", "column 'n' is int64, not text")):
        with pytest.raises(UserError, match=message):
            list_source(Parquet(paths=(str(tmp_path),), field=field), "")
    (tmp_path / "t.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"t.parquet: not a readable Parquet file"):
        list_source(source, "")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pyarrow", Parquet(paths=("t.parquet",))),
        ("datasets", HuggingFaceDataset(path="none")),
    ],
)
def test_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, source: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, module, None)
    rows._dataset.cache_clear()
    extra = {"pyarrow": "parquet"}.get(module, module)
    with pytest.raises(UserError, match=rf"pip install 'llamax\[{extra}\]'"):
        list_source(source, "")


# ---------------------------------------------------------------- datasets
class FakeDataset:
    """The few things llamax asks of a `datasets.Dataset`; the real library is an extra that tests do not install."""

    column_names = ("text", "label")
    dataset_size = None
    _fingerprint = "0123456789abcdef"

    def __init__(self, values: list[Any]):
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def select_columns(self, names: list[str]) -> "FakeDataset":
        return self

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"text": self.values[i]}


def test_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: str, name: str | None, split: str) -> FakeDataset:
        if split != "train":
            raise ValueError(f"Unknown split {split}")
        return FakeDataset(["a", None, "b", "c"])

    fake = types.ModuleType("datasets")
    fake.load_dataset = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setattr(rows, "PART_ROWS", 3)
    rows._dataset.cache_clear()
    assert len(list_source(HuggingFaceDataset(path="p"), "").pieces) == 2
    assert texts(HuggingFaceDataset(path="p")) == ["a", "b", "c"]
    with pytest.raises(UserError, match="no column 'body' among text, label"):
        list_source(HuggingFaceDataset(path="p", field="body"), "")
    with pytest.raises(UserError, match=r"split='nope': datasets cannot load it .Unknown split nope"):
        list_source(HuggingFaceDataset(path="p", split="nope"), "")
    rows._dataset.cache_clear()
