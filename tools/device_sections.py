"""The sections of tools/device_check.py: each yields rows, plain dictionaries, as soon as it has them.

    python tools/device_sections.py SECTION [--tiny]    rows as lines of JSON on stdout

A row has "what" and either figures or "missing", a line that says why there are none. Programs are the project's own:
`make_dispatch` for training, `Engine` for decoding. Batches are random tokens, which cost what any others do.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

Row = dict[str, Any]


class Shape(NamedTuple):
    """A Llama of head_dim 128 and a vocabulary that is a multiple of 256, so that every product is in whole tiles."""

    d: int
    layers: int
    heads: int
    kv: int
    ff: int
    vocab: int
    seq: int
    experts: int = 0  # of width ff each, two of them chosen


TARGETED = ("1B", "50M")  # the sizes that a target is set for; run first
DENSE: dict[str, Shape] = {
    "1B": Shape(2048, 20, 16, 8, 5632, 32768, 4096),
    "50M": Shape(640, 8, 5, 5, 1728, 8192, 2048),
    "125M": Shape(768, 12, 6, 6, 2048, 32768, 4096),
    "350M": Shape(1024, 24, 8, 8, 2816, 32768, 4096),
    "30M": Shape(512, 7, 4, 4, 1408, 8192, 2048),
    "10M": Shape(256, 8, 2, 2, 704, 8192, 2048),
    "3B": Shape(3072, 28, 24, 8, 8192, 32768, 4096),
}
MIXTURE = Shape(2048, 14, 16, 8, 3584, 32768, 4096, experts=8)
TINY = Shape(32, 2, 2, 1, 64, 256, 64)
TOKENS = 65536  # of a step, at most; as few as LEAST_TOKENS before anything is recomputed
LEAST_TOKENS = 8192
SECONDS = 3.0  # timed, of a row


# ---------------------------------------------------------------- training rows
def config_of(shape: Shape, batch: int, compute: str = "bfloat16", remat: str = "auto") -> Any:
    """The run of a shape: bfloat16 stream, AdamW on float32 weights, loss in chunks of 8192 tokens."""
    from llamax.config.load import run_from_data

    mlp: Row = {"kind": "swiglu", "d_ff": shape.ff}
    if shape.experts:
        mlp = {"kind": "moe", "experts": shape.experts, "top_k": 2, "expert": mlp}
    model = {
        "vocab_size": shape.vocab,
        "d_model": shape.d,
        "max_seq_len": shape.seq,
        "segments": [{"repeat": shape.layers}],
        "attention": {"heads": shape.heads, "kv_heads": shape.kv},
        "position": {"kind": "rope"},
        "mlp": mlp,
        "head": {"tied": False},
        "init": {"kind": "fan_in"},
    }
    train = {
        "batch_size": batch,
        "seq_len": shape.seq,
        "steps": 1000,
        "compute_dtype": compute,
        "activation_dtype": "bfloat16",
        "loss_chunk": 8192,
        "remat": remat,
        "on_divergence": "skip",
    }
    return run_from_data({"model": model, "train": train, "mesh": {"data": 1}})


def memory_of(device: Any) -> int | None:
    """Bytes that a device may allocate, where it says so."""
    return (device.memory_stats() or {}).get("bytes_limit")


def batch_of(shape: Shape, memory: int | None) -> int:
    """Sequences a step: the most whose estimate fits without recomputation, at least LEAST_TOKENS' worth. A mixture has
    twice that, as its optimizer moves all experts whatever the tokens."""
    from llamax.train.remat import SHARE, device_bytes

    batch = max(1, TOKENS // shape.seq)
    while (
        memory
        and batch * shape.seq > LEAST_TOKENS
        and device_bytes(config_of(shape, batch), "none", True, {}) > (SHARE * memory)
    ):
        batch //= 2
    return batch


def train_row(name: str, shape: Shape, tiny: bool, batch: int | None = None, **options: str) -> Row:
    """Compile and time the real step; half the batch where memory does not suffice."""
    import jax

    batch = batch or (2 if tiny else batch_of(shape, memory_of(jax.devices()[0])))
    tried = []
    while True:
        config = config_of(shape, batch, **options)
        try:
            return {"what": name, **_timed(config, tiny), **({"too_large": tried} if tried else {})}
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or batch == 1:
                return {"what": name, "batch": batch, "missing": _line(error)}
        tried.append(batch)
        batch //= 2
        gc.collect()


def _timed(config: Any, tiny: bool) -> Row:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from llamax.accounting import count_params, mfu, training_flops_per_token
    from llamax.config.mesh import load_rules
    from llamax.mesh.rules import make_mesh
    from llamax.train.remat import rematerialization
    from llamax.train.state import abstract_state, init_state
    from llamax.train.step import execution_of, make_dispatch

    device = jax.devices()[0]
    rules, mesh = load_rules(config.mesh.rules), make_mesh(config.mesh, [device])
    capacity, train = config.train.steps_per_dispatch, config.train
    size = (capacity, train.batch_size, train.seq_len + 1)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, size, dtype=np.int32)
    batches = {"tokens": jnp.asarray(tokens)}
    abstract = abstract_state(config, rules, mesh)
    begun = time.perf_counter()
    state = init_state(config, 1000, abstract)
    compiled = make_dispatch(config, rules, mesh, abstract).lower(state, batches, jnp.int32(0)).compile()  # type: ignore[attr-defined]
    compile_seconds = time.perf_counter() - begun
    state, metrics, _ = compiled(state, batches, jnp.int32(2))
    first = float(metrics["loss"][0])
    begun = time.perf_counter()
    state, metrics, _ = compiled(state, batches, jnp.int32(1))
    jax.block_until_ready(metrics)
    count = int(min(capacity, max(1, (0.05 if tiny else SECONDS) / 3 / (time.perf_counter() - begun))))
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        state, metrics, _ = compiled(state, batches, jnp.int32(count))
        jax.block_until_ready((state.step, metrics))
        seconds.append((time.perf_counter() - begun) / count)
    step = statistics.median(seconds)
    rate = train.batch_size * train.seq_len / step
    flops = training_flops_per_token(config.model, train.seq_len)["causal"]
    found = mfu(flops * rate, device.device_kind, 1, train.compute_dtype)
    execution, params = execution_of(config, rules, mesh), count_params(config.model)
    plan = compiled.memory_analysis()
    row = {
        "params": params.total,
        "params_active": params.active,
        "batch": train.batch_size,
        "seq": train.seq_len,
        "compute": train.compute_dtype,
        "remat": execution.remat,
        "remat_rule": rematerialization(config, mesh)[1],
        "kernels": list(execution.kernels),
        "compile_seconds": compile_seconds,
        "milliseconds": 1e3 * step,
        "milliseconds_rounds": [1e3 * s for s in seconds],
        "tokens_per_second": rate,
        "tflops": flops * rate / 1e12,
        "mfu": found and found.fraction,
        "mfu_convention": "causal",
        "mfu_peak": found and found.peak_flops_per_second,
        "memory_gb": (plan.argument_size_in_bytes + plan.temp_size_in_bytes) / 1e9 if plan else None,
        "loss_first": first,
        "loss_last": float(metrics["loss"][count - 1]),
    }
    if "moe_entropy_min" in metrics:
        row["load_entropy"] = float(metrics["moe_entropy_min"][count - 1])
    traced = min(count, 3)

    def again() -> None:
        nonlocal state
        state, metrics, _ = compiled(state, batches, jnp.int32(traced))
        jax.block_until_ready((state.step, metrics))

    row |= where_time_goes(again, traced, compiled.as_text())
    for leaf in jax.tree.leaves((state, batches)):
        leaf.delete()
    return row


def where_time_goes(run: Callable[[], Any], steps: int, program: str = "") -> Row:
    """Shares of `run`, which takes `steps` steps, by category of operation (llamax/report/profile.py), and its heaviest
    operations; a line that says why where the profiler gives none."""
    import jax

    from llamax.report.hlo import parse_program
    from llamax.report.profile import summarize
    from llamax.report.trace import read_spans

    with tempfile.TemporaryDirectory() as folder:
        try:
            with jax.profiler.trace(folder):
                run()
            found = summarize({"traced_steps": steps}, parse_program(program), read_spans(Path(folder)))
        except Exception as error:
            return {"profile": _line(error)}
    heaviest = [
        {name: op[name] for name in ("label", "where", "backward", "seconds", "count", "flops_per_second", "names")}
        for op in found["operations"][:16]
    ]
    shares = {name: round(amount["share"], 4) for name, amount in found["shares"].items() if amount["share"] > 0.002}
    return {"shares": shares, "traced_seconds": found["window_seconds"], "operations": heaviest}


def mfu_dense(tiny: bool) -> Iterator[Row]:
    """The dense sizes that a target is set for."""
    for name in TARGETED:
        yield train_row(name, TINY if tiny else DENSE[name], tiny)


def mfu_table(tiny: bool) -> Iterator[Row]:
    """The other dense sizes."""
    for name in DENSE:
        if name not in TARGETED:
            yield train_row(name, TINY if tiny else DENSE[name], tiny)


def mfu_moe(tiny: bool) -> Iterator[Row]:
    """Mixtral's block, eight experts of which two: the layer against a loop over experts, then the step."""
    import jax
    import jax.numpy as jnp

    from llamax.config.components import DenseMlp, Init, MoeMlp
    from llamax.model.execution import Execution
    from llamax.model.kernels import host_of, kernels_for
    from llamax.model.mlp import activate
    from llamax.model.moe import MixtureOfExperts
    from llamax.model.router import route

    config = MoeMlp(kind="moe", experts=8, top_k=2, expert=DenseMlp(kind="swiglu", d_ff=64 if tiny else 512))
    width = 32 if tiny else 256
    layer = MixtureOfExperts(config, width, Init(kind="fan_in"), jnp.float32(1), key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, 64 if tiny else 1024, width))

    def loop(layer: Any, x: Any) -> Any:
        tokens = x.reshape(-1, width)
        logits = jnp.matmul(tokens, layer.router[...], precision="highest")
        choice, out = route(logits, config.router, 2), jnp.zeros(tokens.shape)
        for e in range(8):
            up, gate = (jnp.matmul(tokens, w[...][e], precision="highest") for w in (layer.up, layer.gate))
            y = jnp.matmul(activate(config.expert, up, gate), layer.down[...][e], precision="highest")
            out += y * jnp.sum(jnp.where(choice.experts == e, choice.weights, 0.0), -1, keepdims=True)
        return out.reshape(x.shape)

    exact = _both(loop)(layer, x)
    kernels = kernels_for(host_of(jax.devices()[:1]))
    for name, used in (("rounds", ()), ("the device's kernels", kernels)):
        found = _both(lambda layer, x, e=Execution("bfloat16", kernels=used): layer(x, e)[0])(layer, x)
        yield {"what": f"experts by {name} against a loop, bf16 operands", **_errors(found, exact, limit=0.03)}
    yield train_row("8x, 1B active", TINY._replace(experts=4) if tiny else MIXTURE, tiny)


