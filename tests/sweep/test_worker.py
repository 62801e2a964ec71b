"""The worker's loop in this process: what it claims, skips, records, and how it stops."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamax.errors import Interrupted, UserError
from llamax.sweep.attempt import progress_path
from llamax.sweep.claim import claim, holder
from llamax.sweep.status import status
from llamax.sweep.study import read_study
from llamax.sweep.worker import main, work
from llamax.train.progress import Progress
from tests.sweep.fake_train import starts, train

Make = Callable[..., Path]


def states(study: Path) -> dict[str, str]:
    return {row["name"]: row["state"] for row in status(study)["cells"]}


def test_every_cell_is_trained_once_and_never_again(make_study: Make) -> None:
    study, events = make_study(3), []
    assert work(study, train=train, on_event=lambda *event: events.append(event)) == {
        "done": ["s0", "s1", "s2"],
        "failed": [],
    }
    assert set(states(study).values()) == {"done"}
    assert work(study, train=train) == {"done": [], "failed": []}
    assert [len(lines) for lines in starts(study).values()] == [1, 1, 1]
    assert [event[0] for event in events if event[1] == "s1"] == ["start", *["progress"] * 10, "done"]
    for cell in read_study(study).cells:
        assert (study / cell.run_name / "result.json").exists()
        found = holder(study, cell.name)
        assert found is not None
        assert not found.held


def test_the_longest_cell_comes_first_or_the_order_given(make_study: Make) -> None:
    study = make_study(3)
    data = json.loads((study / "plan.json").read_text())
    for cell, seconds in zip(data["cells"], (1.0, 9.0, 5.0), strict=True):
        cell["seconds"] = seconds
    (study / "plan.json").write_text(json.dumps(data))
    order: list[str] = []

    def note(kind: str, cell: str, details: dict[str, Any]) -> None:
        if kind == "start":
            order.append(cell)

    work(study, train=train, on_event=note, only=["s0", "s2"])
    assert order == ["s0", "s2"]
    assert states(study)["s1"] == "pending"
    for result in study.glob("*/result.json"):
        result.unlink()
    order.clear()
    work(study, train=train, on_event=note)
    assert order == ["s1", "s2", "s0"]


def test_a_failed_cell_is_recorded_and_retried_only_when_asked(
    make_study: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(3)
    monkeypatch.setenv("FAKE_FAIL", "1")
    assert work(study, train=train) == {"done": ["s0", "s2"], "failed": ["s1"]}
    record = json.loads((study / "failures" / "s1.json").read_text())
    assert record["kind"] == "UserError"
    assert record["error"] == "seed 1 is not to be trained\nsecond line"
    assert "fake_train.py" in record["traceback"]
    row = next(row for row in status(study)["cells"] if row["name"] == "s1")
    assert (row["state"], row["error"]) == ("failed", "seed 1 is not to be trained")
    monkeypatch.setenv("FAKE_FAIL", "")
    assert work(study, train=train) == {"done": [], "failed": []}
    assert work(study, train=train, retry_failed=True) == {"done": ["s1"], "failed": []}
    assert set(states(study).values()) == {"done"}


def test_training_that_leaves_no_result_is_a_failure(make_study: Make) -> None:
    study = make_study(1)
    assert work(study, train=lambda config, run_dir, report: {})["failed"] == ["s0"]
    assert "without writing result.json" in json.loads((study / "failures" / "s0.json").read_text())["error"]


def test_a_lost_lease_stops_the_cell_and_is_no_failure(make_study: Make) -> None:
    study, events = make_study(1), []

    def robbed(config: Any, run_dir: Path, report: Callable[[Progress], None]) -> None:
        lease = json.loads((study / "leases" / "s0.json").read_text())
        thief = study / "leases" / "s0~1.json"
        thief.write_text(json.dumps({**lease, "machine": "another", "lease_seconds": 0.2}))
        report(Progress(1, 10, 8, 2.0, None, None, "training"))
        raise AssertionError("the report must not return")

    def once(*args: Any, **kwargs: Any) -> Any:
        return (robbed if not (study / "leases" / "s0~1.json").exists() else train)(*args, **kwargs)

    assert work(study, train=once, on_event=lambda *event: events.append(event))["done"] == ["s0"]
    kinds = [kind for kind, _, _ in events if kind != "progress"]
    assert kinds[:2] == ["start", "lost"]
    assert kinds[-2:] == ["start", "done"], "the thief died too, and its lease expired"
    assert not (study / "failures").exists()


def test_an_error_after_a_loss_is_no_failure(make_study: Make) -> None:
    """The new holder locks the run directory, and the old one's next write is refused."""
    study, tried = make_study(1), []

    def refused(config: Any, run_dir: Path, report: Callable[[Progress], None]) -> None:
        tried.append(1)
        if len(tried) == 1:
            (study / "leases" / "s0~1.json").write_text(json.dumps({"machine": "another", "lease_seconds": 0.1}))
            raise UserError("the run is locked by another process")
        train(config, run_dir, report=report)

    assert work(study, train=refused) == {"done": ["s0"], "failed": []}
    assert len(tried) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Interrupted("SIGTERM", 4)])
