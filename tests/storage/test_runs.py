"""Runs in buckets: the numbers of a run on a disk, through kills, outages, damage and another machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llamax.config.run import RunConfig
from llamax.data.format import Store
from llamax.data.open import open_data
from llamax.data.remote import fetched, send
from llamax.errors import Interrupted, UserError
from llamax.mesh.job import Job
from llamax.storage import leases
from llamax.storage.bucket import open_bucket
from llamax.storage.copies import at_hand
from llamax.storage.places import staging_of
from llamax.train import mirror
from llamax.train.checkpoints import find_checkpoints
from llamax.train.digests import verify_digests
from llamax.train.load import load_run
from llamax.train.loop import train
from llamax.train.mirror import stage
from llamax.train.progress import Progress
from llamax.train.run_dir import CHECKPOINTS, read_evals, read_metrics, read_result
from tests.compiler import flags
from tests.train.runs import RUN, run_config, write_texts
from tests.train.test_loop import untimed

from .emulators import FakeGCS, Moto, environment

ROOT = Path(__file__).parents[2]
OVERRIDES = ("train.steps_per_dispatch=2", "train.eval_every_steps=6", "checkpoint.every_steps=4")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level store of small texts."""
    from tests.train.conftest import build

    folder = tmp_path_factory.mktemp("data")
    return build(write_texts(folder / "texts"), folder / "store").path


@pytest.fixture(scope="module")
def config(store: Path) -> RunConfig:
    return run_config(*OVERRIDES, store=store)


