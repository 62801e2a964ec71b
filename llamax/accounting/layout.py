"""Which mesh a run should have: every way to cut it over a number of devices, by estimated memory and seconds.

The estimate is for choosing, not for planning (roofline.py). A step is

    compute   FLOPs of a device / (peak x filled), filled = x / (x + FILL) for the rows and for the columns of products
    update    weights it holds x UPDATE bytes / its memory rate: optimizer, gradient norms
    network   bytes it sends (communication.py) / its links' rate, and a latency each time; half of what moves weights
              and gradients hides behind compute on accelerators, nothing on simulated devices

and with stages all of compute and network last 1 / (1 - bubble) times as long. A layout that is estimated to need more
than SHARE of a device's memory is taken only if none fits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from llamax.accounting.communication import Traffic, communication, held_bytes
from llamax.accounting.flops import training_flops_per_token
from llamax.accounting.memory import memory_bytes, training_state_bytes
from llamax.accounting.peaks import bandwidth_bytes_per_second, peak_flops_per_second
from llamax.accounting.pipeline import bubble
from llamax.accounting.topology import KINDS
from llamax.config.components import LatentAttention, Mlp, MoeMlp
from llamax.config.mesh import AXES
from llamax.config.run import RunConfig

SHARE = 0.85  # of a device's memory that the estimate may fill, as for train.remat=auto
FILL = 64  # rows or columns at which a product runs at half its peak
UPDATE = 80  # bytes read and written a parameter, a guess: AdamW's 28 and loops that are not joined


@dataclass(frozen=True)
class Rates:
    """What one device does in a second: FLOPs, bytes of its memory, bytes to a neighbour and, from `domain` devices on,
    over the network; `latency` is of one collective, in seconds. `cpu`: devices simulated on one machine."""

    peak: float
    memory: float
    link: float
    network: float
    latency: float
    domain: int
    cpu: bool = False


# Two cores shared by eight simulated devices: guesses, of use for what they say of each other, as layouts are compared
# and not timed. What they pick takes 1.11 to 1.29 of the best layout's time (benchmarks/README.md, "mesh=auto").
SIMULATED = Rates(peak=8e9, memory=1.5e9, link=0.5e9, network=0.5e9, latency=1e-4, domain=4096, cpu=True)
UNKNOWN = Rates(peak=100e12, memory=1e12, link=50e9, network=10e9, latency=1e-5, domain=8)


def rates_of(device_kind: str, dtype: str = "bfloat16") -> Rates:
    """The rates of a device by JAX's name for it: peaks.py and topology.py; UNKNOWN for a name that is not there."""
    if device_kind.casefold() == "cpu":
        return SIMULATED
    kind = next((kind for kind in KINDS.values() if kind.device_kind == device_kind), None)
    peak = peak_flops_per_second(device_kind, dtype) or peak_flops_per_second(device_kind) or UNKNOWN.peak
    if kind is None:
        memory = bandwidth_bytes_per_second(device_kind) or UNKNOWN.memory
        return Rates(peak, memory, UNKNOWN.link, UNKNOWN.network, UNKNOWN.latency, UNKNOWN.domain)
    torus = kind.platform == "tpu"
    link = 2 * kind.link if torus else kind.link  # a ring goes both ways
    return Rates(peak, kind.bandwidth, link, kind.network, UNKNOWN.latency, 4096 if torus else 8)


@dataclass(frozen=True)
class Layout:
    """One way to cut a run: devices along every axis, estimated seconds by term, bytes of a device, what it sends."""

    sizes: dict[str, int]
    compute: float
    update: float
    network: float
    memory: float
    traffic: tuple[Traffic, ...]

    @property
    def seconds(self) -> float:
        """Of one step."""
        return self.compute + self.update + self.network

    @property
    def name(self) -> str:
        """Its axes longer than 1: `data=4 fsdp=2`."""
        return " ".join(f"{axis}={size}" for axis, size in self.sizes.items() if size > 1) or "data=1"


def layouts(config: RunConfig, devices: int, rates: Rates, memory: float | None, flash: bool = False) -> list[Layout]:
    """All layouts of `config` over `devices`, the best first: those that fit in `memory` bytes a device (None: all do)
    by seconds, then the others by memory, to a tenth of the room."""
    found = [estimate(config, sizes, rates, flash) for sizes in candidates(config, devices)]
    room = math.inf if memory is None else SHARE * memory
    return sorted(found, key=lambda one: (max(1.0, round(one.memory / room, 1)), one.memory > room, one.seconds))


def candidates(config: RunConfig, devices: int) -> Iterator[dict[str, int]]:
    """Sizes of every axis whose product is `devices` and that divide what they cut."""
    for sizes in _factors(devices, len(AXES)):
        if _divides(config, named := dict(zip(AXES, sizes, strict=True))):
            yield named


