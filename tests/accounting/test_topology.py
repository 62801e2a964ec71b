"""Named topologies: counts known from the vendors' tables, shapes that are not sold, prices."""

from __future__ import annotations

import pytest

from llamax.accounting.peaks import peak_flops_per_second
from llamax.accounting.topology import KINDS, find_topology, price_of
from llamax.errors import UserError


@pytest.mark.parametrize(
    ("name", "devices", "chips", "hosts"),
    [
        # Google Cloud's tables of slices: chips and hosts of each shape.
        ("v5p:2x2x1", 4, 4, 1),
        ("v5p:2x2x4", 16, 16, 4),
        ("v5p:8x8x16", 1024, 1024, 256),
        ("v5p:16x16x24", 6144, 6144, 1536),
        ("v5e:16x16", 256, 256, 64),
        ("v6e:1x1", 1, 1, 1),
        ("v6e:8x16", 128, 128, 32),
        ("tpu7x:2x2x1", 8, 4, 1),  # two devices a chip
        ("tpu7x:4x4x8", 256, 128, 32),
        ("h100:8x32", 256, 256, 32),
        ("h200:8", 8, 8, 1),
        ("H100:1", 1, 1, 1),
        ("cpu:8", 8, 8, 1),
    ],
)
def test_counts(name: str, devices: int, chips: int, hosts: int) -> None:
    found = find_topology(name)
    assert (found.devices, found.chips, found.hosts) == (devices, chips, hosts)
    assert found.name == name.casefold()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v9:2x2", "v5p"),
        ("v5p", "KIND:SHAPE"),
        ("v5p:", "KIND:SHAPE"),
        ("v5p:2x2", "2x2x1"),
        ("v5p:3x3x3", "multiples of 4"),
        ("v5p:0x4x4", "multiples of 4"),
        ("v5p:8x8x4", "the shortest first"),
        ("v5p:16x16x32", "larger than the largest slice, v5p:16x16x24"),
        ("v5e:16x32", "16x16"),
        ("h100:7", "several nodes have 8"),
        ("h100:4x2", "several nodes have 8"),
        ("h100:8x0", "several nodes have 8"),
        ("h100:8x2x2", "several nodes have 8"),
        ("cpu:0", "at most 4,096"),
        ("cpu:2x2", "at most 4,096"),
    ],
)
def test_what_does_not_exist_is_one_message(name: str, said: str) -> None:
    with pytest.raises(UserError, match="topology") as error:
        find_topology(name)
    assert said in str(error.value)
    assert repr(name) in str(error.value) or name in str(error.value)


def test_a_torus_closes_from_a_cube_on() -> None:
    assert find_topology("v5p:2x2x4").wraps == (False, False, False)
    assert find_topology("v5p:4x4x8").wraps == (True, True, True)
    assert find_topology("v5e:8x16").wraps == (False, True)
    assert find_topology("v6e:16x16").wraps == (True, True)


def test_every_kind_has_a_peak_and_halves_of_a_chip_are_halves() -> None:
    for name, kind in KINDS.items():
        if kind.platform != "cpu":
            assert peak_flops_per_second(kind.device_kind), name
    ironwood = KINDS["tpu7x"]
    assert ironwood.memory * 2 == 192 * 2**30
    assert ironwood.bandwidth * 2 == pytest.approx(7380e9, rel=0.01)


def test_prices_are_of_a_chip_and_may_be_missing() -> None:
    assert price_of(find_topology("v5p:2x2x4")) == 4.20
    assert price_of(find_topology("cpu:8")) is None
