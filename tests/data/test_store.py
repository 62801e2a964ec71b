"""Building, interrupting, sharing, damaging and opening token stores."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llamax.config.run import Bytes, Corpus, SentencePiece
from llamax.data import shards, store
from llamax.data.store import Store, build_store, inspect_store, verify_store
from llamax.errors import UserError
from llamax.storage.files import beside, locked
from tests.data.corpora import corpus, of_folder, small_store, text, write_texts


def documents(built: Store, split: str) -> list[str]:
    """The decoded documents of a split, from its tokens and boundaries alone."""
    found = []
    for source in built.sources:
        arrays = getattr(source, split)
        assert (arrays.tokens[arrays.ends - 1] == built.eos_id).all()
        pieces = np.split(arrays.tokens, arrays.ends[:-1]) if len(arrays.ends) else []
        found += [built.tokenizer.decode(piece) for piece in pieces]
    return found


def content(folder: Path) -> dict[str, str]:
    """A digest of every file of a store."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.name != ".lock"}


# ---------------------------------------------------------------- what is in it
def test_holds_every_document_once_in_order(tmp_path: Path) -> None:
    built = small_store(tmp_path)
    train, held_out = documents(built, "train"), documents(built, "held_out")
    assert sorted(train + held_out) == sorted(text(i) for i in range(60))
    assert 0 < len(held_out) < len(train)
    in_order = [p.read_text() for p in sorted((tmp_path / "text").rglob("*.py"), key=lambda p: str(p))]
    assert train == [t for t in in_order if t in train]
    assert [built.documents(s) for s in ("train", "held_out")] == [len(train), len(held_out)]
    assert built.bytes("train") == sum(len(t.encode()) for t in train)
    assert built.tokens("held_out") == built.bytes("held_out") + built.documents("held_out")
    assert built.sources[0].train.tokens.dtype == np.uint8
    assert built.vocab_size == 256


def test_adding_a_file_moves_no_other(tmp_path: Path) -> None:
    before = small_store(tmp_path)
    write_texts(tmp_path / "text", 5, first=1000)
    after = build_store(of_folder(tmp_path / "text"), Bytes(), tmp_path / "after")
    assert set(documents(before, "held_out")) <= set(documents(after, "held_out"))
    assert set(documents(before, "train")) <= set(documents(after, "train"))
    assert after.fingerprint != before.fingerprint


def test_manifest_counts_what_was_left_out(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "text")
    (folder / "copy.py").write_text(text(7))
    (folder / "latin.py").write_bytes("é".encode("latin-1"))
    (folder / "nul.txt").write_bytes(b"a\0")
    (folder / "empty.md").write_bytes(b"")
    (folder / "image.png").write_bytes(b"x")
    built = build_store(of_folder(folder), Bytes(), tmp_path / "store")
    row = built.manifest["sources"][0]
    assert built.manifest["duplicates"] == row["duplicates"] == 1
    assert built.manifest["skipped"] == row["skipped"] == {"binary": 1, "empty": 1, "not UTF-8": 1}
    assert row["skipped_names"] == [f"{folder}/latin.py: not UTF-8", f"{folder}/nul.txt: binary"]
    assert row["not_listed"] == {".png": 1}
    assert row["split_by"] == "document"


def test_one_document_is_cut_into_both_splits(tmp_path: Path) -> None:
    (tmp_path / "book").write_text(text(1, 3000))
    built = build_store(of_folder(tmp_path / "book", held_out_fraction=0.1), Bytes(), tmp_path / "store")
    assert documents(built, "train")[0] + documents(built, "held_out")[0] == text(1, 3000)
    assert built.bytes("held_out") / len(text(1, 3000).encode()) == pytest.approx(0.1, abs=0.01)
    assert built.manifest["sources"][0]["split_by"] == "the end of each document"


def test_mixture_keeps_sources_apart_and_deduplicates_across(tmp_path: Path) -> None:
    first, second = write_texts(tmp_path / "a", 40), write_texts(tmp_path / "b", 80)
    mix = of_folder(first), of_folder(second)
    both = Corpus(sources=mix[0].sources + mix[1].sources, held_out_fraction=0.2)
    built = build_store(both, Bytes(), tmp_path / "store")
    assert [row["documents"]["train"] + row["documents"]["held_out"] for row in built.manifest["sources"]] == [40, 40]
    assert built.manifest["duplicates"] == 40