def _factors(n: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to write n as a product of `parts` numbers."""
    if parts == 1:
        yield (n,)
        return
    for first in (d for d in range(1, n + 1) if n % d == 0):
        yield from ((first, *rest) for rest in _factors(n // first, parts - 1))


def _divides(config: RunConfig, sizes: Mapping[str, int]) -> bool:
    model, train = config.model, config.train
    tensor, expert, context, stage = (sizes[axis] for axis in ("tensor", "expert", "context", "stage"))
    mixtures = [mlp for block in model.layers for mlp in (block.mlp, block.branch) if isinstance(mlp, MoeMlp)]
    heads = [n for b in model.layers for n in _heads(b.attention)]
    widths = [w for b in model.layers for mlp in (b.mlp, b.branch) if mlp is not None for w in _widths(mlp)]
    inputs = [model.d_model, *(rank for b in model.layers for rank in _ranks(b.attention))]
    return (
        train.batch_size // train.grad_accumulation % (sizes["data"] * sizes["fsdp"] * expert) == 0
        and all(n % (sizes["fsdp"] * context) == 0 for n in inputs)
        and all(n % tensor == 0 for n in (*heads, *widths, model.vocab_size))
        and (expert == 1 or bool(mixtures))
        and all(mlp.experts % expert == 0 for mlp in mixtures)
        and (context == 1 or train.seq_len % (2 * context) == 0)
        and (stage == 1 or (train.grad_accumulation >= stage and not config.log.gradient_noise))
        and all(repeat % stage == 0 for repeat, _ in model.blocks)
    )


def _heads(attention: object) -> tuple[int, ...]:
    heads = attention.heads  # type: ignore[attr-defined]
    return (heads,) if isinstance(attention, LatentAttention) else (heads, attention.kv_heads)  # type: ignore[attr-defined]


def _ranks(attention: object) -> list[int]:
    """The widths of the latents that matrices of a layer read."""
    if not isinstance(attention, LatentAttention):
        return []
    return [rank for rank in (attention.q_rank, attention.kv_rank) if rank is not None]


def _widths(mlp: Mlp | MoeMlp) -> list[int]:
    if isinstance(mlp, MoeMlp):
        return [mlp.expert.d_ff, *([mlp.shared.d_ff] if mlp.shared else [])]
    return [mlp.d_ff]


# ---------------------------------------------------------------- one layout
def estimate(config: RunConfig, sizes: Mapping[str, int], rates: Rates, flash: bool = False) -> Layout:
    """`Layout` of these sizes (axes that are not named: 1), whether they divide or not."""
    sizes = {axis: sizes.get(axis, 1) for axis in AXES}
    train, devices = config.train, math.prod(sizes.values())
    tokens = train.batch_size * train.seq_len
    flops = training_flops_per_token(config.model, train.seq_len)["causal"] * tokens / devices
    rows = tokens / train.grad_accumulation / (devices / sizes["tensor"] / sizes["stage"])
    width = max(w for b in config.model.layers for w in _widths(b.mlp)) / sizes["tensor"]
    filled = 1.0 if rates.cpu else rows / (rows + FILL) * width / (width + FILL)
    waits = 1 / (1 - bubble(sizes["stage"], train.grad_accumulation))
    traffic = tuple(communication(config, sizes, cpu=rates.cpu))
    held = held_bytes(config, sizes)
    return Layout(
        sizes=sizes,
        compute=waits * flops / (rates.peak * filled),
        update=held / 4 * UPDATE / rates.memory,
        network=waits * sum(_seconds(one, sizes, rates) for one in traffic),
        memory=_memory(config, sizes, held, flash),
        traffic=traffic,
    )


def _seconds(one: Traffic, sizes: Mapping[str, int], rates: Rates) -> float:
    """The devices of the last axes are neighbours; a group whose members are further apart uses the network."""
    first = min(AXES.index(axis) for axis in one.axes)
    apart = math.prod(sizes[axis] for axis in AXES[first:])
    hidden = 0.5 if one.what in ("weights", "gradients") and not rates.cpu else 1.0
    rate = rates.link if apart <= rates.domain else rates.network
    return hidden * (one.sent / rate + one.times * rates.latency)


def _memory(config: RunConfig, sizes: Mapping[str, int], held: float, flash: bool) -> float:
    """Bytes of a device: its share of weights, gradients and moments, and of activations and logits."""
    cut = sizes["context"] > 1  # over cut sequences no scores are kept
    found = memory_bytes(config, flash or cut, sizes["stage"])
    state = found["parameters"] + found["gradients"] + found["optimizer"]
    share = held / training_state_bytes(config.model, config.optimizer.kind)["parameters"]
    return state * share + (found["activations"] + found["logits"]) / math.prod(sizes.values())


# ---------------------------------------------------------------- in words
def why(found: list[Layout], memory: float | None, shown: int = 3) -> list[str]:
    """A line for each of the best layouts: seconds by term, memory, and what is sent most."""
    lines = []
    for one in found[:shown]:
        sent: dict[str, float] = {}
        for part in one.traffic:
            sent["+".join(part.axes)] = sent.get("+".join(part.axes), 0.0) + part.sent
        moved = ", ".join(f"{axes} {_bytes(size)}" for axes, size in sorted(sent.items(), key=lambda item: -item[1]))
        room = "" if memory is None else f" of {_bytes(memory)}"
        lines.append(
            f"{one.name}: {one.seconds * 1e3:.3g} ms a step = compute {one.compute * 1e3:.3g} + update "
            f"{one.update * 1e3:.3g} + network {one.network * 1e3:.3g} (a device sends {moved or 'nothing'}); "
            f"{_bytes(one.memory)}{room} a device"
        )
    return lines


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.3g} {unit}"
