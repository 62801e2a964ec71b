"""From files to a tokenizer: of a config, of a store, or of a model's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamax.errors import UserError
from llamax.text.huggingface import HuggingFaceTokenizer
from llamax.text.ranks import RankTokenizer, is_tiktoken, read_tekken, read_tiktoken
from llamax.text.sentence import SentencePieceTokenizer
from llamax.text.tokenizers import ByteTokenizer, Tokenizer

# What a model's folder may hold for its text; an importer copies those that are there.
FILES = (
    "tokenizer.json",
    "tekken.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


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
    if spec["kind"] in ("tiktoken", "tekken"):
        return (read_tekken if spec["kind"] == "tekken" else read_tiktoken)(data, str(path))
    if spec["kind"] == "sentencepiece":
        return SentencePieceTokenizer(data, str(path), spec.get("added"), spec.get("add_bos", True))
    beside = read_json(path.with_name("tokenizer_config.json"))
    if "bos_id" in spec:
        return HuggingFaceTokenizer(data, spec["eos_id"], str(path), spec["bos_id"], spec["bos_id"] is not None)
    return HuggingFaceTokenizer(data, spec.get("eos_id", token_name(beside.get("eos_token"))), where=str(path))


def open_tokenizer(folder: Path | str) -> Tokenizer:
    """The tokenizer of a model's folder, by what it holds: `tokenizer.json`, `tekken.json` or `tokenizer.model`
    (SentencePiece or tiktoken, told apart by content), in this order.

    Raises:
        UserError: none of them, an unreadable or damaged one, or a missing extra.
    """
    folder = Path(folder)
    config = read_json(folder / "tokenizer_config.json")
    add_bos = config.get("add_bos_token") if isinstance(config.get("add_bos_token"), bool) else None
    if (path := folder / "tokenizer.json").exists():
        names = (token_name(config.get(name)) for name in ("eos_token", "bos_token"))
        eos, bos = names
        return HuggingFaceTokenizer(_read(path), eos, str(path), bos, add_bos)
    if (path := folder / "tekken.json").exists():
        return read_tekken(_read(path), str(path))
    if (path := folder / "tokenizer.model").exists():
        data = _read(path)
        if is_tiktoken(data):
            return read_tiktoken(data, str(path))
        return SentencePieceTokenizer(data, str(path), _added(folder, config), add_bos is not False)
    raise UserError(f"{folder}: no tokenizer; a model's folder holds tokenizer.json, tekken.json or tokenizer.model")


def stop_ids(folder: Path | str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end a text of the model in `folder`: its end of document, and those its files name."""
    found = {tokenizer.eos_id}
    if isinstance(tokenizer, RankTokenizer):
        found.update(tokenizer.stops)
    for name in ("generation_config.json", "config.json"):
        given = read_json(Path(folder) / name).get("eos_token_id")
        ids = given if isinstance(given, list) else [given]
        if all(isinstance(i, int) for i in ids):
            return tuple(sorted(found | set(ids)))
    return tuple(sorted(found))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or {} where there is no such file.

    Raises:
        UserError: the file is there and is something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; make it readable") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); fetch the file again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not an object; fetch the file again")
    return content


def token_name(token: Any) -> str | None:
    """The spelling of a token as tokenizer_config.json gives it: a string, or an object with its `content`."""
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else None


def _added(folder: Path, config: Mapping[str, Any]) -> dict[str, int]:
    """Special tokens the SentencePiece file itself lacks."""
    listed = config.get("added_tokens_decoder")
    named = {token_name(t): int(i) for i, t in listed.items() if i.isdigit()} if isinstance(listed, dict) else {}
    added = {name: i for name, i in read_json(folder / "added_tokens.json").items() if isinstance(i, int)}
    return {name: i for name, i in (named | added).items() if name is not None}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"tokenizer file {path}: {error.strerror or error}; give the path of a readable file") from None
