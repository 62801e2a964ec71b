"""Two pieces beside the plain way to write them, in interleaved rounds: a layer of experts, and decoding one token.

    python tools/bench_layers.py                       # three minutes on two cores
    python tools/bench_layers.py experts --rounds 3 --json

experts   forward and backward pass of one mixture layer (8 experts, top 2, SwiGLU): llamax/model/dispatch.py beside
          `jax.lax.ragged_dot` over picks sorted by expert; both give the same values, which is checked first
decode    one row, a cache of 256: the model as `for_serving` lays it out beside the model as it was trained
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

EXPERTS = ((2048, 64, 96, "float32"), (2048, 64, 96, "bfloat16"), (2048, 256, 384, "float32"))
DECODE = ("float32", "bfloat16")
Row = dict[str, Any]


def interleaved(sides: dict[str, Callable[[], Any]], rounds: int, seconds: float) -> dict[str, float]:
    """Median milliseconds of each side, which take turns of at least `seconds` each."""
    import jax

    times: dict[str, list[float]] = {name: [] for name in sides}
    for call in sides.values():
        jax.block_until_ready(call())
    for _ in range(rounds):
        for name, call in sides.items():
            start, calls = time.perf_counter(), 0
            while not calls or time.perf_counter() - start < seconds:
                jax.block_until_ready(call())
                calls += 1
            times[name].append(1e3 * (time.perf_counter() - start) / calls)
    return {name: statistics.median(values) for name, values in times.items()}


# ---------------------------------------------------------------- experts
def bench_experts(tokens: int, width: int, d_ff: int, compute: str, rounds: int, seconds: float) -> Row:
    """Milliseconds of both, and the largest relative difference between their outputs and between their gradients."""
    import jax
    import jax.numpy as jnp

    from llamax.config.components import MoeMlp
    from llamax.config.load import validate
    from llamax.model.execution import Execution
    from llamax.model.moe import MixtureOfExperts

    spec = {"kind": "moe", "experts": 8, "top_k": 2, "expert": {"kind": "swiglu", "d_ff": d_ff}}
    config = validate(MoeMlp, spec, "mlp")
    layer = MixtureOfExperts(config, width, init=_init(), gain=jnp.ones(()), key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (1, tokens, width))
    execution = Execution(compute=compute)

    def loss(forward: Any) -> Any:
        return jax.jit(jax.value_and_grad(lambda layer, x: jnp.mean(forward(layer, x) ** 2), argnums=(0, 1)))

    ours = loss(lambda layer, x: layer(x, execution)[0])
    plain = loss(lambda layer, x: ragged(layer, x, compute))
    apart = _apart(ours(layer, x), plain(layer, x))
    times = interleaved({"llamax": lambda: ours(layer, x), "ragged_dot": lambda: plain(layer, x)}, rounds, seconds)
    return {"tokens": tokens, "width": width, "d_ff": d_ff, "operands": compute, **times, "apart": apart}


def ragged(layer: Any, x: Any, compute: str) -> Any:
    """The same layer with `jax.lax.ragged_dot`: picks sorted by expert, three products, sorted back, summed."""
    import jax
    import jax.numpy as jnp

    from llamax.model.router import route

    rows, k = x.reshape(-1, x.shape[-1]), layer.config.top_k
    logits = jnp.matmul(rows, layer.router[...], precision=jax.lax.Precision.HIGHEST)
    choice = route(logits, layer.config.router, k, None)
    order = jnp.argsort(choice.experts.reshape(-1))
    sizes = jnp.bincount(choice.experts.reshape(-1), length=layer.config.experts).astype(jnp.int32)

    def product(rows: Any, matrix: Any) -> Any:
        operands = rows.astype(compute), matrix[...].astype(compute)
        return jax.lax.ragged_dot(*operands, sizes, preferred_element_type=jnp.float32)

    picked = rows[order // k]
    hidden = jax.nn.silu(product(picked, layer.gate)) * product(picked, layer.up)
    out = product(hidden, layer.down)[jnp.argsort(order)].reshape(-1, k, x.shape[-1])
    return jnp.sum(out * choice.weights[..., None], axis=1).reshape(x.shape)


def _init() -> Any:
    from llamax.config.components import Init

    return Init()


def _apart(a: Any, b: Any) -> float:
    import jax
    import jax.numpy as jnp

    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(jnp.abs(x - y).max() / (jnp.abs(y).max() + 1e-30)) for x, y in pairs)


# ---------------------------------------------------------------- decoding
def bench_decode(model: str, compute: str, rounds: int, seconds: float, steps: int = 32, capacity: int = 256) -> Row:
    """Milliseconds a token of both layouts, and the largest relative difference between their logits."""
    import jax
    import jax.numpy as jnp

    from llamax.config.load import load_model
    from llamax.generate.serving import for_serving
    from llamax.model.cache import init_cache
    from llamax.model.execution import Execution
    from llamax.model.transformer import Transformer

    execution = Execution(compute=compute)
    trained = Transformer(load_model(model), key=jax.random.key(0))
    served = for_serving(trained, execution)

    @jax.jit
    def decode(model: Any) -> Any:
        def step(_: int, carry: Any) -> Any:
            cache, logits = carry
            token = jnp.argmax(logits, axis=-1)[:, None].astype(jnp.int32)
            new, cache = model.decode(token, cache, jnp.ones(1, jnp.int32), execution)
            return cache, new[:, 0]

        cache = init_cache(model.config, 1, capacity)
        logits = jnp.zeros((1, model.config.vocab_size), jnp.float32)
        return jax.lax.fori_loop(0, steps, step, (cache, logits))[1]

    apart = _apart(decode(served), decode(trained))
    times = interleaved({"served": lambda: decode(served), "trained": lambda: decode(trained)}, rounds, seconds)
    times = {name: value / steps for name, value in times.items()}
    return {"model": model, "operands": compute, **times, "apart": apart}


# ---------------------------------------------------------------- output
def table(rows: list[Row], ours: str, other: str, names: tuple[str, ...]) -> str:
    """Rows as Markdown, with the ratio of `ours` to `other`."""
    lines = [f"| {' | '.join(names)} | {ours} ms | {other} ms | ratio | apart |", "|---" * (len(names) + 4) + "|"]
    for row in rows:
        figures = f"{row[ours]:.2f} | {row[other]:.2f} | {row[ours] / row[other]:.2f}"
        lines.append(f"| {' | '.join(str(row[name]) for name in names)} | {figures} | {row['apart']:.0e} |")
    return "\n".join(lines)


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["experts", "decode", "both"], default="both")
    parser.add_argument("--model", default="ladder/d512", help="of decode")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="a side takes in a round, at least")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of the tables")
    options = parser.parse_args()
    result: dict[str, list[Row]] = {}
    if options.what != "decode":
        result["experts"] = [bench_experts(*shape, options.rounds, options.seconds) for shape in EXPERTS]
    if options.what != "experts":
        result["decode"] = [bench_decode(options.model, kind, options.rounds, options.seconds) for kind in DECODE]
    if options.json:
        print(json.dumps(result))
        return
    if "experts" in result:
        print(table(result["experts"], "llamax", "ragged_dot", ("tokens", "width", "d_ff", "operands")))
    if "decode" in result:
        print(table(result["decode"], "served", "trained", ("model", "operands")))


if __name__ == "__main__":
    main()
