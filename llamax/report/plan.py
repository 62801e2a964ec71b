"""What a run would need on a topology: memory, collectives, time, money, and what to change if it does not fit.

Everything comes from a config, a topology and the answer of `llamax.train.ahead`; no JAX is needed to read it.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from llamax.accounting.horizon import horizon
from llamax.accounting.memory import memory_bytes
from llamax.accounting.roofline import StepTime, collective_seconds, estimated_traffic, peak_of, step_flops
from llamax.accounting.topology import PRICES_AS_OF, Topology, price_of
from llamax.config.run import RunConfig
from llamax.report.collectives import Collective, collectives
from llamax.report.hlo import Program
from llamax.report.traffic import memory_traffic

RULES: dict[str, str] = {
    "memory": "bytes of one device. weights, optimizer: what the shardings leave on it; gradients: as the weights, "
    "twice with accumulation; workspace: the rest of the program, activations and buffers of collectives",
    "collectives": "kind and mesh axes by the groups in the compiled program, times what its loops run; sent: bytes a "
    "device sends a step, on a ring of n (n - 1) / n of the array, twice that for an all-reduce",
    "flops": "model: causal matrix products, forward and backward; recomputed: what remat does again",
    "compute": "(model + recomputed FLOPs) / (devices x peak)",
    "traffic": "bytes a device's memory moves a step: operands and results of every instruction, loops included",
    "network": "sum over collectives of bytes sent / rate of the links their axis spans; latencies are left out",
    "step": "halfway between best (the longest of compute, memory, network: all overlap) and worst (their sum)",
    "mfu": "model FLOPs / (step seconds x devices x peak)",
    "hours": "steps x step seconds; no restarts, evaluations or checkpoints",
    "cost": f"hours x chips x price an hour, list price of {PRICES_AS_OF} on demand unless --price is given",
}


def plan_of(
    name: str,
    config: RunConfig,
    topology: Topology,
    answer: Mapping[str, Any],
    program: Program | None,
    price: float | None = None,
) -> dict[str, Any]:
    """The whole plan as JSON data. `program` is None where the compiler refused one that does not fit."""
    own = answer["own"]
    mesh: dict[str, int] = dict(answer["mesh"])
    memory = _memory(config, topology, answer, own)
    found = None if program is None else collectives(program, mesh)
    flops = step_flops(config, answer["remat"])
    length = horizon(config)
    plan: dict[str, Any] = {
        "name": name,
        "hash": config.hash8,
        "topology": _described(topology),
        "mesh": mesh,
        "train": {
            "batch_size": config.train.batch_size,
            "seq_len": config.train.seq_len,
            "grad_accumulation": config.train.grad_accumulation,
            "remat": answer["remat"],
            "compute_dtype": "bfloat16" if config.train.compute_dtype == "auto" else config.train.compute_dtype,
        },
        "compiler": answer["compiler"],
        "from": _origins(own, program is not None),
        "memory": memory,
        "flops_per_step": flops,
        "collectives": [] if found is None else _rows(found, answer["places"], topology),
        "horizon": {"steps": length.steps, "tokens": length.tokens, "rule": length.rule},
        "changes": [],
        "compile": {
            "seconds": answer["seconds"],
            "processor_seconds": answer["processor_seconds"],
            "peak_host_bytes": answer["peak_host_bytes"],
        },
        "rules": RULES,
    }
    if topology.kind.platform != "cpu" and found is not None and program is not None:
        traffic = memory_traffic(program) if own else estimated_traffic(config, mesh, flash=True)
        plan |= _time(plan, config, topology, traffic, price)
    return plan


def _described(topology: Topology) -> dict[str, Any]:
    kind = topology.kind
    rates = {"memory_bytes_per_second": kind.bandwidth, "link_bytes_per_second": kind.link}
    return {
        "name": topology.name,
        "device_kind": kind.device_kind,
        "devices": topology.devices,
        "chips": topology.chips,
        "hosts": topology.hosts,
        "shape": list(topology.shape),
        **(rates if kind.platform != "cpu" else {}),
    }


def _origins(own: bool, compiled: bool) -> dict[str, str]:
    """Where each kind of number is from."""
    if own:
        what = "the compiler of this hardware"
        return {
            "memory": what if compiled else f"{what}, which refused the program",
            "collectives": what if compiled else "none: no program",
            "traffic": f"the program of {what}" if compiled else "none: no program",
        }
    return {
        "memory": "an estimate (accounting/memory.py)",
        "collectives": "XLA's partitioner for as many simulated devices; the hardware's compiler may merge some",
        "traffic": "an estimate (accounting/roofline.py)",
    }


def _memory(config: RunConfig, topology: Topology, answer: Mapping[str, Any], own: bool) -> dict[str, Any]:
    """Bytes of one device by kind, their sum, and whether it fits."""
    state, program = answer["state"], answer["memory"]
    kinds = {"weights": state["weights"], "optimizer": state["optimizer"]}
    gradients = state["weights"] * (1 if config.train.grad_accumulation == 1 else 2)
    if own:
        code = 0 if program is None else program["generated_code"]
        total = answer["needed"] if program is None else _program_bytes(program)
        rest = max(total - sum(kinds.values()) - code, 0)
        kinds |= {"gradients": min(gradients, rest), "workspace": max(rest - gradients, 0), "code": code}
    else:
        train = config.train.model_copy(update={"remat": answer["remat"]})
        found = memory_bytes(config.model_copy(update={"train": train}), flash=True)
        work = (found["activations"] + found["logits"]) / topology.devices
        kinds |= {"gradients": gradients, "workspace": int(work)}
        total = sum(kinds.values())
    capacity = topology.kind.memory if topology.kind.platform != "cpu" else None
    fits = program is not None and (capacity is None or total <= capacity)
    return {**kinds, "total": total, "capacity": capacity, "fits": fits}


def _program_bytes(program: Mapping[str, int]) -> int:
    return sum(program[name] for name in ("argument", "output", "temp", "generated_code")) - program["alias"]


def _rows(found: list[Collective], places: list[list[int]], topology: Topology) -> list[dict[str, Any]]:
    """One row a kind and set of axes, the longest first."""
    merged: dict[tuple[str, tuple[str, ...]], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for one in found:
        row = merged[one.kind, one.axes]
        row["times"] += one.times
        row["array_bytes"] += one.times * one.bytes
        row["sent_bytes"] += one.sent
        if topology.kind.platform != "cpu":
            group = [places[i] for i in one.group]
            seconds = collective_seconds(one.kind, one.bytes, group, topology)
            row["seconds"] += one.times * seconds / (2 if one.both_ways else 1)
    rows = [{"kind": kind, "axes": list(axes), **row} for (kind, axes), row in merged.items()]
    return sorted(rows, key=lambda row: (-row.get("seconds", 0.0), -row["sent_bytes"]))


def _time(
    plan: dict[str, Any], config: RunConfig, topology: Topology, traffic: float, price: float | None
) -> dict[str, Any]:
    """Seconds, utilization, hours and money of the plan so far."""
    flops, steps = plan["flops_per_step"], plan["horizon"]["steps"]
    peak = peak_of(topology, config.train.compute_dtype)
    network = sum(row["seconds"] for row in plan["collectives"])
    time = StepTime(
        compute=(flops["model"] + flops["recomputed"]) / (topology.devices * peak),
        memory=traffic / topology.kind.bandwidth,
        network=network,
        peak=peak,
    )
    by_axis: dict[str, float] = defaultdict(float)
    for row in plan["collectives"]:
        by_axis["+".join(row["axes"])] += row["seconds"]
    hours = steps * time.step / 3600
    rate = price if price is not None else price_of(topology)
    return {
        "traffic_bytes": traffic,
        "seconds": {**dataclasses.asdict(time), "best": time.best, "worst": time.worst, "step": time.step}
        | {"network_by_axis": dict(by_axis)},
        "mfu": {
            "expected": flops["model"] / (time.step * topology.devices * peak),
            "best": flops["model"] / (time.best * topology.devices * peak),
            "worst": flops["model"] / (time.worst * topology.devices * peak),
            "convention": "causal",
            "peak_flops_per_second": peak,
        },
        "tokens_per_second": config.train.batch_size * config.train.seq_len / time.step,
        "hours": hours,
        "chip_hours": hours * topology.chips,
        "price_per_chip_hour": rate,
        "cost": None if rate is None else hours * topology.chips * rate,
    }
