"""Attention kernels that never hold the scores, for calls they cover; `attention.attend` is what they compute.

They read their operands in `dtype` and accumulate in float32; results come back in the queries' dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

Shape = tuple[int, ...]
LANES = 128  # of a TPU's registers


def cudnn(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch seq kv_heads head_dim"],
    v: Float[Array, "batch seq kv_heads head_dim"],
    *,
    scale: float,
    dtype: str,
    window: int | None = None,
    segments: Int[Array, "batch seq"] | None = None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "batch seq heads head_dim"]:
    """cuDNN's flash attention. It has no notion of documents: `segments` become a mask [batch, 1, seq, seq] that it
    reads, beside the causal blocks that it skips. `implementation="xla"` runs the same call anywhere, for tests."""
    mask = None if segments is None else (segments[:, None, :, None] == segments[:, None, None, :])
    out = jax.nn.dot_product_attention(
        q.astype(dtype),
        k.astype(dtype),
        v.astype(dtype),
        mask=mask,
        scale=scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),  # how many before the query
        implementation=implementation,
    )
    return out.astype(q.dtype)


def splash(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch seq kv_heads head_dim"],
    v: Float[Array, "batch seq kv_heads value_dim"],
    *,
    scale: float,
    dtype: str,
    window: int | None = None,
    softcap: float | None = None,
    segments: Int[Array, "batch seq"] | None = None,
    interpret: bool = False,
) -> Float[Array, "batch seq heads value_dim"]:
    """Splash attention on a TPU (jax.experimental.pallas.ops.tpu): blocks that a mask empties are never visited.

    Heads of a width that is no multiple of LANES are filled up with zeros, which leave scores and values as they are.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    batch, seq, heads, _ = q.shape
    value_dim = v.shape[-1]
    q, k, v = (jnp.pad(a, ((0, 0), (0, 0), (0, 0), (0, -a.shape[-1] % LANES))) for a in (q, k, v))
    group = heads // k.shape[2]
    shape = (seq, seq)
    mask = library.CausalMask(shape) if window is None else library.LocalMask(shape, (window - 1, 0), 0)
    kernel = library.make_splash_mqa_single_device(
        library.MultiHeadMask([mask] * group),
        block_sizes=_splash_blocks(library, seq),
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )
    grouped = (q * scale).reshape(batch, seq, k.shape[2], group, -1).transpose(0, 2, 3, 1, 4).astype(dtype)
    k, v = (a.transpose(0, 2, 1, 3).astype(dtype) for a in (k, v))
    ids = None if segments is None else library.SegmentIds(segments, segments)
    heads_of_a_row = jax.vmap(kernel, (0, 0, 0, None))
    out = jax.vmap(heads_of_a_row, (0, 0, 0, None if ids is None else 0))(grouped, k, v, ids)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, seq, heads, -1)[..., :value_dim].astype(q.dtype)


def _splash_blocks(library, seq: int):  # type: ignore[no-untyped-def]
    block = next(b for b in (512, 256, 128) if seq % b == 0)
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    return library.BlockSizes(**dict.fromkeys((*names, "block_q_dq", "block_kv_dq"), block))


class Cover(NamedTuple):
    """What a kernel computes: with which `features` of a call besides scale and causal order, and which sizes; whether
    values may be narrower than keys; whether XLA's partitioner knows how to cut it over devices."""

    run: Callable[..., Array]
    features: frozenset[str]
    dtypes: tuple[str, ...]
    head_dim: tuple[int, int, int]  # a multiple of, at least, at most
    narrow: bool
    seq: int  # a multiple of
    partitions: bool


# Sizes: jax/_src/cudnn/fused_attention_stablehlo.py (256 on Hopper, 128 before) and the block sizes of splash, which
# takes the 192 of latent attention as 256; of 64 taken as 128, half of what it multiplies would be zeros.
COVERS: dict[str, Cover] = {
    "cudnn": Cover(cudnn, frozenset({"window", "segments"}), ("bfloat16", "float16"), (8, 8, 128), False, 2, True),
    "splash": Cover(
        splash, frozenset({"window", "softcap", "segments"}), ("bfloat16", "float32"), (8, 128, 256), True, 128, False
    ),
}
HEADS = "tensor"  # the mesh axis that cuts heads, where it divides them


def by_device(cover: Cover, residual: NamedSharding | None) -> Callable[..., Array]:
    """`cover.run`, where it does not partition itself by every device on its own rows (those of the residual stream,
    whose sharding is given) and its own heads: attention needs nothing of the others'."""
    if cover.partitions or residual is None:
        return cover.run
    mesh, rows = residual.mesh, residual.spec[0]

    def run(q: Array, k: Array, v: Array, segments: Array | None = None, **asked: Any) -> Array:
        ways = mesh.shape.get(HEADS, 1)
        heads = PartitionSpec(rows, None, HEADS if k.shape[2] % ways == 0 else None, None)
        ids = () if segments is None else (segments,)

        def own(q: Array, k: Array, v: Array, *ids: Array) -> Array:
            return cover.run(q, k, v, **asked, **({"segments": ids[0]} if ids else {}))

        specs = (heads, heads, heads, *(PartitionSpec(rows, None) for _ in ids))
        # Replication over axes that are not named is not checked: the kernel does not say what it does.
        return jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)(q, k, v, *ids)

    return run


def covering(
    kernels: tuple[str, ...], features: set[str], dtype: str, queries: Shape, keys: Shape, values: Shape
) -> str | None:
    """The first of `kernels` that computes a call with these features and [batch, seq, heads, width] shapes, or None:
    the reference does. Named features are the fields of `Logits` and `Sight` that are set."""
    square = queries[1] == keys[1] and queries[3] == keys[3]
    for name in kernels:
        cover = COVERS.get(name)
        if cover is None or not square or not features <= cover.features or dtype not in cover.dtypes:
            continue
        multiple, least, most = cover.head_dim
        fits = queries[3] % multiple == 0 and least <= queries[3] <= most and queries[1] % cover.seq == 0
        if fits and (values[3] == keys[3] or (cover.narrow and values[3] < keys[3])):
            return name
    return None
