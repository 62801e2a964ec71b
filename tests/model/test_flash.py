"""The kernels' calls mean what `attend` computes, and they are taken exactly where they cover a call."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llamax.config.components import BlockSparse
from llamax.model.attention import attend, attention
from llamax.model.execution import Execution
from llamax.model.flash import COVERS, by_device, covering, cudnn, splash
from llamax.model.kernels import Host, host_of, kernels_for
from llamax.model.scores import Logits, Sight

Arrays = tuple[jax.Array, ...]


def inputs(seq: int, heads: int, kv_heads: int, dim: int, value_dim: int | None = None) -> list[jax.Array]:
    value_dim = value_dim or dim
    rng = np.random.default_rng(heads + kv_heads)
    shapes = [(2, seq, heads, dim), (2, seq, kv_heads, dim), (2, seq, kv_heads, value_dim), (2, seq, heads, value_dim)]
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def documents(seq: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(0, 2, (2, seq)).cumsum(1) // 5, jnp.int32)


def value_and_gradient(function: Any, q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> list[jax.Array]:
    def both(*arrays: jax.Array) -> tuple[jax.Array, Arrays]:
        y, vjp = jax.vjp(function, *arrays)
        return y, vjp(g)

    y, gradient = jax.jit(both)(q, k, v)
    return [y, *gradient]


def compare(
    kernel: Any,
    seq: int,
    heads: int,
    kv_heads: int,
    dim: int,
    case: dict[str, Any],
    tolerance: float,
    value_dim: int | None = None,
) -> None:
    *operands, g = inputs(seq, heads, kv_heads, dim, value_dim)
    segments = documents(seq) if "segments" in case else None
    options = {name: value for name, value in case.items() if name != "segments"}
    sight, logits = Sight(segments=segments), Logits(**{"scale": dim**-0.5, **options})
    asked = {"scale": logits.scale, **options, **({} if segments is None else {"segments": segments})}
    found = value_and_gradient(lambda *a: kernel(*a, dtype="float32", **asked), *operands, g)
    expected = value_and_gradient(lambda *a: attend(*a, sight, logits, "float32"), *operands, g)
    for name, a, b in zip(("out", "q", "k", "v"), found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance, err_msg=name)


@pytest.mark.parametrize(
    "case",
    [{}, {"scale": 0.7}, {"window": 1}, {"window": 5}, {"segments": True}, {"window": 4, "segments": True}],
    ids=str,
)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_cudnn_call_means_attend(case: dict[str, Any], kv_heads: int) -> None:
    """The same arguments through the library's plain implementation."""
    compare(lambda *a, **o: cudnn(*a, implementation="xla", **o), 12, 4, kv_heads, 8, case, 5e-6)


@pytest.mark.parametrize(
    "case",
    [{}, {"window": 100}, pytest.param({"softcap": 2.0, "scale": 0.3, "window": 70, "segments": True})],
    ids=str,
)
def test_splash_means_attend(case: dict[str, Any]) -> None:
    """The kernel itself, interpreted."""
    compare(lambda *a, **o: splash(*a, interpret=True, **o), 256, 2, 1, 128, case, 2e-5)


def test_splash_of_latent_attention_means_attend() -> None:
    """Keys of 192, which the kernel takes as 256, and values of 128, of as many heads as queries."""
    compare(lambda *a, **o: splash(*a, interpret=True, **o), 256, 2, 2, 192, {"scale": 0.1}, 2e-5, value_dim=128)


@pytest.mark.parametrize("segments", [False, True])
def test_devices_run_splash_on_their_own_rows_and_heads(segments: bool) -> None:
    """Two rows over two devices, two kv heads over two others; XLA alone could not cut the call."""
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"))
    rows = NamedSharding(mesh, PartitionSpec(("data",)))
    cover = COVERS["splash"]._replace(run=lambda *a, **o: splash(*a, interpret=True, **o))
    case = {"segments": True} if segments else {}
    compare(by_device(cover, rows), 128, 4, 2, 128, case, 2e-5)


SHAPE, KEYS = (2, 256, 4, 128), (2, 256, 2, 128)


@pytest.mark.parametrize(
    ("kernel", "features", "dtype", "shapes"),
    [
        ("cudnn", {"window", "segments"}, "bfloat16", (SHAPE, KEYS, KEYS)),
        (None, set(), "float32", (SHAPE, KEYS, KEYS)),
        (None, {"softcap"}, "bfloat16", (SHAPE, KEYS, KEYS)),
        (None, {"slopes"}, "bfloat16", (SHAPE, KEYS, KEYS)),
        (None, {"chunk"}, "bfloat16", (SHAPE, KEYS, KEYS)),
        (None, {"block_sparse"}, "bfloat16", (SHAPE, KEYS, KEYS)),
        (None, {"selected"}, "bfloat16", (SHAPE, KEYS, KEYS)),
        (None, {"queries", "keys"}, "bfloat16", (SHAPE, KEYS, KEYS)),
        (None, set(), "bfloat16", ((2, 1, 4, 128), KEYS, KEYS)),  # one token after a cache
        (None, set(), "bfloat16", (SHAPE, KEYS, (2, 256, 2, 64))),  # latent attention's narrower values
        (None, set(), "bfloat16", ((2, 256, 4, 12),) * 3),  # no multiple of 8
        (None, set(), "bfloat16", ((2, 256, 4, 136),) * 3),  # too wide
        (None, set(), "bfloat16", ((2, 255, 4, 128),) * 3),  # odd length
    ],
)
def test_what_cudnn_covers(kernel: str | None, features: set[str], dtype: str, shapes: Any) -> None:
    assert covering(("cudnn",), features, dtype, *shapes) == kernel
    assert covering((), features, dtype, *shapes) is None


