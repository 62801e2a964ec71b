"""Exports hold the run directory's numbers, and exporting again replaces them."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from llamax.config.load import run_from_data
from llamax.errors import UserError
from llamax.report import exporters
from llamax.report.exporters import export, points
from llamax.train.run_dir import open_run


@pytest.fixture
def run_dir(tmp_path):
    path = tmp_path / "run"
    with open_run(path, run_from_data({"model": "ladder/d32", "train": {"steps": 100}}), "f") as run:
        run.log([{"step": 1, "loss": 5.0, "seconds": 0.5}, {"step": 2, "loss": float("nan"), "seconds": 1.0}])
        run.log_eval({"step": 1, "loss": 4.5, "seconds": 0.75})
        run.finish({"status": "done"})
    return path


def test_points(run_dir):
    assert points(run_dir) == [
        (1, 0.5, {"train/loss": 5.0, "train/seconds": 0.5}),
        (1, 0.75, {"eval/loss": 4.5, "eval/seconds": 0.75}),
        (2, 1.0, {"train/seconds": 1.0}),
    ]


def test_tensorboard(run_dir):
    pytest.importorskip("tensorboardX")
    export(run_dir, "tensorboard")
    folder = export(run_dir, "tensorboard")
    (path,) = folder.iterdir()
    found = {
        (value.tag, event.step, event.wall_time): value.simple_value
        for event in events(path)
        for value in event.summary.value
        if value.tag.startswith(("train/loss", "eval/loss"))
    }
    assert found == {("train/loss", 1, 0.5): 5.0, ("eval/loss", 1, 0.75): 4.5}


def events(path: Path):
    """The records of an event file: a length of 8 bytes, 4 of checksum, the event, 4 of checksum."""
    from tensorboardX.proto.event_pb2 import Event

    data = path.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        yield Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]


def test_wandb_offline(run_dir):
    pytest.importorskip("wandb")
    export(run_dir, "wandb")
    folder = export(run_dir, "wandb")
    assert len(list(folder.rglob("*.wandb"))) == 1


def test_what_cannot_be_exported(run_dir, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="exporter 'excel' is not known; use one of tensorboard, wandb"):
        export(run_dir, "excel")
    with pytest.raises(UserError, match="not a run directory"):
        export(tmp_path, "tensorboard")

    def missing(*_):
        raise ModuleNotFoundError("No module named 'tensorboardX'", name="tensorboardX")

    monkeypatch.setitem(exporters.EXPORTERS, "tensorboard", missing)
    with pytest.raises(UserError, match=r"tensorboardX is not installed; pip install 'llamax\[tensorboard\]'"):
        export(run_dir, "tensorboard")
    assert not (run_dir / "tensorboard").exists()
