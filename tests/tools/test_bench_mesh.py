"""mesh=auto against every layout of a small model, timed on the simulated devices of the tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import bench_mesh


def test_every_model_has_layouts_of_all_kinds_that_fit_it() -> None:
    for name, longest in (("dense", "fsdp"), ("experts", "expert"), ("long", "context")):
        ranked = bench_mesh.layouts(bench_mesh.config_of(name), 8, bench_mesh.rates_of("cpu"), None)
        assert len({one.name for one in ranked}) == len(ranked) >= 10
        assert max(one.sizes[longest] for one in ranked) == 8
        assert bench_mesh.config_of(name, ranked[0].sizes).mesh.sizes == ranked[0].sizes


@pytest.mark.slow
def test_the_pick_is_near_the_best(capsys: pytest.CaptureFixture[str]) -> None:
    """Looser than the 1.3 of the benchmark, which runs on a quiet machine and with LLVM's optimizer."""
    assert bench_mesh.compare("long", repeats=3) < 1.6
    assert "pick" in capsys.readouterr().out
