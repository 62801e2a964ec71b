"""Named groups of accelerators, `v5p:8x8x16` or `h100:8x32`: how many devices, how connected, how fast, at what price.

Collected 2026-11. TPU: the pages "TPU v5e", "TPU v5p", "TPU v6e" and "TPU7x" of Google Cloud's documentation (memory,
HBM and DCN rates, slice shapes, where links wrap around); one-way rate of one link: "How to Scale Your Model", chapter
TPUs (jax-ml.github.io/scaling-book), which measures 90 % of a link's nominal rate, and the same share of TPU7x's 1200
GB/s over six links both ways. GPU: NVIDIA's data sheets of H100 SXM and H200 SXM (NVLink 900 GB/s both ways) in HGX
nodes of eight with one 400 Gb/s adapter a GPU.
 A device is what JAX calls one: on TPU7x half a chip, with half its memory, memory rate and links.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from llamax.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Kind:
    """One kind of accelerator, all rates in bytes a second and a device.

    `device_kind` is JAX's name, by which `peaks` knows its arithmetic rate. `link` is one way: of one link of a torus,
    or of all NVLinks of a GPU; `network` leaves the host. `shapes` are those that are sold as one slice, None: any
    number of nodes of eight. `cube`: dimensions that are multiples of 4 are sold as well, up to `largest`.
    """

    platform: str
    device_kind: str
    memory: float
    bandwidth: float
    link: float
    network: float
    host_chips: int
    chip_devices: int = 1
    shapes: tuple[str, ...] | None = None
    cube: bool = False
    largest: tuple[int, ...] = ()


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
KINDS: dict[str, Kind] = {
    "v5e": Kind("tpu", "TPU v5 lite", 16 * GIB, 819e9, 45e9, 25e9 / 8, 4, shapes=_FLAT),
    "v6e": Kind("tpu", "TPU v6 lite", 32 * GIB, 1638e9, 90e9, 100e9 / 8, 4, shapes=_FLAT),
    "v5p": Kind("tpu", "TPU v5", 95 * GIB, 2765e9, 90e9, 50e9 / 8, 4, shapes=_CUBES, cube=True, largest=(16, 16, 24)),
    "tpu7x": Kind(
        "tpu", "TPU7x", 96 * GIB, 3690e9, 45e9, 50e9 / 8, 4, 2, shapes=_CUBES, cube=True, largest=(16, 24, 24)
    ),
    "h100": Kind("cuda", "NVIDIA H100 80GB HBM3", 80e9, 3350e9, 450e9, 50e9, 8),
    "h200": Kind("cuda", "NVIDIA H200", 141e9, 4800e9, 450e9, 50e9, 8),
    "cpu": Kind("cpu", "cpu", math.inf, math.nan, math.nan, math.nan, 1),
}


@dataclass(frozen=True)
class Topology:
    """Devices of one kind that start one program. `shape` is the torus of a slice in chips, (GPUs a node, nodes), or
    the number of simulated CPU devices; `hosts` are machines."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    devices: int
    chips: int
    hosts: int

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Whether each dimension of a torus closes to a ring: all of them from 4x4x4 on, and those of 16 on a flat
        slice."""
        if len(self.shape) == 3:
            return (self.kind.cube and all(side % 4 == 0 for side in self.shape),) * 3
        return tuple(side == 16 for side in self.shape)


def find_topology(name: str) -> Topology:
    """A topology by its name: `v5e:16x16`, `v6e:4x8`, `v5p:2x2x4`, `tpu7x:4x4x4` (chips), `h100:8x32` (GPUs a node x
    nodes), `h200:8`, and `cpu:8` (devices simulated on this machine).

    Raises:
        UserError: a kind that is not known, or a shape it is not sold in.
    """
    found = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)*)", name.strip().casefold())
    if found is None or found[1] not in KINDS:
        what = "is not known" if found else "is not KIND:SHAPE"
        raise UserError(
            f"topology {name!r} {what}; write a kind of {', '.join(KINDS)} and its shape, as in v5p:2x2x4, h100:8x32"
        )
    kind, shape = KINDS[found[1]], tuple(int(side) for side in found[2].split("x"))
    if kind.shapes is not None:
        _check_slice(found[1], kind, shape, found[2])
        chips = math.prod(shape)
        return Topology(f"{found[1]}:{found[2]}", kind, shape, chips * kind.chip_devices, chips, _hosts(kind, chips))
    most = {"cuda": "1 to 8 GPUs a node, and nodes: h100:8, h100:8x32", "cpu": "a number of devices: cpu:8"}
    if kind.platform == "cpu" and (len(shape) > 1 or not 1 <= shape[0] <= MOST_SIMULATED):
        raise UserError(f"topology {name!r}: expected {most['cpu']}, at most {MOST_SIMULATED:,}")
    if kind.platform == "cuda" and (
        len(shape) > 2 or shape[0] not in (1, 2, 4, 8) or shape[-1] < 1 or (len(shape) == 2 and shape[0] != 8)
    ):
        raise UserError(f"topology {name!r}: expected {most['cuda']}; several nodes have 8 GPUs each")
    nodes = shape[1] if len(shape) == 2 else 1
    devices = shape[0] * nodes
    return Topology(f"{found[1]}:{found[2]}", kind, shape, devices, devices, nodes)


MOST_SIMULATED = 4096


def _hosts(kind: Kind, chips: int) -> int:
    return -(-chips // kind.host_chips)


def _check_slice(name: str, kind: Kind, shape: tuple[int, ...], text: str) -> None:
    """Raises UserError for a shape that is not sold as one slice, with the nearest that are."""
    if text in (kind.shapes or ()):
        return
    ordered = tuple(sorted(shape))
    if kind.cube and len(shape) == 3 and all(side > 0 and side % 4 == 0 for side in shape) and ordered == shape:
        if all(side <= most for side, most in zip(shape, kind.largest, strict=True)):
            return
        raise UserError(f"topology {name}:{text} is larger than the largest slice, {name}:{_text(kind.largest)}")
    more = f", or sides that are multiples of 4, the shortest first, up to {_text(kind.largest)}" if kind.cube else ""
    raise UserError(
        f"topology {name}:{text} is not a shape that {name} slices have; choose {', '.join(kind.shapes or ())}{more}"
    )


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(str(side) for side in shape)


# ---------------------------------------------------------------- prices
PRICES_AS_OF = "2025-06"
# Dollars a chip (a GPU) and hour, on demand, without commitment, in the United States where listed first. TPU: Google
# Cloud's price list. GPU: Amazon EC2 p5.48xlarge and p5en.48xlarge, an eighth of the instance. Not checked
# against the lists since they were written down, and prices change: a plan prints the date and takes another price.
PRICES: dict[str, float] = {"v5e": 1.20, "v5p": 4.20, "v6e": 2.70, "h100": 6.88, "h200": 7.91}


def price_of(topology: Topology) -> float | None:
    """Dollars an hour of one chip or GPU by PRICES; None where none is listed."""
    return PRICES.get(topology.name.partition(":")[0])
