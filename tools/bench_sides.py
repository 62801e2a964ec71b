"""The processes that tools/bench.py compares: each builds one training step and runs it when told to.

    python tools/bench_sides.py SIDE SHAPE    SIDE: llamax-f32 llamax-bf16 torch-eager-f32 torch-compile-f32
                                              torch-compile-bf16 matmul

Lines of JSON: {"steps": k} on stdin answers {"seconds": s}; closing stdin answers the final line with peak memory.
The first answer, before any request, says what was built and the seconds it took to compile.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

# d_model, layers, heads, kv_heads, d_ff, vocab, batch, seq: 41 thousand, 0.92 million, 6.8 million parameters.
SHAPES: dict[str, dict[str, int]] = {
    "S1": {"d": 32, "layers": 2, "heads": 2, "kv": 1, "ff": 96, "vocab": 256, "batch": 8, "seq": 128},
    "S2": {"d": 128, "layers": 4, "heads": 4, "kv": 4, "ff": 384, "vocab": 256, "batch": 16, "seq": 128},
    "S3": {"d": 256, "layers": 6, "heads": 8, "kv": 4, "ff": 768, "vocab": 4096, "batch": 8, "seq": 256},
}
LEARNING_RATE, CLIP, DECAY = 1e-3, 1.0, 0.1

Run = Callable[[int], float]  # steps -> final loss; returns when the device is done
Side = tuple[dict[str, Any], Run]


def mebibytes() -> float:
    """Peak resident memory of this process so far, in MiB (Linux counts ru_maxrss in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_config(shape: dict[str, int], compute: str) -> Any:
    """The llamax run of a shape: untied Llama, AdamW, clipping, constant rate."""
    from llamax.config.load import run_from_data

    model = {
        "vocab_size": shape["vocab"],
        "d_model": shape["d"],
        "max_seq_len": shape["seq"],
        "segments": [{"repeat": shape["layers"]}],
        "attention": {"heads": shape["heads"], "kv_heads": shape["kv"]},
        "position": {"kind": "rope"},
        "mlp": {"kind": "swiglu", "d_ff": shape["ff"]},
        "head": {"tied": False},
    }
    train = {"batch_size": shape["batch"], "seq_len": shape["seq"], "steps": 100, "compute_dtype": compute}
    optimizer = {"kind": "adamw", "lr": LEARNING_RATE, "weight_decay": DECAY, "clip_norm": CLIP}
    schedule = {"kind": "constant", "warmup": 0.0}
    return run_from_data({"model": model, "train": train, "optimizer": optimizer, "schedule": schedule})


def tokens_of(shape: dict[str, int], batches: int) -> Any:
    """Random tokens `[batches, batch, seq + 1]`, the same for every side."""
    import numpy as np

    size = (batches, shape["batch"], shape["seq"] + 1)
    return np.random.default_rng(0).integers(0, shape["vocab"], size, dtype=np.int32)


def llamax_side(shape: dict[str, int], compute: str) -> Side:
    """The project's own dispatch (llamax/train/step.py), as the loop runs it: several steps a call, one call ahead."""
    import jax
    import jax.numpy as jnp

    from llamax.accounting.params import count_params
    from llamax.config.mesh import load_rules
    from llamax.mesh.rules import batch_sharding, make_mesh
    from llamax.train.replicas import use_cores
    from llamax.train.state import abstract_state, init_state
    from llamax.train.step import make_dispatch

    config = run_config(shape, compute)
    baseline = mebibytes()
    devices = use_cores(config)  # as `llamax train` does
    rules, mesh = load_rules(config.mesh.rules), make_mesh(config.mesh, jax.devices()[:devices])
    capacity = config.train.steps_per_dispatch
    abstract = abstract_state(config, rules, mesh)
    holder = {"state": init_state(config, 100, abstract)}
    batches = {"tokens": jax.device_put(tokens_of(shape, capacity), batch_sharding(rules, mesh, leading=1))}
    jax.block_until_ready((holder, batches))
    start = time.perf_counter()
    dispatch = make_dispatch(config, rules, mesh, abstract).lower(holder["state"], batches, jnp.int32(0)).compile()
    seconds = time.perf_counter() - start

    def run(steps: int) -> float:
        before = None
        for first in range(0, steps, capacity):
            holder["state"], metrics, ran = dispatch(holder["state"], batches, jnp.int32(min(capacity, steps - first)))
            if before is not None:
                jax.device_get(before)
            before = (metrics, ran)
        metrics, ran = jax.device_get(before)
        return float(metrics["loss"][int(ran) - 1])

    parameters = count_params(config.model).total
    version = f"jax {jax.__version__} {jax.devices()[0].platform}"
    about = {"compile_seconds": seconds, "parameters": parameters, "baseline_mib": baseline, "version": version}
    return about | {"devices": devices}, run


def torch_side(shape: dict[str, int], compile_it: bool, compute: str) -> Side:
    """`transformers` Llama with fused AdamW: forward, cross-entropy, backward, clip, update."""
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # compile seconds are those of a first use
    import torch
    import transformers
    from torch.nn.functional import cross_entropy

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=shape["vocab"],
            hidden_size=shape["d"],
            intermediate_size=shape["ff"],
            num_hidden_layers=shape["layers"],
            num_attention_heads=shape["heads"],
            num_key_value_heads=shape["kv"],
            max_position_embeddings=shape["seq"],
            tie_word_embeddings=False,
            use_cache=False,
        )
    )
    baseline = mebibytes()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=DECAY, fused=True
    )

    def loss_of(tokens: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=compute == "bf16"):
            logits = model(tokens[:, :-1]).logits
        return cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    loss_of = torch.compile(loss_of) if compile_it else loss_of
    batches = torch.from_numpy(tokens_of(shape, 10)).long()

    def run(steps: int) -> float:
        for i in range(steps):
            loss = loss_of(batches[i % len(batches)])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item()

    start = time.perf_counter()
    run(1)
    first = time.perf_counter() - start
    run(1)  # the second step settles the optimizer's state
    start = time.perf_counter()
    run(1)
    seconds = max(first - (time.perf_counter() - start), 0.0)
    parameters = sum(p.numel() for p in model.parameters())
    version = f"torch {torch.__version__} transformers {transformers.__version__}"
    about = {"compile_seconds": seconds, "parameters": parameters, "baseline_mib": baseline, "version": version}
    return about, run


