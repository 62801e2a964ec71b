"""Building a token store: list, read once, decide, tokenize in parallel, join, and only then name it a store."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llamax.config import run as config
from llamax.data.files import disk_errors
from llamax.data.format import (
    FORMAT,
    SPLITS,
    Store,
    file_digest,
    fingerprint,
    inspect_store,
    read_manifest,
    verify_store,
)
from llamax.data.pieces import Document, read_piece
from llamax.data.shards import (
    MAX_NAMED_SKIPS,
    SHARD_BYTES,
    Job,
    Run,
    Scan,
    Shard,
    make_shards,
    scan_shard,
    token_dtype,
    tokenize_shard,
    workers,
)
from llamax.data.sources import Listing, list_source
from llamax.data.split import fates, parts
from llamax.errors import UserError
from llamax.mesh.cpu import cores
from llamax.storage.files import clear_leftovers, locked, replacing
from llamax.text.open import load_tokenizer
from llamax.text.sentence import SAMPLE_BYTES, SentencePieceTokenizer, train_sentencepiece
from llamax.text.tokenizers import Tokenizer

__all__ = ["Store", "build_store", "inspect_store", "store_key", "verify_store"]

Progress = Callable[[str, int, int], None]
CHUNK = 2000  # characters; what SentencePiece is trained on
SERIAL_BYTES = {"bytes": 64 << 20}  # below this, starting processes costs more than it saves (default 4 MB)


def build_store(
    corpus: config.Corpus,
    tokenizer: config.Tokenizer,
    out: Path,
    workers: int | None = None,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Store:
    """Builds the token store of `corpus` in the folder `out`, or opens it if it is there already.

    Killed at any moment and called again it goes on from its finished shards and ends in the identical store. Two
    processes at once: the second waits and opens what the first built. The result does not depend on `workers`
    (default: every core, or none for a small corpus). `progress(label, done, total)` counts bytes.

    Raises:
        UserError: no text in the corpus, a missing path or extra, a bad row, another store or other
            files in `out`, a full disk.
    """
    listings = list_sources(corpus)
    key = store_key(corpus, tokenizer, listings)
    report = progress or (lambda label, done, total: None)
    with disk_errors(str(out)):
        _prepare(out)
        with locked(out / ".lock", waiting=lambda: report("waiting for another build of this store", 0, 1)):
            if not (out / "manifest.json").exists():
                clear_leftovers(out)
                plan = _Plan(corpus, tokenizer, tuple(listings), key, out, shard_bytes)
                _build(plan, workers or _worker_count(plan), report)
    if read_manifest(out)["key"] != key:
        raise UserError(
            f"{out}: holds a store of other text or another tokenizer; choose another folder, or delete this one"
        )
    return Store.open(out)


def list_sources(corpus: config.Corpus) -> list[Listing]:
    """The listing of every source of the mixture. Raises UserError as `list_source` does."""
    return [list_source(part.source, f"sources.{i}.source") for i, part in enumerate(corpus.sources)]


def store_key(corpus: config.Corpus, tokenizer: config.Tokenizer, listings: Sequence[Listing]) -> str:
    """Identifies what a store is built from, cheaply: configs, interpreter, and each file's path, size and time.

    Raises:
        UserError: the tokenizer's file cannot be read.
    """
    told: list[Any] = [FORMAT, corpus.as_dict(), tokenizer.as_dict()]
    told += [platform.python_implementation(), platform.python_version()]
    if getattr(tokenizer, "path", None):
        told += [hashlib.sha256(data).hexdigest() for data in load_tokenizer(tokenizer).files().values()]
    told += [[piece.told for piece in listing.pieces] for listing in listings]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _prepare(out: Path) -> None:
    """Makes the folder; refuses one that holds something else."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: a file is in the way; choose a folder for the store")
    out.mkdir(parents=True, exist_ok=True)
    known = {"manifest.json", ".build", ".lock"}
    if not known & set(os.listdir(out)) and os.listdir(out):
        raise UserError(f"{out}: the folder holds other files; choose a new or empty folder for the store")


# ---------------------------------------------------------------- the steps
@dataclass(frozen=True)
class _Plan:
    corpus: config.Corpus
    tokenizer: config.Tokenizer
    listings: tuple[Listing, ...]
    key: str
    out: Path
    shard_bytes: int

    @property
    def work(self) -> Path:
        """Where finished shards wait; another key means other text, so nothing stale is picked up."""
        return self.out / ".build" / self.key[:24]

    @property
    def size(self) -> int:
        return sum(piece.size for listing in self.listings for piece in listing.pieces)


def _worker_count(plan: _Plan) -> int:
    small = plan.size < SERIAL_BYTES.get(plan.tokenizer.kind, 4 << 20)
    return 1 if small else len(cores())


