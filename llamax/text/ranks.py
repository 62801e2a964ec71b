"""Byte-pair encodings given as ranked byte sequences: tiktoken files (Llama 3 and 4) and Mistral's Tekken."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Int32

from llamax.errors import UserError
from llamax.text.schemes import SCHEMES, TEKKEN_SPECIALS
from llamax.text.tokenizers import Ids, as_list, ids_of, pieces

# Meta's tokenizers cut longer texts and longer runs (of spaces or of anything else) before the library sees them.
# Source: meta-llama/llama-models, models/llama3/tokenizer.py.
MAX_CHARACTERS, MAX_RUN = 400_000, 25_000


class RankTokenizer:
    """Merges of ranked byte sequences (`ids` from bytes), run by the `tiktoken` library.

    `cut` applies the cuts above, as Meta's own tokenizers do.

    Raises:
        UserError: the extra is missing, a pattern that is no regular expression, or a byte without an id.
    """

    def __init__(
        self,
        ids: Mapping[bytes, int],
        specials: Mapping[str, int],
        pattern: str,
        bos: str,
        eos: str,
        *,
        file: tuple[str, bytes],
        stops: tuple[str, ...] = (),
        cut: bool = False,
        where: str = "tokenizer.model",
    ):
        try:
            import tiktoken
        except ImportError:
            raise UserError(f"{where} needs the tiktoken package; pip install 'llamax[tokenizers]'") from None
        if missing := [byte for byte in range(256) if bytes([byte]) not in ids]:
            raise UserError(f"{where}: no rank for byte {missing[0]:#04x}; the file is cut short, fetch it again")
        try:
            self._model = tiktoken.Encoding(where, pat_str=pattern, mergeable_ranks=dict(ids), special_tokens={})
        except ValueError as error:
            raise UserError(f"{where}: the pattern is not a regular expression ({error}); fetch it again") from None
        for name in (bos, eos):
            if name not in specials:
                raise UserError(f"{where}: no special token {name}; fetch the file again")
        self._file, self._cut = file, cut
        self.specials: Mapping[str, int] = dict(specials)
        self._spelled = {i: piece for piece, i in ids.items()} | {i: s.encode() for s, i in specials.items()}
        self._left_out = set(specials.values())
        self._by_name = {_name(piece): i for piece, i in ids.items()} | dict(specials)
        self.vocab_size = max(self._spelled) + 1
        self.bos_id: int | None = specials[bos]
        self.eos_id = specials[eos]
        self.stops = tuple(specials[name] for name in stops)

    def encode(
        self, text: str, *, bos: bool = False, specials: bool = False, start: bool = True
    ) -> Int32[np.ndarray, " tokens"]:
        ids = pieces(text, self.specials if specials else {}, self._plain)
        return ids_of([self.bos_id, *ids] if bos else ids)

    def _plain(self, text: str) -> list[int]:
        parts = _cut(text) if self._cut else [text]
        return [i for part in parts for i in self._model.encode_ordinary(part)]

    def decode(self, ids: Ids, *, specials: bool = False) -> str:
        kept = (i for i in as_list(ids) if specials or i not in self._left_out)
        return b"".join(self._spelled[i] for i in kept).decode("utf-8", errors="replace")

    def token_id(self, name: str) -> int | None:
        return self._by_name.get(name)

    def spec(self) -> dict[str, Any]:
        return {"kind": "tekken" if self._file[0].endswith(".json") else "tiktoken", "file": self._file[0]}

    def files(self) -> dict[str, bytes]:
        return {self._file[0]: self._file[1]}


def read_tiktoken(data: bytes, where: str = "tokenizer.model") -> RankTokenizer:
    """The tokenizer of a tiktoken file: a line per token, its bytes in base64, a space, its rank.

    Pattern and special tokens are not in the file; the number of ranks says whose they are (`schemes.SCHEMES`).

    Raises:
        UserError: not such a file, ranks with holes or repeats, or a number of ranks nobody is known by.
    """
    ids: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        try:
            piece, rank = line.split()
            ids[base64.b64decode(piece, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            if line.strip():
                raise UserError(
                    f"{where}: line {number} is not `base64 rank`: {line[:40]!r}; give a tiktoken file"
                ) from None
    _check_ranks(ids, where)
    scheme = next((s for s in SCHEMES if s.ranks == len(ids)), None)
    if scheme is None:
        known = ", ".join(f"{s.ranks} ({s.name})" for s in SCHEMES)
        raise UserError(f"{where}: {len(ids)} ranks belong to no known tokenizer; known are {known}")
    return RankTokenizer(
        ids,
        {name: scheme.ranks + i for i, name in enumerate(scheme.specials)},
        scheme.pattern,
        scheme.bos,
        scheme.eos,
        file=("tokenizer.model", data),
        stops=scheme.stops,
        cut=True,
        where=where,
    )


def read_tekken(data: bytes, where: str = "tekken.json") -> RankTokenizer:
    """Mistral's Tekken: special tokens first, then the ranks, of which the file holds more than the model uses.

    Raises:
        UserError: not such a file, or numbers in it that contradict each other.
    """
    try:
        content = json.loads(data)
        config = content["config"]
        size, reserved = int(config["default_vocab_size"]), int(config["default_num_special_tokens"])
        pattern = str(config["pattern"])
        listed = content.get("special_tokens")
        names = TEKKEN_SPECIALS if listed is None else tuple(_in_order(listed))
        ranked = {base64.b64decode(t["token_bytes"], validate=True): int(t["rank"]) for t in content["vocab"]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{where}: not a Tekken tokenizer ({type(error).__name__}: {str(error)[:80]}); fetch the file again"
        ) from None
    _check_ranks(ranked, where)
    if not len(names) <= reserved < size <= len(ranked) + reserved:
        raise UserError(
            f"{where}: {len(ranked)} ranks and {len(names)} special tokens do not make default_vocab_size={size} with "
            f"default_num_special_tokens={reserved}; fetch the file again"
        )
    names += tuple(f"<SPECIAL_{i}>" for i in range(len(names), reserved))
    return RankTokenizer(
        {piece: rank + reserved for piece, rank in ranked.items() if rank < size - reserved},
        {name: i for i, name in enumerate(names)},
        pattern,
        "<s>",
        "</s>",
        file=("tekken.json", data),
        stops=("</s>",),
        where=where,
    )


def is_tiktoken(data: bytes) -> bool:
    """Whether a `tokenizer.model` is a tiktoken file rather than a SentencePiece model."""
    head = data.split(b"\n", 1)[0].split()
    return len(head) == 2 and head[1].isdigit() and head[0].rstrip(b"=").replace(b"/", b"").replace(b"+", b"").isalnum()


def _check_ranks(ids: Mapping[bytes, int], where: str) -> None:
    if not ids or sorted(ids.values()) != list(range(len(ids))):
        raise UserError(f"{where}: the ranks are not 0 to {len(ids) - 1}, each once; fetch the file again")


def _in_order(listed: list[dict[str, Any]]) -> Iterator[str]:
    """Names of special tokens by rank; raises ValueError where the ranks are not 0, 1, 2 and so on."""
    for i, token in enumerate(sorted(listed, key=lambda token: token["rank"])):
        if token["rank"] != i:
            raise ValueError(f"special token {token['token_str']!r} has rank {token['rank']}, not {i}")
        yield str(token["token_str"])


def _name(piece: bytes) -> str:
    return piece.decode("utf-8", errors="backslashreplace")


def _cut(text: str) -> Iterator[str]:
    """`text` in parts of at most MAX_CHARACTERS, none with a run of more than MAX_RUN spaces or non-spaces."""
    for begin in range(0, len(text), MAX_CHARACTERS):
        block = text[begin : begin + MAX_CHARACTERS]
        if len(block) <= MAX_RUN:
            yield block
            continue
        start = run = 0
        space = block[0].isspace()
        for i, character in enumerate(block):
            run = run + 1 if character.isspace() == space else 1
            space = character.isspace()
            if run > MAX_RUN:
                yield block[start:i]
                start, run = i, 1
        yield block[start:]
