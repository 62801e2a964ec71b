"""Streams give the text of the whole, in pieces that are never half a character or half a stop string."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llamax.text.huggingface import HuggingFaceTokenizer
from llamax.text.ranks import read_tekken
from llamax.text.sentence import SentencePieceTokenizer
from llamax.text.stream import TextStream
from llamax.text.tokenizers import ByteTokenizer, Tokenizer
from tests.text import made

MAKERS = {
    "bytes": ByteTokenizer,
    "sentencepiece": lambda: SentencePieceTokenizer(made.sentencepiece_model()),
    "byte_level": lambda: HuggingFaceTokenizer(made.byte_level_json().encode()),
    "metaspace": lambda: HuggingFaceTokenizer(made.metaspace_json().encode()),
    "tekken": lambda: read_tekken(__import__("json").dumps(made.tekken_data()).encode()),
}
texts = st.text(st.sampled_from("ab \n.é漢字🙂👩‍👩‍👧"), max_size=30)
often = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module", params=MAKERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return MAKERS[request.param]()


@often
@given(texts, texts)
def test_pieces_join_to_the_whole(tokenizer: Tokenizer, prompt: str, text: str) -> None:
    before = tokenizer.encode("x" + prompt).tolist()
    after = tokenizer.encode(text, start=False).tolist()
    stream = TextStream(tokenizer, before)
    parts = [stream.push(i) for i in after]
    assert not any("\ufffd" in part for part in parts)
    parts.append(stream.finish())
    assert "".join(parts) == text == stream.text
    assert tokenizer.decode([*before, *after]) == "x" + prompt + text


@often
@given(st.data())
def test_any_ids_give_what_decoding_them_gives(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    if tokenizer.spec()["kind"] == "huggingface":
        # That library takes back good characters when a byte piece behind them is bad; a stream cannot.
        ids = [i for i in ids if i not in {tokenizer.token_id(f"<0x{byte:02X}>") for byte in range(256)}]
    before = tokenizer.encode("x ").tolist()
    stream = TextStream(tokenizer, before)
    parts = [stream.push(i) for i in ids]
    assert "".join([*parts, stream.finish()]) == tokenizer.decode([*before, *ids])[2:]


@often
@given(text=texts, stops=st.lists(st.text(st.sampled_from("ab .é🙂"), max_size=4), max_size=3))
def test_stop_strings(tokenizer: Tokenizer, text: str, stops: list[str]) -> None:
    # As if read character by character: the stop that is complete first, and of those the one that began first.
    found = [(at + len(stop), at) for stop in stops if stop and (at := text.find(stop)) >= 0]
    expected = text[: min(found)[1]] if found else text
    stream = TextStream(tokenizer, tokenizer.encode("x"), stops)
    given, ids = "", tokenizer.encode(text, start=False).tolist()
    for i in ids:
        given += stream.push(i)
        assert expected.startswith(given)
        if stream.stopped:
            break
    assert stream.stopped == bool(found)
    assert given + stream.finish() == expected == stream.text


def test_the_stop_that_is_complete_first_counts() -> None:
    stream = TextStream(ByteTokenizer(), (), [".", "a.a"])
    assert "".join(stream.push(b) for b in b"a.a") + stream.finish() == stream.text == "a"


def test_a_stop_string_across_tokens_is_held_back_until_it_is_none() -> None:
    stream = TextStream(ByteTokenizer(), (), ["\n\n#"])
    assert [stream.push(b) for b in b"a\n\nb\n\n#c"] == ["a", "", "", "\n\nb", "", "", "", ""]
    assert (stream.text, stream.stopped, stream.finish()) == ("a\n\nb", True, "")


def test_a_character_waits_for_its_bytes() -> None:
    stream = TextStream(ByteTokenizer())
    assert [stream.push(b) for b in "é🙂".encode()] == ["", "é", "", "", "", "🙂"]
    assert [stream.push(0xE2), stream.push(0x82), stream.finish()] == ["", "", "\ufffd"]