def _build(plan: _Plan, count: int, report: Progress) -> None:
    plan.work.mkdir(parents=True, exist_ok=True)
    shards = [s for i, listing in enumerate(plan.listings) for s in make_shards(i, listing.pieces, plan.shard_bytes)]
    with workers(min(count, len(shards))) as run:
        scans = _with_progress(run, scan_shard, shards, [s.size for s in shards], "reading", report)
        fate = _decide(plan, shards, scans)
        tokenizer = _tokenizer(plan, shards, scans, fate, report)
        for name, data in tokenizer.files().items():
            with replacing(plan.work / name) as file:
                file.write(data)
        jobs = [
            Job(shard, scans[i].digests, fate[i], plan.corpus.held_out_fraction, tokenizer.spec(), str(plan.work))
            for i, shard in enumerate(shards)
        ]
        written = _with_progress(run, tokenize_shard, jobs, [s.size for s in shards], "tokenizing", report)
    manifest = _join(plan, shards, scans, fate, tokenizer, written)
    with replacing(plan.out / "manifest.json") as file:
        file.write(json.dumps(manifest, indent=1).encode() + b"\n")
    shutil.rmtree(plan.out / ".build", ignore_errors=True)


def _with_progress(
    run: Run[Any, Any], function: Callable[[Any], Any], tasks: list[Any], sizes: list[int], label: str, report: Progress
) -> list[Any]:
    total, done = max(sum(sizes), 1), 0
    report(label, 0, total)

    def ended(i: int) -> None:
        nonlocal done
        done += sizes[i]
        report(label, done, total)

    return run(function, tasks, ended)


def _decide(plan: _Plan, shards: list[Shard], scans: list[Scan]) -> list[np.ndarray]:
    """The fate of every document, one array a shard. Raises UserError if the corpus, or a source of it, has no text."""
    counts = [len(scan.sizes) for scan in scans]
    owner = np.repeat(np.array([shard.source for shard in shards], np.int64), counts)
    if not len(owner):
        raise UserError(f"corpus: no text in it; {_found(plan, shards, scans)}; give files of UTF-8 text")
    digests, sizes = (np.concatenate([getattr(scan, name) for scan in scans]) for name in ("digests", "sizes"))
    fate = fates(digests, sizes, owner, plan.corpus.held_out_fraction)
    for i, listing in enumerate(plan.listings):
        if not (fate[owner == i] > 0).any():
            seen = (
                f"its {int((owner == i).sum())} documents all repeat an earlier source's"
                if (owner == i).any()
                else "no text in it"
            )
            raise UserError(
                f"sources.{i} ({listing.name}): {seen}; {_found(plan, shards, scans, i)}; remove it or give it text"
            )
    if sizes[fate > 0].sum() < 2:
        raise UserError("corpus: a single character is too little to train on and hold out; give more text")
    return np.split(fate, np.cumsum(counts)[:-1])


def _found(plan: _Plan, shards: list[Shard], scans: list[Scan], only: int | None = None) -> str:
    """What a source without text does hold, in words."""
    mine = [i for i in range(len(plan.listings)) if only in (None, i)]
    skipped = sum(
        (scan.skipped for shard, scan in zip(shards, scans, strict=True) if shard.source in mine), Counter[str]()
    )
    skipped += sum((Counter(s.reason for s in plan.listings[i].unlisted) for i in mine), Counter[str]())
    other = sum((plan.listings[i].other for i in mine), Counter[str]())
    words = [f"{n} {reason}" for reason, n in sorted(skipped.items())]
    words += [f"{n} {kind}" for kind, n in other.most_common(5)]
    return f"found {', '.join(words)}" if words else "found nothing"


def _tokenizer(
    plan: _Plan, shards: list[Shard], scans: list[Scan], fate: list[np.ndarray], report: Progress
) -> Tokenizer:
    """The tokenizer asked for; SentencePiece without a path is trained, once, on a sample of the training split."""
    wanted = plan.tokenizer
    if not isinstance(wanted, config.SentencePiece) or wanted.path is not None:
        return load_tokenizer(wanted)
    file = plan.work / "tokenizer.model"
    if not file.exists():
        report("training the tokenizer", 0, 1)
        size = sum(int(scan.sizes[f > 0].sum()) for scan, f in zip(scans, fate, strict=True))
        sample = _sample(shards, fate, plan.corpus.held_out_fraction, min(1.0, SAMPLE_BYTES[wanted.model_type] / size))
        model = train_sentencepiece(sample, wanted.vocab_size, wanted.model_type)
        with replacing(file) as target:
            target.write(model)
        report("training the tokenizer", 1, 1)
    return SentencePieceTokenizer(file.read_bytes())


