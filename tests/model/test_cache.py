"""Decoding with a cache gives the logits of the whole sequence at once, for every attention kind."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamax.config.mesh import MeshConfig, load_rules
from llamax.errors import UserError
from llamax.mesh.rules import batch_sharding, make_mesh, shardings, spec_of
from llamax.model.cache import EMPTY, Cache, KeyValues, Latents, init_cache, map_cache, slot_positions
from llamax.model.execution import Execution
from llamax.model.transformer import Transformer

from .modules import small_config, small_model, tokens_of

GQA = {"kind": "gqa", "heads": 4, "kv_heads": 2}
MLA = {"kind": "mla", "heads": 4, "q_rank": 8, "kv_rank": 6, "nope_dim": 4, "rope_dim": 4, "value_dim": 5}
DSA = {**MLA, "indexer": {"heads": 2, "head_dim": 6, "top_k": 3}}
MOE = {"kind": "moe", "experts": 4, "top_k": 2, "expert": {"kind": "swiglu", "d_ff": 8}}
LONG = {"kind": "longrope", "short": [1.0, 1.1], "long": [1.5, 4.0], "original_max_len": 16, "factor": 2.0}
LLAMA4 = {"temperature": {"scale": 0.1, "floor": 3}, "window": None}
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {"attention": {**GQA, "softcap": 2.0}},
    "window": {"attention": {**GQA, "window": 4}},
    "chunk": {"attention": {**GQA, "chunk": 5}},
    "blocks": {
        "attention": {**GQA, "block_sparse": {"size": 2, "local": 2, "stride": 3}},
        "segments": [{"repeat": 2, "unit": [{}, {"attention": {"block_sparse": None}}]}],
    },
    "local_global": {
        "segments": [
            {"repeat": 2, "unit": [{"attention": {"window": 3}}, {"position": {"kind": "nope"}, "attention": LLAMA4}]},
            {"repeat": 1, "unit": [{"attention": {"chunk": 4}, "mlp": MOE}]},
        ]
    },
    "latent": {"attention": {**MLA, "q_rank": None}, "position": {"kind": "rope", "layout": "interleaved"}},
    "sparse": {"attention": DSA},
    "learned": {"position": {"kind": "learned"}},
    "sinusoidal": {"position": {"kind": "sinusoidal"}},
    "alibi_branch": {"position": {"kind": "alibi"}, "branch": MOE},
    "longrope": {"position": {"kind": "rope", "scaling": LONG}},
}
ROWS, LENGTH, PROMPT = 3, 20, 9


def decode_all(model: Transformer, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """(logits [rows, LENGTH, vocab] gathered from a prompt of unequal lengths, six single tokens, one more read of
    several columns and single tokens to the end, the cache)."""
    rows = jnp.arange(ROWS)
    out = jnp.full((ROWS, LENGTH, model.config.vocab_size), jnp.nan)

    def read(carry: Any, width: int, counts: jax.Array) -> Any:
        out, cache = carry
        counts = jnp.minimum(counts, LENGTH - cache.lengths)
        columns = cache.lengths[:, None] + jnp.arange(width)
        here = jnp.take_along_axis(tokens, jnp.minimum(columns, LENGTH - 1), 1)
        logits, cache = model.decode(here, cache, counts)
        place = jnp.where(jnp.arange(width) < counts[:, None], columns, LENGTH)
        return out.at[rows[:, None], place].set(logits, mode="drop"), cache

    def one(carry: Any, _: None) -> Any:
        return read(carry, 1, jnp.ones(ROWS, jnp.int32)), None

    carry = read((out, cache), PROMPT, jnp.asarray([PROMPT, 4, 1]))
    carry, _ = jax.lax.scan(one, carry, length=6)
    carry = read(carry, 8, jnp.asarray([0, 3, 8]))
    carry, _ = jax.lax.scan(one, carry, length=8)
    return carry


@pytest.mark.parametrize("name", VARIANTS)
def test_decoding_equals_the_whole_sequence(name: str) -> None:
    """Unequal prompts, ring buffers that come round several times, later prompts on a filled cache."""
    model, tokens = small_model(**VARIANTS[name]), tokens_of(ROWS, LENGTH)

    def both(model: Transformer, tokens: jax.Array) -> tuple[jax.Array, tuple[jax.Array, Cache]]:
        return model(tokens), decode_all(model, tokens, init_cache(model.config, ROWS, LENGTH))

    full, (found, cache) = jax.jit(both)(model, tokens)
    assert cache.lengths.tolist() == [LENGTH] * ROWS
    np.testing.assert_allclose(found, full, atol=2e-5)
    attention = model.config.blocks[0][1][0].attention
    slots = jax.tree.leaves(cache.layers[0][0])[0].shape[-2]
    assert slots == {"window": 4, "chunk": 5, "local_global": 3}.get(name, LENGTH)
    assert isinstance(cache.layers[0][0], Latents if attention.kind == "mla" else KeyValues)


def test_longrope_turns_as_planned() -> None:
    """A short prompt of a row that is to become long has the angles of long rows from its first token."""
    model, tokens = small_model(**VARIANTS["longrope"]), tokens_of(ROWS, LENGTH)
    read = jax.jit(lambda m, t, c: m.decode(t, c)[0])
    whole, start = jax.jit(lambda m, t: (m(t)[:, :8], m(t[:, :8])))(model, tokens)
    planned = read(model, tokens[:, :8], init_cache(model.config, ROWS, 12, planned=20))
    np.testing.assert_allclose(planned, whole, atol=1e-5)
    np.testing.assert_allclose(read(model, tokens[:, :8], init_cache(model.config, ROWS, 12)), start, atol=1e-5)
    assert float(jnp.abs(start - whole).max()) > 1e-2


def test_slots_hold_the_last_positions() -> None:
    """Against writing one position after another into a list."""
    for slots in (1, 3, 4):
        for length in range(12):
            held = [EMPTY] * slots
            for position in range(length):
                held[position % slots] = position
            assert slot_positions(slots, jnp.asarray([length])).tolist() == [held]


@pytest.mark.parametrize("name", ["full", "window", "latent", "sparse"])
def test_a_single_row_equals_the_whole_sequence(name: str) -> None:
    """One row and one token are written in place, by other code than several of either."""
    model, tokens = small_model(**VARIANTS[name]), tokens_of(1, 12)

    def both(model: Transformer) -> tuple[jax.Array, jax.Array, Cache, Cache]:
        first, cache = model.decode(tokens[:, :3], init_cache(model.config, 1, 12))

        def one(cache: Cache, token: jax.Array) -> tuple[Cache, jax.Array]:
            logits, cache = model.decode(token[None, None], cache)
            return cache, logits[0]

        cache, rest = jax.lax.scan(one, cache, tokens[0, 3:])
        idle = model.decode(tokens[:, :1], cache, jnp.zeros(1, jnp.int32))[1]
        return model(tokens), jnp.concatenate([first, rest.swapaxes(0, 1)], 1), cache, idle

    full, found, cache, idle = jax.jit(both)(model)
    np.testing.assert_allclose(found, full, atol=2e-5)
    jax.tree.map(np.testing.assert_array_equal, idle, cache)


@pytest.mark.parametrize("name", ["full", "window", "sparse"])
def test_a_call_without_tokens_changes_nothing(name: str) -> None:
    model = small_model(**VARIANTS[name])
    read = jax.jit(lambda m, t, c, n: m.decode(t, c, n)[1])
    cache = read(model, tokens_of(2, 6), init_cache(model.config, 2, 8), jnp.asarray([6, 4]))
    for width in (1, 3):
        after = read(model, tokens_of(2, width, seed=1), cache, jnp.zeros(2, jnp.int32))
        jax.tree.map(np.testing.assert_array_equal, after, cache)


def test_last_gives_each_row_s_last_logits() -> None:
    model, tokens, counts = small_model(), tokens_of(3, 5), jnp.asarray([5, 2, 1])
    cache = init_cache(model.config, 3, 5)
    logits, last = jax.jit(
        lambda m: (m.decode(tokens, cache, counts)[0], m.decode(tokens, cache, counts, last=True)[0])
    )(model)
    np.testing.assert_allclose(last[:, 0], logits[jnp.arange(3), counts - 1], atol=1e-6)


def test_a_row_beyond_the_capacity_is_not_silently_wrong() -> None:
    model = small_model()
    read = jax.jit(lambda m, t, c: m.decode(t, c, jnp.asarray([5, 4]))[0])
    logits = read(model, tokens_of(2, 5), init_cache(model.config, 2, 4))
    assert bool(jnp.isnan(logits[0]).all())
    assert not bool(jnp.isnan(logits[1]).any())


def test_learned_positions_limit_the_capacity() -> None:
    with pytest.raises(UserError, match=r"33 tokens.*max_seq_len=32"):
        init_cache(small_config(position={"kind": "learned"}), 1, 33)


def test_bfloat16_cache_stays_near() -> None:
    model, tokens = small_model(attention=MLA), tokens_of(2, 8)
    full, out = jax.jit(lambda m, t: m(t))(model, tokens), []
    cache, read = init_cache(model.config, 2, 8, "bfloat16"), jax.jit(lambda m, t, c: m.decode(t, c))
    for t in range(8):
        logits, cache = read(model, tokens[:, t : t + 1], cache)
        out.append(logits)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(cache.layers)} == {"bfloat16"}
    error = float(jnp.abs(jnp.concatenate(out, 1) - full).max())
    assert 0 < error < 0.05


@pytest.mark.parametrize("name", ["window", "sparse"])
def test_sharded_decoding_equals_one_device(name: str) -> None:
    """Rows over data, heads over tensor: parameters, cache and logits lie where the rules say."""
    config = small_config(**VARIANTS[name])
    rules, mesh = load_rules("default"), make_mesh(MeshConfig(data=4, tensor=2), jax.devices())
    model, tokens = small_model(**VARIANTS[name]), tokens_of(4, 12)
    execution = Execution(residual=batch_sharding(rules, mesh))

    def run(model: Transformer, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        first, cache = model.decode(tokens[:, :7], cache, jnp.asarray([7, 3, 5, 1]), execution, last=True)
        second, cache = model.decode(tokens[:, 7:8], cache, None, execution)
        return jnp.concatenate([first, second], 1), cache

    def place(axes: tuple[str, ...], array: jax.ShapeDtypeStruct) -> jax.sharding.NamedSharding:
        return jax.sharding.NamedSharding(mesh, spec_of(axes, array.shape, rules, mesh, "cache"))

    expected, _ = jax.jit(lambda m, t, c: run(m, t, c))(model, tokens, init_cache(config, 4, 12))
    places = map_cache(jax.eval_shape(lambda: init_cache(config, 4, 12)), place)
    cache = jax.jit(lambda: init_cache(config, 4, 12), out_shardings=places)()
    spread = jax.device_put(model, shardings(model, model, rules, mesh))
    found, cache = jax.jit(run, out_shardings=(None, places))(spread, tokens, cache)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    first = jax.tree.leaves(cache.layers)[0]
    per_row = (first.shape[1] // 4, first.shape[2] // 2 if name == "window" else first.shape[2])
    shard = first.sharding.shard_shape(first.shape)
    assert (shard[1], shard[2]) == per_row
