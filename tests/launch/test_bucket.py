"""A study in a bucket is launched from one machine and asked after from another."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.conftest import Kubectl
from tests.storage.emulators import Moto
from tests.sweep.studies import BASE
from tests.test_cli import call


@pytest.fixture
def moto(monkeypatch: pytest.MonkeyPatch) -> Iterator[Moto]:
    emulator = Moto()
    for name, value in emulator.environment.items():
        monkeypatch.setenv(name, value)
    yield emulator
    emulator.stop()


def test_a_study_in_a_bucket(
    moto: Moto,
    kubectl: Kubectl,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moto.create("lab")
    sweep = tmp_path / "three.yaml"
    sweep.write_text(json.dumps({"name": "three", "base": BASE, "axes": [{"kind": "seeds", "count": 3}]}))
    kubectl.answers(can_i=(0, "yes\n", ""), get=(0, "", ""))
    monkeypatch.setenv("LLAMAX_CACHE", str(tmp_path / "here"))
    asked = ["--on", "jobset", "--set", "image=registry/llamax:1", "--dir", "s3://lab/runs/first"]
    done = call("launch", str(sweep), *asked)
    assert done.code == 0, done.err
    assert "s3://lab/runs/first" in done.out
    manifest = (kubectl.folder / "created.yaml").read_text()
    assert "name: first-0-0" in manifest
    assert "- s3://lab/runs/first\n" in manifest
    monkeypatch.setenv("LLAMAX_CACHE", str(tmp_path / "elsewhere"))
    told = call("sweep", "status", "s3://lab/runs/first", "--json").json
    assert [row["state"] for row in told["cells"]] == ["pending"] * 3
    assert [(job["id"], job["state"]) for job in told["jobs"]] == [("first-0-0", "Deleted")]
