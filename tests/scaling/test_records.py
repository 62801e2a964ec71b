"""The prediction ledger: every way of tampering is named, appends by many processes are all kept, scores join."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest

from llamax.errors import UserError
from llamax.scaling.records import (
    data_digest,
    digest,
    ledger_path,
    read_predictions,
    register,
    scores,
)

ROOT = Path(__file__).resolve().parents[2]


def claim(flops: float = 1e12, **more: object) -> dict:
    return {"flops": flops, "n": 1e5, "loss": 2.0, "interval": [1.9, 2.1], "level": 0.95, **more}


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    path = tmp_path / "predictions.jsonl"
    for k in range(5):
        register(path, claim(10.0**k))
    return path


def test_what_is_registered_is_read(ledger: Path) -> None:
    records = read_predictions(ledger)
    assert [record["index"] for record in records] == list(range(5))
    assert [record["flops"] for record in records] == [1.0, 10.0, 100.0, 1000.0, 10000.0]
    assert records[0]["previous"] == "0" * 64
    for before, after in pairwise(records):
        assert after["previous"] == before["sha256"] == digest(before)
    assert read_predictions(ledger.with_name("other.jsonl")) == []


def test_the_hash_is_sha256_of_sorted_compact_json() -> None:
    """As another program would compute it."""
    text = '{"a":1.5,"b":[1,null]}'
    done = subprocess.run(["sha256sum"], input=text, capture_output=True, text=True, check=True)
    assert digest({"b": [1, None], "a": 1.5, "sha256": "whatever"}) == done.stdout.split()[0]


# ---------------------------------------------------------------- tampering
def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rewrite(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def edited(records: list[dict]) -> list[dict]:
    records[2]["loss"] = 1.95
    return records


def edited_and_hashed(records: list[dict]) -> list[dict]:
    records[2]["loss"] = 1.95
    records[2]["sha256"] = digest(records[2])
    return records


def last_edited_and_hashed(records: list[dict]) -> list[dict]:
    records[4]["loss"] = 1.95
    records[4]["sha256"] = digest(records[4])
    return records


def backdated(records: list[dict]) -> list[dict]:
    records[1]["registered"] = "2020-01-01T00:00:00+00:00"
    return records


def swapped(records: list[dict]) -> list[dict]:
    records[1], records[3] = records[3], records[1]
    return records


def renumbered(records: list[dict]) -> list[dict]:
    """A record taken out, those after it numbered and hashed anew, but not chained."""
    del records[1]
    for index, record in enumerate(records):
        record["index"] = index
        record["sha256"] = digest(record)
    return records


TAMPERED: list[tuple[Callable[[list[dict]], list[dict]], str]] = [
    (edited, r"record 2 \(line 3\) was edited"),
    (edited_and_hashed, "record 3 does not follow record 2"),
    (last_edited_and_hashed, "record 4 was replaced"),
    (backdated, r"record 1 \(line 2\) was edited"),
    (lambda records: [*records[:2], *records[3:]], "record 2 was removed"),
    (lambda records: records[1:], "record 0 was removed"),
    (lambda records: records[:-1], "record 4 was removed from the end"),
    (lambda records: records[:2], "records 2 to 4 was removed from the end"),
    (lambda records: [], "records 0 to 4 was removed from the end"),
    (swapped, "reordered: line 2 holds record 3"),
    (lambda records: [*records, records[3]], "record 3 is there 2 times"),
    (renumbered, "record 1 does not follow record 0"),
]


@pytest.mark.parametrize(("tamper", "words"), TAMPERED)
def test_tampering_is_named_and_nothing_is_added(ledger: Path, tamper: Callable, words: str) -> None:
    rewrite(ledger, tamper(lines_of(ledger)))
    before = ledger.read_bytes()
    with pytest.raises(UserError, match=words):
        read_predictions(ledger)
    with pytest.raises(UserError, match=words):
        register(ledger, claim())
    assert ledger.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"index": 5', "line 6 is cut off"),
        ("nonsense\n", "line 6 was edited"),
        ('{"index": 5}\n', "line 6 was edited"),
    ],
)
def test_a_line_that_is_no_record_is_named(ledger: Path, text: str, words: str) -> None:
    with open(ledger, "a") as file:
        file.write(text)
    with pytest.raises(UserError, match=words):
        read_predictions(ledger)


def test_the_ledger_gone_or_its_head_gone_is_named(ledger: Path) -> None:
    head = ledger.with_name("predictions.jsonl.head")
    kept = head.read_text()
    head.unlink()
    with pytest.raises(UserError, match=r"head file predictions\.jsonl\.head was removed"):
        read_predictions(ledger)
    head.write_text("[2, 3")
    with pytest.raises(UserError, match="head was edited"):
        read_predictions(ledger)
    head.write_text(kept)
    ledger.unlink()
    with pytest.raises(UserError, match="records 0 to 4 was removed"):
        read_predictions(ledger)


def test_a_process_that_dies_between_line_and_head_loses_nothing(ledger: Path) -> None:
    head = ledger.with_name("predictions.jsonl.head")
    before = head.read_text()
    register(ledger, claim(1e9))
    head.write_text(before)
    assert len(read_predictions(ledger)) == 6
    register(ledger, claim(1e10))
    assert len(read_predictions(ledger)) == 7


# ---------------------------------------------------------------- writing
def test_concurrent_appends_are_all_kept_in_one_chain(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    code = (
        "import sys; from llamax.scaling.records import register\n"
        "for k in range(20): register(sys.argv[1], {'flops': float(k + 1), 'who': int(sys.argv[2])})"
    )
    many = [subprocess.Popen([sys.executable, "-c", code, str(path), str(who)], cwd=ROOT) for who in range(4)]
    assert [process.wait(timeout=120) for process in many] == [0] * 4
    records = read_predictions(path)
    assert len(records) == 80
    for who in range(4):
        assert [record["flops"] for record in records if record["who"] == who] == [float(k + 1) for k in range(20)]


def test_a_refused_claim_leaves_no_trace(ledger: Path) -> None:
    def refuse(records: object) -> None:
        raise UserError("no")

    before = ledger.read_bytes()
    with pytest.raises(UserError, match="no"):
        register(ledger, claim(), check=refuse)
    with pytest.raises(UserError, match="cannot be recorded"):
        register(ledger, claim(loss=float("nan")))
    assert ledger.read_bytes() == before


def test_where_ledgers_live(tmp_path: Path) -> None:
    assert ledger_path(tmp_path) == tmp_path / "predictions.jsonl"
    assert ledger_path("a/runs.csv") == Path("a/runs.predictions.jsonl")


# ---------------------------------------------------------------- joining
def test_scores_join_by_run_or_by_compute_and_size() -> None:
    runs = pd.DataFrame(
        {
            "run": ["a", "b", "c", "d"],
            "n": [1e5, 1.02e5, 2e5, 1e5],
            "flops": [1e12, 1.01e12, 1e12, 4e12],
            "loss": [2.02, 2.3, 1.0, 1.5],
        }
    )
    records = [claim() | {"index": 0}, claim(run="d") | {"index": 1}, claim(9e12) | {"index": 2}]
    found = scores(records, runs)
    assert [(row["index"], row.get("run")) for row in found] == [
        (0, "a"), (0, "b"), (1, "d"), (2, None),
    ]  # fmt: skip
    assert found[0]["miss_percent"] == pytest.approx(1.0)
    assert [row["inside"] for row in found] == [True, False, False, None]
    assert found[3]["measured"] is None


def test_data_digest_depends_on_numbers_alone() -> None:
    frame = pd.DataFrame({"n": [1.0, 2.0], "d": [3.0, 4.0], "flops": [18.0, 48.0], "loss": [2.0, 1.5]})
    same = frame.iloc[::-1].assign(run=["x", "y"])
    assert data_digest(frame) == data_digest(same)
    assert data_digest(frame) != data_digest(frame.assign(loss=[2.0, 1.5 + 1e-15]))
