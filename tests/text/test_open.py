"""A folder opens the tokenizer it holds, or says in one message what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llamax.errors import UserError
from llamax.text.huggingface import HuggingFaceTokenizer
from llamax.text.open import open_tokenizer, stop_ids
from llamax.text.ranks import RankTokenizer
from llamax.text.schemes import LLAMA3
from llamax.text.sentence import SentencePieceTokenizer
from llamax.text.tokenizers import check_vocabulary
from tests.text import made


def test_which_file_counts(tmp_path: Path) -> None:
    made.folder_of(tmp_path, tokenizer_model=made.sentencepiece_model())
    assert isinstance(open_tokenizer(tmp_path), SentencePieceTokenizer)
    made.folder_of(tmp_path, tokenizer_model=made.tiktoken_file(LLAMA3))
    assert isinstance(open_tokenizer(tmp_path), RankTokenizer)
    made.folder_of(tmp_path, tekken_json=made.tekken_data())
    assert open_tokenizer(tmp_path).vocab_size == 740
    made.folder_of(tmp_path, tokenizer_json=made.byte_level_json())
    assert isinstance(open_tokenizer(tmp_path), HuggingFaceTokenizer)


def test_where_a_text_starts(tmp_path: Path) -> None:
    """The post-processor says whether a text begins with a special token; tokenizer_config.json overrules it."""
    made.folder_of(tmp_path, tokenizer_json=made.byte_level_json())
    assert open_tokenizer(tmp_path).encode("a", bos=True)[0] == 0
    made.folder_of(tmp_path, tokenizer_config_json={"add_bos_token": False})
    assert open_tokenizer(tmp_path).bos_id is None
    made.folder_of(tmp_path, tokenizer_json=made.byte_level_json(bos=None), tokenizer_config_json={})
    assert open_tokenizer(tmp_path).bos_id is None
    config = {"add_bos_token": True, "bos_token": {"content": "[INST]"}, "eos_token": "<|im_end|>"}
    made.folder_of(tmp_path, tokenizer_config_json=config)
    ours = open_tokenizer(tmp_path)
    assert (ours.bos_id, ours.eos_id) == (4, 3)


def test_sentencepiece_with_added_tokens(tmp_path: Path) -> None:
    model, added = made.sentencepiece_model(), {"<|user|>": 501, "<|end|>": 500}
    ours = open_tokenizer(made.folder_of(tmp_path, tokenizer_model=model, added_tokens_json=added))
    assert ours.vocab_size == 502
    ids = ours.encode("<|user|>hi<|end|></s><s>hi", specials=True).tolist()
    plain = ours.encode("hi").tolist()
    after = ours.encode("hi", start=False).tolist()
    assert ids == [501, *after, 500, 2, 1, *plain]
    assert plain != after
    assert ours.decode(ids, specials=True).replace(" ", "") == "<|user|>hi<|end|></s><s>hi"
    assert 501 not in ours.encode("<|user|>hi")
    made.folder_of(tmp_path, added_tokens_json={"<|user|>": 7})
    with pytest.raises(UserError, match=r"added token '<\|user\|>' has id 7, which is the piece"):
        open_tokenizer(tmp_path)


def test_what_stops(tmp_path: Path) -> None:
    ours = open_tokenizer(made.folder_of(tmp_path, tokenizer_json=made.byte_level_json()))
    assert stop_ids(tmp_path, ours) == (1,)
    made.folder_of(tmp_path, config_json={"eos_token_id": 5})
    assert stop_ids(tmp_path, ours) == (1, 5)
    made.folder_of(tmp_path, generation_config_json={"eos_token_id": [3, 9]})
    assert stop_ids(tmp_path, ours) == (1, 3, 9)
    three = open_tokenizer(made.folder_of(_new(tmp_path, "three"), tokenizer_model=made.tiktoken_file(LLAMA3)))
    assert stop_ids(tmp_path / "three", three) == (128001, 128008, 128009)


def _new(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    return folder / name


def _tekken(**change: Any) -> dict[str, Any]:
    data = made.tekken_data()
    return data | {"config": data["config"] | change}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "no tokenizer; a model's folder holds tokenizer.json, tekken.json or tokenizer.model"),
    "json": ({"tokenizer_json": "{}"}, "not a tokenizer.json"),
    "json cut": ({"tokenizer_json": made.byte_level_json()[:1000]}, "not a tokenizer.json"),
    "config": ({"tokenizer_json": "{}", "tokenizer_config_json": "[]"}, "holds a list, not an object"),
    "config cut": ({"tokenizer_json": "{}", "tokenizer_config_json": "{"}, "not JSON"),
    "model": ({"tokenizer_model": b"\x00\x01\x02"}, "not a SentencePiece model"),
    "model cut": ({"tokenizer_model": made.sentencepiece_model()[:3000]}, "not a SentencePiece model"),
    "ranks": ({"tokenizer_model": b"IQ== 0\nIg== 1\n"}, "2 ranks belong to no known tokenizer; known are 128000"),
    "ranks with a hole": ({"tokenizer_model": b"IQ== 0\nIg== 2\n"}, "ranks are not 0 to 1"),
    "ranks broken": ({"tokenizer_model": b"IQ== 0\n\xff\xff 1\n"}, "line 2 is not `base64 rank`"),
    "ranks cut": ({"tokenizer_model": made.tiktoken_file(LLAMA3)[:5000]}, "the ranks are not 0 to 567"),
    "tekken": ({"tekken_json": "{}"}, "not a Tekken tokenizer"),
    "tekken list": ({"tekken_json": "[]"}, "not a Tekken tokenizer"),
    "tekken size": ({"tekken_json": _tekken(default_vocab_size=5000)}, "do not make default_vocab_size=5000"),
    "tekken pattern": ({"tekken_json": _tekken(pattern="(")}, "not a regular expression"),
    "tekken bytes": ({"tekken_json": _tekken(default_vocab_size=140)}, "no rank for byte 0x64"),
}


@pytest.mark.parametrize(("files", "message"), BAD.values(), ids=BAD)
def test_unreadable_folders(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_tokenizer(made.folder_of(tmp_path, **files))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_tiktoken_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tiktoken", None)
    with pytest.raises(UserError, match=r"pip install 'llamax\[tokenizers\]'"):
        open_tokenizer(made.folder_of(tmp_path, tekken_json=made.tekken_data()))


def test_a_tokenizer_larger_than_the_embedding(tmp_path: Path) -> None:
    ours = open_tokenizer(made.folder_of(tmp_path, tokenizer_model=made.sentencepiece_model()))
    check_vocabulary(ours, 500, "here")
    with pytest.raises(UserError, match="here: the tokenizer has 500 tokens, more than the 499 rows"):
        check_vocabulary(ours, 499, "here")
    # Special tokens behind the vocabulary need no row until they are used.
    more = open_tokenizer(made.folder_of(tmp_path, added_tokens_json={"<image>": 500}))
    check_vocabulary(more, 500, "here")
    with pytest.raises(UserError, match="501 tokens, more than the 499"):
        check_vocabulary(more, 499, "here")


def test_real_tekken_files_where_they_are_installed() -> None:
    """Mistral's own package ships its tokenizers: same ids, same text."""
    common = pytest.importorskip("mistral_common")
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    for path in sorted((Path(common.__file__).parent / "data").glob("tekken*.json")):
        library, ours = Tekkenizer.from_file(path), None
        from llamax.text.ranks import read_tekken

        ours = read_tekken(path.read_bytes())
        for text in ("Hello, world", "naïve 漢字 🙂\r\n\t 1234567", json.dumps({"a": [1, 2]}), "[INST] x </s>"):
            assert ours.encode(text).tolist() == library.encode(text, bos=False, eos=False)
            assert ours.decode(ours.encode(text)) == text
        assert ours.vocab_size == library.n_words
