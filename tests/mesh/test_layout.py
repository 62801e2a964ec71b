"""Where devices stand: fast axes inside a host, data parallelism between slices. Devices are made up."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import pytest

from llamax.errors import UserError
from llamax.mesh.layout import laid_out

SIZES = {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}


@dataclass(frozen=True)
class Device:
    id: int
    process_index: int
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100"
    slice_index: int = 0
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0


def hosts(count: int, each: int, platform: str) -> list[Device]:
    devices = [Device(100 * host + i, host, platform) for host in range(count) for i in range(each)]
    random.Random(0).shuffle(devices)
    return devices


def slices(count: int) -> list[Device]:
    """Slices of 2 x 4 chips, four chips a host."""
    return [
        Device(8 * s + 4 * x + y, 2 * s + x, "tpu", "TPU v5p", s, (x, y, 0))
        for s in range(count)
        for x in range(2)
        for y in range(4)
    ]


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_fast_axes_lie_inside_a_host(platform: str):
    mesh = laid_out({**SIZES, "data": 2, "fsdp": 2, "expert": 2, "tensor": 4}, hosts(4, 8, platform))
    assert mesh.shape == (2, 2, 2, 4)
    process = np.vectorize(lambda device: device.process_index)(mesh)
    assert all(len(set(process[d, f].ravel())) == 1 for d in range(2) for f in range(2))
    assert len(set(process[:, :, 0, 0].ravel())) == 4
    assert sorted(device.id for device in mesh.flat) == sorted(device.id for device in hosts(4, 8, platform))


def test_between_slices_goes_data_alone():
    mesh = laid_out({**SIZES, "data": 4, "fsdp": 2, "tensor": 2}, slices(2))
    index = np.vectorize(lambda device: device.slice_index)(mesh)
    assert mesh.shape == (4, 2, 1, 2)
    assert [set(index[d].ravel()) for d in range(4)] == [{0}, {0}, {1}, {1}]
    assert len({device.id for device in mesh.flat}) == 16


def test_one_slice_is_laid_along_its_torus():
    mesh = laid_out({**SIZES, "data": 2, "tensor": 4}, slices(1))
    rows = np.vectorize(lambda device: device.coords[0])(mesh)
    assert all(len(set(rows[d].ravel())) == 1 for d in range(2))  # tensor along the longer physical axis


def test_slices_that_data_cannot_be_cut_over():
    with pytest.raises(UserError, match=r"mesh.data=1: there are 2 slices, .* make mesh.data a multiple of 2"):
        laid_out({**SIZES, "fsdp": 16}, slices(2))


def test_gpu_hosts_are_no_slices():
    """JAX numbers the hosts of GPUs as slices too; fsdp over all of them is usual."""
    devices = [Device(i, i // 8, slice_index=i // 8) for i in range(16)]
    assert laid_out({**SIZES, "fsdp": 16}, devices).shape == (1, 16, 1, 1)