def test_what_splash_covers() -> None:
    assert covering(("splash",), {"softcap", "window"}, "float32", SHAPE, KEYS, KEYS) == "splash"
    latent = (2, 256, 4, 192), (2, 256, 4, 192), (2, 256, 4, 128)
    assert covering(("splash",), {"segments"}, "bfloat16", *latent) == "splash"
    assert covering(("splash",), set(), "bfloat16", KEYS, KEYS, (2, 256, 2, 256)) is None
    assert covering(("splash",), set(), "float32", *((2, 192, 4, 128),) * 3) is None
    assert covering(("splash",), set(), "float32", *((2, 256, 4, 64),) * 3) is None


@pytest.mark.parametrize(
    ("host", "kernels"),
    [
        (Host("cpu", 0.0, 1), ()),
        (Host("rocm", 0.0, 1), ()),
        (Host("cuda", 7.0, 1), ()),
        (Host("cuda", 8.0, 1), ("cudnn",)),
        (Host("cuda", 9.0, 8), ("cudnn",)),
        (Host("cuda", 9.0, 1), ("cudnn", "ragged")),
        (Host("cuda", 9.0, 1, here=False), ("cudnn",)),
        (Host("tpu", 0.0, 1), ("splash",)),
        (Host("tpu", 0.0, 4), ("splash",)),
    ],
)
def test_kernels_of_a_host(host: Host, kernels: tuple[str, ...]) -> None:
    assert (kernels_for(host), kernels_for(host, "none")) == (kernels, ())


def test_host_of_devices() -> None:
    assert host_of(jax.devices()) == Host("cpu", 0.0, len(jax.devices()))
    hopper = SimpleNamespace(
        platform="gpu", compute_capability="9.0", client=SimpleNamespace(platform_version="PJRT C API\ncuda 12080")
    )
    assert host_of([hopper, hopper]) == Host("cuda", 9.0, 2, here=False)
    amd = SimpleNamespace(platform="gpu", client=SimpleNamespace(platform_version="PJRT C API\nrocm 60300"))
    assert host_of([amd]) == Host("rocm", 0.0, 1, here=False)


def test_without_kernels_attention_is_attend() -> None:
    q, k, v, _ = inputs(8, 4, 2, 8)
    logits = Logits(0.5, softcap=2.0, block_sparse=BlockSparse(size=2, local=1, stride=2, heads="alike"))
    found = attention(q, k, v, Sight(), logits, Execution())
    np.testing.assert_array_equal(found, attend(q, k, v, Sight(), logits, "float32"))


@pytest.fixture
def cuda_lowering(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library asks the machine for its cuDNN and GPU even to lower for another."""
    from jax._src.cudnn import fused_attention_stablehlo as library

    monkeypatch.setattr(library, "check_cudnn_version", lambda: 91500)
    monkeypatch.setattr(library, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(library, "is_cuda_compute_capability_equal", lambda capability: False)


@pytest.mark.parametrize("segments", [False, True])
def test_lowered_for_cuda_it_is_the_flash_kernel(cuda_lowering: None, segments: bool) -> None:
    """Forward and backward become cuDNN's custom calls, and nothing has the scores' shape except a mask."""
    q, k, v, _ = (a.astype(jnp.bfloat16) for a in inputs(128, 4, 2, 64))
    sight = Sight(segments=documents(128) if segments else None)
    execution = Execution("bfloat16", "bfloat16", kernels=("cudnn",))

    def total(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention(q, k, v, sight, Logits(0.125, window=32), execution).astype(jnp.float32).sum()

    lowered = jax.jit(jax.grad(total, (0, 1, 2))).trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()
    bias = "Bias" if segments else ""
    assert f"__cudnn$fmhaScale{bias}Softmax" in lowered or f"__cudnn$fmha{bias}Softmax" in lowered
    assert f"{bias}SoftmaxBackward" in lowered
    assert "4x128x128" not in lowered


def test_members_of_a_population_share_the_kernel(cuda_lowering: None) -> None:
    """Under `vmap` the members join the kernel's batch (what flows back is each member's own, as in any model)."""
    q, k, v, g = (jnp.stack([a, a, a]).astype(jnp.bfloat16) for a in inputs(64, 4, 2, 16))
    execution = Execution("bfloat16", "bfloat16", kernels=("cudnn",))

    def total(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> jax.Array:
        return (g * attention(q, k, v, Sight(), Logits(0.25), execution)).astype(jnp.float32).sum()

    members = jax.jit(jax.vmap(jax.grad(total, (0, 1, 2))))
    lowered = members.trace(q, k, v, g).lower(lowering_platforms=("cuda",)).as_text()
    (call,) = [line for line in lowered.splitlines() if "@__cudnn$fmhaSoftmaxBackward" in line]
    assert "tensor<6x64x4x16xbf16>" in call
