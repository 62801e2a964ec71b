"""Duplicates, and the line between training and held-out text."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamax.data.split import Fate, cut, digest, fates, parts


def decide(texts: list[str], fraction: float = 0.2, sources: list[int] | None = None) -> list[int]:
    digests = np.frombuffer(b"".join(map(digest, texts)), np.uint8).reshape(-1, 16)
    sizes = np.array([len(t) for t in texts], np.int64)
    return fates(digests, sizes, np.array(sources or [0] * len(texts), np.int64), fraction).tolist()


def test_share_of_documents_held_out() -> None:
    fate = decide([f"document {i}" for i in range(5000)], 0.1)
    assert set(fate) == {Fate.TRAIN, Fate.HELD_OUT}
    assert fate.count(Fate.HELD_OUT) / 5000 == pytest.approx(0.1, abs=0.015)  # 3.5 standard deviations


def test_adding_documents_moves_nothing() -> None:
    texts = [f"document {i}" for i in range(200)]
    before = dict(zip(texts, decide(texts), strict=True))
    more = [f"new {i}" for i in range(50)] + texts[::-1]
    after = dict(zip(more, decide(more), strict=True))
    assert {t: after[t] for t in texts} == before


def test_first_of_equal_documents_is_kept_across_sources() -> None:
    texts = [f"document {i}" for i in range(100)]
    fate = decide(texts * 2 + ["other " + t for t in texts], sources=[0] * 100 + [1] * 200)
    assert Fate.DUPLICATE not in fate[:100]
    assert fate[100:200] == [Fate.DUPLICATE] * 100
    assert Fate.DUPLICATE not in fate[200:]


def test_few_documents_are_cut_instead() -> None:
    assert decide(["one long document"]) == [Fate.CUT]
    assert decide(["same", "same", "other"], 0.001) == [Fate.CUT, Fate.DUPLICATE, Fate.CUT]


def test_a_giant_held_out_document_is_cut() -> None:
    texts = [f"document {k}" for k in range(300)]
    held = decide(texts).index(Fate.HELD_OUT)
    digests = np.frombuffer(b"".join(map(digest, texts)), np.uint8).reshape(-1, 16)
    sizes = np.array([10**6 if i == held else 10 for i in range(300)], np.int64)
    assert set(fates(digests, sizes, np.zeros(300, np.int64), 0.2).tolist()) == {Fate.CUT}


@given(st.text(min_size=1), st.floats(0.01, 0.49))
def test_cut_loses_nothing(content: str, fraction: float) -> None:
    train, held_out = cut(content, fraction)
    assert train + held_out == content
    assert train
    assert held_out or len(content) == 1


def test_cut_falls_on_a_line_and_keeps_the_share() -> None:
    content = "0123456789\n" * 1000
    train, held_out = cut(content, 0.1)
    assert train.endswith("\n")
    assert len(held_out) / len(content) == pytest.approx(0.1, abs=0.002)


def test_parts() -> None:
    assert parts("text", Fate.TRAIN, 0.5) == ("text", "")
    assert parts("text", Fate.HELD_OUT, 0.5) == ("", "text")
    assert parts("text", Fate.DUPLICATE, 0.5) == ("", "")
    assert parts("text", Fate.CUT, 0.25) == ("tex", "t")