def test_an_interruption_releases_the_cell(make_study: Make, error: BaseException) -> None:
    study = make_study(2)

    def interrupted(config: Any, run_dir: Path, report: Callable[[Progress], None]) -> None:
        report(Progress(4, 10, 32, 2.5, None, math.nan, "training"))
        raise error

    with pytest.raises(KeyboardInterrupt):
        work(study, train=interrupted)
    assert states(study) == {"s0": "pending", "s1": "pending"}
    assert not (study / "failures").exists()
    assert status(study)["cells"][0]["step"] == 4
    json.loads(progress_path(study, "s0").read_text(), parse_constant=lambda name: pytest.fail(name))  # NaN is not JSON
    assert work(study, train=train)["done"] == ["s0", "s1"]


def test_a_cell_held_elsewhere_is_waited_for(make_study: Make) -> None:
    study, events = make_study(2), []
    lease = claim(study, "s0")
    assert lease is not None
    done: list[dict] = []
    thread = threading.Thread(
        target=lambda: done.append(work(study, train=train, on_event=lambda *e: events.append(e)))
    )
    thread.start()
    until = time.monotonic() + 20
    while not any(kind == "waiting" for kind, _, _ in events) and time.monotonic() < until:
        time.sleep(0.02)
    assert states(study) == {"s0": "running", "s1": "done"}
    assert not done
    lease.release()  # its holder gives up
    thread.join(20)
    assert done == [{"done": ["s1", "s0"], "failed": []}]


def test_many_workers_race_in_one_process(make_study: Make) -> None:
    study = make_study(12)
    threads = [threading.Thread(target=work, args=(study,), kwargs={"train": train}) for _ in range(6)]
    [t.start() for t in threads]
    [t.join(60) for t in threads]
    assert set(states(study).values()) == {"done"}
    assert all(len(lines) == 1 for lines in starts(study).values())


def test_reports_are_written_at_most_twice_a_second(make_study: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    study, written, replace = make_study(1), [], os.replace

    def counting(source: Any, target: Any) -> None:
        written.extend([target] if Path(target).parent.name == "progress" else [])
        replace(source, target)

    monkeypatch.setattr(os, "replace", counting)
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.08")
    work(study, train=train)
    assert 1 <= len(written) <= 3  # 0.8 s of ten reports


def test_unknown_cells_and_studies_are_user_errors(
    make_study: Make, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    study = make_study(1)
    with pytest.raises(UserError, match="'s9' is not in the plan; cells: s0"):
        work(study, train=train, only=["s9"])
    with pytest.raises(UserError, match="no such plan"):
        work(tmp_path / "nothing", train=train)
    with pytest.raises(UserError, match="a study directory"):
        status(tmp_path / "nothing")
    assert main([str(tmp_path / "nothing"), "--train", "tests.sweep.fake_train:train"]) == 2
    assert "no such plan" in capsys.readouterr().err


def test_status_estimates_from_what_finished_cells_took(make_study: Make) -> None:
    study = make_study(4)
    each = status(study)["cells"][0]["estimate_seconds"]
    assert status(study)["seconds_left"] == pytest.approx(4 * each)
    work(study, train=train, only=["s0", "s1"])
    state = status(study)
    assert state["counts"] == {"done": 2, "diverged": 0, "running": 0, "failed": 0, "pending": 2}
    assert state["seconds_left"] == pytest.approx(2 * 0.5), "finished cells took 0.5 s each"
    assert status(study, ["s3"])["seconds_left"] == pytest.approx(each)
    assert [row["loss"] for row in state["cells"]] == [1.5, 1.5, None, None]
    json.dumps(state, allow_nan=False)


def test_a_diverged_run_is_finished_and_shown(make_study: Make) -> None:
    study = make_study(1)

    def diverging(config: Any, run_dir: Path, report: Any) -> None:
        run_dir.mkdir()
        (run_dir / "result.json").write_text(
            json.dumps({"status": "diverged", "cause": "loss is nan at step 7", "steps": 7})
        )

    assert work(study, train=diverging)["done"] == ["s0"]
    row = status(study)["cells"][0]
    assert (row["state"], row["error"], row["step"]) == ("diverged", "loss is nan at step 7", 7)
