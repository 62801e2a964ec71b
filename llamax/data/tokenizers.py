"""Tokenizers: text to ids and back. Bytes, SentencePiece, and any Hugging Face `tokenizer.json`."""

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from llamax.errors import UserError

Ids = Sequence[int] | np.ndarray


@runtime_checkable
class Tokenizer(Protocol):
    """What the rest of llamax asks of a tokenizer. `encode` adds no special token; `decode` leaves `eos_id` out."""

    vocab_size: int
    eos_id: int

    def encode(self, text: str) -> Int32[np.ndarray, "tokens"]: ...

    def decode(self, ids: Ids) -> str: ...

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

    def encode(self, text: str) -> Int32[np.ndarray, "tokens"]:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def decode(self, ids: Ids) -> str:
        """Bytes that are not UTF-8, as a cut character leaves, become U+FFFD. Raises ValueError for an id over 255."""
        return bytes(i for i in np.asarray(ids, np.int64).tolist() if i != self.eos_id).decode(
            "utf-8", errors="replace"
        )

    def spec(self) -> dict[str, Any]:
        return {"kind": "bytes"}

    def files(self) -> dict[str, bytes]:
        return {}


class SentencePieceTokenizer:
    """A SentencePiece model (arXiv:1808.06226). Models llamax trains round-trip any text without NUL exactly.

    Raises:
        UserError: not a SentencePiece model, or one without an end-of-sentence piece.
    """

    SPACE = "\u2581"  # SentencePiece writes a space as this character, so this character itself needs a way around

    def __init__(self, model: bytes, where: str = "tokenizer.model"):
        import sentencepiece

        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise UserError(f"{where}: not a SentencePiece model; give the .model file that training wrote") from None
        self._model = model
        self.vocab_size = self._pieces.vocab_size()
        self.eos_id = self._pieces.eos_id()
        if self.eos_id < 0:
            raise UserError(f"{where}: the model has no end-of-sentence piece; train it with an eos_id")
        bytes_of_space = [self._pieces.piece_to_id(f"<0x{byte:02X}>") for byte in self.SPACE.encode()]
        self._literal = bytes_of_space if all(self._pieces.is_byte(i) for i in bytes_of_space) else None

    def encode(self, text: str) -> Int32[np.ndarray, "tokens"]:
        if self._literal is None or self.SPACE not in text:
            return np.array(self._pieces.encode(text), np.int32)
        ids: list[int] = []
        for i, part in enumerate(text.split(self.SPACE)):
            ids += (self._literal if i else []) + self._pieces.encode(part)
        return np.array(ids, np.int32)

    def decode(self, ids: Ids) -> str:
        return self._pieces.decode(np.asarray(ids, np.int64).tolist())

    def spec(self) -> dict[str, Any]:
        return {"kind": "sentencepiece", "file": "tokenizer.model"}

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.model": self._model}


class HuggingFaceTokenizer:
    """A `tokenizer.json` of the `tokenizers` library. Special tokens spelled out in a text stay plain text.

    Raises:
        UserError: the `tokenizers` extra is missing, the file is not a tokenizer, or no end-of-text token is known.
    """

    EOS = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "<|im_end|>", "<|eot_id|>", "[SEP]")

    def __init__(self, text: bytes, eos: str | int | None = None, where: str = "tokenizer.json"):
        try:
            import tokenizers
        except ImportError:
            raise UserError(
                "tokenizer.kind=huggingface needs the tokenizers package; pip install 'llamax[tokenizers]'"
            ) from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(text)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{where}: not a tokenizer.json ({str(error)[:120]}); export it again") from None
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._text = text
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        found = (
            [eos] if isinstance(eos, int) else [vocab[name] for name in ([eos] if eos else self.EOS) if name in vocab]
        )
        if not found:
            raise UserError(
                f"{where}: no end-of-text token found ({eos or ', '.join(self.EOS)}); "
                "set eos_token in the tokenizer_config.json beside it"
            )
        self.eos_id = int(found[0])

    def encode(self, text: str) -> Int32[np.ndarray, "tokens"]:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Ids) -> str:
        return self._tokenizer.decode(
            [i for i in np.asarray(ids, np.int64).tolist() if i != self.eos_id], skip_special_tokens=False
        )

    def spec(self) -> dict[str, Any]:
        return {"kind": "huggingface", "file": "tokenizer.json", "eos_id": self.eos_id}

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.json": self._text}


def load_tokenizer(source: Any, base_dir: Path | str = ".") -> Tokenizer:
    """The tokenizer of a `config.run.Tokenizer` or of the `spec()` of one, its files looked up from `base_dir`.

    Raises:
        UserError: a missing or damaged file, a missing extra, or a SentencePiece config without a path.
    """
    spec: Mapping[str, Any] = source if isinstance(source, Mapping) else source.as_dict()
    if spec["kind"] == "bytes":
        return ByteTokenizer()
    name = spec.get("file") or spec.get("path")
    if name is None:
        raise UserError(
            "tokenizer.path is null: a SentencePiece model is trained with its store; "
            "build the store, or give tokenizer.path"
        )
    path = Path(base_dir) / Path(name).expanduser()
    data = _read(path)
    if spec["kind"] == "sentencepiece":
        return SentencePieceTokenizer(data, where=str(path))
    return HuggingFaceTokenizer(data, spec.get("eos_id", _configured_eos(path)), where=str(path))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"tokenizer file {path}: {error.strerror or error}; give the path of a readable file") from None


def _configured_eos(path: Path) -> str | None:
    """`eos_token` of the tokenizer_config.json beside a tokenizer.json, if there is one."""
    beside = path.with_name("tokenizer_config.json")
    try:
        token = json.loads(beside.read_text(encoding="utf-8")).get("eos_token")
    except (OSError, ValueError, AttributeError):
        return None
    return token.get("content") if isinstance(token, dict) else token


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
