"""Collectives and memory traffic of compiled programs against sums done by hand and XLA's own analysis."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llamax.report.collectives import Collective, _groups, collectives, spanned
from llamax.report.hlo import Instruction, Program, parse_program, type_bytes
from llamax.report.traffic import memory_traffic

SIZES = {"data": 2, "tensor": 4}
ROUNDS = 5


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "tensor"))


def compiled(function: Callable[..., Any], mesh: Mesh, specs: tuple[P, ...], *shapes: tuple[int, ...]) -> Program:
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    return parse_program(jax.jit(function).lower(*arguments).compile().as_text())


def totals(found: list[Collective]) -> dict[tuple[str, tuple[str, ...]], tuple[float, float]]:
    """(times, bytes sent) by kind and axes."""
    sums: dict[Any, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for one in found:
        sums[one.kind, one.axes][0] += one.times
        sums[one.kind, one.axes][1] += one.sent
    return {key: (times, sent) for key, (times, sent) in sums.items()}


def test_known_collectives_inside_and_outside_a_loop(mesh: Mesh) -> None:
    """Every device holds [16, 32] floats, 2 KiB; the loop gathers, scatters, exchanges and passes on."""

    def device(x: jax.Array) -> jax.Array:
        def body(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            whole = jax.lax.all_gather(x, "tensor", tiled=True)  # [64, 32]: 8 KiB, of which 6 KiB are sent
            part = jax.lax.psum_scatter(jnp.sin(whole), "tensor", tiled=True)  # the same back
            turned = jax.lax.all_to_all(part, "data", 0, 1, tiled=True)  # 2 KiB, of which half are sent
            y = jnp.cos(turned).reshape(16, 32)
            return jax.lax.ppermute(y, "tensor", [(0, 1), (1, 2), (2, 3), (3, 0)]), None

        x, _ = jax.lax.scan(body, x, None, length=ROUNDS)
        return jax.lax.psum(x, ("data", "tensor"))  # 2 KiB over 8 devices: 2 x 7/8

    mapped = jax.shard_map(device, mesh=mesh, in_specs=P(("data", "tensor")), out_specs=P(), check_vma=False)
    found = totals(collectives(compiled(mapped, mesh, (P(("data", "tensor")),), (128, 32)), SIZES))
    assert found == {
        ("all-gather", ("tensor",)): (ROUNDS, ROUNDS * 6144),
        ("reduce-scatter", ("tensor",)): (ROUNDS, ROUNDS * 6144),
        ("all-to-all", ("data",)): (ROUNDS, ROUNDS * 1024),
        ("collective-permute", ("tensor",)): (ROUNDS, ROUNDS * 2048),
        ("all-reduce", ("data", "tensor")): (1, 3584),
    }


def test_what_the_partitioner_puts_in(mesh: Mesh) -> None:
    """A product over a cut dimension: 64 x 16 floats summed over `tensor`, on every device of `data` its own half."""

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x @ w, NamedSharding(mesh, P("data", None)))

    program = compiled(product, mesh, (P("data", "tensor"), P("tensor", None)), (64, 128), (128, 16))
    assert totals(collectives(program, SIZES)) == {("all-reduce", ("tensor",)): (1, 32 * 16 * 4 * 2 * 3 / 4)}


def test_permutations_in_both_directions_at_once(mesh: Mesh) -> None:
    """On a ring of four; in a group of two forth and back are the same pairs."""
    ring = [(i, (i + 1) % 4) for i in range(4)]

    def device(x: jax.Array) -> jax.Array:
        there = jax.lax.ppermute(x, "tensor", ring)
        return there + jax.lax.ppermute(2 * x, "tensor", [(b, a) for a, b in ring])

    mapped = jax.shard_map(device, mesh=mesh, in_specs=P("tensor"), out_specs=P("tensor"), check_vma=False)
    found = collectives(compiled(mapped, mesh, (P("tensor"),), (64,)), SIZES)
    assert [(one.kind, one.bytes, one.both_ways) for one in found] == [("collective-permute", 64, True)] * 2


@pytest.mark.parametrize(
    ("text", "groups", "axes"),
    [
        # as a TPU program writes them, for 4 x 2 x 2 devices
        ("replica_groups={{0,2},{4,6},{8,10},{12,14},{1,3},{5,7},{9,11},{13,15}}", (0, 2), ("fsdp",)),
        ("replica_groups=[8,2]<=[16], use_global_device_ids=true", (0, 1), ("tensor",)),
        ("replica_groups=[8,2]<=[8,2]T(1,0), dimensions={3}", (0, 2), ("fsdp",)),
        ("replica_groups=[4,4]<=[4,2,2]T(2,1,0), to_apply=%add", (0, 4, 8, 12), ("data",)),
        ("replica_groups=mesh['a'=2,'b'=8], device_ids=([4,2,2]T(1,0,2)) {'a'}, to_apply=%add", (0, 2), ("fsdp",)),
        ("replica_groups=mesh['a'=8,'b'=1,'c'=2] {'c'}, to_apply=%add", (0, 1), ("tensor",)),
        ("replica_groups=mesh['a'=8,'b'=1,'c'=2] {'a','b'}, x", (0, 2, 4, 6, 8, 10, 12, 14), ("data", "fsdp")),
        ("replica_groups={}, to_apply=%add", tuple(range(16)), ("data", "fsdp", "tensor")),
        ("channel_id=59, source_target_pairs={{0,4},{4,8},{8,12},{12,0}}", (0, 4), ("data",)),
    ],
)
def test_groups_in_every_form(text: str, groups: tuple[int, ...], axes: tuple[str, ...]) -> None:
    part = Instruction("x", "all-reduce", "f32[]", (), None, "", "", (), ", " + text)
    found = _groups(part, 16)
    assert found[0] == groups
    assert spanned(found, {"data": 4, "fsdp": 2, "tensor": 2}) == axes


def test_a_fusion_of_a_sum_and_a_slice_is_a_reduce_scatter() -> None:
    """As a TPU program spells it, started apart from where it ends."""
    text = """HloModule m

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%fused (p: f32[64,8]) -> f32[16,8] {
  %p = f32[64,8]{1,0:T(8,128)} parameter(0)
  %i = s32[] constant(0)
  %r = f32[64,8]{1,0:T(8,128)} all-reduce(%p), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %d = f32[16,8]{1,0:T(8,128)} dynamic-slice(%r, %i, %i), dynamic_slice_sizes={16,8}
}

