"""Batches as pure functions: batch k of (store, seed, k), and the held-out split in order."""

import functools
import hashlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32, Int64

from llamax.data.format import Split, Store
from llamax.data.permutation import shuffled
from llamax.errors import UserError

Draws = Int64[np.ndarray, " batch"]
Rows = Callable[[int, np.ndarray], np.ndarray]
SHARES = 1 << 20  # mixture weights as integers that add up to this


class TrainBatches:
    """`batches(step)` is the training batch of a step: a pure function of (store, seed, step).

    The training split of each source is cut into windows of `seq_len` + 1 tokens, each sharing one token with the next,
    so that every token but the first is a target once an epoch (a rest shorter than a window is left out). An epoch is
    a permutation of the windows, a new one each time; a mixture draws from its sources in proportion to their weights,
    spread evenly. The order is one for all processes, and each is given the `rows` of every batch that it reads (None:
    all), so the batch does not depend on how many there are.

    `dataset` is the same as a Grain `MapDataset` of batches, for prefetching.

    Raises:
        UserError: a window longer than a source's text.
    """

    # Why not MapDataset.source(windows).shuffle(seed).repeat().batch(n): Grain's bookkeeping costs 20 us an element
    # and its mix() rounds weights to 1/100 of the smallest. One source is in the very order that pipeline gives (a test
    # compares them), but the rows of many steps are found and gathered at once (benchmarks/README.md, Data).

    def __init__(
        self,
        store: Store,
        *,
        batch_size: int,
        seq_len: int,
        seed: int,
        mask_documents: bool = False,
        rows: Int64[np.ndarray, " rows"] | None = None,
    ):
        for source in store.sources:
            if len(source.train.tokens) <= seq_len:
                raise UserError(
                    f"train.seq_len={seq_len}: a window of {seq_len + 1} tokens is longer than the training text, "
                    f"{len(source.train.tokens)} tokens in {source.name!r}; lower train.seq_len or give more text"
                )
        self.batch_size, self.seq_len = batch_size, seq_len
        self._mask = mask_documents
        self.rows = np.arange(batch_size, dtype=np.int64) if rows is None else rows
        self._sources = store.sources
        self._windows = [(len(source.train.tokens) - 1) // seq_len for source in store.sources]
        self._seeds = [_source_seed(seed, i) for i in range(len(store.sources))]
        self._shares = _shares([source.weight for source in store.sources])
        self._views = [
            np.lib.stride_tricks.sliding_window_view(s.train.tokens, seq_len + 1)[::seq_len] for s in store.sources
        ]

    @functools.cached_property
    def dataset(self) -> Any:
        """The batches as a Grain dataset; Grain is imported only for who asks."""
        import grain

        return grain.MapDataset.range(sys.maxsize).map(self)

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """`tokens` [rows, seq_len + 1] int32, and `segments` alike when documents are masked.

        Segments number the documents of a window from 1; an end-of-document token belongs to the document it ends.
        """
        return {name: rows[0] for name, rows in self.of_steps(step, 1).items()}

    def of_steps(self, step: int, count: int) -> dict[str, np.ndarray]:
        """The batches of `count` steps from `step` on, stacked: [count, rows, seq_len + 1]."""
        steps = np.arange(step, step + count, dtype=np.int64)
        source, window = self._windows_of((steps[:, None] * self.batch_size + self.rows).ravel())
        batch = {"tokens": self._gather(source, window, lambda i, rows: self._views[i][rows])}
        if self._mask:
            batch["segments"] = self._gather(source, window, self._segments)
        return {name: rows.reshape(count, len(self.rows), -1) for name, rows in batch.items()}

    def _gather(
        self, source: Int64[np.ndarray, " batch"], window: Int64[np.ndarray, " batch"], rows: Rows
    ) -> np.ndarray:
        """`rows(i, windows)` of every source, each in its place: [batch, seq_len + 1] int32."""
        if len(self._sources) == 1:
            return rows(0, window).astype(np.int32)
        result = np.empty((len(window), self.seq_len + 1), np.int32)
        for i in range(len(self._sources)):
            result[source == i] = rows(i, window[source == i])
        return result

    def _segments(self, source: int, window: Int64[np.ndarray, " rows"]) -> Int32[np.ndarray, "rows length"]:
        return segments(self._sources[source].train, window * self.seq_len, self.seq_len + 1)

    def _windows_of(self, draws: Draws) -> tuple[Draws, Draws]:
        """The source of each draw, and the window of it."""
        if len(self._sources) == 1:
            return np.zeros_like(draws), self._shuffled(0, draws)
        before = _drawn(draws, self._shares)
        source = np.argmax(_drawn(draws + 1, self._shares) - before, axis=0)
        place = before[source, np.arange(len(draws))]
        window = np.empty_like(place)
        for i in np.unique(source).tolist():
            window[source == i] = self._shuffled(i, place[source == i])
        return source, window

    def _shuffled(self, source: int, drawn: Draws) -> Draws:
        """The windows that are drawn as these from `source`: MapDataset.shuffle(seed).repeat() there."""
        epoch, place = np.divmod(drawn, self._windows[source])
        window = np.empty_like(place)
        for e in np.unique(epoch).tolist():
            seed = (self._seeds[source] + e) % 2**32
            window[epoch == e] = shuffled(place[epoch == e], self._windows[source], seed)
        return window

    def epochs(self, step: int) -> float:
        """Passes over the most repeated source after `step` steps."""
        return max(drawn / windows for drawn, windows in zip(self._drawn_by(step), self._windows, strict=True))

    def unique_tokens(self, step: int) -> int:
        """Different tokens trained on after `step` steps; the rest of step * batch_size * seq_len were repeats."""
        return self.seq_len * sum(min(d, w) for d, w in zip(self._drawn_by(step), self._windows, strict=True))

    def _drawn_by(self, step: int) -> list[int]:
        return _drawn(np.array([step * self.batch_size], np.int64), self._shares)[:, 0].tolist()


def _source_seed(seed: int, source: int) -> int:
    """32 bits. Grain adds the epoch to a seed, so plain ones would make epoch 1 of seed 0 the epoch 0 of seed 1."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{source}".encode()).digest()[:4], "big")


def _shares(weights: list[float]) -> list[int]:
    """Positive integers in proportion to `weights`, precise to one in a million."""
    return [max(1, round(SHARES * weight / sum(weights))) for weight in weights]


def _drawn(draws: Int64[np.ndarray, " n"], shares: list[int]) -> Int64[np.ndarray, "sources n"]:
    """How many of the first `draws` draws came from each source.

    Source 0 gets its share of them rounded up, the next its share of what is left, and so on: each count is within one
    or two of exact at every point, and each draw adds one to exactly one count.
    """
    counts, left, total = [], draws, sum(shares)
    for share in shares:
        rest = left * (total - share) // total
        counts.append(left - rest)
        left, total = rest, total - share
    return np.stack(counts)


def segments(split: Split, starts: Int64[np.ndarray, " batch"], length: int) -> Int32[np.ndarray, "batch length"]:
    """Which document of its window each position belongs to, from 1."""
    first = np.searchsorted(split.ends, starts, side="right")
    inside = np.searchsorted(split.ends, starts + length - 1, side="right") - first  # documents that end in each window
    row = np.repeat(np.arange(len(starts)), inside)
    end = split.ends[first[row] + np.arange(len(row)) - np.repeat(np.cumsum(inside) - inside, inside)]
    begins = np.zeros((len(starts), length), np.int32)
    begins[:, 0] = 1
    begins[row, end - starts[row]] = 1
    return np.cumsum(begins, axis=1, dtype=np.int32)


# ---------------------------------------------------------------- held-out text
def eval_batches(
    store: Store,
    *,
    batch_size: int,
    seq_len: int,
    max_tokens: int | None = None,
    mask_documents: bool = False,
    rows: Int64[np.ndarray, " rows"] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """The held-out split in order, every target token once, in batches of one shape; of each the `rows` asked for.

    Each has `tokens` (and `segments`) [batch, seq_len + 1] int32, and `weights` [batch, seq_len] float32: 1 where the
    target counts, 0 on padding (token 0, segment 0). The first token of each source has no context and is no target.
    With `max_tokens` at most that many targets count, in windows spread evenly over the whole split. The parts of
    a mixture count by their held-out size, not by their weight.
    """
    windows = [
        (source.held_out, start)
        for source in store.sources
        for start in range(0, len(source.held_out.tokens) - 1, seq_len)
    ]
    wanted = len(windows) if max_tokens is None else min(len(windows), -(-max_tokens // seq_len))
    chosen = [windows[i * len(windows) // wanted] for i in range(wanted)]
    budget = sum(len(source.held_out.tokens) for source in store.sources) if max_tokens is None else max_tokens
    for first in range(0, wanted, batch_size):
        part = chosen[first : first + batch_size]
        weights: Float32[np.ndarray, "batch seq_len"] = np.zeros((batch_size, seq_len), np.float32)
        for row, (split, start) in enumerate(part):
            weights[row, : len(split.tokens) - start - 1] = 1
        counted = weights.ravel().cumsum(dtype=np.int64).reshape(weights.shape)
        weights = np.where(counted <= budget, weights, np.float32(0))
        budget -= int(counted[-1, -1])
        mine = range(batch_size) if rows is None else rows.tolist()
        batch = _held_out_rows([part[row] if row < len(part) else None for row in mine], seq_len, mask_documents)
        yield {**batch, "weights": weights if rows is None else weights[rows]}


def _held_out_rows(windows: list[tuple[Split, int] | None], seq_len: int, mask: bool) -> dict[str, np.ndarray]:
    """Tokens, and segments where masked, of the windows; zeros where there is none, and after a short one."""
    shape = (len(windows), seq_len + 1)
    batch = {name: np.zeros(shape, np.int32) for name in (["tokens", "segments"] if mask else ["tokens"])}
    for row, (split, start) in ((row, window) for row, window in enumerate(windows) if window is not None):
        length = min(seq_len + 1, len(split.tokens) - start)
        batch["tokens"][row, :length] = split.tokens[start : start + length]
        if mask:
            batch["segments"][row, :length] = segments(split, np.array([start]), length)[0]
    return batch


def held_out_bytes_per_token(store: Store) -> float:
    """Bytes of held-out text a token; bits per byte = nats per token / ln 2 / this. End-of-document tokens count."""
    return store.bytes("held_out") / store.tokens("held_out")
