"""Small tokenizers of every kind, made on the spot: nothing is fetched."""

from __future__ import annotations

import base64
import io
import json
from functools import cache
from pathlib import Path
from typing import Any

from llamax.text.schemes import Scheme
from tests.data.corpora import text

SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"]
FIM = ["\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>", "\u2581<EOT>"]
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@cache
def corpus() -> tuple[str, ...]:
    return (*(text(i, 300) for i in range(20)), "Ça va? naïve 漢字 かな 🙂🙃 Ω≈ç√ \t\ttabs  spaces 1234567 " * 20)


@cache
def sentencepiece_model(kind: str = "bpe", size: int = 500, fim: bool = True) -> bytes:
    """As Llama 1 and 2 have it: byte fallback, a leading space, begin and end of sentence; Code Llama's pieces."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for part in corpus() for line in part.splitlines()),
        model_writer=model,
        vocab_size=size,
        model_type=kind,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        control_symbols=FIM if fim else [],
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=4,
    )
    return model.getvalue()


@cache
def byte_level_json(eos: str = "</s>", bos: str | None = "<s>", size: int = 600) -> str:
    """A byte-level BPE as Llama 3, Qwen and DeepSeek ship it, with a post-processor that puts `bos` first."""
    import tokenizers as t

    made = t.Tokenizer(t.models.BPE())
    made.pre_tokenizer = t.pre_tokenizers.Sequence(
        [
            t.pre_tokenizers.Split(t.Regex(PATTERN), behavior="isolated"),
            t.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = t.decoders.ByteLevel()
    trainer = t.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[*SPECIALS, *({eos} - set(SPECIALS))],
        initial_alphabet=t.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(list(corpus()), trainer)
    if bos is not None:
        made.post_processor = t.processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, made.token_to_id(bos))]
        )
    return made.to_str()


@cache
def metaspace_json(size: int = 600) -> str:
    """A BPE over SentencePiece's spaces with byte fallback, as Llama 2 and Mistral 7B ship it."""
    import tokenizers as t

    made = t.Tokenizer(t.models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = t.normalizers.Sequence([t.normalizers.Prepend("\u2581"), t.normalizers.Replace(" ", "\u2581")])
    made.decoder = t.decoders.Sequence(
        [
            t.decoders.Replace("\u2581", " "),
            t.decoders.ByteFallback(),
            t.decoders.Fuse(),
            t.decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = t.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<unk>", *SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    made.train_from_iterator([line for part in corpus() for line in part.splitlines()], trainer)
    data = json.loads(made.to_str())
    # Byte pieces are ordinary tokens of the model; the trainer can only add them as special ones.
    data["added_tokens"] = [token for token in data["added_tokens"] if not token["content"].startswith("<0x")]
    return json.dumps(data)


@cache
def ranks(count: int) -> dict[bytes, int]:
    """`count` byte sequences by rank: the bytes, merges found in a text, then pairs of bytes and longer ones."""
    found = [bytes([byte]) for byte in range(256)]
    known = set(found)

    def add(piece: bytes) -> None:
        if piece not in known and len(found) < count:
            known.add(piece)
            found.append(piece)

    words = "".join(corpus()).encode().split(b" ")
    for width in range(2, 7):
        for word in words:
            for start in range(len(word) - width + 1):
                add((b" " + word)[start : start + width])
    for number in range(count):
        add(bytes([number % 256, (number * 7 + number // 256) % 256]))
    for number in range(count):
        add(bytes([97 + number % 26, number // 26 % 256, number // 6656 % 256, 97 + number // 11 % 26]))
    assert len(found) == count
    return {piece: rank for rank, piece in enumerate(found)}


@cache
def tiktoken_file(scheme: Scheme) -> bytes:
    return b"".join(base64.b64encode(piece) + b" %d\n" % rank for piece, rank in ranks(scheme.ranks).items())


def tekken_data(reserved: int = 40, used: int = 700, held: int = 900, listed: bool = True) -> dict[str, Any]:
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(piece).decode(), "token_str": None}
        for piece, rank in ranks(held).items()
    ]
    data: dict[str, Any] = {
        "config": {
            "pattern": PATTERN,
            "num_vocab_tokens": held,
            "default_vocab_size": reserved + used,
            "default_num_special_tokens": reserved,
            "version": "v3",
        },
        "vocab": vocab,
    }
    if listed:
        names = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]"]
        data["special_tokens"] = [{"rank": i, "token_str": n, "is_control": True} for i, n in enumerate(names)]
    return data


def folder_of(folder: Path, **files: str | bytes | dict[str, Any]) -> Path:
    """`folder` with `files`, `tokenizer_json=...` for tokenizer.json; dictionaries as JSON."""
    for name, content in files.items():
        stem, _, suffix = name.rpartition("_")
        data = json.dumps(content) if isinstance(content, dict) else content
        (folder / f"{stem}.{suffix}").write_bytes(data.encode() if isinstance(data, str) else data)
    return folder
