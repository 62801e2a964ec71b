"""What rows of device_check.py move, from their programs compiled for a GPU that is not there.

    python tools/bench_ahead.py                      (needs llamax[cuda], no GPU; a minute)
    python tools/bench_ahead.py --gpu h100 --only decode --out benchmarks

A line a program: kernels a step (a library's call is one), bytes they read and write (llamax/report/traffic.py), how
many of those copy, cast, cut, join or turn arrays and compute nothing, and the milliseconds that all take at the
memory's full speed, where nothing is found in a cache. What a dispatch does before and after its steps is left out.
`--out` has the bytes by category and part too. On a GPU that is there products may run in other tiles and sorts by a
library.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

MEMBERS, CAPACITY = 16, 512  # of a population; slots of the cache that device_check.py's decoding ends with
BATCHES = {"1B": 8, "50M": 64}  # that device_check.py found to fit an H200, and measured
Row = dict[str, Any]


def decode(device: Any) -> Iterator[tuple[str, Any]]:
    """One step of the 1B model in bfloat16 for one row."""
    import jax
    import jax.numpy as jnp
    from device_sections import DENSE, config_of

    from llamax.generate import engine
    from llamax.generate.sampling import Rows, Sampling, rows_of
    from llamax.generate.serving import STEP_OPTIONS, for_serving
    from llamax.model.cache import init_cache
    from llamax.model.execution import Execution
    from llamax.model.transformer import Transformer

    config, execution = config_of(DENSE["1B"], 1).model, Execution("bfloat16", "bfloat16")
    place = jax.sharding.SingleDeviceSharding(device)

    def arguments(key: Any) -> Any:
        model = for_serving(Transformer(config, key=key), execution, inputs_last=True)
        zero = jnp.zeros(1, jnp.int32)
        rows = Rows(*(jnp.asarray(column) for column in rows_of([Sampling(0.0)])))
        request = engine.Request(rows, jax.vmap(jax.random.key)(zero), zero, jnp.zeros(4, jnp.int32))
        cache = init_cache(model.config, 1, CAPACITY, execution.activation)
        state = engine.State(zero, zero, jnp.zeros(1, bool))
        return model, state, cache, request, jnp.zeros(1, bool), jnp.int32(0)

    step = functools.partial(engine._decode, execution=execution, turned=True)
    shapes = on(place, jax.eval_shape(arguments, jax.random.key(0)))
    jitted = jax.jit(step, donate_argnums=(1, 2), compiler_options=STEP_OPTIONS)
    yield "decode 1B bf16, batch 1", jitted.lower(*shapes)


def dense(device: Any) -> Iterator[tuple[str, Any]]:
    """The whole step of device_check.py's dense sizes that a target is set for."""
    from device_sections import DENSE, TARGETED, config_of

    for name in TARGETED:
        config = config_of(DENSE[name], BATCHES[name], remat="none")
        lowered, _ = step_of(config, device)
        yield f"{name}, batch {BATCHES[name]}", lowered


