"""SentencePiece models: reading them, and training one byte-exactly."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Int32

from llamax.errors import UserError
from llamax.text.tokenizers import Ids, as_list, ids_of, pieces

# Protocol buffers merge a message given twice, so this suffix sets normalizer_spec (field 3) add_dummy_prefix (3) to 0.
NO_PREFIX = b"\x1a\x02\x18\x00"
CHUNK = 4000  # characters encoded at once where a text may be cut: a longer agenda of merges leaves the cache
GAP = re.compile("(?<! ) ")  # where words end


class SentencePieceTokenizer:
    """A SentencePiece model (arXiv:1808.06226). Models llamax trains round-trip any text without NUL exactly.

    `added` are special tokens by name that the file does not hold (`added_tokens.json`); `add_bos` says whether texts
    start with the model's begin-of-sentence piece, if it has one. After a special token text is encoded without the
    leading space, except after begin-of-sentence, where a text starts anew.

    Raises:
        UserError: not a SentencePiece model, one without an end-of-sentence piece, or an added token on a piece's id.
    """

    SPACE = "\u2581"  # SentencePiece writes a space as this character, so this character itself needs a way around

    def __init__(
        self,
        model: bytes,
        where: str = "tokenizer.model",
        added: Mapping[str, int] | None = None,
        add_bos: bool = True,
    ):
        import sentencepiece

        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
            self._after = sentencepiece.SentencePieceProcessor(model_proto=model + NO_PREFIX)
        except RuntimeError:
            raise UserError(f"{where}: not a SentencePiece model; give the .model file that training wrote") from None
        self._model, self._added, self._add_bos = model, dict(added or {}), add_bos
        self._count = self._pieces.vocab_size()
        self.eos_id = self._pieces.eos_id()
        if self.eos_id < 0:
            raise UserError(f"{where}: the model has no end-of-sentence piece; train it with an eos_id")
        self._begin = self._pieces.bos_id()
        self.bos_id = self._begin if add_bos and self._begin >= 0 else None
        control = {self._pieces.id_to_piece(i): i for i in range(self._count) if self._pieces.is_control(i)}
        for name, i in self._added.items():
            if i < self._count and self._pieces.id_to_piece(i) != name:
                raise UserError(
                    f"{where}: added token {name!r} has id {i}, which is the piece {self._pieces.id_to_piece(i)!r}; "
                    "give the added tokens of this model"
                )
        self.specials: Mapping[str, int] = control | self._added
        self._names = {i: name for name, i in self.specials.items()}
        self.vocab_size = max([self._count - 1, *self._added.values()]) + 1
        bytes_of_space = [self._pieces.piece_to_id(f"<0x{byte:02X}>") for byte in self.SPACE.encode()]
        exact = all(self._pieces.is_byte(i) for i in bytes_of_space)
        self._literal = np.array(bytes_of_space, np.int32) if exact else None
        self._cuts = self._ends_at_words()

    def _ends_at_words(self) -> bool:
        """Whether tokens never depend on what lies beyond the end of a word, so that texts may be cut there: merges by
        rank (a unigram model compares rounded sums over the whole text), spaces kept as they are, and no piece with a
        space after something else."""
        words = [i for i in range(self._count) if not (self._pieces.is_byte(i) or self._pieces.is_control(i))]
        probe = "  a   b "
        return (
            self._pieces.piece_to_id(self.SPACE) != self._pieces.unk_id()
            and self._after.decode(self._after.encode(probe)) == probe
            and all(self._pieces.get_score(i).is_integer() for i in words)
            and not any(self.SPACE in self._pieces.id_to_piece(i).lstrip(self.SPACE) for i in words)
        )

    def encode(
        self, text: str, *, bos: bool = False, specials: bool = False, start: bool = True
    ) -> Int32[np.ndarray, " tokens"]:
        begin = [self.bos_id] if bos and self.bos_id is not None else []
        if not specials:
            ids = self._encode(text, start)
            return np.append(np.int32(begin[0]), ids) if begin else ids
        mixed = list(begin)

        def plain(part: str) -> list[int]:
            first = start if len(mixed) == len(begin) else mixed[-1] == self._begin
            return self._encode(part, first).tolist()

        for i in pieces(text, self.specials, plain):
            mixed.append(i)
        return ids_of(mixed)

    def _encode(self, text: str, start: bool) -> Int32[np.ndarray, " tokens"]:
        first = self._pieces if start else self._after
        if self._literal is None or self.SPACE not in text:
            return self._encode_chunks(first, text)
        head, *rest = text.split(self.SPACE)
        parts = [self._encode_chunks(first, head)]
        for part in rest:
            parts += [self._literal, self._encode_chunks(self._after, part)]
        return np.concatenate(parts)

    def _encode_chunks(self, first: Any, text: str) -> Int32[np.ndarray, " tokens"]:
        """`text` encoded by `first`, in chunks where that gives the same tokens."""
        if not self._cuts or len(text) <= CHUNK:
            return first.encode_as_numpy(text)
        start, parts = 0, []
        while len(text) - start > CHUNK and (gap := GAP.search(text, start + CHUNK)):
            parts.append((first if start == 0 else self._after).encode_as_numpy(text[start : gap.start()]))
            start = gap.start()
        return np.concatenate([*parts, (first if start == 0 else self._after).encode_as_numpy(text[start:])])

    def decode(self, ids: Ids, *, specials: bool = False) -> str:
        out: list[str] = []
        run: list[int] = []
        for i in as_list(ids):
            name = self._names.get(i)
            if name is None or (not specials and i < self._count):
                run.append(i)  # the library leaves control pieces out, and wants to see where a text starts
                continue
            out += [self._pieces.decode(run), name if specials else ""]
            run = []
        return "".join([*out, self._pieces.decode(run)])

    def token_id(self, name: str) -> int | None:
        if name in self.specials:
            return self.specials[name]
        found = self._pieces.piece_to_id(name)
        return found if self._pieces.id_to_piece(found) == name else None

    def spec(self) -> dict[str, Any]:
        spec: dict[str, Any] = {"kind": "sentencepiece", "file": "tokenizer.model"}
        if self._begin >= 0:
            spec["add_bos"] = self._add_bos
        return spec | ({"added": self._added} if self._added else {})

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.model": self._model}


# Training reads a sample: pieces settle long before a corpus ends. BPE takes 2 s for 10 MB, unigram 40 s.
SAMPLE_BYTES = {"bpe": 10_000_000, "unigram": 3_000_000}


def train_sentencepiece(chunks: Iterable[str], vocab_size: int, model_type: str) -> bytes:
    """A SentencePiece model trained on `chunks` of text, byte-exact: same chunks, same model.

    Bytes stand in for unknown characters and nothing is normalized, so decode(encode(text)) == text.

    Raises:
        UserError: the text does not support `vocab_size` pieces, or the size leaves no room for the 256 bytes.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(chunks),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            character_coverage=0.9995,
            max_sentence_length=1 << 20,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            num_threads=2,  # fixed: unigram's sums depend on how they are divided
            minloglevel=4,  # the message of the exception says the same once
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].rpartition("] ")[2].rstrip(". ")
        raise UserError(
            f"tokenizer.vocab_size={vocab_size}: SentencePiece cannot train it on this text ({reason}); "
            "choose another size"
        ) from None
    return model.getvalue()
