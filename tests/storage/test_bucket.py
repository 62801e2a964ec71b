"""The operations on a bucket, on both kinds: conditions, errors in words, patience."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from llamax.errors import UserError
from llamax.storage.bucket import ABSENT, Bucket, Conflict, Missing, StorageError, open_bucket
from llamax.storage.places import address, address_of, is_address, shown, staging_of, view_of

from .emulators import FakeGCS, Moto


def test_addresses_and_the_folders_that_stand_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMAX_CACHE", str(tmp_path))
    assert is_address(Path("s3://lab/runs/a"))  # pathlib folds the two slashes
    assert address(Path("gs://lab//runs/a/")) == "gs://lab/runs/a"
    assert address("s3://lab") == "s3://lab"
    assert not is_address("/data/s3:/x")
    for place in (view_of("s3://lab/runs/a"), staging_of("s3://lab/runs/a")):
        assert address_of(place) == "s3://lab/runs/a"
        assert shown(f"error: {place}/x: bad") == "error: s3://lab/runs/a/x: bad"
    assert address_of(tmp_path / "elsewhere") is None
    for wrong in ("s3://", "gs://lab/../x"):
        with pytest.raises(UserError, match="address"):
            address(wrong)


def test_conditions_decide_who_writes(bucket: str) -> None:
    here, _ = open_bucket(bucket)
    first = here.write("a/b", b"1", ABSENT)
    with pytest.raises(Conflict):
        here.write("a/b", b"2", ABSENT)
    second = here.write("a/b", b"2", first.version)
    with pytest.raises(Conflict):
        here.write("a/b", b"3", first.version)
    assert here.read("a/b") == (b"2", second.version)
    here.write("a/b", b"4")
    assert [(item.key, item.size) for item in here.list("a/")] == [("a/b", 1)]
    item = here.stat("a/b")
    assert item is not None
    assert item.version != second.version
    assert abs(item.modified - time.time()) < 60
    here.delete(["a/b", "never"])
    assert here.stat("a/b") is None
    with pytest.raises(Missing):
        here.read("a/b")
    with pytest.raises(Conflict):
        here.write("a/b", b"5", second.version)


def test_of_many_writers_one_creates(bucket: str) -> None:
    here, _ = open_bucket(bucket)
    for attempt in range(3):
        start, won = threading.Barrier(8), []

        def racer(i: int, key: str = f"k{attempt}", start: threading.Barrier = start, won: list[int] = won) -> None:
            start.wait()
            try:
                here.write(key, str(i).encode(), ABSENT)
                won.append(i)
            except Conflict:
                pass

        threads = [threading.Thread(target=racer, args=(i,)) for i in range(8)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert len(won) == 1
        assert here.read(f"k{attempt}")[0] == str(won[0]).encode()


def test_a_write_whose_answer_was_lost_is_known_for_ours(bucket: str) -> None:
    """The bucket took it and the connection broke: the second try meets what the first wrote."""
    here, _ = open_bucket(bucket)
    client, lost = here._client, []

    class Broken(type(client)):  # type: ignore[misc]
        def __init__(self) -> None:
            vars(self).update(vars(client))

        def write(self, key: str, data: bytes, expect: str | None) -> object:
            answer = client.write(key, data, expect)
            if not lost:
                lost.append(answer)
                raise _no_answer(bucket)
            return answer

    there = Bucket(bucket, Broken(), 5.0)
    assert there.write("k", b"mine", ABSENT).version == lost[0].version
    with pytest.raises(Conflict):
        there.write("k", b"a rival's", ABSENT)


def _no_answer(bucket: str) -> Exception:
    if bucket.startswith("s3"):
        from botocore.exceptions import ReadTimeoutError

        return ReadTimeoutError(endpoint_url="http://127.0.0.1")
    import requests

    return requests.ReadTimeout("lost")


def test_files_of_any_size_arrive_whole(bucket: str, tmp_path: Path) -> None:
    here, _ = open_bucket(bucket)
    data = bytes(range(256)) * (40 << 10)  # 10 MB: more than one part
    (tmp_path / "a").write_bytes(data)
    here.upload("big", tmp_path / "a")
    here.download("big", tmp_path / "new" / "b")
    assert (tmp_path / "new" / "b").read_bytes() == data
    with pytest.raises(Missing):
        here.download("absent", tmp_path / "new" / "c")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["b"]


def test_a_bucket_that_is_not_there_is_said_at_once(bucket: str) -> None:
    none, _ = open_bucket(bucket.replace("bucket", "no-such"))
    start = time.monotonic()
    for action in (lambda: none.write("a", b""), lambda: none.list(""), lambda: none.upload("a", Path(__file__))):
        with pytest.raises(StorageError, match="there is no bucket no-such"):
            action()
    assert time.monotonic() - start < 10, "no patience with what will not pass"


def test_a_bucket_that_goes_away_is_waited_for(bucket: str, emulator: Moto | FakeGCS) -> None:
    here, _ = open_bucket(bucket, 0.6)
    here.write("a", b"1")
    emulator.stop()
    try:
        with pytest.raises(StorageError, match="no answer") as caught:
            here.read("a")
        assert caught.value.passing
        patient, _ = open_bucket(bucket, 60.0)
        back = threading.Timer(0.5, emulator.start)
        back.start()
        assert patient.read("a")[0] == b"1"
        back.join()
    except BaseException:
        emulator.start()
        raise


def test_an_outage_of_the_emulator_cuts_no_object_in_two(fake_gcs: FakeGCS) -> None:
    fake_gcs.create("halves")
    here, _ = open_bucket("gs://halves")
    here.write("whole", b"1")
    half = fake_gcs.folder / "halves" / "half"
    half.write_bytes(b"as the server has it before its metadata")
    outage = threading.Thread(target=fake_gcs.stop)
    outage.start()
    try:
        outage.join(0.3)
        assert outage.is_alive(), "waits for the write"
        half.unlink()
        outage.join(20)
        assert not outage.is_alive()
    finally:
        half.unlink(missing_ok=True)
        outage.join(40)
        fake_gcs.start()
    assert [item.key for item in here.list("")] == ["whole"]


@pytest.mark.parametrize("name", ["s3", "gs"])
def test_missing_credentials_are_one_message(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("boto3" if name == "s3" else "google.cloud.storage", reason="needs the client library")
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "STORAGE_EMULATOR_HOST"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    for variable, value in {"AWS_EC2_METADATA_DISABLED": "true", "NO_GCE_CHECK": "true"}.items():
        monkeypatch.setenv(variable, value)
    for variable in ("HOME", "CLOUDSDK_CONFIG", "AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(variable, str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"no credentials for .*; (set AWS_|run `gcloud)"):
        open_bucket(f"{name}://without-credentials/x")[0].list("")
