"""A study of cells that differ in their seed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # fake_train, also by name in worker processes

from llamax.config.load import validate
from llamax.config.sweep import SweepConfig
from llamax.sweep.plan import Plan, make_plan
from llamax.sweep.study import open_study

BASE = {"model": {"base": "ladder/d16", "max_seq_len": 64}, "train": {"steps": 10, "seq_len": 8, "batch_size": 1}}


def seeds_plan(count: int, **more: object) -> Plan:
    data = {"name": "study", "base": BASE, "axes": [{"kind": "seeds", "count": count}], **more}
    return make_plan(validate(SweepConfig, data, "test"))


@pytest.fixture
def make_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))

    def make(count: int = 4) -> Path:
        open_study(tmp_path / "study", seeds_plan(count))
        return tmp_path / "study"

    return make