def step_of(config: Any, device: Any) -> tuple[Any, Any]:
    """The lowered dispatch of one run, and what it is called with: the state, batches and how many of them."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from llamax.config.mesh import load_rules
    from llamax.mesh.rules import make_mesh
    from llamax.train.state import abstract_state
    from llamax.train.step import make_dispatch

    rules, mesh = load_rules(config.mesh.rules), make_mesh(config.mesh, [device])
    abstract = abstract_state(config, rules, mesh)
    shape = (config.train.steps_per_dispatch, config.train.batch_size, config.train.seq_len + 1)
    given = ({"tokens": jax.ShapeDtypeStruct(shape, np.int32)}, jax.ShapeDtypeStruct((), np.int32))
    placed = on(NamedSharding(mesh, PartitionSpec()), given)
    return make_dispatch(config, rules, mesh, abstract).lower(abstract, *placed), (abstract, *given)  # type: ignore[attr-defined]


def packing(device: Any) -> Iterator[tuple[str, Any]]:
    """A member alone, and a population of them, as device_check.py times them; S3 with a bfloat16 stream too."""
    import jax
    from bench_sides import SHAPES, run_config
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from llamax.config.mesh import load_rules
    from llamax.mesh.rules import make_mesh
    from llamax.train.population import MEMBER, population_dispatch
    from llamax.train.step import execution_of

    for name, stream in (("S1", "float32"), ("S2", "float32"), ("S3", "float32"), ("S3", "bfloat16")):
        config = run_config(SHAPES[name], "bfloat16")
        train = config.train.model_copy(update={"unroll_layers": True, "activation_dtype": stream})
        config = config.model_copy(update={"train": train})
        what = name if stream == "float32" else f"{name} ({stream})"
        lowered, given = step_of(config, device)
        yield f"{what}, a member alone", lowered
        execution = execution_of(config, load_rules(config.mesh.rules), make_mesh(config.mesh, [device]))
        members = Mesh(np.array([device]), (MEMBER,))
        cut = NamedSharding(members, PartitionSpec(MEMBER))
        stacked = on(cut, given, MEMBERS)
        together = population_dispatch(config, execution, members, batched=True)
        yield f"{what}, {MEMBERS} members", jax.jit(together, donate_argnums=0, out_shardings=cut).lower(*stacked)


SECTIONS = {"dense": dense, "decode": decode, "packing": packing}


def on(place: Any, tree: Any, *lead: int) -> Any:
    """The shapes of `tree`, behind leading axes, at `place`."""
    import jax

    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*lead, *leaf.shape), leaf.dtype, sharding=place), tree)


ALONE = ("matmul", "kernel", "copy")  # categories that are counted by themselves; others by the part they are for


def costs(text: str, bandwidth: float) -> Row:
    """The figures of one step of a compiled program, from its text, by the categories and parts of `llamax profile`."""
    from llamax.report.hlo import parse_program
    from llamax.report.profile import describe
    from llamax.report.trace import Span
    from llamax.report.traffic import traffic_of

    program = parse_program(text)
    around = {part.name for part in program.computations[program.entry]}
    kernels, by = 0.0, dict[str, float]()
    for part, times, size in traffic_of(program):
        if part.name not in around:
            found = describe(program, Span(0, 0, "", part.name, part.name, ""))
            what = found.category if found.category in ALONE else found.part
            by[what] = by.get(what, 0.0) + times * size
            kernels += times
    return {
        "kernels": round(kernels),
        "bytes": sum(by.values()),
        "bytes_of_copies": by.get("copy", 0.0),
        "milliseconds_at_bandwidth": 1e3 * sum(by.values()) / bandwidth,
        "bytes_by": dict(sorted(by.items(), key=lambda item: -item[1])),
    }


def main() -> None:
    """Compile what was asked for, print the table, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=("h100", "h200"), default="h200")
    parser.add_argument("--only", nargs="*", choices=tuple(SECTIONS), default=tuple(SECTIONS))
    parser.add_argument("--out", type=Path, help="folder for DATE-GPU-ahead.json")
    asked = parser.parse_args()

    from llamax.accounting.topology import KINDS
    from llamax.train.ahead import Request, devices_of, environment

    kind = KINDS[asked.gpu]
    request = Request({}, "cuda", "1x1x1", 1, kind.device_kind, kind.memory, kind.bandwidth)
    os.environ.update(environment(request))  # read when JAX is imported
    device = devices_of(request)[0]
    rows: list[Row] = []
    print(f"{'program':32s} {'kernels':>8s} {'GB':>8s} {'of copies':>9s} {'ms at ' + asked.gpu:>11s}")
    for name in asked.only:
        for what, lowered in SECTIONS[name](device):
            row = {"what": what, **costs(lowered.compile().as_text(), kind.bandwidth)}
            rows.append(row)
            print(
                f"{what:32s} {row['kernels']:>8d} {row['bytes'] / 1e9:>8.2f} {row['bytes_of_copies'] / 1e9:>9.2f} "
                f"{row['milliseconds_at_bandwidth']:>11.2f}",
                flush=True,
            )
    if asked.out:
        path = asked.out / f"{datetime.date.today().isoformat()}-{asked.gpu}-ahead.json"
        path.write_text(json.dumps({"command": " ".join(sys.argv), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
