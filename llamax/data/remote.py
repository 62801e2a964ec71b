"""A token store in a bucket: fetched into the cache once and verified, then memory-mapped like any other."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llamax.config.files import cache_dir
from llamax.data.files import disk_errors
from llamax.data.format import file_digest, read_manifest
from llamax.errors import UserError
from llamax.storage.bucket import Bucket, Conflict, Missing, open_bucket
from llamax.storage.files import clear_leftovers, locked
from llamax.storage.places import address, is_address, parts

MANIFEST = "manifest.json"


def fetched(path: str | Path) -> Path:
    """The folder of the store at `path`: itself, or for an address the copy in the cache, one for each content.

    Training reads windows from all over a store, so all its files come, each checked against its digest; one that is
    there already is not fetched again, and two processes share the work by waiting.

    Raises:
        UserError: no store there, one of another version, a file that differs from its digest, or no answer.
    """
    if not is_address(path):
        return Path(path).expanduser()
    where = address(path)
    bucket, prefix = open_bucket(where)
    try:
        text, _ = bucket.read(f"{prefix}/{MANIFEST}")
    except Missing:
        words = f"no {MANIFEST}: not a token store; build one with `llamax data build --text PATH --out {where}`"
        raise UserError(f"data.store={where}: {words}") from None
    folder = cache_dir() / "stores" / f"bucket-{hashlib.sha256(text).hexdigest()[:16]}"
    with disk_errors(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        waiting = f"waiting for another fetch of {where}"
        with locked(folder / ".lock", lambda: print(waiting, file=sys.stderr)):
            if not (folder / MANIFEST).exists():
                clear_leftovers(folder)
                _fetch(bucket, prefix, where, text, folder)
    return folder


def _fetch(bucket: Bucket, prefix: str, where: str, text: bytes, folder: Path) -> None:
    unchecked = folder / f".{MANIFEST}"
    unchecked.write_bytes(text)
    try:
        files = json.loads(text)["files"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{where}/{MANIFEST}: not the manifest of a store; build the store again") from None
    size = sum(told["bytes"] for told in files.values())
    print(f"note: fetching the store {where}, {size / 1e6:,.1f} MB, once", file=sys.stderr)

    def fetch(name: str) -> None:
        if Path(name).name != name:
            raise UserError(f"{where}/{MANIFEST}: lists {name!r}, which is no file of a store; build the store again")
        path, told = folder / name, files[name]
        if path.exists() and file_digest(path) == told["sha256"]:
            return
        try:
            bucket.download(f"{prefix}/{name}", path)
        except Missing:
            raise UserError(f"{where}/{name}: is missing; the store is damaged, send it again") from None
        if file_digest(path) != told["sha256"]:
            path.unlink()
            raise UserError(f"{where}/{name}: differs from its digest; the store is damaged, send it again")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(fetch, files))
    os.replace(unchecked, folder / MANIFEST)
    read_manifest(folder)


def build_folder(path: str | Path) -> Path:
    """Where a store that is to be at `path` is built: there, or for an address in the cache, to be sent."""
    return cache_dir().joinpath("stores", "built", *parts(path)) if is_address(path) else Path(path)


def send(folder: Path, path: str | Path) -> None:
    """Put the store in `folder` at an address, its manifest last.

    Raises:
        UserError: another store is there, or the bucket refuses or does not answer.
    """
    where = address(path)
    bucket, prefix = open_bucket(where)
    text = (folder / MANIFEST).read_bytes()
    if bucket.stat(f"{prefix}/{MANIFEST}") is not None:
        if bucket.read(f"{prefix}/{MANIFEST}")[0] == text:
            return
        raise UserError(f"{where}: another store is there; choose another address, or delete that one")
    for name in json.loads(text)["files"]:
        bucket.upload(f"{prefix}/{name}", folder / name)
    try:
        bucket.write(f"{prefix}/{MANIFEST}", text, expect="")
    except Conflict:
        raise UserError(f"{where}: another store arrived there meanwhile; choose another address") from None
