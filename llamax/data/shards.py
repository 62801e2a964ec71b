"""The parallel half of a build: reading and tokenizing shards. Imports no JAX and no config: workers start fast."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from llamax.data.pieces import Document, Piece, Skip, read_piece
from llamax.data.split import DIGEST_BYTES, digest, parts
from llamax.errors import UserError
from llamax.storage.files import replacing
from llamax.text.open import load_tokenizer
from llamax.text.tokenizers import Tokenizer

SHARD_BYTES = 1 << 20  # small, so that the last ones end together
SPLITS = ("train", "held_out")
MAX_NAMED_SKIPS = 200  # a source; the counts are always complete

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Shard:
    """Consecutive pieces of one source, read and tokenized as one task."""

    source: int
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)


def make_shards(source: int, pieces: Sequence[Piece], shard_bytes: int) -> list[Shard]:
    """`pieces` in order, in groups of about `shard_bytes` (or 512 small files)."""
    shards: list[Shard] = []
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        group.append(piece)
        size += piece.size
        if size >= shard_bytes or len(group) == 512:
            shards.append(Shard(source, tuple(group)))
            group, size = [], 0
    return [*shards, Shard(source, tuple(group))] if group else shards


# ---------------------------------------------------------------- first pass: what is there
@dataclass(frozen=True)
class Scan:
    """What a first reading of a shard found: a digest and a size in bytes a document, and what was passed over."""

    digests: np.ndarray
    sizes: np.ndarray
    skipped: Counter[str]
    named: tuple[Skip, ...]


def scan_shard(shard: Shard) -> Scan:
    """Reads a shard once, keeping no text."""
    digests, sizes, skips = bytearray(), [], []
    for item in _read(shard):
        if isinstance(item, Skip):
            skips.append(item)
        else:
            digests += digest(item.text)
            sizes.append(len(item.text.encode("utf-8")))
    counts = Counter(skip.reason for skip in skips)
    named = tuple(skip for skip in skips if skip.reason != "empty")[:MAX_NAMED_SKIPS]
    table = np.frombuffer(bytes(digests), np.uint8).reshape(-1, DIGEST_BYTES)
    return Scan(table, np.array(sizes, np.int64), counts, named)


def _read(shard: Shard) -> Iterator[Document | Skip]:
    for piece in shard.pieces:
        yield from read_piece(piece)


# ---------------------------------------------------------------- second pass: tokens
@dataclass(frozen=True)
class Job:
    """A shard to tokenize: what its documents were and what becomes of each, the tokenizer, the folder of the build."""

    shard: Shard
    digests: np.ndarray
    fate: np.ndarray
    fraction: float
    spec: dict[str, Any]
    folder: str

    @functools.cached_property
    def path(self) -> Path:
        """Named by all that determines the content, so a finished shard of an interrupted build is known."""
        told = json.dumps([[piece.told for piece in self.shard.pieces], self.fraction, self.spec])
        name = hashlib.sha256(told.encode() + self.digests.tobytes() + self.fate.tobytes()).hexdigest()[:24]
        return Path(self.folder) / f"shard-{name}.npz"


def tokenize_shard(job: Job) -> Path:
    """Writes the tokens of a shard's kept documents, each ended by its end token, unless already written.

    The .npz holds for each split the tokens, the documents' lengths in tokens, and the bytes of text.

    Raises:
        UserError: a file changed since it was first read.
    """
    if _readable(job.path):
        return job.path
    tokenizer = _tokenizer(json.dumps(job.spec), job.folder)
    dtype = token_dtype(tokenizer.vocab_size)
    tokens: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    size = dict.fromkeys(SPLITS, 0)
    documents = (item for item in _read(job.shard) if isinstance(item, Document))
    for document, fate in _in_step(documents, job):
        for split, text in zip(SPLITS, parts(document.text, fate, job.fraction), strict=True):
            if text:
                tokens[split].append(np.append(tokenizer.encode(text), np.int32(tokenizer.eos_id)).astype(dtype))
                size[split] += len(text.encode("utf-8"))
    arrays: dict[str, Any] = {}
    for split in SPLITS:
        arrays[f"{split}_tokens"] = np.concatenate([np.zeros(0, dtype), *tokens[split]])
        arrays[f"{split}_lengths"] = np.array([len(t) for t in tokens[split]], np.int64)
        arrays[f"{split}_bytes"] = np.int64(size[split])
    with replacing(job.path) as file:
        np.savez(file, **arrays)
    return job.path


def _in_step(documents: Iterator[Document], job: Job) -> Iterator[tuple[Document, int]]:
    """Documents with their fates, as long as they are the ones the first reading found."""
    told = zip(job.digests, job.fate.tolist(), strict=True)
    for document in documents:
        seen, fate = next(told, (None, 0))
        if seen is None or seen.tobytes() != digest(document.text):
            raise _changed(job)
        yield document, fate
    if next(told, None) is not None:
        raise _changed(job)


def _changed(job: Job) -> UserError:
    first = job.shard.pieces[0].name
    return UserError(f"{first}: it, or a file listed near it, changed while the store was being built; build it again")


def _readable(path: Path) -> bool:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return all(f"{split}_{part}" in arrays for split in SPLITS for part in ("tokens", "lengths", "bytes"))
    except (OSError, ValueError, EOFError, KeyError):
        return False
    except Exception as error:  # zipfile.BadZipFile, whose module costs more than this line
        if type(error).__name__ != "BadZipFile":
            raise
        return False


@functools.lru_cache(maxsize=2)
def _tokenizer(spec: str, folder: str) -> Tokenizer:
    return load_tokenizer(json.loads(spec), folder)


def token_dtype(vocab_size: int) -> type[np.unsignedinteger[Any]]:
    """The smallest unsigned type that holds every id."""
    return np.uint8 if vocab_size <= 1 << 8 else np.uint16 if vocab_size <= 1 << 16 else np.uint32


# ---------------------------------------------------------------- workers
Run = Callable[[Callable[[T], R], Sequence[T], Callable[[int], None]], list[R]]


@contextmanager
def workers(count: int) -> Iterator[Run]:
    """A function `run(function, tasks, done)` that maps in order over `count` processes (1: in this one).

    `done(i)` is called as task i ends. Processes are spawned, not forked: a fork of a process that ran JAX can hang.

    Raises:
        UserError: the processes did not start, or one was killed.
    """
    if count <= 1:
        yield _serial
        return
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from concurrent.futures.process import BrokenProcessPool

    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), initializer=_start_worker)

    def run(function: Callable[[T], R], tasks: Sequence[T], done: Callable[[int], None]) -> list[R]:
        futures = {pool.submit(function, task): i for i, task in enumerate(tasks)}
        results: dict[int, R] = {}
        for future in as_completed(futures):
            results[futures[future]] = future.result()
            done(futures[future])
        return [results[i] for i in range(len(tasks))]

    try:
        yield run
    except BrokenProcessPool:
        raise UserError(
            "data workers: a worker process died or did not start; in a script put the call under "
            "`if __name__ == '__main__':`, or pass workers=1; if memory ran out, use fewer workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _serial(function: Callable[[T], R], tasks: Sequence[T], done: Callable[[int], None]) -> list[R]:
    results = []
    for i, task in enumerate(tasks):
        results.append(function(task))
        done(i)
    return results


def _start_worker() -> None:
    """Leaves Ctrl-C to the parent, and ends with it: an orphan would wait for tasks for ever."""
    import multiprocessing
    import multiprocessing.connection
    import signal
    import threading

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:

        def watch() -> None:
            multiprocessing.connection.wait([parent.sentinel])
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()
