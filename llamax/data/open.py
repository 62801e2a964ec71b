"""From a config to an open token store: the one named, or one built once and kept in the cache folder."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from llamax.config.files import cache_dir
from llamax.config.load import load_corpus
from llamax.config.run import DataConfig
from llamax.data.format import Store
from llamax.data.remote import fetched
from llamax.data.store import build_store, list_sources, store_key


def open_data(config: DataConfig, progress: Callable[[str, int, int], None] | None = None) -> Store:
    """The store `config.store` names, or that of `config.corpus` and `config.tokenizer`, built into the cache once.

    The cached folder's name has the hash of both configs, the interpreter's version and a listing of the files (path,
    size, time), so that a changed tree is built anew and an unchanged one opens at once.

    Raises:
        UserError: no store there or a damaged one, a bucket that does not answer; a corpus that cannot be read.
    """
    if config.store is not None:
        return Store.open(fetched(config.store))
    corpus = load_corpus(config.corpus)
    key = store_key(corpus, config.tokenizer, list_sources(corpus))
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(config.corpus).stem) or "corpus"
    folder = cache_dir() / "stores" / f"{name}-{key[:16]}"
    if (folder / "manifest.json").exists():
        return Store.open(folder)
    return build_store(corpus, config.tokenizer, folder, progress=progress)
