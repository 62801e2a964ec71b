"""How long a training step takes by three limits: arithmetic, memory and network of the devices it is planned for.

    compute = (model FLOPs + recomputed FLOPs) / (devices x peak)       memory = bytes / bandwidth
    network = sum over collectives of what a device sends / the rate of the links it sends over

`best` is the longest of the three, where all overlap; `worst` is their sum, where none do. `step` is halfway between.
 Rates of collectives: on a torus a ring runs in both directions over every dimension that its group spans, in one
direction over a dimension that does not close; a permutation has one link, or half of two where its reverse runs
beside it; an all-to-all is limited by the bisection of the longest dimension. GPUs
of a node send over NVLink, and over their own network adapters between nodes (the longer of the two counts).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llamax.accounting.flops import forward_flops_by_component, training_flops_per_token
from llamax.accounting.memory import memory_bytes
from llamax.accounting.peaks import peak_flops_per_second
from llamax.accounting.topology import Topology
from llamax.config.run import RunConfig

Place = Sequence[int]
"""Where a device is: coordinates of its chip on a torus, else one number, counted node by node."""

# What a device sends, as a multiple of the array a group of n holds or reduces: exact on rings, least elsewhere.
SENT = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-broadcast": lambda n: 1.0,
    "collective-permute": lambda n: 1.0,
}
_EXCHANGES = ("all-to-all", "ragged-all-to-all")


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by each limit, and together; `peak` is what one device multiplies a second."""

    compute: float
    memory: float
    network: float
    peak: float

    @property
    def best(self) -> float:
        """All three overlap."""
        return max(self.compute, self.memory, self.network)

    @property
    def worst(self) -> float:
        """Nothing overlaps."""
        return self.compute + self.memory + self.network

    @property
    def step(self) -> float:
        """Halfway: what is expected."""
        return (self.best + self.worst) / 2


def step_flops(config: RunConfig, remat: str) -> dict[str, float]:
    """FLOPs of one step over all devices: `model` (causal convention) and `recomputed` under `remat`.

    full: every layer's forward pass once more; dots: what no weight multiplies (scores, values, routers, an indexer).
    """
    train = config.train
    tokens = train.batch_size * train.seq_len
    forward = forward_flops_by_component(config.model, train.seq_len)
    layers = sum(forward.values()) - forward["head"]
    again = {"full": layers, "dots": sum(forward[name] for name in ("scores", "values", "router", "indexer"))}
    model = training_flops_per_token(config.model, train.seq_len)["causal"]
    return {"model": tokens * model, "recomputed": tokens * again.get(remat, 0.0)}


def peak_of(topology: Topology, compute_dtype: str) -> float:
    """FLOP/s of one device for the operand type of a run; auto is bfloat16; float8 where the device has it."""
    dtype = "bfloat16" if compute_dtype == "auto" else compute_dtype
    found = peak_flops_per_second(topology.kind.device_kind, dtype)
    return found or peak_flops_per_second(topology.kind.device_kind) or float("nan")


def collective_seconds(kind: str, size: float, group: Sequence[Place], topology: Topology) -> float:
    """Seconds of one collective of `kind` on an array of `size` bytes (of an all-gather its result, else the operand)
    in a group of devices at these places."""
    n = len(group)
    if topology.kind.platform == "tpu":
        return _on_torus(kind, size, n, group, topology)
    nodes = {place[0] // topology.shape[0] for place in group}
    inside, between = n // len(nodes) or 1, len(nodes)
    seconds = size * SENT[kind](n) / topology.kind.link
    if between == 1:
        return seconds
    shared = 1 if kind in (*_EXCHANGES, "collective-permute") else inside  # a ring passes a node once, on all adapters
    return max(seconds, size * SENT[kind](between) / (shared * topology.kind.network))


def _on_torus(kind: str, size: float, n: int, group: Sequence[Place], topology: Topology) -> float:
    spans = [len({place[i] for place in group}) for i in range(len(topology.shape))]
    link = topology.kind.link
    rates = [
        link * (2 if closed and span == side else 1)
        for span, side, closed in zip(spans, topology.shape, topology.wraps, strict=True)
        if span > 1
    ]
    seconds = size * SENT[kind](n) / (sum(rates) or link)
    if kind == "collective-permute":
        return size / link
    if kind in _EXCHANGES:
        across = (size * span / 4 / rate for span, rate in zip([s for s in spans if s > 1], rates, strict=True))
        return max(seconds, *across, 0.0)
    return seconds


def estimated_traffic(config: RunConfig, mesh: dict[str, int], flash: bool) -> float:
    """Bytes that one device reads and writes in a step, where no compiler says: weights, gradients and moments once a
    step; weights in the operand type three times a microbatch (four with full recomputation), gradients twice where
    they accumulate; every intermediate written once and read twice."""
    train = config.train
    plain = config.model_copy(update={"train": train.model_copy(update={"remat": "none"})})
    found = memory_bytes(plain, flash)
    shards, devices = 1, 1
    for axis, size in mesh.items():
        devices *= size
        shards *= 1 if axis == "data" else size
    held = shards // mesh.get("fsdp", 1)  # a layer's weights are gathered over fsdp
    parts = train.grad_accumulation
    state = (2 * found["parameters"] + 2 * found["optimizer"] + found["parameters"]) / shards
    passes = 4 if train.remat == "full" else 3
    weights = parts * passes * found["parameters"] / 2 / held
    sums = 2 * parts * found["parameters"] / shards if parts > 1 else 0.0
    activations = parts * passes * (found["activations"] + found["logits"]) / devices
    return state + weights + sums + activations
