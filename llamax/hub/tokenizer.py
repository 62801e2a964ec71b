"""The tokenizer beside a model's weights: does it fit the embedding, and how a run config names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llamax.errors import UserError
from llamax.hub.safetensors import strict_json


def tokenizer_data(folder: Path, vocab_size: int) -> dict[str, Any]:
    """The `data.tokenizer` of a folder's tokenizer, bytes where it has none that a config can name.

    Raises:
        UserError: a tokenizer whose ids do not fit an embedding of `vocab_size` rows, or a damaged one.
    """
    if (path := folder / "tokenizer.json").is_file():
        ids = _ids(path)
        if ids and max(ids) >= vocab_size:
            raise UserError(
                f"{path}: ids up to {max(ids)} do not fit the embedding's {vocab_size} rows (vocab_size); "
                "take the tokenizer that belongs to these weights"
            )
        return {"kind": "huggingface", "path": str(path)}
    if (path := folder / "tokenizer.model").is_file() or (folder / "tekken.json").is_file():
        from llamax.text.open import open_tokenizer

        tokenizer = open_tokenizer(folder)
        if tokenizer.vocab_size > vocab_size:
            raise UserError(
                f"{folder}: the tokenizer has {tokenizer.vocab_size} ids and the embedding {vocab_size} rows "
                "(vocab_size); take the tokenizer that belongs to these weights"
            )
        if tokenizer.spec().get("kind") == "sentencepiece":
            return {"kind": "sentencepiece", "path": str(path)}
    return {"kind": "bytes"}


def _ids(path: Path) -> list[int]:
    """The ids of the trained vocabulary. Added tokens are left out: Gemma 3's text models share a tokenizer whose image
    token lies outside their table."""
    try:
        data = strict_json(path.read_bytes(), str(path))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; make it readable") from None
    model = data.get("model") if isinstance(data, dict) else None
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, list):  # unigram: a list of [piece, score], the id being the place
        return [len(vocab) - 1]
    if not isinstance(vocab, dict) or any(type(number) is not int for number in vocab.values()):
        raise UserError(f"{path}: no model.vocab of ids; take the tokenizer.json that belongs to these weights")
    return list(vocab.values())
