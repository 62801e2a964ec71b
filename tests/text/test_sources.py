"""Every kind of tokenizer gives the ids and texts of the library its file belongs to, on thousands of strings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from llamax.text.open import load_tokenizer, open_tokenizer
from llamax.text.ranks import MAX_RUN
from llamax.text.schemes import LLAMA3, LLAMA4, SCHEMES, Scheme
from llamax.text.tokenizers import Tokenizer
from tests.text import made

NAMES = [
    *made.SPECIALS,
    *made.FIM,
    "<|begin_of_text|>",
    "<|eot_id|>",
    "<|reserved_special_token_20|>",
    "<0x41>",
    "<unk>",
]
strings = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.text(st.sampled_from(" \t\n\r\0\x1b\u2581\u3000\u200d\u0301ab_().<>/sk019é漢🙂☺\ufffd")),
    st.lists(st.sampled_from([*NAMES, " ", "\n", "Hello", " world", "'s", "漢字", "é", "1234"])).map("".join),
)
many = settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))


def check(ours: Tokenizer, content: str, theirs: Callable[[str], list[int]], back: Callable[[list[int]], str]) -> None:
    ids = ours.encode(content)
    assert ids.tolist() == theirs(content)
    assert ours.decode(ids) == back(ids.tolist())
    assert not set(ids.tolist()) & set(ours.specials.values())


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def sentence(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    import sentencepiece

    model = made.sentencepiece_model(request.param, {"bpe": 500, "unigram": 330}[request.param])
    folder = made.folder_of(tmp_path_factory.mktemp("sentence"), tokenizer_model=model)
    return open_tokenizer(folder), sentencepiece.SentencePieceProcessor(model_proto=model)


@many
@given(strings.filter(lambda s: "\u2581" not in s))
@example("  <s>[INST] hi </s>")
def test_sentencepiece(sentence: tuple[Tokenizer, Any], content: str) -> None:
    ours, library = sentence
    check(ours, content, library.encode, library.decode)
    assert ours.encode(content, bos=True).tolist() == [library.bos_id(), *library.encode(content)]
    # What follows something has no leading space: as Code Llama does it, behind a character that merges with nothing.
    if library.is_byte(library.encode("\u263a")[-1]):
        assert ours.encode(content, start=False).tolist() == library.encode("\u263a" + content)[4:]


@many
@given(strings)
def test_sentencepiece_gives_back_its_own_character_for_a_space(sentence: tuple[Tokenizer, Any], content: str) -> None:
    content = content.replace("\0", "")
    assert sentence[0].decode(sentence[0].encode(content)) == content


@pytest.fixture(scope="module", params=["byte_level", "metaspace"])
def hugging_face(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    tokenizers = pytest.importorskip("tokenizers")
    text = {"byte_level": made.byte_level_json, "metaspace": made.metaspace_json}[request.param]()
    ours = open_tokenizer(made.folder_of(tmp_path_factory.mktemp("hf"), tokenizer_json=text))
    return ours, tokenizers.Tokenizer.from_str(text)


@many
@given(strings)
def test_tokenizer_json(hugging_face: tuple[Tokenizer, Any], content: str) -> None:
    ours, library = hugging_face
    library.encode_special_tokens = True
    check(
        ours,
        content,
        lambda s: library.encode(s, add_special_tokens=False).ids,
        lambda ids: library.decode(ids, skip_special_tokens=False),
    )
    library.encode_special_tokens = False
    ids = ours.encode(content, specials=True)
    assert ids.tolist() == library.encode(content, add_special_tokens=False).ids
    assert ours.decode(ids) == library.decode(ids.tolist(), skip_special_tokens=True)
    assert ours.decode(ids, specials=True) == library.decode(ids.tolist(), skip_special_tokens=False)
    assert ours.encode(content, bos=True, specials=True).tolist() == library.encode(content).ids


@pytest.fixture(scope="module", params=SCHEMES, ids=lambda scheme: scheme.name)
def ranked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    tiktoken = pytest.importorskip("tiktoken")
    scheme: Scheme = request.param
    ours = open_tokenizer(made.folder_of(tmp_path_factory.mktemp("ranks"), tokenizer_model=made.tiktoken_file(scheme)))
    specials = {name: scheme.ranks + i for i, name in enumerate(scheme.specials)}
    return ours, tiktoken.Encoding(
        "x", pat_str=scheme.pattern, mergeable_ranks=made.ranks(scheme.ranks), special_tokens=specials
    )


@many
@given(strings)
def test_tiktoken(ranked: tuple[Tokenizer, Any], content: str) -> None:
    ours, library = ranked
    check(ours, content, library.encode_ordinary, library.decode)
    ids = ours.encode(content, specials=True)
    assert ids.tolist() == library.encode(content, allowed_special="all")
    assert ours.decode(ids, specials=True) == library.decode(ids.tolist())
    assert ours.decode(ours.encode(content)) == content


def test_tiktoken_special_ids_are_the_published_ones() -> None:
    """Ids of the model cards and of llama-models' tests: Llama 3's turn tokens, Llama 4's, the sizes of both."""
    ids = {scheme.name: {n: scheme.ranks + i for i, n in enumerate(scheme.specials)} for scheme in SCHEMES}
    three, four = ids["llama3"], ids["llama4"]
    assert (len(three), len(four)) == (256, 2048)
    assert (three["<|begin_of_text|>"], three["<|end_of_text|>"], three["<|eot_id|>"]) == (128000, 128001, 128009)
    assert (three["<|start_header_id|>"], three["<|end_header_id|>"]) == (128006, 128007)
    assert (three["<|eom_id|>"], three["<|python_tag|>"]) == (128008, 128010)
    assert (four["<|begin_of_text|>"], four["<|header_start|>"], four["<|header_end|>"]) == (200000, 200005, 200006)
    assert (four["<|eom|>"], four["<|eot|>"], four["<|image_start|>"]) == (200007, 200008, 200080)
    assert (four["<|patch|>"], four["<|finetune_right_pad|>"]) == (200092, 200018)
    assert LLAMA3.ranks + len(LLAMA3.specials) == 128256
    assert LLAMA4.ranks + len(LLAMA4.specials) == 202048


