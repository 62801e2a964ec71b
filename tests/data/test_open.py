"""`open_data`: a named store, or one built once into the cache."""

import os
import time
from pathlib import Path

import pytest
import yaml

from llamax.config.run import DataConfig, SentencePiece
from llamax.data.open import cache_dir, open_data
from llamax.errors import UserError
from tests.data.corpora import of_folder, small_store, write_texts


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, and a corpus file over a folder of text."""
    monkeypatch.setenv("LLAMAX_CACHE", str(tmp_path / "cache"))
    corpus = of_folder(write_texts(tmp_path / "text"))
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(corpus.as_dict()))
    return tmp_path


def test_builds_once_and_again_when_the_text_changes(cached: Path) -> None:
    config = DataConfig(corpus=str(cached / "mine.yaml"))
    calls: list[str] = []
    first = open_data(config, progress=lambda label, *_: calls.append(label))
    assert first.path.parent == cached / "cache" / "stores"
    assert first.path.name.startswith("mine-")
    assert "tokenizing" in calls
    calls.clear()
    again = open_data(config, progress=lambda label, *_: calls.append(label))
    assert (again.path, again.fingerprint, calls) == (first.path, first.fingerprint, [])
    file = cached / "text" / "part0" / "file0.py"
    file.write_text(file.read_text()[::-1])  # the same size
    os.utime(file, ns=(time.time_ns(), time.time_ns() + 1))
    changed = open_data(config)
    assert changed.path != first.path
    assert changed.fingerprint != first.fingerprint


def test_another_tokenizer_is_another_store(cached: Path) -> None:
    corpus = str(cached / "mine.yaml")
    one, two = (
        open_data(DataConfig(corpus=corpus)),
        open_data(DataConfig(corpus=corpus, tokenizer=SentencePiece(vocab_size=300))),
    )
    assert one.path != two.path
    assert (one.vocab_size, two.vocab_size) == (256, 300)


def test_a_named_store_needs_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = small_store(tmp_path)
    monkeypatch.setenv("LLAMAX_CACHE", str(tmp_path / "cache"))
    assert open_data(DataConfig(store=str(built.path))).fingerprint == built.fingerprint
    assert not (tmp_path / "cache").exists()
    with pytest.raises(UserError, match=r"data.store=.*: no such folder; build one with"):
        open_data(DataConfig(store=str(tmp_path / "none")))


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLAMAX_CACHE", "/a")
    assert cache_dir() == Path("/a")
    monkeypatch.delenv("LLAMAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_dir() == Path("/b/llamax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert cache_dir() == Path("/c/.cache/llamax")


@pytest.mark.slow
def test_the_standard_library(cached: Path) -> None:
    """The default corpus: megabytes of source, a few per cent held out, a build of seconds."""
    start = time.monotonic()
    built = open_data(DataConfig())
    assert time.monotonic() - start < 60
    assert built.bytes("train") > 5_000_000
    assert 0.01 < built.bytes("held_out") / built.bytes("train") < 0.15
    assert built.documents("train") > 400
    assert built.tokens("train") == built.bytes("train") + built.documents("train")
    start = time.monotonic()
    assert open_data(DataConfig()).fingerprint == built.fingerprint
    assert time.monotonic() - start < 5
