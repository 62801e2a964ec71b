"""From a program and spans to the summary: what is read from XLA's text, what counts as what, and that it adds up."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from llamax.errors import UserError
from llamax.report.hlo import Program, dimensions, parse_program
from llamax.report.profile import CATEGORIES, IDLE, PARTS, describe, summarize
from llamax.report.trace import Span

# As XLA prints a GPU's program: a triton product, a library's product, cuDNN attention, a collective, a copy.
GPU = """HloModule jit_dispatch, is_scheduled=true

FileNames
1 "/src/llamax/model/attention.py"
2 "/src/llamax/model/linear.py"
3 "/venv/site-packages/optax/_src/transform.py"

FunctionNames
1 "SelfAttention.__call__"
2 "contract"
3 "scale_by_adam.<locals>.update_fn.<locals>.<lambda>"

FileLocations
1 {file_name_id=1 function_name_id=1 line=208 end_line=208 column=1 end_column=9}
2 {file_name_id=2 function_name_id=2 line=59 end_line=59 column=1 end_column=9}
3 {file_name_id=3 function_name_id=3 line=7 end_line=7 column=1 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=1}

%gemm_fusion (p0: bf16[64,32], p1: bf16[32,16]) -> f32[64,16] {
  %p0 = bf16[64,32]{1,0} parameter(0)
  %p1 = bf16[32,16]{1,0} parameter(1)
  ROOT %dot.1 = f32[64,16]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(dispatch)/transpose(jvp())/dot_general" stack_frame_id=2}
}

%fused_softmax (p2: f32[64,16]) -> f32[64,16] {
  %p2 = f32[64,16]{1,0} parameter(0)
  ROOT %exponential.1 = f32[64,16]{1,0} exponential(%p2)
}

%fused_slice (p3: f32[4,16], p4: s32[]) -> f32[1,16] {
  %p3 = f32[4,16]{1,0} parameter(0)
  %p4 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %add.9 = s32[] add(%p4, %zero)
  ROOT %dynamic-slice.1 = f32[1,16]{1,0} dynamic-slice(%p3, %add.9, %zero), dynamic_slice_sizes={1,16}
}