def matmul_side() -> Side:
    """The machine's peak: the best square products f32 x f32 and bf16 x bf16 -> f32; a "step" is one round of all."""
    import jax
    import jax.numpy as jnp

    best: dict[str, float] = {}

    @jax.jit
    def product(a: Any, b: Any) -> Any:
        return jnp.dot(a, b, preferred_element_type=jnp.float32)

    def measure(name: str, dtype: Any, n: int) -> None:
        a = jax.random.normal(jax.random.key(0), (n, n)).astype(dtype)
        product(a, a).block_until_ready()
        for _ in range(5):
            start = time.perf_counter()
            product(a, a).block_until_ready()
            best[name] = max(best.get(name, 0.0), 2 * n**3 / (time.perf_counter() - start) / 1e9)

    def run(steps: int) -> float:
        for _ in range(steps):
            for n in (1024, 2048):
                measure("f32", jnp.float32, n)
                try:
                    measure("bf16", jnp.bfloat16, n)
                except jax.errors.JaxRuntimeError:  # some CPUs have no such product
                    best["bf16"] = float("nan")
        return 0.0

    return {"best_gflops": best}, run


def build(side: str, shape: str) -> Side:
    """The side by name."""
    if side == "matmul":
        return matmul_side()
    library, *mode, compute = side.split("-")
    if library == "llamax":
        return llamax_side(SHAPES[shape], {"f32": "float32", "bf16": "bfloat16"}[compute])
    return torch_side(SHAPES[shape], mode == ["compile"], compute)


def main() -> None:
    """Serve the requests on stdin; anything libraries print goes to stderr."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    about, run = build(*sys.argv[1:3])

    def reply(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=replies, flush=True)

    reply(about)
    for line in sys.stdin:
        steps = json.loads(line)["steps"]
        start = time.perf_counter()
        loss = run(steps)
        reply({"seconds": time.perf_counter() - start, "loss": loss})
    reply({**about, "peak_mib": mebibytes()})


if __name__ == "__main__":
    main()
