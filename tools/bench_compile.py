"""Seconds to lower and compile the training step by depth: a stack of equal blocks is one scan, so depth is free.

    python tools/bench_compile.py                          # 4, 8 and 32 layers of width 128, scan and default
    python tools/bench_compile.py --layers 4 32 --repeats 3 --json

`scan` sets train.unroll_layers=false; `default` leaves the choice to the run, which on CPUs makes models of at most
eight layers straight code. Rounds go through all cells in turn; figures are medians, without a compilation cache.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

MODES: dict[str, bool | None] = {"scan": False, "default": None}


def compile_step(layers: int, unroll: bool | None, width: int = 128, vocab: int = 256) -> dict[str, float]:
    """Seconds and processor seconds to lower and compile one dispatch, and the instructions of the compiled program."""
    import jax
    import numpy as np

    from llamax.config.load import run_from_data
    from llamax.config.mesh import load_rules
    from llamax.mesh.rules import batch_sharding, make_mesh
    from llamax.train.state import abstract_state
    from llamax.train.step import make_dispatch

    model = {
        "vocab_size": vocab,
        "d_model": width,
        "max_seq_len": 128,
        "segments": [{"repeat": layers}],
        "attention": {"heads": width // 16},
        "position": {"kind": "rope"},
        "mlp": {"kind": "swiglu", "d_ff": 3 * width},
    }
    train = {"batch_size": 8, "seq_len": 128, "steps": 100, "unroll_layers": unroll}
    config = run_from_data({"model": model, "train": train})
    rules, mesh = load_rules(config.mesh.rules), make_mesh(config.mesh, jax.devices()[:1])
    abstract = abstract_state(config, rules, mesh)
    place = batch_sharding(rules, mesh, leading=1)
    tokens = jax.ShapeDtypeStruct((config.train.steps_per_dispatch, 8, 129), np.int32, sharding=place)
    start, processor = time.perf_counter(), time.process_time()
    dispatch = make_dispatch(config, rules, mesh, abstract)
    lowered = dispatch.lower(abstract, {"tokens": tokens}, jax.ShapeDtypeStruct((), np.int32))  # type: ignore[attr-defined]
    compiled = lowered.compile()
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    return {"seconds": seconds, "processor_seconds": processor, "instructions": _instructions(compiled.as_text())}


def _instructions(text: str) -> int:
    """Instructions of a program in HLO text: the lines that assign one."""
    return sum(" = " in line and line.startswith(" ") for line in text.splitlines())


def bench_compile(layers: list[int], repeats: int = 3, width: int = 128) -> dict[str, Any]:
    """{mode: {layers: median figures}} and {ratios: {mode: deepest / shallowest, processor seconds}}."""
    rows: dict[tuple[str, int], list[dict[str, float]]] = {(mode, n): [] for mode in MODES for n in layers}
    compile_step(2, False, 16)  # what the first compilation of a process starts
    for i in range(repeats):
        for (mode, n), found in rows.items():
            print(f"compile: round {i + 1} of {repeats}, {mode} {n} layers", file=sys.stderr, flush=True)
            found.append(compile_step(n, MODES[mode], width))
    result: dict[str, Any] = {mode: {} for mode in MODES}
    for (mode, n), found in rows.items():
        result[mode][str(n)] = {key: statistics.median(row[key] for row in found) for key in found[0]}
    few, many = str(min(layers)), str(max(layers))
    ratios = {m: result[m][many]["processor_seconds"] / result[m][few]["processor_seconds"] for m in MODES}
    return {**result, "ratios": ratios}


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = ["| layers | mode | s | processor s | instructions |", "|--:|---|--:|--:|--:|"]
    for mode in MODES:
        for n, row in result[mode].items():
            lines.append(
                f"| {n} | {mode} | {row['seconds']:.2f} | {row['processor_seconds']:.2f} | {row['instructions']:.0f} |"
            )
    shown = ", ".join(f"{mode} {ratio:.2f}" for mode, ratio in result["ratios"].items())
    return "\n".join([*lines, "", f"Deepest to shallowest, processor seconds: {shown}."])


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 32])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of the table")
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    result = bench_compile(options.layers, options.repeats)
    print(json.dumps(result) if options.json else table(result))


if __name__ == "__main__":
    main()