def _sample(shards: list[Shard], fate: list[np.ndarray], held_out: float, share: float) -> Iterator[str]:
    """About `share` of the training text in chunks, each in or out by its own hash."""
    for shard, mine in zip(shards, fate, strict=True):
        documents = (d for piece in shard.pieces for d in read_piece(piece) if isinstance(d, Document))
        for document, f in zip(documents, mine.tolist(), strict=False):
            text, _ = parts(document.text, f, held_out)
            for chunk in (text[i : i + CHUNK] for i in range(0, len(text), CHUNK)):
                if zlib.crc32(chunk.encode()) < share * 2**32:
                    yield chunk


# ---------------------------------------------------------------- joining
def _join(
    plan: _Plan,
    shards: list[Shard],
    scans: list[Scan],
    fate: list[np.ndarray],
    tokenizer: Tokenizer,
    written: list[Path],
) -> dict[str, Any]:
    """Writes the store's arrays from the shards and returns its manifest."""
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "fingerprint": "",
        "key": plan.key,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "tokenizer": tokenizer.spec(),
        "corpus": plan.corpus.as_dict(),
        "files": {},
        "sources": [],
    }
    for name, data in tokenizer.files().items():
        with replacing(plan.out / name) as file:
            file.write(data)
        manifest["files"][name] = {"bytes": (plan.out / name).stat().st_size, "sha256": file_digest(plan.out / name)}
    dtype = np.dtype(token_dtype(tokenizer.vocab_size))
    for i in range(len(plan.listings)):
        mine = [j for j, shard in enumerate(shards) if shard.source == i]
        paths = [written[j] for j in mine]
        row = _describe(plan, i, [scans[j] for j in mine], [fate[j] for j in mine])
        for split in SPLITS:
            loaded = [_load(path, f"{split}_lengths") for path in paths]
            ends = np.cumsum(np.concatenate([np.zeros(0, np.int64), *loaded]))
            tokens = partial(map, partial(_load, name=f"{split}_tokens"), paths)
            count = int(ends[-1]) if len(ends) else 0
            for part, arrays, type_, n in (
                ("tokens", tokens(), dtype, count),
                ("ends", [ends], np.dtype(np.int64), len(ends)),
            ):
                name = f"source{i}.{split}.{part}.npy"
                manifest["files"][name] = _write_array(plan.out / name, arrays, type_, n)
            row["documents"][split], row["tokens"][split] = len(ends), count
            row["bytes"][split] = sum(int(_load(path, f"{split}_bytes")) for path in paths)
        manifest["sources"].append(row)
    for what in ("documents", "bytes", "tokens"):
        manifest[what] = {split: sum(row[what][split] for row in manifest["sources"]) for split in SPLITS}
    manifest["duplicates"] = sum(row["duplicates"] for row in manifest["sources"])
    manifest["skipped"] = dict(sum((Counter(row["skipped"]) for row in manifest["sources"]), Counter[str]()))
    manifest["fingerprint"] = fingerprint(manifest)
    return manifest


def _load(path: Path, name: str) -> np.ndarray:
    with np.load(path, allow_pickle=False) as arrays:
        return arrays[name]


def _write_array(path: Path, arrays: Any, dtype: np.dtype[Any], count: int) -> dict[str, Any]:
    """A 1-D .npy from consecutive arrays, of which one at a time is in memory."""
    with replacing(path) as file:
        np.lib.format.write_array_header_1_0(file, {"descr": dtype.str, "fortran_order": False, "shape": (count,)})
        for array in arrays:
            file.write(np.ascontiguousarray(array, dtype).data)
    return {"bytes": path.stat().st_size, "dtype": dtype.name, "count": count, "sha256": file_digest(path)}


def _describe(plan: _Plan, i: int, scans: list[Scan], fate: list[np.ndarray]) -> dict[str, Any]:
    """One source's row of the manifest, counts of kept text still to come."""
    listing = plan.listings[i]
    every = np.concatenate([np.zeros(0, np.uint8), *fate])
    named = [skip for scan in scans for skip in scan.named] + list(listing.unlisted)
    skipped = sum((scan.skipped for scan in scans), Counter(skip.reason for skip in listing.unlisted))
    return {
        "name": listing.name,
        "weight": plan.corpus.sources[i].weight,
        "split_by": "the end of each document" if (every == 3).any() else "document",
        "documents": {},
        "bytes": {},
        "tokens": {},
        "duplicates": int((every == 0).sum()),
        "skipped": dict(sorted(skipped.items())),
        "skipped_names": [f"{skip.name}: {skip.reason}" for skip in named[:MAX_NAMED_SKIPS]],
        "not_listed": dict(listing.other.most_common(20)),
    }