@pytest.fixture(scope="module")
def whole(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on a disk."""
    path = tmp_path_factory.mktemp("whole") / "run"
    train(config, path)
    return path


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "SEND_SECONDS", 0.05)
    monkeypatch.setattr(mirror, "RUN_LEASE_SECONDS", 3.0)


def another_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str = "other") -> None:
    """From here on nothing of the cache is there."""
    monkeypatch.setenv("LLAMAX_CACHE", str(tmp_path / name))


def assert_same(address: str, whole: Path) -> None:
    """What the bucket holds is the run on the disk: rows, evaluations, result, every array of the last checkpoint."""
    view = at_hand(address)
    assert untimed(read_metrics(view)) == untimed(read_metrics(whole))
    assert untimed(read_evals(view)) == untimed(read_evals(whole))
    there, here = read_result(view), read_result(whole)
    assert there is not None
    assert here is not None
    same = ("status", "steps", "eval_loss", "fingerprint")
    assert [there[name] for name in same] == [here[name] for name in same]
    model, _ = load_run(view)
    expected, _ = load_run(whole)
    import jax
    import numpy as np

    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), model, expected)


def at_step(step: int, action: Callable[[], None]) -> Callable[[Progress], None]:
    """Does something once, when the loop reports a step."""
    done: list[int] = []

    def report(progress: Progress) -> None:
        if progress.phase == "train" and progress.step >= step and not done:
            done.append(progress.step)
            action()

    return report


def test_a_run_in_a_bucket_is_the_run_on_a_disk(
    bucket: str, config: RunConfig, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"{bucket}/runs/a"
    train(config, address)
    another_machine(monkeypatch, tmp_path)
    assert_same(address, whole)
    names = {item.key.removeprefix("runs/a/") for item in open_bucket(bucket)[0].list("runs/")}
    assert {"config.yaml", "env.json", "metrics.jsonl", "evals.jsonl", "result.json", "leases/run.json"} <= names
    assert {name.split("/")[1] for name in names if name.startswith(CHECKPOINTS)} == {"4", "8", "12"}
    assert not any("lock" in name or name.startswith(".") for name in names)
    again = train(config, address)  # a finished run returns its result
    assert again["eval_loss"] == read_result(whole)["eval_loss"]  # type: ignore[index]


def test_a_bucket_that_vanishes_pauses_the_run_and_loses_nothing(
    bucket: str, emulator: Moto | FakeGCS, config: RunConfig, whole: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("LLAMAX_STORAGE_SECONDS", "0.4")
    address, said, returned = f"{bucket}/runs/a", [], threading.Event()

    def come_back() -> None:
        until = time.monotonic() + 60
        while "paused:" not in "".join(said) and time.monotonic() < until:
            said.append(capsys.readouterr().err)
            time.sleep(0.05)
        emulator.start()
        returned.set()

    def vanish() -> None:
        emulator.stop()
        threading.Thread(target=come_back, daemon=True).start()

    slow = at_step(4, vanish)

    def report(progress: Progress) -> None:
        slow(progress)
        if progress.phase == "train" and not returned.is_set() and progress.step > 4:
            time.sleep(0.3)  # so that the outage is longer than the patience before the run ends

    train(config, address, report=report)
    assert returned.wait(60)
    text = " ".join(("".join(said) + capsys.readouterr().err).split())
    assert re.search(rf"paused: {bucket}/\S*: .*no answer .*nothing is lost: .* goes on by itself", text), text
    another_machine(monkeypatch, tmp_path)
    assert_same(address, whole)


@pytest.mark.slow
def test_stopped_while_the_bucket_is_away_it_goes_on_from_this_disk(
    bucket: str, emulator: Moto | FakeGCS, config: RunConfig, whole: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("LLAMAX_STORAGE_SECONDS", "0.2")
    address = f"{bucket}/runs/a"

    def vanish() -> None:
        time.sleep(0.5)  # until something is there
        emulator.stop()
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()

    pause = at_step(4, vanish)

    def report(progress: Progress) -> None:
        pause(progress)
        if progress.phase == "train" and progress.step > 4:
            time.sleep(0.3)

    try:
        with pytest.raises(Interrupted):
            train(config, address, report=report)
        words = " ".join(capsys.readouterr().err.split())
        assert "what is not there yet is kept in" in words
        kept = find_checkpoints(staging_of(address) / CHECKPOINTS)[0].step
        assert kept > 4
    finally:
        emulator.start()
    train(config, address)
    another_machine(monkeypatch, tmp_path)
    assert_same(address, whole)


@pytest.mark.slow
def test_another_machine_goes_on_and_the_first_finds_out(
    bucket: str, config: RunConfig, whole: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    address = f"{bucket}/runs/a"

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, address, report=at_step(6, stop))
    first = os.environ["LLAMAX_CACHE"]
    another_machine(monkeypatch, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train(config, address, report=at_step(10, stop))
    monkeypatch.setenv("LLAMAX_CACHE", first)
    capsys.readouterr()
    train(config, address)
    assert "went on elsewhere" in capsys.readouterr().err
    another_machine(monkeypatch, tmp_path, "third")
    assert_same(address, whole)


def test_a_run_that_somebody_holds_is_refused(
    bucket: str, config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(leases, "alive", lambda record: None)  # as another machine would see it
    address = f"{bucket}/runs/a"
    with leases.claim(staging_of(address) / "leases", "run", lease_seconds=1.0), pytest.raises(UserError) as caught:  # type: ignore[union-attr]
        train(config, address)
    assert re.search(rf"{address}: process {os.getpid()} on machine \w+ is using this run", str(caught.value))
    assert open_bucket(bucket)[0].stat("runs/a/config.yaml") is None


def test_a_run_that_was_taken_over_stops_and_overwrites_nothing(
    bucket: str, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its successor, who thought it dead, wrote the rows since: the condition on the version refuses ours."""
    address, here = f"{bucket}/runs/a", open_bucket(bucket)[0]

    def rival() -> None:
        until = time.monotonic() + 30
        while here.stat("runs/a/metrics.jsonl") is None and time.monotonic() < until:
            time.sleep(0.05)
        here.write("runs/a/metrics.jsonl", b'{"step": 1, "loss": 0.0}\n')

    pause = at_step(2, rival)

    def report(progress: Progress) -> None:
        pause(progress)
        time.sleep(0.1 if progress.phase == "train" else 0.0)

    with pytest.raises(UserError, match="another process took this run over"):
        train(config, address, report=report)
    assert here.read("runs/a/metrics.jsonl")[0] == b'{"step": 1, "loss": 0.0}\n'


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(
    bucket: str, config: RunConfig, whole: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    address, here = f"{bucket}/runs/a", open_bucket(bucket)[0]

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, address, report=at_step(10, stop))
    key = max((item for item in here.list(f"runs/a/{CHECKPOINTS}/8/state/ocdbt")), key=lambda item: item.size).key
    data = bytearray(here.read(key)[0])
    data[len(data) // 2] ^= 1
    here.write(key, bytes(data))
    another_machine(monkeypatch, tmp_path)
    train(config, address)
    assert "using step 4 instead" in capsys.readouterr().err
    assert_same(address, whole)


@pytest.mark.slow
@pytest.mark.parametrize("emulator", ["gs"], indirect=True)
def test_a_branch_finds_its_trunk_in_the_bucket(
    bucket: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = ("schedule.kind=wsd", "schedule.warmup_steps=2", "train.steps_per_dispatch=2")
    trunk = run_config(*shape, "schedule.decay=0", "checkpoint.branch_steps=[6]", store=store)
    branch = {"trunk": f"t-{trunk.hash8}", "step": 6}
    decayed = run_config(*shape, "schedule.decay=0.5", f"branch={json.dumps(branch)}", store=store)
    results = {}
    for place in (str(tmp_path / "disk"), bucket):
        train(trunk, f"{place}/t-{trunk.hash8}")
        another_machine(monkeypatch, tmp_path, f"after-{len(results)}")
        results[place] = train(decayed, f"{place}/b")["eval_loss"]
    assert len(set(results.values())) == 1


def test_a_store_in_a_bucket_is_fetched_once_and_verified(
    bucket: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    where, here = f"{bucket}/stores/small", open_bucket(bucket)[0]
    with pytest.raises(UserError, match=r"no manifest.json"):
        fetched(where)
    send(store, where)
    folder = fetched(where)
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.name[0] != "."} == {
        p.name: p.read_bytes() for p in store.iterdir() if p.name[0] != "."
    }
    capsys.readouterr()
    assert fetched(where) == folder
    assert capsys.readouterr().err == "", "nothing is fetched again"
    opened = open_data(run_config(f"data.store={where}").data)
    assert opened.fingerprint == Store.open(store).fingerprint
    name = "source0.train.tokens.npy"
    here.write(f"stores/small/{name}", b"x" + here.read(f"stores/small/{name}")[0][1:])
    another_machine(monkeypatch, tmp_path)
    with pytest.raises(UserError, match=f"{where}/{name}: differs from its digest"):
        fetched(where)


def test_the_processes_of_a_job_share_the_cache_folder(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, marks = f"{bucket}/runs/a", list[str]()

    class Part(Job):
        count = 2

        def __init__(self, index: int) -> None:
            self.index = index

        def agree(self, value: Any) -> Any:
            marks.append(value)
            return marks[0]  # the leader's

    assert stage(address, None, Part(0)) == stage(address, None, Part(1)) == staging_of(address)
    another_machine(monkeypatch, tmp_path)
    monkeypatch.setattr(mirror, "VISIBLE_SECONDS", 0.2)
    with pytest.raises(UserError, match=r"process 1 does not see .* set LLAMAX_CACHE \(here .*\) to a folder that all"):
        stage(address, None, Part(1))


# ---------------------------------------------------------------- processes that are killed
@pytest.fixture
def start(emulator: Moto | FakeGCS, store: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def begin(address: str, cache: str, steps: int) -> subprocess.Popen[str]:
        data: dict[str, Any] = {**RUN, "data": {"store": str(store)}, "checkpoint": {"every_steps": 40}}
        data["train"] = {**RUN["train"], "steps": steps, "steps_per_dispatch": 2}
        env = environment(emulator) | {"LLAMAX_CACHE": str(tmp_path / cache), "JAX_PLATFORMS": "cpu"}
        env["XLA_FLAGS"] = flags()
        words = [sys.executable, "-m", "tests.storage.runner", json.dumps(data), address]
        started.append(subprocess.Popen(words, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("emulator", ["s3"], indirect=True)
def test_kill_9_and_another_machine_changes_no_number(
    bucket: str, start: Callable[..., subprocess.Popen[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three kills, each at another moment, each time a machine that has nothing of it but the bucket."""
    steps, address, here = 600, f"{bucket}/runs/a", open_bucket(bucket)[0]
    local = start(str(tmp_path / "whole"), "whole", steps)
    assert local.wait(600) == 0
    for kill, least in enumerate((40, 120, 240)):
        process = start(address, f"machine-{kill}", steps)
        while process.poll() is None and here.stat(f"runs/a/{CHECKPOINTS}/{least}/digests.json") is None:
            time.sleep(0.05)
        time.sleep(0.2 * kill)
        assert process.poll() is None, "too fast to be killed"
        process.kill()
        process.wait()
    assert start(address, "last", steps).wait(600) == 0
    another_machine(monkeypatch, tmp_path)
    assert_same(address, tmp_path / "whole")
    assert len(find_checkpoints(at_hand(address) / CHECKPOINTS)) == steps // 40


@pytest.mark.slow
@pytest.mark.parametrize("emulator", ["gs"], indirect=True)
def test_a_killed_run_goes_on_from_its_own_disk(
    bucket: str, start: Callable[..., subprocess.Popen[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine that was killed sends what it had not: nothing is fetched that it has."""
    address, here = f"{bucket}/runs/a", open_bucket(bucket)[0]
    process = start(address, "machine", 400)
    while process.poll() is None and here.stat(f"runs/a/{CHECKPOINTS}/80/digests.json") is None:
        time.sleep(0.05)
    process.kill()
    process.wait()
    again = start(address, "machine", 400)
    assert again.wait(600) == 0
    local = start(str(tmp_path / "whole"), "whole", 400)
    assert local.wait(600) == 0
    shutil.rmtree(tmp_path / "machine")
    another_machine(monkeypatch, tmp_path)
    assert_same(address, tmp_path / "whole")
    verify_digests(find_checkpoints(at_hand(address) / CHECKPOINTS)[0].path)