def fp8(tiny: bool) -> Iterator[Row]:
    """Eight-bit products: speed at 1B, and the loss of a small run on real text beside bfloat16 and float32."""
    import jax

    shape = TINY if tiny else DENSE["1B"]
    batch = 2 if tiny else batch_of(shape, memory_of(jax.devices()[0]))
    for compute in ("bfloat16", "float8"):
        yield train_row(f"1B {compute}", shape, tiny, batch, compute=compute)
    for compute in ("float32", "bfloat16", "float8"):
        yield {"what": f"tiny on the standard library, {compute}", **text_loss(compute, 3 if tiny else 300, seed=0)}


def text_loss(compute: str, steps: int, seed: int) -> Row:
    """The held-out loss of `configs/train/tiny.yaml` after `steps` steps."""
    from llamax.config.load import load_run
    from llamax.train.loop import train

    settings = {"train.compute_dtype": compute, "train.steps": steps, "train.seed": seed, "data.eval_tokens": 65536}
    with tempfile.TemporaryDirectory() as folder:
        config = load_run("tiny", [f"{name}={value}" for name, value in settings.items()])
        result = train(config, Path(folder) / "run")
    return {"compute": compute, "steps": steps, "seed": seed, "eval_loss": result["eval_loss"]}


def remat(tiny: bool) -> Iterator[Row]:
    """What recomputation costs and saves at 1B, one batch for all."""
    import jax

    shape = TINY if tiny else DENSE["1B"]
    batch = 2 if tiny else batch_of(shape, memory_of(jax.devices()[0]))
    for policy in ("none", "dots", "full"):
        yield train_row(f"1B remat={policy}", shape, tiny, batch, remat=policy)