ENTRY %main (x: f32[64,8]) -> f32[16,8] {
  %x = f32[64,8]{1,0:T(8,128)} parameter(0)
  %g = (f32[64,8]{1,0}, f32[256,8]{1,0:T(8,128)S(1)}) all-gather-start(%x), replica_groups=[2,4]<=[8], dimensions={0}
  %h = f32[256,8]{1,0:T(8,128)S(1)} all-gather-done(%g)
  ROOT %f = f32[16,8]{1,0:T(8,128)} fusion(%x), kind=kCustom, calls=%fused
}
"""
    program = parse_program(text)
    assert totals(collectives(program, SIZES)) == {
        ("reduce-scatter", ("tensor",)): (1, 64 * 8 * 4 * 3 / 4),
        ("all-gather", ("tensor",)): (1, 256 * 8 * 4 * 3 / 4),
    }


def test_what_follows_a_kernel_that_speaks_in_several_lines() -> None:
    """As a TPU program spells a splash attention: one of its lines begins with a brace, and does not end the loop's
    body. A ragged exchange sends its first operand; the second is the buffer of its result."""
    text = """HloModule m

%body (p: (s32[], f32[64,8])) -> (s32[], f32[64,8]) {
  %p = (s32[], f32[64,8]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%p), index=0
  %x = f32[64,8]{1,0} get-tuple-element(%p), index=1
  %r = f32[64,8]{1,0} ragged-all-to-all(%x, %x, %n, %n, %n, %n), channel_id=2, replica_groups=[2,4]<=[8]
  %k = f32[64,8]{1,0} custom-call(%r), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="splash"}
  %g = f32[256,8]{1,0} all-gather(%k), replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %t = (s32[], f32[64,8]{1,0}) tuple(%n, %k)
}

