"""Batches are pure functions of (store, seed, step); held-out text is covered exactly once."""

import grain
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamax.config.run import Bytes, Corpus
from llamax.data import batches as batches_module
from llamax.data.batches import TrainBatches, eval_batches, held_out_bytes_per_token
from llamax.data.format import Split
from llamax.data.store import Store, build_store
from llamax.errors import UserError
from tests.data.corpora import of_folder, small_store, write_texts

SEQ = 16


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return small_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Two sources, weights 3 to 1, of which only the second has digits beyond its numbering."""
    folder = tmp_path_factory.mktemp("mixture")
    first, second = write_texts(folder / "a", 60), folder / "b"
    second.mkdir()
    for i in range(30):
        (second / f"{i}.txt").write_text(f"{i:02d}" + "0123456789" * 20)
    parts = of_folder(first, weights=(3.0,)), of_folder(second, weights=(1.0,))
    corpus = Corpus(sources=parts[0].sources + parts[1].sources, held_out_fraction=0.2)
    return build_store(corpus, Bytes(), folder / "store")


def starts_of(store: Store, rows: np.ndarray) -> list[int]:
    """Which window of the (single) source each row is; every window of the fixture is unique."""
    tokens = store.sources[0].train.tokens
    windows = {tokens[a : a + SEQ + 1].tobytes(): a // SEQ for a in range(0, len(tokens) - SEQ, SEQ)}
    return [windows[row.astype(np.uint8).tobytes()] for row in rows]


# ---------------------------------------------------------------- training
def test_a_batch_is_a_pure_function(store: Store) -> None:
    one, two = (TrainBatches(store, batch_size=8, seq_len=SEQ, seed=3) for _ in range(2))
    later = [two(step)["tokens"] for step in (7, 2, 1000)]
    for step, tokens in zip((7, 2, 1000), later, strict=True):
        np.testing.assert_array_equal(one(step)["tokens"], tokens)
        np.testing.assert_array_equal(one.dataset[step]["tokens"], tokens)
    assert one(0)["tokens"].shape == (8, SEQ + 1)
    assert one(0)["tokens"].dtype == np.int32
    assert set(one(0)) == {"tokens"}


def test_seeds_differ_in_every_epoch(store: Store) -> None:
    windows = (store.tokens("train") - 1) // SEQ
    orders = [
        tuple(TrainBatches(store, batch_size=windows, seq_len=SEQ, seed=seed)(epoch)["tokens"].tobytes())
        for seed in range(3)
        for epoch in range(3)
    ]
    assert len(set(orders)) == 9


def test_order_is_that_of_the_plain_grain_pipeline(store: Store) -> None:
    tokens = store.sources[0].train.tokens
    windows = [tokens[a : a + SEQ + 1].astype(np.int32) for a in range(0, len(tokens) - SEQ, SEQ)]
    plain = grain.MapDataset.source(windows).shuffle(seed=batches_module._source_seed(5, 0)).repeat().batch(8)
    ours = TrainBatches(store, batch_size=8, seq_len=SEQ, seed=5)
    for step in (0, 1, len(windows) // 8, 3 * len(windows) // 8, 10_000):
        np.testing.assert_array_equal(ours(step)["tokens"], plain[step])


def test_an_epoch_sees_every_window_once(store: Store) -> None:
    windows = (store.tokens("train") - 1) // SEQ
    batches = TrainBatches(store, batch_size=1, seq_len=SEQ, seed=0)
    for epoch in range(2):
        rows = np.concatenate([batches(epoch * windows + i)["tokens"] for i in range(windows)])
        assert sorted(starts_of(store, rows)) == list(range(windows))
    assert batches.epochs(windows) == 1
    assert batches.unique_tokens(windows) == windows * SEQ


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("name", ["store", "mixture"])
@pytest.mark.parametrize("count", [2, 4, 8])
def test_processes_share_one_global_batch(request: pytest.FixtureRequest, name: str, count: int, mask: bool) -> None:
    store = request.getfixturevalue(name)
    common = {"batch_size": 16, "seq_len": SEQ, "seed": 1, "mask_documents": mask}
    whole = TrainBatches(store, **common)
    rows = np.arange(16).reshape(count, -1)
    shares = [TrainBatches(store, **common, rows=mine) for mine in rows]
    for step in (0, 5, 500):
        expected = whole(step)
        for key in expected:
            got = np.concatenate([share(step)[key] for share in shares])
            np.testing.assert_array_equal(got, expected[key])
        assert shares[0](step)["tokens"].shape == (16 // count, SEQ + 1)


def test_any_sequence_length_reads_the_same_text(store: Store) -> None:
    for seq_len in (1, 7, 64, store.tokens("train") - 1):
        windows = (store.tokens("train") - 1) // seq_len
        batches = TrainBatches(store, batch_size=windows, seq_len=seq_len, seed=0)
        targets = np.sort(batches(0)["tokens"][:, 1:].ravel())
        np.testing.assert_array_equal(targets, np.sort(store.sources[0].train.tokens[1 : windows * seq_len + 1]))


def test_segments_number_the_documents_of_a_window(store: Store) -> None:
    for seq_len in (SEQ, 1000):
        batch = TrainBatches(store, batch_size=4, seq_len=seq_len, seed=0, mask_documents=True)(3)
        ended = np.cumsum(batch["tokens"] == store.eos_id, axis=1)
        expected = 1 + np.concatenate([np.zeros((4, 1), np.int32), ended[:, :-1]], axis=1)
        np.testing.assert_array_equal(batch["segments"], expected)
    assert expected.max() > 2


def test_segments_at_every_alignment() -> None:
    """Windows that start or end on a boundary, one before, one after, against counting by hand."""
    split = Split(np.arange(12, dtype=np.uint8), np.array([2, 3, 7, 12], np.int64))
    document = [0, 0, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3]
    for length in range(1, 13):
        starts = np.arange(13 - length, dtype=np.int64)
        expected = [[document[a + i] - document[a] + 1 for i in range(length)] for a in starts]
        np.testing.assert_array_equal(batches_module.segments(split, starts, length), expected)


def test_mixture_draws_by_weight_at_every_point(mixture: Store) -> None:
    batches = TrainBatches(mixture, batch_size=8, seq_len=SEQ, seed=0)
    digits = np.isin(np.arange(256), list(b"0123456789"))
    second = [digits[batches(step)["tokens"]].mean(axis=1) > 0.7 for step in range(200)]
    assert np.concatenate(second).mean() == pytest.approx(0.25, abs=0.01)
    assert {int(s.sum()) for s in second} == {2}
    windows = [(len(s.train.tokens) - 1) // SEQ for s in mixture.sources]
    drawn = [8 * 200 * 3 // 4, 8 * 200 // 4]
    assert batches.epochs(200) == pytest.approx(max(d / w for d, w in zip(drawn, windows, strict=True)), rel=0.01)
    unique = SEQ * sum(min(d, w) for d, w in zip(drawn, windows, strict=True))
    assert batches.unique_tokens(200) == pytest.approx(unique, rel=0.01)
    assert batches.unique_tokens(10**6) == SEQ * sum(windows)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(0, 10**12))
def test_mixture_counts_add_up(weights: list[float], first: int) -> None:
    shares = batches_module._shares(weights)
    draws = np.arange(first, first + 300, dtype=np.int64)
    counts = batches_module._drawn(draws, shares)
    np.testing.assert_array_equal(counts.sum(axis=0), draws)
    steps = np.diff(counts, axis=1)
    assert set(np.unique(steps)) <= {0, 1}
    assert (steps.sum(axis=0) == 1).all()
    exact = np.array(shares)[:, None] / sum(shares) * draws.astype(np.float64)
    assert np.abs(counts - exact).max() <= len(weights) + 1e-3


def test_window_longer_than_the_corpus(store: Store, mixture: Store) -> None:
    tokens = store.tokens("train")
    with pytest.raises(UserError, match=rf"train.seq_len={tokens}: .* {tokens} tokens in .*; lower train.seq_len"):
        TrainBatches(store, batch_size=8, seq_len=tokens, seed=0)
    shortest = min(len(source.train.tokens) for source in mixture.sources)
    with pytest.raises(UserError, match=rf"{shortest} tokens in"):
        TrainBatches(mixture, batch_size=8, seq_len=shortest, seed=0)


# ---------------------------------------------------------------- held-out
def counted_targets(batches: list[dict[str, np.ndarray]]) -> np.ndarray:
    return np.concatenate([batch["tokens"][:, 1:][batch["weights"] > 0] for batch in batches])


@pytest.mark.parametrize("batch_size", [1, 5, 64])
@pytest.mark.parametrize("seq_len", [1, SEQ, 10_000])
def test_every_held_out_target_once_in_order(mixture: Store, batch_size: int, seq_len: int) -> None:
    batches = list(eval_batches(mixture, batch_size=batch_size, seq_len=seq_len))
    expected = np.concatenate([source.held_out.tokens[1:] for source in mixture.sources])
    np.testing.assert_array_equal(counted_targets(batches), expected)
    for batch in batches:
        assert batch["tokens"].shape == (batch_size, seq_len + 1)
        assert batch["weights"].shape == (batch_size, seq_len)
        assert (batch["tokens"].dtype, batch["weights"].dtype) == (np.int32, np.float32)
        inputs = batch["tokens"][:, :-1][batch["weights"] > 0]
        assert len(inputs) == batch["weights"].sum()


@pytest.mark.parametrize("max_tokens", [1, 5, 100, 333, 10**9])
def test_a_bound_on_held_out_tokens(store: Store, max_tokens: int) -> None:
    total = store.tokens("held_out") - 1
    batches = list(eval_batches(store, batch_size=4, seq_len=SEQ, max_tokens=max_tokens))
    counted = sum(int(batch["weights"].sum()) for batch in batches)
    assert min(max_tokens, total) - SEQ < counted <= min(max_tokens, total)
    assert counted > 0
    again = list(eval_batches(store, batch_size=4, seq_len=SEQ, max_tokens=max_tokens))
    assert all((a["tokens"] == b["tokens"]).all() for a, b in zip(batches, again, strict=True))


def test_a_bound_spreads_over_the_split(store: Store) -> None:
    tokens = store.sources[0].held_out.tokens
    (batch,) = eval_batches(store, batch_size=4, seq_len=SEQ, max_tokens=4 * SEQ)
    windows = (len(tokens) - 2) // SEQ + 1
    for row, k in zip(batch["tokens"], range(4), strict=True):
        start = k * windows // 4 * SEQ
        np.testing.assert_array_equal(row, tokens[start : start + SEQ + 1])


def test_eval_segments(store: Store) -> None:
    batches = list(eval_batches(store, batch_size=4, seq_len=64, mask_documents=True))
    plain = list(eval_batches(store, batch_size=4, seq_len=64))
    for batch, other in zip(batches, plain, strict=True):
        np.testing.assert_array_equal(batch["tokens"], other["tokens"])
        padding = np.concatenate([np.zeros((4, 1), bool), batch["weights"] == 0], axis=1)
        expected = 1 + np.cumsum(batch["tokens"] == store.eos_id, axis=1) - (batch["tokens"] == store.eos_id)
        expected[padding] = 0
        expected[padding.all(axis=1) | (padding[:, 1:].all(axis=1))] = 0
        np.testing.assert_array_equal(batch["segments"], expected)


def test_bytes_per_token_turns_nats_into_bits_per_byte(store: Store) -> None:
    """A uniform guess over 256 ids costs ln 256 nats a token, which is 8 bits a byte plus the end tokens' share."""
    bits = np.log(256) / np.log(2) / held_out_bytes_per_token(store)
    assert bits == pytest.approx(8 * (1 + store.documents("held_out") / store.bytes("held_out")))
