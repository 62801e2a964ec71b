"""One emulator of each kind a process, found through the variables that the client libraries themselves read."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.train.conftest import cli as cli

from .emulators import FakeGCS, Moto

COUNT = itertools.count()


@pytest.fixture(scope="session")
def moto() -> Iterator[Moto]:
    with pytest.MonkeyPatch.context() as patch:
        emulator = Moto()
        for name, value in emulator.environment.items():
            patch.setenv(name, value)
        yield emulator
        emulator.stop()


@pytest.fixture(scope="session")
def fake_gcs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeGCS]:
    with pytest.MonkeyPatch.context() as patch:
        emulator = FakeGCS(tmp_path_factory.mktemp("gcs"))
        for name, value in emulator.environment.items():
            patch.setenv(name, value)
        yield emulator
        emulator.stop()


@pytest.fixture(params=["s3", "gs"])
def emulator(request: pytest.FixtureRequest) -> Moto | FakeGCS:
    """Each kind in turn."""
    return request.getfixturevalue("moto" if request.param == "s3" else "fake_gcs")


@pytest.fixture
def bucket(emulator: Moto | FakeGCS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a new bucket, on a machine that has seen none: `s3://bucket-3`."""
    name = f"bucket-{next(COUNT)}"
    emulator.create(name)
    monkeypatch.setenv("LLAMAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LLAMAX_STORAGE_SECONDS", "2")
    return f"{emulator.scheme}://{name}"