# ---------------------------------------------------------------- the same however it is built
def test_fingerprint_does_not_depend_on_workers_shards_place_or_time(tmp_path: Path) -> None:
    built = small_store(tmp_path)
    spec = of_folder(tmp_path / "text")
    parallel = build_store(spec, Bytes(), tmp_path / "parallel", workers=2, shard_bytes=1000)
    assert content(parallel.path) == content(built.path)
    (tmp_path / "text").rename(tmp_path / "moved")
    os.utime(tmp_path / "moved" / "part0" / "file0.py", (1, 1))
    moved = build_store(of_folder(tmp_path / "moved"), Bytes(), tmp_path / "again")
    assert moved.fingerprint == built.fingerprint
    assert moved.manifest["key"] != built.manifest["key"]


def test_fingerprint_sees_boundaries_and_weights(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x" * 100)
    one = corpus({"kind": "text", "paths": [str(tmp_path / "a")]})
    heavier = corpus({"kind": "text", "paths": [str(tmp_path / "a")]}, weights=(2.0,))
    assert (
        build_store(one, Bytes(), tmp_path / "1").fingerprint
        != build_store(heavier, Bytes(), tmp_path / "2").fingerprint
    )


def test_workers_import_no_jax() -> None:
    code = "import sys, llamax.data.open, llamax.data.shards; print([m for m in ('jax', 'grain') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_building_again_opens(tmp_path: Path) -> None:
    built = small_store(tmp_path)
    stamps = {p.name: p.stat().st_mtime_ns for p in built.path.iterdir()}
    again = build_store(of_folder(tmp_path / "text"), Bytes(), built.path)
    assert again.fingerprint == built.fingerprint
    assert {p.name: p.stat().st_mtime_ns for p in built.path.iterdir() if p.name != ".lock"} == {
        name: stamp for name, stamp in stamps.items() if name != ".lock"
    }


def test_sentencepiece_trains_on_training_text_and_travels_with_the_store(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "text", 40, words=200)
    config = SentencePiece(vocab_size=320)
    built = build_store(of_folder(folder), config, tmp_path / "store", workers=1)
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    built = verify_store(tmp_path / "elsewhere")
    assert built.vocab_size == 320
    assert built.sources[0].train.tokens.dtype == np.uint16
    assert sorted(documents(built, "train") + documents(built, "held_out")) == sorted(text(i, 200) for i in range(40))
    assert built.tokens("train") < built.bytes("train")
    again = build_store(of_folder(folder), config, tmp_path / "again", workers=1, shard_bytes=2000)
    assert again.fingerprint == built.fingerprint
    loaded = build_store(
        of_folder(folder), SentencePiece(path=str(tmp_path / "again" / "tokenizer.model")), tmp_path / "third"
    )
    assert loaded.fingerprint == built.fingerprint


def test_progress_counts_to_the_end(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    build_store(
        of_folder(write_texts(tmp_path / "t")), Bytes(), tmp_path / "s", progress=lambda *call: calls.append(call)
    )
    for label in ("reading", "tokenizing"):
        mine = [(done, total) for name, done, total in calls if name == label]
        assert mine[0][0] == 0
        assert mine[-1][0] == mine[-1][1] > 0


# ---------------------------------------------------------------- crashes and races
KILL = """
import os, signal, sys
from pathlib import Path
from llamax.config.run import Bytes
from llamax.data.store import build_store
from tests.data.corpora import of_folder

def progress(label, done, total):
    if label == "tokenizing" and done > total / 2:
        os.killpg(0, signal.SIGKILL)  # workers too: they would go on with what they have been given

if __name__ == "__main__":
    text, out, workers = sys.argv[1:]
    build_store(of_folder(Path(text)), Bytes(), Path(out), workers=int(workers), progress=progress, shard_bytes=2000)
"""


@pytest.mark.parametrize("workers", ["1", "2"])
def test_killed_build_continues_to_the_identical_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: str
) -> None:
    expected = small_store(tmp_path, count=240)
    (tmp_path / "kill.py").write_text(KILL)
    command = [sys.executable, str(tmp_path / "kill.py"), str(tmp_path / "text"), str(tmp_path / "out"), workers]
    root = Path(__file__).parents[2]
    killed = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        timeout=60,
        start_new_session=True,  # a group of its own, which it kills
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    with pytest.raises(UserError, match="a build that did not finish"):
        Store.open(tmp_path / "out")
    kept = set((tmp_path / "out" / ".build").rglob("shard-*.npz"))
    assert len(kept) >= 3
    stamps = {path.name: path.stat().st_mtime_ns for path in kept}
    seen: dict[str, int] = {}
    join = store._join

    def spy(plan: store._Plan, *rest: object) -> dict[str, object]:
        seen.update({path.name: path.stat().st_mtime_ns for path in plan.work.glob("shard-*.npz")})
        return join(plan, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "_join", spy)
    build_store(of_folder(tmp_path / "text"), Bytes(), tmp_path / "out", shard_bytes=2000)
    assert stamps.items() < seen.items()  # the finished shards were not written again, others were added
    assert content(tmp_path / "out") == content(expected.path)


def test_a_cut_shard_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = small_store(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(store, "_join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build_store(of_folder(tmp_path / "text"), Bytes(), tmp_path / "out", shard_bytes=2000)
    made = sorted((tmp_path / "out" / ".build").rglob("shard-*.npz"))
    made[0].write_bytes(made[0].read_bytes()[:-50])
    made[1].write_bytes(b"")
    build_store(of_folder(tmp_path / "text"), Bytes(), tmp_path / "out", shard_bytes=2000)
    assert content(tmp_path / "out") == content(expected.path)


BUILD = """
import sys
from pathlib import Path
from llamax.config.run import Bytes
from llamax.data.store import build_store
from tests.data.corpora import of_folder

corpus = of_folder(Path(sys.argv[1]))
built = build_store(corpus, Bytes(), Path(sys.argv[2]), progress=lambda label, *_: print(label, flush=True))
print(built.fingerprint)
"""


def test_two_builders_at_once(tmp_path: Path) -> None:
    expected = small_store(tmp_path)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", BUILD, str(tmp_path / "text"), str(tmp_path / "out")]
    racers = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [racer.communicate(timeout=60)[0].split()[-1] for racer in racers] == [expected.fingerprint] * 3
    assert content(tmp_path / "out") == content(expected.path)


def test_the_second_builder_waits_then_opens(tmp_path: Path) -> None:
    write_texts(tmp_path / "text")
    out = tmp_path / "out"
    out.mkdir()
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with locked(out / ".lock", waiting=lambda: pytest.fail("nobody else has the lock")):
        second = subprocess.Popen(
            [sys.executable, "-c", BUILD, str(tmp_path / "text"), str(out)], env=env, stdout=subprocess.PIPE, text=True
        )
        assert second.stdout is not None
        assert second.stdout.readline() == "waiting for another build of this store\n"
        assert not (out / "manifest.json").exists()
    assert second.communicate(timeout=60)[0].splitlines()[-1] == Store.open(out).fingerprint


def test_text_that_changes_under_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text(i)}) + "\n" for i in range(20)))
    lines = path.read_text().splitlines()
    for changed in (lines[:10], [lines[0].replace("document", "dokument"), *lines[1:]]):

        def change(label: str, done: int, total: int, changed: list[str] = changed) -> None:
            if label == "tokenizing":
                path.write_text("\n".join(changed))

        with pytest.raises(UserError, match=r"rows.jsonl: it, or a file listed near it, changed"):
            build_store(corpus({"kind": "jsonl", "paths": [str(path)]}), Bytes(), tmp_path / "out", progress=change)
        path.write_text("\n".join(lines))


