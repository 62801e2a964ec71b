"""A token store on disk: what it looks like, opening it, checking it, looking inside.

    STORE/
      manifest.json                  written last: a folder without one is no store
      source0.train.tokens.npy       every document of the split, each ended by the end-of-document token
      source0.train.ends.npy         int64: where each document ends (one past its end-of-document token)
      source0.held_out.tokens.npy    ... and so on, one set for each source of the mixture
      tokenizer.model                the tokenizer's own file, if it has one

Arrays are memory-mapped; a window of any length is a slice.
"""

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt

from llamax.errors import UserError
from llamax.text.open import load_tokenizer
from llamax.text.tokenizers import Tokenizer

FORMAT = 1
SPLITS = ("train", "held_out")
KEYS = {"fingerprint", "key", "vocab_size", "eos_id", "tokenizer", "files", "sources", "documents", "bytes", "tokens"}


@dataclass(frozen=True)
class Split:
    """One split of one source: `tokens` end to end, and where each document `ends`."""

    tokens: UInt[np.ndarray, " tokens"]
    ends: Int64[np.ndarray, " documents"]


@dataclass(frozen=True)
class Source:
    """One part of the mixture; `weight` is its share of training windows relative to the other parts."""

    name: str
    weight: float
    train: Split
    held_out: Split


@dataclass(frozen=True)
class Store:
    """An open token store. `fingerprint` identifies its tokens, boundaries and weights, however they were built."""

    path: Path
    manifest: dict[str, Any]
    sources: tuple[Source, ...]

    @staticmethod
    def open(path: str | Path) -> "Store":
        """Opens a store and checks that its files are there, whole in size, and of the right type (not their content).

        Raises:
            UserError: no store there, one of another version, or a missing or truncated file, by name.
        """
        path = Path(path).expanduser()
        manifest = read_manifest(path)
        names = [source["name"] for source in manifest["sources"]]
        sources = [
            Source(
                name,
                float(manifest["sources"][i]["weight"]),
                *(_split(path, manifest, f"source{i}.{split}") for split in SPLITS),
            )
            for i, name in enumerate(names)
        ]
        if "file" in manifest["tokenizer"]:
            _check_size(path, manifest["tokenizer"]["file"], manifest["files"])
        return Store(path, manifest, tuple(sources))

    @property
    def vocab_size(self) -> int:
        return int(self.manifest["vocab_size"])

    @property
    def eos_id(self) -> int:
        """The token that ends every document."""
        return int(self.manifest["eos_id"])

    @property
    def fingerprint(self) -> str:
        return str(self.manifest["fingerprint"])

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.manifest["tokenizer"], self.path)

    def tokens(self, split: str) -> int:
        """Tokens in `split` ("train" or "held_out"), end-of-document tokens included."""
        return int(self.manifest["tokens"][split])

    def bytes(self, split: str) -> int:
        """Bytes of UTF-8 text in `split`."""
        return int(self.manifest["bytes"][split])

    def documents(self, split: str) -> int:
        """Documents in `split`."""
        return int(self.manifest["documents"][split])


# ---------------------------------------------------------------- opening
def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the store at `path`. Raises UserError if it is missing, damaged or of another version."""
    file = path / "manifest.json"
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        what = (
            "no manifest.json: not a token store, or a build that did not finish" if path.is_dir() else "no such folder"
        )
        raise UserError(
            f"data.store={path}: {what}; build one with `llamax data build --text PATH --out {path}`"
        ) from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}; give the folder of a token store") from None
    except ValueError:
        raise UserError(f"{file}: not JSON; the store is damaged, delete {path} and build it again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise UserError(f"{file}: format {found}, this llamax reads {FORMAT}; delete {path} and build it again")
    if missing := KEYS - manifest.keys():
        raise _damaged(path, "manifest.json", f"has no {', '.join(sorted(missing))}")
    return manifest


def _split(path: Path, manifest: dict[str, Any], name: str) -> Split:
    tokens, ends = (_array(path, f"{name}.{part}.npy", manifest["files"]) for part in ("tokens", "ends"))
    if len(ends) and ends[-1] != len(tokens):
        raise _damaged(path, f"{name}.ends.npy", "does not match the tokens")
    return Split(tokens, ends)


def _array(path: Path, name: str, files: dict[str, Any]) -> np.ndarray:
    told = _check_size(path, name, files)
    try:
        array = np.load(path / name, mmap_mode="r" if told["count"] else None, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        raise _damaged(path, name, "is not a whole .npy file") from None
    if array.shape != (told["count"],) or array.dtype.name != told["dtype"]:
        raise _damaged(
            path, name, f"holds {array.dtype}{list(array.shape)}, the manifest says {told['dtype']}[{told['count']}]"
        )
    return np.asarray(array)  # the plain view of the map: slicing a memmap object costs ten times as much


def _check_size(path: Path, name: str, files: dict[str, Any]) -> dict[str, Any]:
    told = files.get(name)
    if told is None:
        raise _damaged(path, "manifest.json", f"does not list {name}")
    try:
        size = (path / name).stat().st_size
    except OSError:
        raise _damaged(path, name, "is missing") from None
    if size != told["bytes"]:
        raise _damaged(path, name, f"has {size} bytes, the manifest says {told['bytes']}")
    return told


def _damaged(path: Path, name: str, what: str) -> UserError:
    return UserError(f"{path / name}: {what}; the store is damaged, delete {path} and build it again")


# ---------------------------------------------------------------- checking and looking
def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(manifest: dict[str, Any]) -> str:
    """The hash of what training sees: each array's type, length and digest, the weights, the end-of-document token."""
    arrays = {name: [f["dtype"], f["count"], f["sha256"]] for name, f in manifest["files"].items() if "dtype" in f}
    told = [arrays, [source["weight"] for source in manifest["sources"]], manifest["vocab_size"], manifest["eos_id"]]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def verify_store(path: str | Path) -> Store:
    """Opens a store and reads all of it against its digests.

    Raises:
        UserError: naming the first file that differs.
    """
    store = Store.open(path)
    for name, told in store.manifest["files"].items():
        if file_digest(store.path / name) != told["sha256"]:
            raise _damaged(store.path, name, "differs from its digest")
    if fingerprint(store.manifest) != store.fingerprint:
        raise _damaged(store.path, "manifest.json", "does not match its own fingerprint")
    return store


def inspect_store(path: str | Path, windows: int = 2, length: int = 64) -> dict[str, Any]:
    """What `llamax data inspect` shows: the manifest, whether every digest holds, and some decoded windows.

    Raises:
        UserError: the store cannot be opened. Damage that only digests show is told under `verified` and `damage`.
    """
    store = Store.open(path)
    try:
        verify_store(path)
        damage = None
    except UserError as error:
        damage = str(error)
    samples = []
    for source in store.sources:
        for split in SPLITS:
            tokens = getattr(source, split).tokens
            for start in np.linspace(0, max(len(tokens) - length, 0), windows + 2, dtype=np.int64)[1:-1].tolist():
                text = store.tokenizer.decode(tokens[start : start + length])
                samples.append({"source": source.name, "split": split, "start": start, "text": text})
    return {
        "path": str(store.path),
        "verified": damage is None,
        "damage": damage,
        "samples": samples,
        "manifest": store.manifest,
    }
