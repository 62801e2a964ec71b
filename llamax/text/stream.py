"""Ids to text as they come: no half characters, no half stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from llamax.text.tokenizers import Ids, Tokenizer, as_list

CONTEXT = 8  # ids of a prompt that are decoded along, so that the first new ones know they continue something
HALF = "\ufffd"  # what a character whose bytes are not all there decodes to


class TextStream:
    """The text of one continuation, given id by id.

    `text` is all of it so far, cut before the first of the `stops` that is complete in it (the longest of those that
    end together), however the text falls into tokens; `stopped` says that one was.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Ids = (), stops: Sequence[str] = ()):
        self._tokenizer, self._stops = tokenizer, [stop for stop in stops if stop]
        self._ids = _context(tokenizer, as_list(prompt))
        self._start, self._read = 0, len(self._ids)
        self.text, self.stopped, self._given = "", False, 0

    def push(self, i: int) -> str:
        """Adds one id; the text that is now certain, often none."""
        if self.stopped:
            return ""
        self._ids.append(i)
        new = self._new()
        if new and not new.endswith(HALF):
            self._take(new)
        return self._release(False)

    def finish(self) -> str:
        """The text that was held back: there are no more ids."""
        if not self.stopped:
            self._take(self._new())
        return self._release(True)

    def _new(self) -> str:
        """The text of the ids not yet taken, as it reads behind those before."""
        before = self._tokenizer.decode(self._ids[self._start : self._read])
        return self._tokenizer.decode(self._ids[self._start :])[len(before) :]

    def _take(self, new: str) -> None:
        self._start, self._read = self._read, len(self._ids)
        searched = max(0, len(self.text) - max((len(stop) for stop in self._stops), default=0))
        self.text += new
        found = [(at + len(stop), at) for stop in self._stops if (at := self.text.find(stop, searched)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)[1]], True

    def _release(self, all_of_it: bool) -> str:
        """What of the text was not given yet, less an ending that may become a stop string."""
        end = len(self.text)
        if not (all_of_it or self.stopped):
            end -= max((_overlap(self.text, stop) for stop in self._stops), default=0)
        out = self.text[self._given : end]
        self._given = max(self._given, end)
        return out


def _context(tokenizer: Tokenizer, prompt: list[int]) -> list[int]:
    """The last ids of a prompt, from a place that cuts no character."""
    count = CONTEXT
    while count < len(prompt) and HALF in tokenizer.decode(prompt[-count:]):
        count *= 2
    return prompt[-count:]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