def test_a_killed_worker_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data workers: a worker process died"), shards.workers(2) as run:
        run(os._exit, [3, 3], lambda i: None)


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    folder = write_texts(tmp_path / "text")
    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
        with pytest.raises(UserError, match="no space left on the disk; free some and run again"):
            build_store(of_folder(folder), Bytes(), tmp_path / "store")
    assert not list((tmp_path / "store").rglob("*.tmp"))
    for place in (tmp_path / "store", next((tmp_path / "store" / ".build").iterdir())):
        beside(place / "of a build that was killed").touch()
    assert build_store(of_folder(folder), Bytes(), tmp_path / "store").tokens("train") > 0
    assert not list((tmp_path / "store").rglob(".*.tmp"))


# ---------------------------------------------------------------- bad corpora and places
@pytest.mark.parametrize(
    ("names", "found"),
    [
        ({}, "found nothing"),
        ({"a.py": b"\0\1"}, "found 1 binary"),
        ({"a.py": b"", "b.md": b"\xff", "c.png": b"x", "d.png": b"x"}, r"found 1 empty, 1 not UTF-8, 2 \.png"),
    ],
)
def test_corpus_without_text(tmp_path: Path, names: dict[str, bytes], found: str) -> None:
    (tmp_path / "text").mkdir()
    for name, data in names.items():
        (tmp_path / "text" / name).write_bytes(data)
    with pytest.raises(UserError, match=f"corpus: no text in it; {found}; give files of UTF-8 text"):
        build_store(of_folder(tmp_path / "text"), Bytes(), tmp_path / "store")


