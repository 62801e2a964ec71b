"""Data is measured on the real paths, and both sides of a comparison do the same work."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
from bench_data import bench_feed, bench_tokenize, table

from tests.data.corpora import of_folder, write_texts


@pytest.mark.slow
def test_a_tiny_corpus(tmp_path: Path) -> None:
    corpus = of_folder(write_texts(tmp_path / "texts", 200))
    result = bench_feed(tmp_path, corpus, steps=20)
    assert result["feed"]["S1"]["tokens_per_second"] == pytest.approx(
        8 * 128 / result["feed"]["S1"]["microseconds_per_step"] * 1e6
    )
    assert 0 < result["wait"]["data_seconds"] < result["wait"]["train_seconds"]
    result["tokenize"] = bench_tokenize(tmp_path, corpus, pieces=300, rounds=1)
    assert result["tokenize"]["same_tokens"]
    assert result["tokenize"]["build"]["documents"] == result["tokenize"]["library"]["documents"]
    assert "build, 2 processes" in table(result)
