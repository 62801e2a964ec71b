"""Starts of the real command are timed, cold and warm."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
from bench_startup import ROOT, RUN, bench_startup, launch, table


@pytest.mark.slow
def test_a_warm_start_spends_less_than_a_cold_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XLA_FLAGS")  # the tests' own: eight devices
    run = {**RUN, "train": {"batch_size": 2, "seq_len": 16, "steps": 3}, "data": {"eval_tokens": 256}}
    found = bench_startup(sys.executable, repeats=1, run=run)
    assert set(found) == {"first_ever", "cold", "warm"}
    for row in found.values():
        assert 0 < row["first_step_seconds"] <= row["total_seconds"]
        assert 0 < row["first_step_processor_seconds"] <= row["total_processor_seconds"] + 0.02  # ticks of 10 ms
    assert found["warm"]["first_step_processor_seconds"] < found["cold"]["first_step_processor_seconds"]
    assert "| warm |" in table({"here": found})


def test_a_run_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"train\.batch_size"):
        launch(sys.executable, ROOT, {**RUN, "train": {"batch_size": 0, "steps": 1}}, tmp_path)