def test_a_source_that_only_repeats_another(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "text", 5)
    source = {"kind": "text", "paths": [str(folder)]}
    with pytest.raises(UserError, match=r"sources.1 .*: its 5 documents all repeat an earlier source's"):
        build_store(corpus(source, source), Bytes(), tmp_path / "store")


def test_a_single_character(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    with pytest.raises(UserError, match="a single character is too little"):
        build_store(of_folder(tmp_path / "a"), Bytes(), tmp_path / "store")


def test_folder_that_holds_something_else(tmp_path: Path) -> None:
    built = small_store(tmp_path)
    with pytest.raises(UserError, match="holds other files"):
        build_store(of_folder(tmp_path / "text"), Bytes(), tmp_path / "text")
    with pytest.raises(UserError, match="a file is in the way"):
        build_store(of_folder(tmp_path / "text"), Bytes(), tmp_path / "text" / "part0" / "file0.py")
    write_texts(tmp_path / "text", 1, first=99)
    with pytest.raises(UserError, match="holds a store of other text"):
        build_store(of_folder(tmp_path / "text"), Bytes(), built.path)


# ---------------------------------------------------------------- damage
def test_open_what_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.store=.*: no such folder"):
        Store.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no manifest.json: not a token store"):
        Store.open(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 1, "sour')
    with pytest.raises(UserError, match=r"manifest.json: not JSON; the store is damaged"):
        Store.open(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match=r"manifest.json: format 99, this llamax reads 1"):
        Store.open(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 1, "key": ""}')
    with pytest.raises(UserError, match=r"manifest.json: has no bytes, documents, eos_id"):
        Store.open(tmp_path)


@pytest.mark.parametrize("name", ["source0.train.tokens.npy", "source0.held_out.ends.npy"])
def test_damaged_array(tmp_path: Path, name: str) -> None:
    built = small_store(tmp_path)
    path = built.path / name
    data = path.read_bytes()
    path.write_bytes(data[:-8])
    with pytest.raises(
        UserError, match=rf"{name}: has {len(data) - 8} bytes, the manifest says {len(data)}; the store is damaged"
    ):
        Store.open(built.path)
    path.write_bytes(b"\x93NUMPZ" + data[6:])
    with pytest.raises(UserError, match=f"{name}: is not a whole .npy file"):
        Store.open(built.path)
    path.unlink()
    with pytest.raises(UserError, match=f"{name}: is missing"):
        Store.open(built.path)


def test_a_flipped_byte_shows_in_verification(tmp_path: Path) -> None:
    built = small_store(tmp_path)
    verify_store(built.path)
    assert inspect_store(built.path)["verified"]
    path = built.path / "source0.train.tokens.npy"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"source0.train.tokens.npy: differs from its digest"):
        verify_store(built.path)
    told = inspect_store(built.path)
    assert not told["verified"]
    assert "source0.train.tokens.npy" in told["damage"]


def test_arrays_never_unpickle(tmp_path: Path) -> None:
    built = small_store(tmp_path)
    path = built.path / "source0.train.ends.npy"
    np.save(path, np.array([{"a": 1}], object), allow_pickle=True)
    manifest = json.loads((built.path / "manifest.json").read_text())
    manifest["files"][path.name]["bytes"] = path.stat().st_size
    (built.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"ends.npy: is not a whole .npy file"):
        Store.open(built.path)


def test_inspect_shows_text_of_both_splits(tmp_path: Path) -> None:
    built = small_store(tmp_path)
    told = inspect_store(built.path, windows=3, length=50)
    assert json.loads(json.dumps(told))["manifest"]["fingerprint"] == built.fingerprint
    assert [s["split"] for s in told["samples"]] == ["train"] * 3 + ["held_out"] * 3
    whole = "".join(documents(built, "train"))
    assert told["samples"][0]["text"][:40].strip("\ufffd") in whole