@pytest.mark.parametrize("content", ["a" * 60_000, " " * 60_000, "ab " * 200_000, "x" * 30_000 + " " * 30_000])
def test_tiktoken_long_runs_are_cut_as_meta_cuts_them(ranked: tuple[Tokenizer, Any], content: str) -> None:
    ours, library = ranked
    ids = ours.encode(content)
    assert ours.decode(ids) == content
    if content[0] == content[MAX_RUN - 1] and len(set(content)) == 1:
        parts = [content[i : i + MAX_RUN] for i in range(0, len(content), MAX_RUN)]
        assert ids.tolist() == [i for part in parts for i in library.encode_ordinary(part)]


@pytest.fixture(scope="module", params=[True, False], ids=["listed", "unlisted"])
def tekken(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    tiktoken = pytest.importorskip("tiktoken")
    data = made.tekken_data(listed=request.param)
    ours = open_tokenizer(made.folder_of(tmp_path_factory.mktemp("tekken"), tekken_json=data))
    library = tiktoken.Encoding(
        "x",
        pat_str=made.PATTERN,
        mergeable_ranks={p: r for p, r in made.ranks(900).items() if r < 700},
        special_tokens={},
    )
    return ours, library


@many
@given(strings)
def test_tekken(tekken: tuple[Tokenizer, Any], content: str) -> None:
    ours, library = tekken
    check(
        ours,
        content,
        lambda s: [40 + i for i in library.encode_ordinary(s)],
        lambda ids: library.decode([i - 40 for i in ids]),
    )
    assert ours.decode(ours.encode(content, specials=True), specials=True) == content


def test_tekken_numbers(tekken: tuple[Tokenizer, Any]) -> None:
    ours, _ = tekken
    assert (ours.vocab_size, ours.bos_id, ours.eos_id) == (740, 1, 2)
    assert ours.encode("[INST]", specials=True, bos=True).tolist() == [1, 3]
    assert ours.specials["<SPECIAL_39>"] == 39
    assert len(ours.specials) == 40


def kinds(folder: Path) -> dict[str, Tokenizer]:
    files: dict[str, dict[str, Any]] = {
        "bpe": {"tokenizer_model": made.sentencepiece_model()},
        "added": {"tokenizer_model": made.sentencepiece_model(), "added_tokens_json": {"<new>": 500}},
        "json": {"tokenizer_json": made.byte_level_json()},
        "llama3": {"tokenizer_model": made.tiktoken_file(LLAMA3)},
        "tekken": {"tekken_json": made.tekken_data()},
    }
    found = {}
    for name, content in files.items():
        (folder / name).mkdir()
        found[name] = open_tokenizer(made.folder_of(folder / name, **content))
    return found


def test_spec_and_files_reload_every_kind(tmp_path: Path) -> None:
    for name, ours in kinds(tmp_path).items():
        (tmp_path / f"{name}-copy").mkdir()
        for file, data in ours.files().items():
            (tmp_path / f"{name}-copy" / file).write_bytes(data)
        again = load_tokenizer(json.loads(json.dumps(ours.spec())), tmp_path / f"{name}-copy")
        assert isinstance(again, Tokenizer)
        text = "def f(x): </s><new><|eot_id|>"
        for options in ({}, {"bos": True}, {"specials": True}, {"start": False}):
            np.testing.assert_array_equal(again.encode(text, **options), ours.encode(text, **options))
        assert (again.vocab_size, again.eos_id, again.bos_id) == (ours.vocab_size, ours.eos_id, ours.bos_id)
        assert dict(again.specials) == dict(ours.specials)
        assert all(again.token_id(n) == i for n, i in ours.specials.items())
        assert again.token_id("no such token") is None
