"""Code Llama's infilling prompts, beside a reading of them with the library alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llamax.errors import UserError
from llamax.text.infill import infill_end, infill_ids
from llamax.text.open import open_tokenizer
from llamax.text.sentence import SentencePieceTokenizer
from tests.text import made

code = st.text(st.sampled_from(" \t\ndefxyz():=+_0é漢"), max_size=40)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(code, code)
def test_both_orders(prefix: str, suffix: str) -> None:
    import sentencepiece

    library = sentencepiece.SentencePieceProcessor(model_proto=made.sentencepiece_model())
    ours = SentencePieceTokenizer(made.sentencepiece_model())
    pre, suf, mid, end = (library.piece_to_id(name) for name in ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"))
    before = library.encode(prefix)
    # Meta's way to the suffix: behind a character that merges with nothing (here the space and three bytes).
    anchor = library.encode("☺")
    after = library.encode("☺" + suffix)[len(anchor) :]
    assert len(anchor) == 4
    assert infill_ids(ours, prefix, suffix).tolist() == [1, pre, *before, suf, *after, mid]
    assert infill_ids(ours, prefix, suffix, "spm").tolist() == [1, pre, suf, *after, mid, *before]
    assert infill_end(ours) == end
    assert ours.decode(infill_ids(ours, prefix, suffix, "spm")).count("<") == 0


def test_the_suffix_has_no_space_of_its_own() -> None:
    ours = SentencePieceTokenizer(made.sentencepiece_model())
    ids = infill_ids(ours, "def f", "return x").tolist()
    middle, suffix = ids.index(ours.specials["▁<MID>"]), ids.index(ours.specials["▁<SUF>"])
    assert ours.decode([ours.token_id("x"), *ids[suffix + 1 : middle]]) == "xreturn x"
    assert ids[suffix + 1 : middle] != ours.encode("return x").tolist()


def test_names_in_the_text_are_text() -> None:
    ours = SentencePieceTokenizer(made.sentencepiece_model())
    ids = infill_ids(ours, "a ▁<MID> <MID>", "</s> <s>").tolist()
    assert ids.count(ours.specials["▁<MID>"]) == 1
    assert ids.count(2) == 0


def test_from_a_tokenizer_json(tmp_path: Path) -> None:
    ours = open_tokenizer(made.folder_of(tmp_path, tokenizer_json=made.metaspace_json()))
    assert ours.decode(np.append(ours.encode("x"), ours.encode("def", start=False))) == "xdef"
    assert ours.decode(np.append(ours.encode("x"), ours.encode("def"))) == "x def"


def test_a_tokenizer_without_the_tokens() -> None:
    with pytest.raises(UserError, match="lacks; use Code Llama 7B, 13B or 70B"):
        infill_ids(SentencePieceTokenizer(made.sentencepiece_model(fim=False)), "a", "b")