%end (q: (s32[], f32[64,8])) -> pred[] {
  %q = (s32[], f32[64,8]{1,0}) parameter(0)
  ROOT %c = pred[] constant(true)
}, execution_thread="main"

ENTRY %main (y: (s32[], f32[64,8])) -> (s32[], f32[64,8]) {
  %y = (s32[], f32[64,8]{1,0}) parameter(0)
  ROOT %w = (s32[], f32[64,8]{1,0}) while(%y), condition=%end, body=%body, backend_config={"known_trip_count":{"n":"5"}}
}
"""
    program = parse_program(text)
    assert [part.name for part in program.computations["body"]] == ["p", "n", "x", "r", "k", "g", "t"]
    assert program.instructions["k"].op_name == "splash"
    assert totals(collectives(program, SIZES)) == {
        ("ragged-all-to-all", ("tensor",)): (5, 5 * 64 * 8 * 4 * 3 / 4),
        ("all-gather", ("tensor",)): (5, 5 * 256 * 8 * 4 * 3 / 4),
    }


def test_type_bytes() -> None:
    text = "(f32[4,128]{1,0:T(8,128)}, bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, pred[7]{0}, "
    text += "/*index=3*/s4[8]{0:S(1)}, f8e4m3fn[5])"
    assert type_bytes(text) == 2048 + 12 + 7 + 4 + 5
    assert type_bytes(text, "") == 2048 + 7 + 5
    assert type_bytes(text, "S(1)") == 12 + 4


# ---------------------------------------------------------------- memory traffic
def straight(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    y = jnp.tanh(x @ w) + 1
    return (y @ w.T).sum(0), y


def looped(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A scan that reads a slice of `w` and writes one of its result each round."""

    def body(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = jnp.tanh(x @ w)
        return y, y

    return jax.lax.scan(body, x, w)


def test_traffic_of_straight_code_is_what_xla_counts() -> None:
    done = jax.jit(straight).lower(np.ones((256, 512), np.float32), np.ones((512, 128), np.float32)).compile()
    assert memory_traffic(parse_program(done.as_text())) == pytest.approx(
        done.cost_analysis()["bytes accessed"], rel=0.01
    )


def test_the_workspace_of_a_library_is_not_traffic() -> None:
    """A product [4, 8] x [8, 2] in float32 by cuBLAS, which reserves 32 MiB."""
    text = """HloModule m

ENTRY %main (x: f32[4,8], w: f32[8,2]) -> f32[4,2] {
  %x = f32[4,8]{1,0} parameter(0)
  %w = f32[8,2]{1,0} parameter(1)
  %c = (f32[4,2]{1,0}, s8[33554432]{0}) custom-call(%x, %w), custom_call_target="__cublas$gemm"
  ROOT %y = f32[4,2]{1,0} get-tuple-element(%c), index=0
}
"""
    assert memory_traffic(parse_program(text)) == 4 * (32 + 16 + 8)


def test_traffic_of_a_loop_is_its_body_as_often_as_it_runs() -> None:
    """XLA counts the body once: the difference is rounds - 1 times what one more round adds."""
    x = np.ones((256, 512), np.float32)
    once, many = (
        jax.jit(looped).lower(x, np.ones((rounds, 512, 512), np.float32)).compile() for rounds in (ROUNDS, 3 * ROUNDS)
    )
    a, b = (memory_traffic(parse_program(done.as_text())) for done in (once, many))
    body = (b - a) / (2 * ROUNDS)
    outside = a - ROUNDS * body
    # Weights sliced (read, written) and read again, x read, y written, read, written in the stack: 3 MiB to 7 MiB.
    assert 3 * 2**20 < body < 8 * 2**20
    assert outside + body == pytest.approx(once.cost_analysis()["bytes accessed"], rel=0.25)