# ---------------------------------------------------------------- attention
def attention(tiny: bool) -> Iterator[Row]:
    """The device's kernel against the reference in value and gradient, then both timed at the 1B layer's shape."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from llamax.model.attention import attend
    from llamax.model.attention import attention as choose
    from llamax.model.execution import Execution
    from llamax.model.flash import covering
    from llamax.model.kernels import host_of, kernels_for
    from llamax.model.scores import Logits, Sight

    execution = Execution("bfloat16", "bfloat16", kernels=kernels_for(host_of(jax.devices()[:1])))
    seq, dim = (64, 16) if tiny else (1024, 128)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 2, (2, seq)).cumsum(1) // (seq // 8), jnp.int32)

    def operands(batch: int, seq: int, heads: int, kv: int) -> list[Any]:
        keys = jax.random.split(jax.random.key(0), 3)
        return [
            jax.random.normal(key, (batch, seq, n, dim), jnp.bfloat16)
            for key, n in zip(keys, (heads, kv, kv), strict=True)
        ]

    cases: dict[str, tuple[Logits, Sight]] = {
        "causal": (Logits(dim**-0.5), Sight()),
        "window": (Logits(dim**-0.5, window=seq // 4 + 1), Sight()),
        "documents": (Logits(dim**-0.5), Sight(segments=ids)),
    }
    for name, (logits, sight) in cases.items():
        q, k, v = operands(2, seq, 4, 2)
        kernel = covering(execution.kernels, set(), "bfloat16", q.shape, k.shape, v.shape)
        row = {"what": f"{kernel or 'reference'} against float32, {name}"}
        try:
            found = _both(lambda *a, s=sight, o=logits: choose(*a, s, o, execution))(q, k, v)
            wide = [a.astype(jnp.float32) for a in (q, k, v)]
            with jax.default_matmul_precision("highest"):
                exact = _both(lambda *a, s=sight, o=logits: attend(*a, s, o, "float32"))(*wide)
            yield {**row, **_errors(found, exact, limit=0.02)}
        except Exception as error:  # a kernel that this device refuses is a finding, not the end of the check
            yield {**row, "missing": _line(error)}
    batch, length, heads, kv = (2, seq, 4, 2) if tiny else (4, 4096, 16, 8)
    flops = 3 * 4 * batch * heads * dim * length * (length + 1) / 2
    for name, used in (("device's", execution), ("reference", execution._replace(kernels=()))):
        run = _both(lambda *a, e=used: choose(*a, Sight(), cases["causal"][0], e))
        seconds = _seconds(lambda f=run: f(*operands(batch, length, heads, kv)), tiny)
        yield {"what": f"{name} attention, forward and backward", "milliseconds": 1e3 * seconds} | {
            "tflops": flops / seconds / 1e12
        }


def _both(function: Callable[..., Any]) -> Callable[..., Any]:
    """The value, and the gradients of a fixed weighted sum of it."""
    import jax
    import jax.numpy as jnp

    def run(*operands: Any) -> Any:
        y, pull = jax.vjp(function, *operands)
        return y, *pull(jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape).astype(y.dtype))

    return jax.jit(run)


def _errors(found: Any, exact: Any, limit: float) -> Row:
    """Relative errors in norm, of the value and of the worst gradient."""
    import jax
    import jax.numpy as jnp

    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True)
    value, *gradients = [
        float(jnp.linalg.norm((a.astype(jnp.float32) - b).ravel()) / (jnp.linalg.norm(b.ravel()) + 1e-30))
        for a, b in pairs
    ]
    return {"error_value": value, "error_gradient": max(gradients), "agrees": max(value, *gradients) < limit}


def _seconds(run: Callable[[], Any], tiny: bool) -> float:
    """Median seconds of a call, after one that compiles."""
    import jax

    jax.block_until_ready(run())
    times = []
    for _ in range(2 if tiny else 10):
        begun = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


# ---------------------------------------------------------------- decoding, packing, torch
def decode(tiny: bool) -> Iterator[Row]:
    """One row of text from the 1B model in bfloat16, and the share of memory bandwidth its bytes come to."""
    import jax
    import numpy as np

    from llamax.accounting.cache import kv_cache_bytes
    from llamax.accounting.peaks import bandwidth_bytes_per_second
    from llamax.generate.engine import Engine
    from llamax.generate.sampling import Sampling
    from llamax.generate.serving import step_bytes
    from llamax.model.execution import Execution
    from llamax.model.transformer import Transformer

    config = config_of(TINY if tiny else DENSE["1B"], 1).model
    model = jax.jit(lambda key: Transformer(config, key=key))(jax.random.key(0))
    engine = Engine(model, execution=Execution("bfloat16", "bfloat16"))
    prompt, new = np.arange(16 if tiny else 128, dtype=np.int32), 16 if tiny else 256
    engine.run([prompt], [Sampling(0.0)], [0], new)
    _, timings = engine.run([prompt], [Sampling(0.0)], [0], new)
    seconds = timings.decode / max(timings.steps, 1)
    read = step_bytes(engine.model) + kv_cache_bytes(config, len(prompt) + new // 2)
    bandwidth = bandwidth_bytes_per_second(jax.devices()[0].device_kind)
    yield {
        "what": "decode 1B bf16, batch 1",
        "milliseconds": 1e3 * seconds,
        "tokens_per_second": 1 / seconds,
        "bytes_per_step": read,
        "bytes_per_second": read / seconds,
        "bandwidth": bandwidth,
        "of_bandwidth": bandwidth and read / seconds / bandwidth,
        "prefill_seconds": timings.prefill,
        **where_time_goes(lambda: engine.run([prompt], [Sampling(0.0)], [0], new), timings.steps),
    }


def packing(tiny: bool) -> Iterator[Row]:
    """Members of one small shape in one program beside the same runs one by one, on one device."""
    import jax
    from bench_packing import ONE, PACKED, compare
    from bench_sides import SHAPES, run_config

    members = 2 if tiny else 16
    configs = (
        {"tiny": config_of(TINY, 2)} if tiny else {n: run_config(SHAPES[n], "bfloat16") for n in ("S1", "S2", "S3")}
    )
    for name, config in configs.items():
        found = compare(config, members, jax.devices()[:1], seconds=0.05 if tiny else 1.0, rounds=2 if tiny else 5)
        packed = found["sides"][PACKED]
        yield {
            "what": f"{members} members of {name}, one step of all",
            "milliseconds": 1e3 * packed["wall"],
            "milliseconds_one_by_one": 1e3 * found["sides"][ONE]["wall"],
            "ratio": packed["ratio_wall"],
            "loss_difference": found["loss_difference"],
        }


def torch(tiny: bool) -> Iterator[Row]:
    """torch.compile of a `transformers` Llama of the 1B shape: bf16 autocast, fused AdamW, clipping."""
    what = "1B torch.compile"
    try:
        import torch
        import transformers
    except ImportError as error:
        yield {"what": what, "missing": str(error)}
        return
    if not torch.cuda.is_available() and not tiny:
        yield {"what": what, "missing": f"torch {torch.__version__} sees no CUDA device"}
        return
    from llamax.accounting import mfu, training_flops_per_token

    shape, place = TINY if tiny else DENSE["1B"], "cuda" if torch.cuda.is_available() else "cpu"
    config = config_of(shape, 1).model
    settings = transformers.LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.d,
        intermediate_size=shape.ff,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv,
        max_position_embeddings=shape.seq,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    torch.set_float32_matmul_precision("high")
    with torch.device(place):
        model = transformers.LlamaForCausalLM(settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def loss_of(tokens: Any) -> Any:
        with torch.autocast(place, torch.bfloat16):
            logits = model(tokens[:, :-1]).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    compiled = loss_of if tiny else torch.compile(loss_of)
    batch = 2 if tiny else 8
    while batch:
        try:
            tokens = torch.randint(0, shape.vocab, (batch, shape.seq + 1), device=place)

            def step(tokens: Any = tokens) -> None:
                compiled(tokens).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            seconds = _torch_seconds(torch, step, place, tiny)
            break
        except torch.cuda.OutOfMemoryError:
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            batch //= 2
    else:
        yield {"what": what, "missing": "out of memory at batch 1"}
        return
    rate = batch * shape.seq / seconds
    flops = training_flops_per_token(config, shape.seq)["causal"] * rate
    found = mfu(flops, torch.cuda.get_device_name() if place == "cuda" else "cpu", 1)
    row = {"what": what, "params": sum(p.numel() for p in model.parameters()), "batch": batch, "seq": shape.seq}
    row |= {"milliseconds": 1e3 * seconds, "tokens_per_second": rate, "tflops": flops / 1e12}
    yield row | {"mfu": found and found.fraction, "version": f"torch {torch.__version__}"}


def _torch_seconds(torch: Any, step: Callable[[], None], place: str, tiny: bool) -> float:
    """Seconds a step, after three that compile and settle the optimizer."""

    def wait() -> None:
        if place == "cuda":
            torch.cuda.synchronize()

    count = 2 if tiny else 10
    for _ in range(1 if tiny else 3):
        step()
    wait()
    begun = time.perf_counter()
    for _ in range(count):
        step()
    wait()
    return (time.perf_counter() - begun) / count


def _line(error: BaseException) -> str:
    """An error as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


# In the order of their worth, with the seconds each may take at most.
SECTIONS: dict[str, tuple[Callable[[bool], Iterator[Row]], float]] = {
    "attention": (attention, 60),
    "mfu-dense": (mfu_dense, 150),
    "mfu-moe": (mfu_moe, 100),
    "decode": (decode, 70),
    "torch": (torch, 120),
    "packing": (packing, 100),
    "mfu-table": (mfu_table, 240),
    "fp8": (fp8, 150),
    "remat": (remat, 120),
}


def main() -> None:
    """Run one section; anything that libraries print goes to stderr."""
    parser = argparse.ArgumentParser()
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    rows = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from llamax.mesh.start import start

    start()
    for row in SECTIONS[options.section][0](options.tiny):
        print(json.dumps(row), file=rows, flush=True)


if __name__ == "__main__":
    main()
