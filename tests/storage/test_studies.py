"""Studies in buckets: workers of several machines, failures, the command line from anywhere."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamax.config.run import RunConfig
from llamax.errors import UserError
from llamax.storage import leases
from llamax.storage.bucket import open_bucket
from llamax.storage.copies import at_hand, refresh
from llamax.storage.places import address_of
from llamax.sweep import worker
from llamax.sweep.claim import claim
from llamax.sweep.status import status
from llamax.sweep.study import add_cells, open_study, read_study
from llamax.sweep.worker import work
from llamax.train.progress import Progress
from tests.sweep import lease_faults
from tests.sweep.studies import seeds_plan

from .emulators import FakeGCS, Moto

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "BUCKET_POLL_SECONDS", 0.1)


class Trainer:
    """Stands in for the loop: a result at the address of the run, and which cells it was asked for."""

    def __init__(self, failing: str = "", seconds: float = 0.0) -> None:
        self.failing, self.seconds, self.trained = failing, seconds, list[str]()

    def __call__(self, config: RunConfig, run_dir: Path, *, report: Callable[[Progress], None]) -> dict[str, Any]:
        self.trained.append(run_dir.name)
        report(Progress(5, 10, 40, 2.0, 1e4, 1.0, "train"))
        time.sleep(self.seconds)
        if run_dir.name.startswith(self.failing or "none"):
            raise UserError("not this one")
        bucket, key = open_bucket(str(address_of(run_dir)))
        result = {"status": "done", "steps": 10, "tokens": 80, "eval_loss": 1.5}
        bucket.write(f"{key}/result.json", json.dumps(result).encode())
        return result


def counts(study: Path | str) -> dict[str, int]:
    return {state: count for state, count in status(study)["counts"].items() if count}  # type: ignore[arg-type]


def test_workers_of_several_machines_train_each_cell_once(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "alive", lambda record: None)
    address, trainer = f"{bucket}/studies/s", Trainer(seconds=0.2)
    open_study(at_hand(address, new=True), seeds_plan(5))
    monkeypatch.setenv("LLAMAX_CACHE", str(tmp_path / "other"))  # the workers have only the address
    workers = [threading.Thread(target=work, args=(Path(address),), kwargs={"train": trainer}) for _ in range(3)]
    [each.start() for each in workers]
    [each.join(120) for each in workers]
    assert sorted(trainer.trained) == sorted(cell.run_name for cell in read_study(at_hand(address)).cells)
    monkeypatch.setenv("LLAMAX_CACHE", str(tmp_path / "third"))
    found = status(address)  # type: ignore[arg-type]
    assert found["left"] == 0
    assert {row["loss"] for row in found["cells"]} == {1.5}
    assert {row["attempts"] for row in found["cells"]} == {0}, "a finished cell's leases are not read"


def test_a_failure_is_recorded_for_all_and_retried_when_asked(bucket: str, tmp_path: Path) -> None:
    address = f"{bucket}/studies/s"
    study = at_hand(address, new=True)
    open_study(study, seeds_plan(2))
    first = read_study(study).cells[0].name
    assert work(study, train=Trainer(failing=first))["failed"] == [first]
    shutil.rmtree(study)
    assert counts(address) == {"done": 1, "failed": 1}
    assert "not this one" in str([row["error"] for row in status(address)["cells"]])  # type: ignore[arg-type]
    assert work(Path(address), train=Trainer()) == {"done": [], "failed": []}
    assert work(Path(address), train=Trainer(), retry_failed=True)["done"] == [first]
    assert counts(address) == {"done": 2}


def test_a_cell_held_elsewhere_is_running_and_waited_for(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "alive", lambda record: None)
    study = at_hand(f"{bucket}/studies/s", new=True)
    open_study(study, seeds_plan(2))
    cell, trainer = read_study(study).cells[0], Trainer()
    held = claim(study, cell.name, lease_seconds=2.0)  # by a worker that dies at once
    assert held is not None
    assert counts(study) == {"running": 1, "pending": 1}
    ended = work(study, train=trainer, lease_seconds=2.0)
    assert len(ended["done"]) == 2
    assert trainer.trained[-1] == cell.run_name, "after the free one, when nobody beat for a term"


def test_an_outage_between_cells_is_waited_for(
    bucket: str, emulator: Moto | FakeGCS, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLAMAX_STORAGE_SECONDS", "0.3")
    study = at_hand(f"{bucket}/studies/s", new=True)
    open_study(study, seeds_plan(2))

    class Vanishing(Trainer):
        def __call__(self, config: RunConfig, run_dir: Path, *, report: Callable[[Progress], None]) -> dict[str, Any]:
            if not self.trained:
                emulator.stop()
                threading.Timer(2.0, emulator.start).start()
            return super().__call__(config, run_dir, report=report)

    trainer = Vanishing()
    work(study, train=trainer)
    assert counts(study) == {"done": 2}, "the bucket's absence was no failure of the cell"
    assert "waiting: " in capsys.readouterr().err


def test_two_who_change_a_plan_do_not_lose_each_others(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    address = f"{bucket}/studies/s"
    plan = open_study(at_hand(address, new=True), seeds_plan(1))
    one, other = (replace(plan.cells[0], name=name) for name in ("one", "other"))
    first, cache = at_hand(address), os.environ["LLAMAX_CACHE"]
    monkeypatch.setenv("LLAMAX_CACHE", str(tmp_path / "other"))
    add_cells(at_hand(address), [other])
    monkeypatch.setenv("LLAMAX_CACHE", cache)
    with pytest.raises(UserError, match="somebody else changed it meanwhile; give the same command again"):
        add_cells(first, [one])  # which does not look into the bucket before it writes
    refresh(first)
    add_cells(first, [one])
    assert [cell.name for cell in read_study(at_hand(address)).cells][1:] == ["other", "one"]


# ---------------------------------------------------------------- the command line
def test_the_command_line_sees_buckets(bucket: str, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"{bucket}/studies/s"
    study = at_hand(address, new=True)
    open_study(study, seeds_plan(2))
    work(study, train=Trainer())
    monkeypatch.setenv("LLAMAX_CACHE", str(tmp_path / "other"))
    code, out, err = cli("sweep", "status", address, "--json")
    assert (code, json.loads(out)["counts"]["done"]) == (0, 2), err
    code, out, err = cli("ledger", address, "--json")
    assert code == 0, err
    code, out, err = cli("report", address, "--json")
    assert code == 0, err
    assert json.loads(out)["report"] == f"{address}/report.html"
    here, key = open_bucket(address)
    assert b"<html" in here.read(f"{key}/report.html")[0][:2000]
    table = tmp_path / "runs.csv"
    assert cli("ledger", address, "--out", table)[0] == 0
    here.write(f"{key}-runs.csv", table.read_bytes())
    assert at_hand(f"{address}-runs.csv").read_bytes() == table.read_bytes()
    code, out, err = cli("ledger", f"{address}-not")
    assert (code, out) == (2, "")
    assert f"error: {address}-not: nothing is there; correct the address" in err


def test_a_bucket_that_cannot_be_written_is_one_message(
    moto: Moto, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMAX_CACHE", str(tmp_path / "cache"))
    moto.create("closed")
    study = at_hand("s3://closed/s", new=True)
    open_study(study, seeds_plan(1))
    moto.read_only = True
    try:
        code, _, err = cli("train", "tiny", "--run-dir", "s3://closed/run")
        assert code == 2
        assert "error: s3://closed/run/leases/run.json: cannot be written: permission denied" in err
        assert "Traceback" not in err
        code, out, err = cli("sweep", "status", "s3://closed/s", "--json")  # reading needs no more than reading
        assert (code, json.loads(out)["counts"]["pending"]) == (0, 1), err
    finally:
        moto.read_only = False


@pytest.mark.slow
@pytest.mark.parametrize("emulator", ["s3"], indirect=True)
def test_workers_of_a_study_in_a_bucket_under_faults(bucket: str, tmp_path: Path) -> None:
    """One dies, one is silent for two terms, each on a machine of its own; a third has a wrong clock."""
    workers = [
        {"machine": "m0", "faults": [{"do": "clock", "nth": 1, "seconds": -1e6}]},
        {"machine": "m1", "faults": [{"do": "kill", "nth": 2}]},
        {"machine": "m2", "faults": [{"do": "stop", "nth": 2, "seconds": 2 * lease_faults.TERM}]},
    ]
    study = at_hand(f"{bucket}/faults", new=True)
    log = tmp_path / "log"
    assert lease_faults.run({"seed": 0, "cells": 3, "workers": workers}, study, log) == []
    happened = {one["do"] for one in lease_faults.read(log)}
    assert happened >= {"clock", "kill", "stop"}


@pytest.mark.slow
@pytest.mark.parametrize("emulator", ["s3"], indirect=True)
def test_a_sweep_in_a_bucket_is_the_sweep_on_a_disk(
    bucket: str, emulator: Moto | FakeGCS, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers, populations included, and an outage while they train."""
    from llamax.report.ledger import ledger
    from tests.train.conftest import build
    from tests.train.runs import write_texts

    monkeypatch.setenv("LLAMAX_STORAGE_SECONDS", "5")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]), prepend=os.pathsep)
    store = build(write_texts(tmp_path / "texts"), tmp_path / "store").path
    spec = tmp_path / "spec.yaml"
    base = {"model": {"base": "ladder/d16", "max_seq_len": 64}, "data": {"store": str(store)}}
    base["train"] = {"steps": 300, "seq_len": 16, "batch_size": 8, "compute_dtype": "float32"}
    spec.write_text(json.dumps({"name": "s", "base": base, "axes": [{"kind": "seeds", "count": 4}]}))
    address = f"{bucket}/studies/s"
    outage = threading.Timer(25.0, lambda: (emulator.stop(), time.sleep(8), emulator.start()))
    outage.start()
    code, out, err = cli("sweep", "run", spec, "--dir", address, "--workers", 2, "--json")
    outage.join()
    assert code == 0, err
    assert json.loads(out)["counts"]["done"] == 4
    monkeypatch.setenv("LLAMAX_CACHE", str(tmp_path / "elsewhere"))
    assert counts(address) == {"done": 4}
    code, _, err = cli("sweep", "run", spec, "--dir", tmp_path / "disk", "--workers", 2, "--json")
    assert code == 0, err
    there, here = ledger(address), ledger(tmp_path / "disk")
    assert len(there) == 4
    pairs = zip(there.sort_values("run")["eval_loss"], here.sort_values("run")["eval_loss"], strict=True)
    assert all(abs(a - b) < 1e-5 for a, b in pairs), "a population agrees with another to float tolerance"
