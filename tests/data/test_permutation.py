"""The permutation is Grain's, and one."""

import numpy as np
import pytest
from grain.experimental import index_shuffle

from llamax.data.permutation import shuffled


@pytest.mark.parametrize("count", [1, 2, 3, 100, 65_535, 65_536, 65_538, 100_000, 131_073, 2**25 + 3, 2**33 + 7, 2**40])
def test_order_is_grains(count: int) -> None:
    index = np.unique(np.random.default_rng(0).integers(0, count, 64))
    for seed in (0, 1, 123_456_789, 2**32 - 1):
        assert shuffled(index, count, seed).tolist() == [index_shuffle(i, count - 1, seed, 4) for i in index.tolist()]


@pytest.mark.parametrize("count", [1, 2, 7, 1000, 65_537])
def test_every_index_once(count: int) -> None:
    """Also 2^16 + 1, which Grain's blocks are too narrow for."""
    for seed in (0, 5):
        assert np.array_equal(np.sort(shuffled(np.arange(count), count, seed)), np.arange(count))
    assert count < 7 or (shuffled(np.arange(count), count, 0) != shuffled(np.arange(count), count, 5)).any()
