"""Which rows of a batch a process holds."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llamax.mesh.slices import on_mesh, rows_of


class Place:
    """A sharding of a batch of 8 over made-up devices, of which this process has some: ranges of rows."""

    def __init__(self, *parts: tuple[int, int]) -> None:
        self.parts = parts

    def addressable_devices_indices_map(self, shape: tuple[int, ...]) -> dict[int, tuple[slice, ...]]:
        return {i: (slice(None), slice(*part), slice(None)) for i, part in enumerate(self.parts)}


@pytest.mark.parametrize(
    ("parts", "rows"),
    [
        ([(0, 2), (2, 4)], [0, 1, 2, 3]),  # data over processes: a part each
        ([(4, 8), (4, 8)], [4, 5, 6, 7]),  # tensor inside the process: one part twice
        ([(None, None)] * 2, list(range(8))),  # tensor over processes: everybody reads all
        ([(6, 8), (0, 2)], [0, 1, 6, 7]),  # devices that are no neighbours
    ],
)
def test_rows_follow_from_the_devices(parts: list, rows: list[int]):
    assert rows_of.__wrapped__(Place(*parts), (3, 8, 17), 1).tolist() == rows


def test_rows_come_to_their_devices():
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"))
    place = NamedSharding(mesh, PartitionSpec(None, "data"))
    values = np.arange(3 * 8 * 5).reshape(3, 8, 5)
    rows = rows_of(place, values.shape, 1)
    assert rows.tolist() == list(range(8))
    np.testing.assert_array_equal(on_mesh(place, values, rows, 8, 1), values)
