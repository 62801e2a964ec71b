"""The SHA-256 of every file of a checkpoint, so that a flipped byte or a missing file is noticed before it is read."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llamax.storage.files import write_atomic

DIGESTS = "digests.json"


class Damaged(Exception):
    """A folder is not what was written; the message says in words how."""


def write_digests(folder: Path, note: dict[str, Any]) -> None:
    """Write `digests.json` for the files under `folder`, with `note` (JSON data) under the same protection.

    The files are flushed to the disk first. Raises OSError.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != DIGESTS)
    names = [path.relative_to(folder).as_posix() for path in files]
    body = {"files": dict(zip(names, _in_threads(_flush_and_digest, files), strict=True)), **note}
    write_atomic(folder / DIGESTS, json.dumps({"sha256": _sha256(body), **body}))


def verify_digests(folder: Path) -> dict[str, Any]:
    """The note stored with `folder`, after every file was found to be exactly as written.

    Raises:
        Damaged: a missing, shorter, longer or changed file, or an unreadable or changed `digests.json`.
    """
    body = read_note(folder)
    files = body.pop("files")

    def check(name: str) -> str | None:
        path, (size, digest) = folder / name, files[name]
        try:
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            return None if _digest(path) == digest else f"{name} has changed (its SHA-256 differs)"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror or error}"

    if problems := [problem for problem in _in_threads(check, list(files)) if problem]:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise Damaged(problems[0] + more)
    return body


def read_note(folder: Path) -> dict[str, Any]:
    """The content of `digests.json`, found to be as written; the files are not looked at. Raises Damaged."""
    path = folder / DIGESTS
    try:
        document = json.loads(path.read_bytes())
        written = document.pop("sha256")
    except FileNotFoundError:
        raise Damaged(f"{DIGESTS} is missing") from None
    except OSError as error:
        raise Damaged(f"{DIGESTS} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise Damaged(f"{DIGESTS} is not the JSON that was written") from None
    if _sha256(document) != written:
        raise Damaged(f"{DIGESTS} has changed")
    return document


def _sha256(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush_and_digest(path: Path) -> tuple[int, str]:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()


def _in_threads(function: Any, items: list[Any]) -> list[Any]:
    """Hashing and reading release the interpreter lock, so large checkpoints use the cores there are."""
    with ThreadPoolExecutor(min(8, len(items) or 1)) as pool:
        return list(pool.map(function, items))
