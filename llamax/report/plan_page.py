"""A plan as text within 100 columns, every derived number with its rule."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from llamax.report.words import plural

GIB = 2**30


def plan_lines(plan: dict[str, Any]) -> Iterator[str]:
    """The lines of a plan as `report.plan.plan_of` gives it."""
    topology, train = plan["topology"], plan["train"]
    mesh = " ".join(f"{axis}={size}" for axis, size in plan["mesh"].items() if size > 1) or "one device"
    yield f"{plan['name']} ({plan['hash']}) on {topology['name']}"
    hosts, parts = plural(topology["hosts"], "host"), plural(train["grad_accumulation"], "part")
    yield f"  {topology['devices']:,} x {topology['device_kind']}, {hosts}; mesh {mesh}; remat {train['remat']}"
    tokens = f"{train['batch_size']:,} x {train['seq_len']:,} tokens"
    yield f"  batch {tokens} in {parts}, {train['compute_dtype']} products"
    seconds = plan["compile"]["seconds"]
    yield f"  {plan['compiler']}"
    yield (
        f"  lowered in {seconds['lower']:.0f} s, compiled in {seconds['compile']:.0f} s "
        f"({plan['compile']['processor_seconds']:.0f} processor seconds in all), "
        f"peak {plan['compile']['peak_host_bytes'] / GIB:.1f} GiB of this host"
    )
    yield ""
    yield from _memory(plan)
    yield ""
    yield from _collectives(plan)
    if "seconds" in plan:
        yield ""
        yield from _time(plan)
    yield ""
    yield "rules"
    for name, rule in plan["rules"].items():
        yield from textwrap.wrap(f"{name}: {rule}", 98, initial_indent="  ", subsequent_indent="    ")


def _memory(plan: dict[str, Any]) -> Iterator[str]:
    memory = plan["memory"]
    yield from _wrapped(f"memory a device, GiB (by {plan['from']['memory']})")
    for name in ("weights", "optimizer", "gradients", "workspace", "code"):
        if name in memory:
            yield f"  {name:<12}{memory[name] / GIB:>10.2f}"
    line = f"  {'total':<12}{memory['total'] / GIB:>10.2f}"
    if memory["capacity"] is None:
        yield line
        return
    share = memory["total"] / memory["capacity"]
    yield f"{line}  of {memory['capacity'] / GIB:.1f} ({share:.0%}): {'fits' if memory['fits'] else 'DOES NOT FIT'}"
    if plan["changes"]:
        yield "what to change, by estimate, each on top of those before"
        for row in plan["changes"]:
            verdict = "fits" if row["fits"] else "not yet"
            yield f"  {row['change']:<40}{row['bytes'] / GIB:>10.2f} GiB  {verdict}"
    elif not memory["fits"]:
        yield "no setting and no larger topology of this kind is enough by estimate: choose another kind"


def _collectives(plan: dict[str, Any]) -> Iterator[str]:
    yield from _wrapped(f"collectives a step (by {plan['from']['collectives']})")
    if not plan["collectives"]:
        yield "  none"
        return
    yield f"  {'kind':<20}{'axes':<24}{'times':>8}{'GB sent a device':>18}{'seconds':>10}"
    for row in plan["collectives"]:
        axes, seconds = "+".join(row["axes"]), row.get("seconds")
        shown = "" if seconds is None else f"{seconds:.4g}"
        yield f"  {row['kind']:<20}{axes:<24}{row['times']:>8,.0f}{row['sent_bytes'] / 1e9:>18,.3f}{shown:>10}"


def _time(plan: dict[str, Any]) -> Iterator[str]:
    seconds, mfu, flops = plan["seconds"], plan["mfu"], plan["flops_per_step"]
    total = flops["model"] + flops["recomputed"]
    rates = plan["topology"]
    yield "a step"
    yield (
        f"  compute   {seconds['compute']:>10.4g} s  {total:.4g} FLOPs ({flops['recomputed'] / total:.0%} recomputed), "
        f"{mfu['peak_flops_per_second'] / 1e12:.0f} TFLOP/s a device"
    )
    yield (
        f"  memory    {seconds['memory']:>10.4g} s  {plan['traffic_bytes'] / 1e9:,.1f} GB a device at "
        f"{rates['memory_bytes_per_second'] / 1e9:,.0f} GB/s"
    )
    yield from _wrapped(f"            (bytes by {plan['from']['traffic']})")
    by_axis = ", ".join(f"{axis} {value:.3g}" for axis, value in seconds["network_by_axis"].items()) or "none"
    yield from _wrapped(f"  network   {seconds['network']:>10.4g} s  by axis: {by_axis}", indent=" " * 26)
    yield (
        f"  step      {seconds['step']:>10.4g} s  between {seconds['best']:.4g} (all overlap) and "
        f"{seconds['worst']:.4g} (nothing does)"
    )
    yield (
        f"  MFU       {mfu['expected']:>10.1%}    between {mfu['worst']:.1%} and {mfu['best']:.1%}, "
        f"{mfu['convention']} FLOPs; {plan['tokens_per_second']:,.0f} tokens/s"
    )
    yield ""
    yield "the horizon"
    yield from _wrapped(f"  {plan['horizon']['rule']}", indent="    ")
    yield f"  {plan['hours']:,.1f} hours, {plan['chip_hours']:,.0f} chip-hours"
    if plan["cost"] is None:
        yield "  no price given: --price DOLLARS an hour of one chip"
    else:
        yield f"  ${plan['cost']:,.0f} at ${plan['price_per_chip_hour']:.2f} a chip-hour"


def _wrapped(text: str, indent: str = "  ") -> list[str]:
    start = text[: len(text) - len(text.lstrip())]
    return textwrap.wrap(text.strip(), 98, initial_indent=start, subsequent_indent=indent)
