"""Which documents train, which are held out, which are duplicates: decided by content alone."""

import hashlib
from enum import IntEnum

import numpy as np
from jaxtyping import Int64, UInt8

DIGEST_BYTES = 16


class Fate(IntEnum):
    """What becomes of one document."""

    DUPLICATE = 0
    TRAIN = 1
    HELD_OUT = 2
    CUT = 3  # its end is held out, the rest trains


def digest(text: str) -> bytes:
    """16 bytes that identify a document's text."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=DIGEST_BYTES).digest()


def fates(
    digests: UInt8[np.ndarray, "documents 16"],
    sizes: Int64[np.ndarray, " documents"],
    sources: Int64[np.ndarray, " documents"],
    fraction: float,
) -> UInt8[np.ndarray, " documents"]:
    """The fate of every document, in corpus order; `sizes` are bytes, `fraction` the share to hold out.

    The first of equal documents is kept. A document is held out when its digest, read as a number in [0, 1), is below
    `fraction`: a document added or removed elsewhere moves nothing, and equal documents are never on both sides. Where
    that leaves one source without either side, or holds out more than it trains on (a handful of documents, or one
    giant), the end of every document of that source is held out instead.
    """
    fate = np.full(len(digests), Fate.DUPLICATE, np.uint8)
    if not len(digests):
        return fate
    _, first = np.unique(np.ascontiguousarray(digests).view(f"V{DIGEST_BYTES}").ravel(), return_index=True)
    share = np.ascontiguousarray(digests[:, :8]).view(">u8").ravel().astype(np.float64) / 2.0**64
    fate[first] = np.where(share[first] < fraction, Fate.HELD_OUT, Fate.TRAIN)
    for source in np.unique(sources):
        mine = sources == source
        train = sizes[mine & (fate == Fate.TRAIN)].sum()
        held_out = sizes[mine & (fate == Fate.HELD_OUT)].sum()
        if held_out == 0 or held_out >= train:
            fate[mine & (fate != Fate.DUPLICATE)] = Fate.CUT
    return fate


def cut(text: str, fraction: float) -> tuple[str, str]:
    """`text` as (training part, held-out end): at a line's end where there is one near, at a character otherwise."""
    end = min(len(text) - round(len(text) * fraction), len(text) - 1)
    line = text.rfind("\n", 0, end) + 1
    if line > end - max(80, round(len(text) * fraction)) and line > 0:
        end = line
    return (text[:end], text[end:]) if end > 0 else (text, "")


def parts(text: str, fate: int, fraction: float) -> tuple[str, str]:
    """What of one document goes to (train, held_out)."""
    if fate == Fate.CUT:
        return cut(text, fraction)
    return (text, "") if fate == Fate.TRAIN else ("", text if fate == Fate.HELD_OUT else "")
