"""Leases in a bucket: one winner among racers, takeover by watching, nobody robbed by an outage or a wrong clock."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest

from llamax.storage import leases
from llamax.storage.bucket import StorageError, open_bucket
from llamax.storage.leases import LeaseLost, claim, holder, shared_now
from llamax.storage.places import address_of, view_of

from .emulators import FakeGCS, Moto

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def folder(bucket: str) -> Path:
    """The folder that stands for the leases of a study in a bucket."""
    return view_of(f"{bucket}/study/leases")


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every lease is another machine's, as far as this process can tell."""
    monkeypatch.setattr(leases, "alive", lambda record: None)


def _racer(folder: Path, names: list[str], start: object, out: object) -> None:
    start.wait()  # type: ignore[attr-defined]
    won = [name for name in names if claim(folder, name) is not None]
    out.put(won)  # type: ignore[attr-defined]
    start.wait()  # type: ignore[attr-defined]  # winners stay alive until all have tried


def test_of_many_processes_one_wins_each_name(folder: Path) -> None:
    names = [f"c{i}" for i in range(6)]
    start, out = FORK.Barrier(4), FORK.Queue()
    processes = [FORK.Process(target=_racer, args=(folder, names, start, out)) for _ in range(4)]
    [process.start() for process in processes]
    won = [name for _ in processes for name in out.get(timeout=60)]
    [process.join(60) for process in processes]
    assert sorted(won) == names


def test_a_holder_keeps_its_name_until_it_gives_it_back(folder: Path, elsewhere: None) -> None:
    lease = claim(folder, "c")
    assert lease is not None
    with lease:
        assert claim(folder, "c") is None
        lease.check()
    again = claim(folder, "c")
    assert again is not None
    assert (again.number, address_of(again.path)) == (1, f"{address_of(folder)}/c~1.json")
    assert claim(folder, "c.1") is not None, "names with dots and numbers are other names"


def test_of_many_threads_one_takes_over_what_nobody_beats(folder: Path, elsewhere: None) -> None:
    assert claim(folder, "c", lease_seconds=2.0) is not None  # and never beats
    until, won = time.monotonic() + 90, []
    while not won and time.monotonic() < until:
        start, found = threading.Barrier(6), []

        def racer(start: threading.Barrier = start, found: list = found) -> None:
            start.wait()
            found.append(claim(folder, "c", lease_seconds=2.0))

        threads = [threading.Thread(target=racer) for _ in range(6)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        won = [lease for lease in found if lease is not None]
    assert len(won) == 1
    assert won[0].number == 1


def test_a_loser_finds_out_and_harms_nobody(folder: Path, elsewhere: None) -> None:
    slow = claim(folder, "c", lease_seconds=2.0)
    assert slow is not None
    until = time.monotonic() + 90
    while (successor := claim(folder, "c", lease_seconds=2.0)) is None and time.monotonic() < until:
        time.sleep(0.05)
    assert successor is not None
    with slow:
        assert slow.lost.wait(60)
        with pytest.raises(LeaseLost):
            slow.check()
    found = holder(folder, "c", shared_now(folder))
    assert found is not None
    assert found.number == 1
    assert found.record["id"] == successor.record["id"], "the loser's release leaves the winner's lease alone"


def test_heartbeats_are_seen_whatever_the_clocks_say(
    folder: Path, elsewhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The claimant's clock is a day off in either direction; S3 stamps whole seconds; neither is looked at."""
    lease = claim(folder, "c", lease_seconds=3.0)
    assert lease is not None
    real = time.time
    with lease:
        for off in (-86400.0, 86400.0):
            monkeypatch.setattr(time, "time", lambda off=off: real() + off)
            until = time.monotonic() + 3.5
            while time.monotonic() < until:
                assert claim(folder, "c") is None
                time.sleep(0.1)
        monkeypatch.undo()


def test_an_outage_robs_nobody(
    folder: Path, elsewhere: None, emulator: Moto | FakeGCS, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bucket is away for several terms: the one that waits for the name must begin to watch anew."""
    monkeypatch.setenv("LLAMAX_STORAGE_SECONDS", "0")
    lease = claim(folder, "c", lease_seconds=3.0)
    assert lease is not None
    with lease:
        assert claim(folder, "c") is None
        emulator.stop()
        try:
            until = time.monotonic() + 3.5
            while time.monotonic() < until:
                with pytest.raises(StorageError):
                    leases.records_of(folder)._list("c")  # type: ignore[union-attr]
                time.sleep(0.1)
        finally:
            emulator.start()
        assert claim(folder, "c") is None
        until = time.monotonic() + 3.5
        while time.monotonic() < until:
            assert claim(folder, "c") is None
            time.sleep(0.1)
        assert not lease.lost.is_set()


def test_what_may_have_been_claimed_or_given_back_in_an_outage_is_free_here(
    folder: Path, emulator: Moto | FakeGCS, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process lives, so its lease would be held for good; it knows that it has none."""
    monkeypatch.setenv("LLAMAX_STORAGE_SECONDS", "0")
    lease = claim(folder, "c")
    assert lease is not None
    records = leases.records_of(folder)
    emulator.stop()
    try:
        lease.release()
        with pytest.raises(StorageError):
            records.create("d", 0, {})
    finally:
        emulator.start()
    record = {**lease.record, "cell": "d"}
    records._bucket.write(records._key("d", 0), json.dumps(record).encode())  # type: ignore[union-attr]  # it had arrived
    for name in ("c", "d"):
        again = claim(folder, name)
        assert again is not None
        assert again.number == 1


def test_status_ages_a_heartbeat_by_the_clock_of_the_bucket(folder: Path, elsewhere: None) -> None:
    start = time.monotonic()
    assert claim(folder, "c", lease_seconds=600.0) is not None
    now = shared_now(folder)
    age = time.monotonic() - start + 1  # at most: a bucket may tell whole seconds
    assert abs(now - time.time()) < 60
    for later, held in ((0.0, True), (600.0 - age, True), (602.0, False)):
        found = holder(folder, "c", now + later)
        assert found is not None
        assert found.held is held
    assert holder(folder, "never", now) is None


def test_a_damaged_lease_is_taken_over_after_its_term(
    folder: Path, elsewhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "LEASE_SECONDS", 2.0)
    bucket, prefix = open_bucket(str(address_of(folder)))
    bucket.write(f"{prefix}/c.json", b"{")
    assert claim(folder, "c") is None
    until = time.monotonic() + 90
    while claim(folder, "c") is None and time.monotonic() < until:
        time.sleep(0.05)
    assert json.loads(bucket.read(f"{prefix}/c~1.json")[0])["pid"] == os.getpid()
