"""What the tests of the loop share: a small token store, the command line in this process."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamax.config.run import Bytes, Corpus
from llamax.data.store import Store, build_store
from tests.train.runs import write_texts


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level store of small texts."""
    folder = tmp_path_factory.mktemp("data")
    return build(write_texts(folder / "texts"), folder / "store").path


def build(texts: Path, out: Path) -> Store:
    source = {"kind": "text", "paths": (str(texts),)}
    corpus = Corpus.model_validate({"sources": [{"source": source}], "held_out_fraction": 0.2})
    return build_store(corpus, Bytes(), out)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`llamax ...` in this process: (exit code, stdout, stderr as one line without colours)."""
    from llamax.cli import main

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["llamax", *map(str, words)])
        capfd.readouterr()
        code: Any = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        out, err = capfd.readouterr()
        return code or 0, out, " ".join(re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", err).split())

    return run