ENTRY %main (a: bf16[64,32], b: bf16[32,16]) -> f32[64,16] {
  %a = bf16[64,32]{1,0} parameter(0)
  %b = bf16[32,16]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %gemm_fusion_dot.1 = f32[64,16]{1,0} fusion(%a, %b), kind=kCustom, calls=%gemm_fusion
  %cublas-gemm.2 = (bf16[64,16]{1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", metadata={op_name="jit(dispatch)/dot_general" stack_frame_id=3}, backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  %cudnn.3 = (bf16[64,16]{1,0}, u8[0]{0}) custom-call(%a, %b), custom_call_target="__cudnn$fmhaSoftmax"
  %pallas.4 = bf16[64,16]{1,0} custom-call(%a), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(dispatch)/pallas_call" stack_frame_id=1}
  %all-reduce-start.5 = f32[64,16]{1,0} all-reduce-start(%gemm_fusion_dot.1), to_apply=%add
  %loop_exponential_fusion.6 = f32[64,16]{1,0} fusion(%gemm_fusion_dot.1), kind=kLoop, calls=%fused_softmax, metadata={op_name="jit(dispatch)/exp" stack_frame_id=1}
  %loop_slice_fusion.7 = f32[1,16]{1,0} fusion(%gemm_fusion_dot.1, %i), kind=kLoop, calls=%fused_slice
  %copy.8 = f32[64,16]{0,1} copy(%loop_exponential_fusion.6)
  %while.9 = (s32[], f32[64,16]{1,0}, /*index=2*/(f32[4]{0}, pred[])) while(%tuple), condition=%c, body=%body
  %scatter.10 = f32[64,16]{1,0} scatter(%copy.8, %i, %a), to_apply=%add
  ROOT %subtract.11 = f32[64,16]{1,0} subtract(%copy.8, %copy.8), metadata={op_name="jit(dispatch)/sub" stack_frame_id=3}
}
"""  # noqa: E501 (as XLA writes it)


@pytest.fixture(scope="module")
def gpu() -> Program:
    return parse_program(GPU)


def span(operation: str, event: str | None = None, start: int = 0, end: int = 1, module: str = "jit_dispatch") -> Span:
    return Span(start, end, operation, operation, event or operation, module)


# ---------------------------------------------------------------- what an operation is
@pytest.mark.parametrize(
    ("operation", "category"),
    [
        ("gemm_fusion_dot.1", "matmul"),
        ("cublas-gemm.2", "matmul"),
        ("cudnn.3", "kernel"),
        ("pallas.4", "kernel"),
        ("all-reduce-start.5", "collective"),
        ("loop_exponential_fusion.6", "exp"),
        ("loop_slice_fusion.7", "copy"),  # the sum of two indices is not arithmetic on the data
        ("copy.8", "copy"),
        ("while.9", "loop"),
        ("scatter.10", "gather"),
        ("subtract.11", "arith"),
    ],
)
def test_category(gpu: Program, operation: str, category: str) -> None:
    assert describe(gpu, span(operation)).category == category


@pytest.mark.parametrize(
    ("kernel", "category"),
    [
        ("loop_exponential_fusion_6", "exp"),  # a GPU kernel without hlo_op, named after its instruction
        ("nvjet_hsh_128x256", "matmul"),
        ("ncclDevKernel_AllReduce_Sum_f32", "collective"),
        ("MemcpyD2D", "copy"),
        ("something_else", "other"),
    ],
)
def test_category_of_a_kernel_the_profiler_names(gpu: Program, kernel: str, category: str) -> None:
    assert describe(gpu, span(kernel, module="")).category == category


def test_a_kernel_in_a_cuda_graph_is_found_by_its_own_name(gpu: Program) -> None:
    found = describe(gpu, span("command_buffer_2", event="loop_exponential_fusion_6"))
    assert (found.category, found.part) == ("exp", "attention")
    assert describe(gpu, span("command_buffer_2", event="nvjet_hsh_128x256")).category == "matmul"


def test_an_operation_of_another_program_is_not_looked_up(gpu: Program) -> None:
    assert describe(gpu, span("copy.8", module="jit_convert")).part == PARTS[-1].name
    assert describe(gpu, span("subtract.11", module="jit_convert")).category == "other"


def test_source_is_the_innermost_line_that_belongs_to_a_part(gpu: Program) -> None:
    product = describe(gpu, span("gemm_fusion_dot.1"))
    assert (product.part, product.where) == ("attention", "attention.py:208 SelfAttention.__call__")
    assert product.backward
    assert product.label == "dot f32[64,16]"
    assert describe(gpu, span("subtract.11")).where == "transform.py:7 scale_by_adam.update_fn"
    assert describe(gpu, span("subtract.11")).part == "optimizer"
    assert describe(gpu, span("copy.8")).part == "attention", "a copy without a line of its own has its operand's"
    assert describe(gpu, span("while.9")).part == "no source"


@pytest.mark.parametrize("operation", ["gemm_fusion_dot.1", "cublas-gemm.2"])
def test_flops(gpu: Program, operation: str) -> None:
    assert describe(gpu, span(operation)).flops == 2 * 64 * 16 * 32


def test_a_program_compiled_here() -> None:
    def f(x: Any, w: Any) -> Any:
        return jnp.exp(jnp.einsum("bij,jk->bik", x, w)).sum()

    compiled = jax.jit(f).lower(jnp.ones((3, 5, 7)), jnp.ones((7, 11))).compile()
    program = parse_program(compiled.as_text())
    assert program.name == "jit_f"
    total = sum(program.flops(part) for part in program.instructions.values() if part.opcode == "dot")
    assert total == 2 * 3 * 5 * 11 * 7
    products = [part for part in program.instructions.values() if part.opcode == "dot"]
    op_name, frames = program.source(products[0])
    assert "dot_general" in op_name
    assert re.match(rf"{re.escape(__file__)}:\d+ test_a_program_compiled_here", frames[0])


def test_dimensions() -> None:
    assert (dimensions("f32[2,3]"), dimensions("s32[]"), dimensions("token")) == ([2, 3], [], [])


def test_tables_name_nothing_twice_and_only_their_last_row_takes_the_rest() -> None:
    for rows in (CATEGORIES, PARTS):
        assert len({row.name for row in rows}) == len(rows)
        assert [row.pattern == "" for row in rows] == [False] * (len(rows) - 1) + [True]


# ---------------------------------------------------------------- adding up
def test_categories_and_parts_add_up_to_the_window(gpu: Program) -> None:
    spans = [
        span("while.9", start=0, end=1000),
        span("gemm_fusion_dot.1", start=100, end=400),
        span("gemm_fusion_dot.1", start=500, end=700),
        span("all-reduce-start.5", start=600, end=800),
        span("MemcpyD2D", start=1200, end=1300),
    ]
    found = summarize({"traced_steps": 2}, gpu, {"/device:GPU:0": spans, "/device:GPU:1": []})
    assert found["traced_device"] == "/device:GPU:0"
    assert found["window_seconds"] == pytest.approx(1300e-9 / 2)
    seconds = {name: amount["seconds"] * 2e9 for name, amount in found["shares"].items()}
    assert {name: value for name, value in seconds.items() if value} == pytest.approx(
        {"loop": 400, "matmul": 450, "collective": 150, "copy": 100, IDLE: 200}
    )
    assert sum(amount["share"] for amount in found["shares"].values()) == pytest.approx(1)
    parts = sum(sum(cells.values()) for cells in found["parts"].values())
    assert parts + found["shares"][IDLE]["seconds"] == pytest.approx(found["window_seconds"])
    assert sum(row["share"] for row in found["operations"]) + found["shares"][IDLE]["share"] == pytest.approx(1)
    first = found["operations"][0]
    assert (first["category"], first["count"], first["names"]) == ("matmul", 1, ["gemm_fusion_dot.1"])
    assert first["flops"] == 2 * 64 * 16 * 32
    assert first["flops_per_second"] == pytest.approx(first["flops"] / 225e-9)
    assert found["backward"]["attention"] == pytest.approx(600e-9 / 2)


def test_a_trace_without_operations(gpu: Program) -> None:
    with pytest.raises(UserError, match="no operations"):
        summarize({"traced_steps": 1}, gpu, {})
