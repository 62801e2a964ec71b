"""What a tokenizer is to the rest of llamax, and the simplest one: bytes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from llamax.errors import UserError

Ids = Sequence[int] | np.ndarray


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids and back.

    `specials`: the ids that stand for no text, by name. `eos_id` ends a document; `bos_id` starts a text, None where
    the model's texts start without one.
    """

    vocab_size: int
    eos_id: int
    bos_id: int | None
    specials: Mapping[str, int]

    def encode(
        self, text: str, *, bos: bool = False, specials: bool = False, start: bool = True
    ) -> Int32[np.ndarray, " tokens"]:
        """The ids of `text`, after `bos_id` where `bos` is set and there is one.

        The names of special tokens in a text are text, unless `specials` makes them those tokens. `start=False` is
        text that continues something: without the space that SentencePiece puts before a start.
        """
        ...

    def decode(self, ids: Ids, *, specials: bool = False) -> str:
        """The text of `ids`; special tokens are left out, or spelled out where `specials` is set."""
        ...

    def token_id(self, name: str) -> int | None:
        """The id of the token spelled `name` in the tokenizer's file, special or not; None where there is none."""
        ...

    def spec(self) -> dict[str, Any]:
        """JSON data that `load_tokenizer` reloads it from, given the folder that holds `files()`."""
        ...

    def files(self) -> dict[str, bytes]:
        """The files it needs beside its spec, by name."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as ids. 255, a byte UTF-8 never uses, ends a document."""

    vocab_size = 256
    eos_id = 255
    bos_id: int | None = None

    def __init__(self) -> None:
        self.specials: Mapping[str, int] = {"<eos>": self.eos_id}

    def encode(
        self, text: str, *, bos: bool = False, specials: bool = False, start: bool = True
    ) -> Int32[np.ndarray, " tokens"]:
        if not specials:
            return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)
        return ids_of(pieces(text, self.specials, lambda part: list(part.encode("utf-8"))))

    def decode(self, ids: Ids, *, specials: bool = False) -> str:
        """Bytes that are not UTF-8, as a cut character leaves, become U+FFFD. Raises ValueError for an id over 255."""
        end = b"<eos>" if specials else b""
        parts = (end if i == self.eos_id else bytes([i]) for i in as_list(ids))
        return b"".join(parts).decode("utf-8", errors="replace")

    def token_id(self, name: str) -> int | None:
        return self.specials.get(name)

    def spec(self) -> dict[str, Any]:
        return {"kind": "bytes"}

    def files(self) -> dict[str, bytes]:
        return {}


def pieces(text: str, specials: Mapping[str, int], plain: Any) -> Iterator[int]:
    """Ids of `text`, the names in `specials` as their ids and `plain(part)` for what lies between; where one name
    begins another, the longer one counts."""
    if not specials:
        yield from plain(text)
        return
    names = "|".join(re.escape(name) for name in sorted(specials, key=len, reverse=True))
    for i, part in enumerate(re.split(f"({names})", text)):
        if i % 2:
            yield specials[part]
        elif part:
            yield from plain(part)


def ids_of(ids: Any) -> Int32[np.ndarray, " tokens"]:
    """Ids as an array."""
    return np.array(list(ids), np.int32)


def as_list(ids: Ids) -> list[int]:
    """Ids as Python integers."""
    return np.asarray(ids, np.int64).tolist()


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, where: str) -> None:
    """Refuses a tokenizer whose text needs more ids than the embedding's `vocab_size` rows.

    Special tokens added behind the vocabulary do not count (Gemma 3's text models have no row for the image token of
    their tokenizer); a prompt that uses one is refused when it is run.

    Raises:
        UserError: with both numbers.
    """
    size, special = tokenizer.vocab_size, set(tokenizer.specials.values())
    while size - 1 in special:
        size -= 1
    if size > vocab_size:
        raise UserError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} tokens, more than the {vocab_size} rows of the "
            "embedding (model.vocab_size); use the tokenizer the model was trained with"
        )
