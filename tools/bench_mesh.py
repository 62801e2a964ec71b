"""How good is mesh=auto? Every layout of small models on eight simulated devices, timed, against the one it picks.

    python tools/bench_mesh.py                   all models; some minutes on two free cores
    python tools/bench_mesh.py dense --repeats 3
    python tools/bench_mesh.py --fit             and the rates of layout.py's SIMULATED that fit what was measured

Prints processor seconds a step (the devices share the machine's cores, so that this is what wall-clock time would be on
a machine that does nothing else), in rounds over all layouts, the median of the rounds; the estimate beside it; and the
ratio of the pick to the best, which is to be below 1.3. The fit is a non-negative least-squares one of relative errors
over all layouts of all models: the estimate is linear in the seconds of a FLOP, a byte moved, a byte sent and a call.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import statistics
import sys
import time
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import nnls

from llamax.accounting.layout import SIMULATED, Rates, estimate, layouts, rates_of
from llamax.config.mesh import load_rules
from llamax.config.run import RunConfig
from llamax.errors import UserError
from llamax.mesh.rules import batch_sharding
from llamax.train.setup import share_places
from llamax.train.state import init_state
from llamax.train.step import make_dispatch

DEVICES, STEPS = 8, 4
BASE: dict[str, Any] = {
    "vocab_size": 512, "d_model": 128, "segments": [{"repeat": 1}], "position": {"kind": "rope"},
    "attention": {"heads": 8, "kv_heads": 8}, "mlp": {"kind": "swiglu", "d_ff": 256}, "head": {"tied": False},
}  # fmt: skip
MODELS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "dense": ({}, {"batch_size": 16, "seq_len": 128}),
    "experts": (
        {"mlp": {"kind": "moe", "experts": 8, "top_k": 2, "expert": {"kind": "swiglu", "d_ff": 128}}},
        {"batch_size": 16, "seq_len": 64},
    ),
    "long": ({"d_model": 64}, {"batch_size": 2, "seq_len": 1024}),
}


def config_of(name: str, mesh: dict[str, int] | None = None) -> RunConfig:
    model, train = MODELS[name]
    return RunConfig.model_validate(
        {
            "model": {**BASE, "max_seq_len": train["seq_len"], **model},
            "mesh": {"data": 1, **(mesh or {})},
            "train": {**train, "steps": 1000, "compute_dtype": "float32", "steps_per_dispatch": STEPS},
        }
    )


def step_of(config: RunConfig) -> Any:
    """A function that runs STEPS steps and gives processor seconds a step."""
    rules, mesh, abstract = share_places(config, jax.devices()[:DEVICES])
    held = [init_state(config, 1000, abstract)]
    train = config.train
    shape = (STEPS, train.batch_size, train.seq_len + 1)
    tokens = jax.random.randint(jax.random.key(0), shape, 0, config.model.vocab_size)
    batch = {"tokens": jax.device_put(tokens, batch_sharding(load_rules(config.mesh.rules), mesh, leading=1))}
    program = make_dispatch(config, rules, mesh, abstract).lower(held[0], batch, jnp.int32(STEPS)).compile()

    def run() -> float:
        start = time.process_time()
        held[0], metrics, _ = program(held[0], batch, jnp.int32(STEPS))
        jax.block_until_ready((held[0], metrics))
        return (time.process_time() - start) / STEPS

    run()
    return run


Measured = list[tuple[RunConfig, dict[str, int], float]]  # run, sizes of the axes, processor seconds a step


def compare(name: str, repeats: int) -> tuple[float, Measured]:
    """(the ratio of the pick's seconds to the best's, what was measured)."""
    ranked = layouts(config_of(name), DEVICES, rates_of("cpu"), None)
    runs = {}
    for one in ranked:
        try:
            runs[one.name] = step_of(config_of(name, one.sizes))
        except UserError as error:
            print(f"  {one.name}: {error}", file=sys.stderr)
    times: dict[str, list[float]] = {layout: [] for layout in runs}
    for _ in range(repeats):
        for layout, run in runs.items():
            times[layout].append(run())
    measured = {layout: statistics.median(seconds) for layout, seconds in times.items()}
    print(f"\n{name}: {MODELS[name][1]}\n{'layout':32} {'measured ms':>12} {'estimated ms':>13}")
    found: Measured = []
    for one in ranked:
        if one.name in measured:
            found.append((config_of(name), one.sizes, measured[one.name]))
            print(f"{one.name:32} {measured[one.name] * 1e3:12.2f} {one.seconds * 1e3:13.2f}", flush=True)
    pick = next(one.name for one in ranked if one.name in measured)
    best = min(measured, key=measured.__getitem__)
    ratio = measured[pick] / measured[best]
    worst = max(measured.values()) / measured[best]
    print(f"pick {pick}, best {best}: {ratio:.2f} (the worst: {worst:.2f}; {len(measured)} layouts)", flush=True)
    return ratio, found


def fit(found: Measured) -> Rates:
    """The rates whose estimates come nearest to what was measured."""
    free = Rates(math.inf, math.inf, math.inf, math.inf, 0.0, SIMULATED.domain, cpu=True)
    one_by_one = [{"peak": 1.0}, {"memory": 1.0}, {"link": 1.0, "network": 1.0}, {"latency": 1.0}]
    units = [dataclasses.replace(free, **rate) for rate in one_by_one]
    rows = [[estimate(config, sizes, rates).seconds / seconds for rates in units] for config, sizes, seconds in found]
    (flop, byte, sent, latency), _ = nnls(np.array(rows), np.ones(len(rows)))
    peak, memory, link = (1 / cost if cost else math.inf for cost in (flop, byte, sent))
    return dataclasses.replace(SIMULATED, peak=peak, memory=memory, link=link, network=link, latency=latency)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"of {', '.join(MODELS)}; default all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--fit", action="store_true", help="print the rates that fit")
    given = parser.parse_args()
    compared = [compare(name, given.repeats) for name in given.models or MODELS]
    if given.fit:
        print(fit([row for _, rows in compared for row in rows]))
    sys.exit(max(ratio for ratio, _ in compared) > 1.3)
