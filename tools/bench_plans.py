"""The plans of benchmarks/README.md: each model on a topology where it fits, one compilation after another.

    python tools/bench_plans.py --out benchmarks/plans            (all; needs llamax[tpu])
    python tools/bench_plans.py --out benchmarks/plans llama3/8b  (some)

Writes MODEL-TOPOLOGY.json a plan, as `llamax plan --json` prints it with its command, and prints the table.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llamax.planning import plan_run

# model, topology, overrides
PLANS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("llama3/8b", "v5p:2x2x4", ()),
    ("llama3.1/70b", "v5p:4x4x8", ()),
    ("llama3.1/405b", "v5p:8x8x8", ()),
    ("mixtral/8x22b", "v5p:4x4x8", ("mesh.expert=8",)),
    ("deepseek_v3/671b", "v5p:8x8x16", ("mesh.expert=16",)),
)
GIB = 2**30


def main() -> None:
    """Compile what was asked for, and print the table of everything that is in the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="models of the table; default all")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/plans"))
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    for model, topology, overrides in PLANS:
        if asked.models and model not in asked.models:
            continue
        command = ["llamax", "plan", model, "--topology", topology, *overrides, "--json"]
        print(shlex.join(command), flush=True)
        plan = plan_run(model, list(overrides), topology, report=lambda phase: print(f"  {phase}", flush=True))
        path = asked.out / f"{model.replace('/', '-')}-{topology.replace(':', '-')}.json"
        path.write_text(json.dumps({"command": shlex.join(command), **plan}, indent=1) + "\n")
    for line in table(json.loads(path.read_text()) for path in sorted(asked.out.glob("*.json"))):
        print(line)


def table(plans: Iterable[dict[str, Any]]) -> Iterable[str]:
    """The table of benchmarks/README.md."""
    yield (
        "| model | topology | mesh | memory/device | of | expected MFU | step s | hours | compile s | processor s "
        "| peak host GiB |"
    )
    yield "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|"
    for plan in plans:
        mesh = " ".join(f"{axis}={size}" for axis, size in plan["mesh"].items() if size > 1)
        memory, compiled = plan["memory"], plan["compile"]
        mfu, step, hours = "-", "-", "-"
        if "seconds" in plan:
            mfu, step = f"{plan['mfu']['expected']:.0%}", f"{plan['seconds']['step']:.1f}"
            hours = f"{plan['hours']:,.0f}"
        yield (
            f"| {plan['name']} | {plan['topology']['name']} | {mesh} | {memory['total'] / GIB:.1f} GiB "
            f"| {memory['capacity'] / GIB:.0f} GiB | {mfu} "
            f"| {step} | {hours} "
            f"| {compiled['seconds']['compile']:.0f} | {compiled['processor_seconds']:.0f} "
            f"| {compiled['peak_host_bytes'] / GIB:.1f} |"
        )


if __name__ == "__main__":
    main()
