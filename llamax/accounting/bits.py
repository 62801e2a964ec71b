"""Bits per byte: the loss that vocabularies share."""

from __future__ import annotations

import math

from llamax.errors import UserError


def bits_per_byte(loss: float, tokens: float, text_bytes: float) -> float:
    """Loss in nats per token as bits per byte of the text that `tokens` tokens encode in `text_bytes` bytes.

    Raises:
        UserError: tokens or bytes that are not positive.
    """
    for name, value in (("tokens", tokens), ("text_bytes", text_bytes)):
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"{name}: {value}; bits per byte needs positive counts of tokens and bytes")
    return loss / math.log(2) * tokens / text_bytes
