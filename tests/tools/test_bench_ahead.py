"""tools/bench_ahead.py: what it counts in a program, and what programs move where a CUDA compiler is installed."""

from __future__ import annotations

import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"

# A loop whose length is data, around a sum of two arrays and a copy that turns one; before it, a copy of the dispatch.
TEXT = """HloModule m

%added (p: f32[8,4], q: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %q = f32[8,4]{1,0} parameter(1)
  ROOT %sum = f32[8,4]{1,0} add(%p, %q)
}

%body (s: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %s = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[8,4]{1,0} get-tuple-element(%s), index=1
  %turned = f32[8,4]{0,1} copy(%x)
  %y = f32[8,4]{1,0} fusion(%x, %turned), kind=kLoop, calls=%added
  ROOT %next = (s32[], f32[8,4]{1,0}) tuple(%i, %y)
}

%more (s: (s32[], f32[8,4])) -> pred[] {
  %s.1 = (s32[], f32[8,4]{1,0}) parameter(0)
  ROOT %go = pred[] custom-call(%s.1), custom_call_target="whether"
}

ENTRY %main (n: s32[], x: f32[8,4]) -> f32[8,4] {
  %n = s32[] parameter(0)
  %x.1 = f32[8,4]{1,0} parameter(1)
  %own = f32[8,4]{1,0} copy(%x.1)
  %start = (s32[], f32[8,4]{1,0}) tuple(%n, %own)
  %loop = (s32[], f32[8,4]{1,0}) while(%start), condition=%more, body=%body
  ROOT %out = f32[8,4]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_costs_are_those_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    from bench_ahead import costs

    array = 4 * 8 * 4
    assert costs(TEXT, bandwidth=1e6) == {
        "kernels": 2,
        "bytes": 5 * array,
        "bytes_of_copies": 2 * array,
        "milliseconds_at_bandwidth": 1e3 * 5 * array / 1e6,
        "bytes_by": {"no source": 3 * array, "copy": 2 * array},
    }


@pytest.mark.parametrize("section", ["dense", "decode", "packing"])
def test_the_programs_can_be_lowered(section: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the CPU that is here: what they are made of has the names and arguments the tool knows."""
    monkeypatch.syspath_prepend(str(TOOLS))
    import bench_ahead

    made = list(itertools.islice(bench_ahead.SECTIONS[section](jax.devices("cpu")[0]), 2))
    assert all("while" in lowered.as_text() for _, lowered in made)


with_cuda = pytest.mark.skipif(
    not any(importlib.util.find_spec(f"jax_cuda{v}_plugin") for v in (12, 13)), reason="no CUDA compiler: llamax[cuda]"
)


def rows_of(section: str, folder: Path) -> list[dict[str, Any]]:
    command = [sys.executable, str(TOOLS / "bench_ahead.py"), "--only", section, "--out", str(folder)]
    subprocess.run(command, check=True, cwd=folder)
    return json.loads(next(folder.glob("*-h200-ahead.json")).read_text())["rows"]


@with_cuda
def test_a_decoding_step_turns_no_cache(tmp_path: Path) -> None:
    """It reads 2.04 GB of weights and cache (device_check.py); turned in every layer, the cache adds 0.1 to 0.3."""
    (row,) = rows_of("decode", tmp_path)
    assert 2.0e9 < row["bytes"] < 2.1e9
    assert row["bytes_of_copies"] < 0.01 * row["bytes"]


@with_cuda
def test_a_training_step_goes_over_its_weights_once(tmp_path: Path) -> None:
    """Of 1.078 billion parameters the update reads weights, both moments and the gradient, and writes the first three:
    28 bytes each, and 4 more for the gradient's norm. The norms of weights and update add nothing, and forward norms
    are one kernel each: they read and write 0.27 GB, where a second kernel reads 0.13 more."""
    row = next(row for row in rows_of("dense", tmp_path) if row["what"].startswith("1B"))
    assert row["bytes_by"]["optimizer"] < 1.02 * 32 * 1.078e9
    assert row["bytes_by"]["norm"] < 49.3e9
