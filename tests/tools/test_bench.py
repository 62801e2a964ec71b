"""The benchmark runs, and its figures are what their names say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_one_side_of_the_smallest_shape():
    options = ["--shapes", "S1", "--sides", "llamax-f32", "--rounds", "2", "--seconds", "0.1", "--no-startup", "--json"]
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "bench.py", *options], capture_output=True, text=True, check=True
    )
    result = json.loads(done.stdout)
    row = result["shapes"]["S1"]["llamax-f32"]
    assert row["parameters"] == 41120  # 2 x 256 x 32 + 2 x (3 x 32 x 32 + 3 x 32 x 96 + 2 x 32) + 32
    assert row["tokens_per_second"] == pytest.approx(1e3 * 8 * 128 / row["milliseconds"])
    assert row["gflops"] < result["matmul_peak_gflops"]["f32"]
    assert row["peak_mib"] > row["baseline_mib"] > 50
    assert row["compile_seconds"] > 0.1
