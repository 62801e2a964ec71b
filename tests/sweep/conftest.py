"""A study directory to work in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from llamax.sweep.study import open_study
from tests.sweep.studies import seeds_plan


@pytest.fixture
def make_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """make_study(4) is the directory of a study of four cells; worker processes can import tests.sweep.fake_train."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))

    def make(count: int = 4) -> Path:
        open_study(tmp_path / "study", seeds_plan(count))
        return tmp_path / "study"

    return make
