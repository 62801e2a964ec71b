"""Attention over cut sequences is attention over whole ones, and every device does the same work."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llamax.config.components import BlockSparse
from llamax.config.mesh import MeshConfig
from llamax.mesh.rules import make_mesh
from llamax.model import context
from llamax.model.attention import attend, attention
from llamax.model.context import attend_cut, block_size, pairs_of
from llamax.model.execution import Context, Execution
from llamax.model.position import alibi_slopes
from llamax.model.scores import Logits, Sight, visible, whole

BATCH, SEQ, HEADS, KV_HEADS, DIM, VALUE_DIM = 2, 64, 4, 2, 8, 6
CASES: dict[str, Logits] = {
    "causal": Logits(0.5),
    "cap": Logits(0.5, softcap=1.5),
    "window": Logits(0.5, window=9),
    "chunk": Logits(0.5, chunk=20),
    "alibi": Logits(0.5, slopes=tuple(alibi_slopes(HEADS).tolist())),
    "blocks": Logits(0.5, block_sparse=BlockSparse(size=4, local=2, stride=3)),
}


def cut(ways: int) -> Context:
    return Context(make_mesh(MeshConfig(data=1, tensor=2, context=ways)), ways)


def operands() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = [(HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, VALUE_DIM), (HEADS, VALUE_DIM)]
    q, k, v, g = (rng.standard_normal((BATCH, SEQ, *shape)).astype(np.float32) for shape in shapes)
    ids = np.cumsum(rng.random((BATCH, SEQ)) < 0.1, axis=1).astype(np.int32)
    return {"q": q, "k": k, "v": v, "g": g, "ids": ids}


@pytest.mark.parametrize(("case", "documents"), [("causal", False), *((case, True) for case in CASES)])
def test_value_and_gradients_equal_attend(case: str, documents: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four devices, blocks of 4 tokens, two a chunk; heads are cut over `tensor` meanwhile."""
    monkeypatch.setattr(context, "BLOCK", 4)
    given, where, logits = operands(), cut(4), CASES[case]
    ids = given["ids"] if documents else None
    order = where.order(SEQ)

    def both(f: Any, q: Any, k: Any, v: Any, g: Any) -> tuple[Any, ...]:
        out, pull = jax.vjp(f, q, k, v)
        return (out, *pull(g))

    plain = [given[name] for name in "qkvg"]
    sight = Sight(segments=ids)
    expected = jax.jit(lambda *a: both(lambda q, k, v: attend(q, k, v, sight, logits, "float32"), *a))(*plain)

    place = NamedSharding(where.mesh, PartitionSpec(None, "context", "tensor"))
    held = [jax.device_put(a[:, order], place) for a in plain]
    held_ids = None if ids is None else jnp.asarray(ids[:, order])
    found = jax.jit(lambda *a: both(lambda q, k, v: attend_cut(q, k, v, held_ids, logits, "float32", where), *a))(*held)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, np.asarray(theirs)[:, order], rtol=1e-5, atol=2e-6)


def test_bfloat16_products_stay_near_float32() -> None:
    given, where = operands(), cut(2)
    q, k, v = (jnp.asarray(given[name][:, where.order(SEQ)], jnp.bfloat16) for name in "qkv")
    logits = CASES["causal"]

    def total(q: Any, k: Any, v: Any, dtype: str) -> Any:
        return jnp.sum(attend_cut(q, k, v, None, logits, dtype, where).astype(jnp.float32) ** 2)

    both = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)), static_argnums=3)
    narrow = both.lower(*(a.astype(jnp.float32) for a in (q, k, v)), "bfloat16").as_text()
    gathers = [line for line in narrow.splitlines() if "all_gather" in line]
    assert gathers
    assert all("bf16" in line for line in gathers)  # float32 keys travel as what products read of them
    value, found = both(q, k, v, "bfloat16")
    wide, expected = both(*(a.astype(jnp.float32) for a in (q, k, v)), "float32")
    np.testing.assert_allclose(value, wide, rtol=0.01)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(ours.astype(np.float32), theirs, rtol=0.05, atol=0.05 * np.abs(theirs).max())


@pytest.mark.parametrize(("case", "seq"), [("causal", 4096), *((case, 64) for case in CASES)])
def test_the_pairs_are_those_that_see_something(case: str, seq: int) -> None:
    """Against the mask itself; what fills a list up is not counted. Causal work is equal on all devices."""
    where = Context(jax.make_mesh((1,), ("context",)), 4)
    logits, size = CASES[case], block_size(seq // 8)
    table = pairs_of(seq, where, logits)
    keep = np.asarray(visible(whole(seq, seq), Sight(), logits.window, logits.chunk)[0][0])
    some = keep.reshape(seq // size, size, seq // size, size).any((1, 3))
    found = {(query, key) for row in table for _, query, _, key, live in row.tolist() if live}
    assert found == set(zip(*np.nonzero(some), strict=True))
    blocks = where.order(seq).reshape(4, -1, size)[:, :, 0] // size
    for device, row in enumerate(table.tolist()):
        assert all(blocks[device, own] == query for own, query, _, _, _ in row)
        assert all(blocks.ravel()[gathered] == key for _, _, gathered, key, _ in row)
    if case == "causal":
        assert table[..., 4].all()
        many = seq // size
        assert table[..., 4].sum() == many * (many + 1) / 2


def test_a_block_is_never_tiny() -> None:
    assert block_size(8192) == 512
    assert block_size(640) == 320
    assert block_size(1031) == 1031  # a prime
    assert block_size(8) == 8


def test_order_is_two_chunks_a_device_one_from_either_end() -> None:
    where = Context(jax.make_mesh((1,), ("context",)), 2)
    assert where.order(8).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    execution = Execution(context=where)
    x = jnp.arange(16).reshape(2, 8)
    np.testing.assert_array_equal(execution.natural(execution.held(x)), x)
    np.testing.assert_array_equal(execution.held(x)[0], execution.positions(8))


def test_chosen_keys_go_by_the_mask() -> None:
    """`selected` is a mask of whole keys: `attention` leaves cut sequences to the reference, which reads it."""
    given, where = operands(), cut(4)
    order, chosen = where.order(SEQ), np.random.default_rng(1).random((BATCH, SEQ, SEQ)) < 0.5
    sight = Sight(selected=jnp.asarray(chosen))
    q, k, v = (jnp.asarray(given[name]) for name in "qkv")
    expected = attend(q, k, v, sight, Logits(0.5), "float32")
    mine = Sight(jnp.broadcast_to(order, (BATCH, SEQ)), selected=jnp.asarray(chosen[:, order]))
    found = attention(q[:, order], k, v, mine, Logits(0.5), Execution(context=where))
    np.testing.assert_allclose(found, np.asarray(expected)[:, order], rtol=1e-5, atol=2e-6)
