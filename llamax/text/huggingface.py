"""`tokenizer.json`, the file of the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int32

from llamax.errors import UserError
from llamax.text.tokenizers import Ids, as_list, ids_of


class HuggingFaceTokenizer:
    """A `tokenizer.json`. `add_bos` overrules whether its post-processor puts a token before a text.

    Raises:
        UserError: the `tokenizers` extra is missing, the file is not a tokenizer, or no end-of-text token is known.
    """

    EOS = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "<|im_end|>", "<|eot_id|>", "[SEP]")
    BOS = ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>", "[CLS]")

    def __init__(
        self,
        text: bytes,
        eos: str | int | None = None,
        where: str = "tokenizer.json",
        bos: str | int | None = None,
        add_bos: bool | None = None,
    ):
        try:
            import tokenizers
        except ImportError:
            raise UserError(
                "tokenizer.kind=huggingface needs the tokenizers package; pip install 'llamax[tokenizers]'"
            ) from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(text)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{where}: not a tokenizer.json ({str(error)[:120]}); export it again") from None
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._text = text
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        added = self._tokenizer.get_added_tokens_decoder()
        self.specials: Mapping[str, int] = {token.content: i for i, token in sorted(added.items()) if token.special}
        found = _named(vocab, eos, self.EOS)
        if found is None:
            raise UserError(
                f"{where}: no end-of-text token found ({eos or ', '.join(self.EOS)}); "
                "set eos_token in the tokenizer_config.json beside it"
            )
        self.eos_id = found
        self.bos_id = self._leading() if add_bos is None else _named(vocab, bos, self.BOS) if add_bos else None
        self._left_out = {*self.specials.values(), self.eos_id}
        # Llama 2's file marks a start with a space, as SentencePiece does; most mark nothing.
        plain = self._tokenizer.encode("a", add_special_tokens=False).tokens
        self._anchor = self._plain("\u263a") if plain and plain[0].startswith("\u2581") else []

    def _leading(self) -> int | None:
        """The special token the post-processor puts before a text."""
        encoded = self._tokenizer.encode("a")
        return int(encoded.ids[0]) if encoded.special_tokens_mask[:1] == [1] else None

    def _plain(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode(
        self, text: str, *, bos: bool = False, specials: bool = False, start: bool = True
    ) -> Int32[np.ndarray, " tokens"]:
        self._tokenizer.encode_special_tokens = not specials
        try:
            ids = self._plain(text) if start or not self._anchor else self._continued(text)
        finally:
            self._tokenizer.encode_special_tokens = True
        return ids_of([self.bos_id, *ids] if bos and self.bos_id is not None else ids)

    def _continued(self, text: str) -> list[int]:
        """As Code Llama does: encoded behind a character that merges with nothing, which is then cut off."""
        ids = self._plain("\u263a" + text)
        return ids[len(self._anchor) :] if ids[: len(self._anchor)] == self._anchor else self._plain(text)

    def decode(self, ids: Ids, *, specials: bool = False) -> str:
        kept = as_list(ids) if specials else [i for i in as_list(ids) if i not in self._left_out]
        return self._tokenizer.decode(kept, skip_special_tokens=False)

    def token_id(self, name: str) -> int | None:
        return self._tokenizer.token_to_id(name)

    def spec(self) -> dict[str, Any]:
        spec: dict[str, Any] = {"kind": "huggingface", "file": "tokenizer.json", "eos_id": self.eos_id}
        return spec if self.bos_id == self._leading() else spec | {"bos_id": self.bos_id}

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.json": self._text}


def _named(vocab: Mapping[str, int], given: str | int | None, usual: tuple[str, ...]) -> int | None:
    if isinstance(given, int):
        return given
    return next((vocab[name] for name in ([given] if given else usual) if name in vocab), None)
