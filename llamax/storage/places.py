"""Which folder of the cache stands for which address: `s3://lab/runs/a` is `<cache>/buckets/s3/lab/runs/a`.

buckets/   views: what readers see of a bucket, refreshed when a command names the address
staging/   runs that train here: written first on this disk, sent to the bucket behind the loop
notes/     for each file of both, which version of the object it is
"""

from __future__ import annotations

import re
from pathlib import Path

from llamax.config.files import cache_dir
from llamax.errors import UserError

VIEWS, STAGING, NOTES = "buckets", "staging", "notes"
_ADDRESS = re.compile(r"(gs|s3):/+([^/]*)/*(.*)")  # one slash too: pathlib folds two into one


def is_address(path: str | Path) -> bool:
    """Whether `path` names something in a bucket rather than on a disk."""
    return _ADDRESS.match(str(path)) is not None


def parts(path: str | Path) -> tuple[str, str, str]:
    """(scheme, bucket, key) of an address; the key has no slash at its ends. Raises UserError if it is none."""
    match = _ADDRESS.match(str(path))
    if match is None or not match[2]:
        raise UserError(f"{path}: not the address of a bucket; write gs://BUCKET/PATH or s3://BUCKET/PATH")
    key = re.sub("/+", "/", match[3]).strip("/")
    if ".." in key.split("/"):
        raise UserError(f"{path}: an address has no '..'; write out the path it means")
    return match[1], match[2], key


def address(path: str | Path) -> str:
    """`path` as people write it, `s3://bucket/key`. Raises UserError if it is no address."""
    scheme, bucket, key = parts(path)
    return f"{scheme}://{bucket}/{key}".rstrip("/")


def written(path: str | Path) -> str:
    """A path or an address as people write it."""
    return address(path) if is_address(path) else str(path)


def view_of(path: str | Path) -> Path:
    """The folder in which readers see an address."""
    return _root(VIEWS).joinpath(*parts(path))


def staging_of(path: str | Path) -> Path:
    """The folder in which a run at an address is written before it is sent."""
    return _root(STAGING).joinpath(*parts(path))


def notes_of(path: Path) -> Path:
    """Where the versions of the files of a view or a staging folder are noted."""
    return notes_root() / path.absolute().relative_to(cache_dir().absolute())


def notes_root() -> Path:
    """Where all notes are."""
    return _root(NOTES)


def address_of(path: str | Path) -> str | None:
    """The address a folder of the cache, or an address itself, stands for; None for any other path."""
    if is_address(path):
        return address(path)
    path = Path(path).absolute()
    for kind in (VIEWS, STAGING):
        root = _root(kind)
        if path.is_relative_to(root) and len(inner := path.relative_to(root).parts) >= 2:
            return f"{inner[0]}://{'/'.join(inner[1:])}"
    return None


def is_staged(path: Path) -> bool:
    """Whether a path is of a staging folder, which only the process that trains there writes."""
    return path.absolute().is_relative_to(_root(STAGING))


def shown(text: str) -> str:
    """`text` with the folders that stand for addresses written as those, for a person or a program to read."""
    for kind in (VIEWS, STAGING):
        if (root := f"{_root(kind)}/") in text:
            text = re.sub(re.escape(root) + "(gs|s3)/", r"\1://", text)
    return text


def _root(kind: str) -> Path:
    return cache_dir().absolute() / kind
