"""What a launch will take: devices, hours and cost, from the plan's FLOPs, every number with its rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llamax.accounting.peaks import peak_flops_per_second
from llamax.accounting.topology import KINDS, PRICES, PRICES_AS_OF
from llamax.launch.protocol import Settings, Shape
from llamax.sweep.plan import Cell, make_cell
from llamax.sweep.throughput import Throughput, guess, wall_seconds


@dataclass(frozen=True)
class Estimate:
    """Cells left, workers, processes and devices of one, hours until the last cell is done, device hours of all, and
    dollars; None where a rate or a price is not known. `rules`: the sentence behind each number."""

    cells: int
    workers: int
    processes: int
    devices: int
    kind: str
    hours: float | None
    device_hours: float | None
    dollars: float | None
    rules: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def estimate(cells: Sequence[Cell], shape: Shape, settings: Settings) -> Estimate:
    """Of the cells that are left, on `settings.workers` workers of a shape."""
    speed = _speed(shape, settings)
    word = {"cpu": "core", None: "device"}.get(shape.kind, shape.kind or "")
    rules = {
        "devices": f"workers ({settings.workers}) x {word}s of one ({shape.chips}); its processes: {shape.processes}"
    }
    hours = paid = cost = None
    if isinstance(speed, str):
        rules["hours"] = f"unknown: {speed}"
    else:
        seconds = {c.name: make_cell(c.name, c.config, throughput=speed, trunk=c.trunk).seconds for c in cells}
        after = [seconds[c.name] + seconds.get(c.trunk or "", 0.0) for c in cells]  # a branch waits for its trunk
        hours = max([wall_seconds(list(seconds.values()), settings.workers), *after]) / 3600
        paid = shape.chips * sum(seconds.values()) / 3600
        rules["hours"] = (
            f"each worker takes the longest cell left; a cell takes {speed.startup_seconds:g} s + (6 N D + 2 N x eval "
            f"tokens) / rate; rate: {speed.rule}"
        )
        rules[f"{word} hours"] = f"{shape.chips} x the sum of all cells' hours; a worker ends when none is left"
    price, source = _price(shape, settings)
    if paid is not None and price is not None:
        cost = paid * price
    rules["cost"] = source if price is None else f"{word} hours x ${price:g}; {source}"
    total = settings.workers * shape.chips
    return Estimate(len(cells), settings.workers, shape.processes, total, word, hours, paid, cost, rules)


def _speed(shape: Shape, settings: Settings) -> Throughput | str:
    """How fast one worker is, or why that is not known."""
    if shape.kind == "cpu":
        return guess(shape.devices, settings.startup_seconds)
    if shape.kind is None:
        return "no kind of device is named; --set device=h100 would"
    name = KINDS[shape.kind].device_kind if shape.kind in KINDS else shape.kind
    peak = peak_flops_per_second(name)
    if peak is None:
        return f"no peak rate of {name!r} is known (llamax/accounting/peaks.py)"
    rate = peak * shape.devices * settings.utilization
    rule = (
        f"{rate / 1e12:,.0f} TFLOP/s = {shape.devices} devices x {peak / 1e12:g} (bfloat16 peak) x "
        f"{settings.utilization:g} (utilization: assumed, not measured)"
    )
    return Throughput(lambda n, batch_tokens: rate, settings.startup_seconds, rule)


def _price(shape: Shape, settings: Settings) -> tuple[float | None, str]:
    """Dollars an hour of one chip, and where that is from."""
    if settings.price_per_device_hour is not None:
        return settings.price_per_device_hour, "price_per_device_hour as given"
    if shape.kind in PRICES:
        return PRICES[shape.kind], f"list price on demand, {PRICES_AS_OF}; yours: --set price_per_device_hour=X"
    return None, "no price known; --set price_per_device_hour=X"
