"""Workers that die in a cell, by attempts that are begun and never end."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from llamax.errors import UserError
from llamax.sweep.deaths import DEATHS, counted
from llamax.sweep.status import status
from llamax.sweep.study import read_study
from llamax.sweep.worker import work
from tests.sweep.fake_train import train

Make = Callable[..., Path]


def die(study: Path) -> None:
    """Begin an attempt at the first cell in a process that ends without a word."""
    pid = os.fork()
    if pid == 0:
        try:
            attempt = counted(study, read_study(study).cells[0])
            attempt.__enter__()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)


def test_a_cell_that_kills_its_workers_is_a_failure_in_the_end(make_study: Make) -> None:
    study = make_study(2)
    for _ in range(DEATHS):
        die(study)
    assert work(study, train=train) == {"done": ["s1"], "failed": ["s0"]}
    row = status(study)["cells"][0]
    assert row["error"].startswith("5 workers died in this cell, all from step 0 on")
    assert work(study, train=train, retry_failed=True)["done"] == ["s0"], "the count begins again"


def test_attempts_that_end_in_words_leave_no_trace(make_study: Make) -> None:
    study = make_study(1)
    for _ in range(DEATHS - 1):
        die(study)
    cell = read_study(study).cells[0]
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt), counted(study, cell):
            raise KeyboardInterrupt
    assert len(json.loads((study / "attempts" / "s0.json").read_text())["began"]) == DEATHS - 1
    assert work(study, train=train)["done"] == ["s0"]


def test_a_checkpoint_between_deaths_forgives_them(make_study: Make) -> None:
    study = make_study(1)
    cell = read_study(study).cells[0]
    for _ in range(DEATHS):
        die(study)
    (study / cell.run_name / "checkpoints" / "40").mkdir(parents=True)
    with counted(study, cell):
        pass
    for _ in range(DEATHS):
        die(study)
    with pytest.raises(UserError, match="all from step 40 on"), counted(study, cell):
        pass
