"""Small corpora for the tests of the data part."""

from pathlib import Path
from typing import Any

import numpy as np

from llamax.config.load import validate
from llamax.config.run import Bytes, Corpus
from llamax.data.store import Store, build_store

WORDS = [
    *("def", "return", "import", "self", "for", "in", "if", "else", "while", "class", "yield", "lambda"),
    *("not", "and", "or", "None", "True", "False", "x", "y", "z"),
]


def text(seed: int, words: int = 60) -> str:
    """Repeatable text of about five characters a word, some of it outside ASCII."""
    rng = np.random.default_rng(seed)
    lines = [" ".join(rng.choice(WORDS, 6)) for _ in range(words // 6)]
    return f"# document {seed} — ü\n" + "\n".join(lines) + "\n"


def write_texts(folder: Path, count: int = 60, first: int = 0, words: int = 60) -> Path:
    """`count` files of text under `folder`, in two levels."""
    for seed in range(first, first + count):
        path = folder / f"part{seed % 3}" / f"file{seed}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text(seed, words), encoding="utf-8")
    return folder


def corpus(
    *sources: dict[str, Any], held_out_fraction: float = 0.2, weights: tuple[float, ...] | None = None
) -> Corpus:
    """A mixture of sources given as data."""
    parts = [
        {"source": source, "weight": weight}
        for source, weight in zip(sources, weights or [1.0] * len(sources), strict=True)
    ]
    return validate(Corpus, {"sources": parts, "held_out_fraction": held_out_fraction}, "corpus")


def of_folder(*paths: Path, **kwargs: Any) -> Corpus:
    """One source of text files."""
    return corpus({"kind": "text", "paths": [str(path) for path in paths]}, **kwargs)


def small_store(folder: Path, count: int = 60, words: int = 60) -> Store:
    """A byte store of `count` small documents under `folder`."""
    return build_store(of_folder(write_texts(folder / "text", count, words=words)), Bytes(), folder / "store")
