"""What to change where a run does not fit its devices: each change with what it would need, by estimate."""

from __future__ import annotations

from typing import Any

from llamax.accounting.topology import KINDS, Topology, find_topology
from llamax.config.run import RunConfig
from llamax.errors import UserError

BOUND = ("data", "fsdp", "expert")  # axes the batch is cut over
LOGITS = 512  # tokens of a device whose logits exist at once; fewer, and its head is gathered more often


def changes(
    config: RunConfig, topology: Topology, mesh: dict[str, int], memory: dict[str, Any]
) -> list[dict[str, Any]]:
    """Overrides one after the other, each on top of those before, until the run fits; then the least devices of the
    same kind on which it would fit as it is. `bytes` is what is needed by estimate: what the compiler asked for, less
    what the arithmetic of accounting/memory.py says the change saves."""
    from llamax.train.remat import device_bytes

    def needs(config: RunConfig, mesh: dict[str, int]) -> float:
        return device_bytes(config, config.train.remat if config.train.remat != "auto" else "full", True, mesh)

    need, capacity = float(memory["total"]), float(memory["capacity"])
    base, found = needs(config, mesh), []
    tried = config
    for text, fields in _settings(config, mesh):
        tried = tried.model_copy(update={"train": tried.train.model_copy(update=fields)})
        saved = base - needs(tried, mesh)
        if saved <= 0:
            continue
        found.append({"change": text, "bytes": need - saved, "fits": need - saved <= capacity})
        if need - saved <= capacity:
            return found
    if mesh["data"] > 1:
        sharded = {**mesh, "data": 1, "fsdp": mesh["fsdp"] * mesh["data"]}
        saved = base - needs(tried, sharded)
        found.append({"change": "mesh.data=1 mesh.fsdp=-1", "bytes": need - saved, "fits": need - saved <= capacity})
        if need - saved <= capacity:
            return found
    larger = _larger(topology)
    for candidate in larger:
        times = candidate.devices // topology.devices
        saved = base - needs(tried, {**mesh, "fsdp": mesh["fsdp"] * times})
        if need - saved <= capacity:
            found.append({"change": f"--topology {candidate.name}", "bytes": need - saved, "fits": True})
            break
    return found


def _settings(config: RunConfig, mesh: dict[str, int]) -> list[tuple[str, dict[str, Any]]]:
    """Settings that save memory, from what costs least."""
    train, ways = config.train, 1
    for axis in BOUND:
        ways *= mesh.get(axis, 1)
    found: list[tuple[str, dict[str, Any]]] = []
    most = train.batch_size // ways
    chunk = LOGITS * ways
    if train.loss_chunk is None or train.loss_chunk > chunk:
        found.append((f"train.loss_chunk={chunk}", {"loss_chunk": chunk}))
    if train.grad_accumulation < most:
        found.append((f"train.grad_accumulation={most}", {"grad_accumulation": most}))
    if train.activation_dtype == "float32":
        found.append(("train.activation_dtype=bfloat16", {"activation_dtype": "bfloat16"}))
    if train.remat != "full":
        found.append(("train.remat=full", {"remat": "full"}))
    return found


def _larger(topology: Topology) -> list[Topology]:
    """Topologies of the same kind with 2, 4, ... times the devices, as far as they are sold."""
    name, found, devices = topology.name.partition(":")[0], [], topology.devices
    for _ in range(10):
        devices *= 2
        shape = _shape(name, devices // KINDS[name].chip_devices)
        try:
            found.append(find_topology(f"{name}:{shape}"))
        except UserError:
            break
    return found


def _shape(name: str, chips: int) -> str:
    """The most even shape of `chips` chips that a slice of this kind has."""
    kind = KINDS[name]
    if kind.shapes is None:
        return f"{chips}" if chips <= 8 else f"8x{chips // 8}"
    for shape in kind.shapes:
        if _product(shape) == chips:
            return shape
    sides = [4, 4, 4] if kind.cube else [1, 1]
    while _product("x".join(map(str, sides))) < chips:
        sides.sort()
        sides[0] *= 2
    return "x".join(map(str, sorted(sides)))


def _product(shape: str) -> int:
    total = 1
    for side in shape.split("x"):
        total *= int(side)
    return total
