"""Infilling: the tokens that ask a code model for what goes between a prefix and a suffix."""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Int32

from llamax.errors import UserError
from llamax.text.tokenizers import Tokenizer, ids_of

# Code Llama (arXiv:2308.12950, section 2.3): ids 32007, 32008, 32009 and 32010 of its tokenizer.
PREFIX, SUFFIX, MIDDLE, END = ("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>", "\u2581<EOT>")


def infill_ids(
    tokenizer: Tokenizer, prefix: str, suffix: str, order: Literal["psm", "spm"] = "psm"
) -> Int32[np.ndarray, " tokens"]:
    """The prompt whose continuation, up to `infill_end`, goes between `prefix` and `suffix`.

    `psm`: begin PRE prefix SUF suffix MID. `spm`: begin PRE SUF suffix MID prefix, which lets the middle go on in the
    last token of the prefix. The suffix has no leading space of its own: it continues the middle.

    Raises:
        UserError: a tokenizer without the infilling tokens.
    """
    pre, suf, mid = (_token(tokenizer, name) for name in (PREFIX, SUFFIX, MIDDLE))
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    before, after = tokenizer.encode(prefix).tolist(), tokenizer.encode(suffix, start=False).tolist()
    if order == "spm":
        return ids_of([*begin, pre, suf, *after, mid, *before])
    return ids_of([*begin, pre, *before, suf, *after, mid])


def infill_end(tokenizer: Tokenizer) -> int:
    """The id that ends the middle.

    Raises:
        UserError: a tokenizer without the infilling tokens.
    """
    return _token(tokenizer, END)


def _token(tokenizer: Tokenizer, name: str) -> int:
    found = tokenizer.token_id(name)
    if found is None:
        raise UserError(
            f"infilling needs the token {name!r}, which this tokenizer lacks; use Code Llama 7B, 13B or 70B"
        )
    return found
