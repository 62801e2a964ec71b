"""Where a step's time goes: from a trace and the program's text to one page.

Pure functions: spans and a program in, a summary of JSON data out. Two tables say what counts as what.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from llamax.errors import UserError
from llamax.report.hlo import Instruction, Program
from llamax.report.trace import Span, self_times

FORMAT = 1
IDLE = "idle"
CONTAINERS = ("while", "conditional", "call")  # they run other operations


class Row(NamedTuple):
    """A category or a part: the first whose pattern is found in an operation's words has it."""

    name: str
    pattern: str
    meaning: str


def _words(text: str) -> str:
    """A pattern for any of these opcodes."""
    return rf"(?<![\w.-])({'|'.join(text.split())})(?![\w.-])"


# What an operation does. Its words are its opcode, the opcodes of what it fuses, and what _words_of adds; a fusion
# counts whole, by the first row that has any of them.
CATEGORIES = (
    Row(
        "collective",
        _words(r"all-reduce\S* all-gather\S* all-to-all reduce-scatter collective-\S+ ragged-all-to-all") + "|nccl",
        "communication between devices",
    ),
    Row("kernel", r"fmha|flash|pallas|triton_kernel|tpu_custom_call|mosaic", "kernels written by hand, or cuDNN's"),
    Row("matmul", _words("dot convolution ragged-dot") + "|gemm|matmul|cutlass|nvjet|xmma", "has a matrix product"),
    Row(
        "exp",
        _words("exponential exponential-minus-one log log-plus-one logistic tanh erf"),
        "exponentials: softmax, gates, cross-entropy",
    ),
    Row("gather", _words("gather scatter sort topk"), "lookups, scatters, sorts"),
    Row(
        "arith",
        _words(
            "add subtract multiply divide remainder maximum minimum negate abs sign clamp power sqrt rsqrt cbrt "
            r"floor ceil round-\S+ sine cosine reduce reduce-window reduce-precision select compare and or not xor "
            r"rng-\S+ map"
        ),
        "other arithmetic and reductions",
    ),
    Row(
        "copy",
        _words(
            "copy copy-start copy-done transpose convert bitcast bitcast-convert reshape slice dynamic-slice "
            "dynamic-update-slice concatenate pad broadcast reverse iota tuple"
        )
        + "|memcpy|memset",
        "copies, casts, transposes: no arithmetic",
    ),
    Row("loop", _words(" ".join(CONTAINERS)), "in a loop or call, between the operations in it"),
    Row("other", "", "none of these, or another program"),
)

# For whom it is done: the innermost line of its stack, as `path:line function`, that is found here.
PARTS = (
    Row("attention", r"llamax/model/(attention|mla|indexer|cache)", "projections, scores, softmax"),
    Row("experts", r"llamax/model/(moe|router)|llamax/train/balance", "router, experts"),
    Row("mlp", r"llamax/model/mlp", "feed-forward"),
    Row("norm", r"llamax/model/norm", "norms"),
    Row("position", r"llamax/model/position", "rotary and other positions"),
    Row("head, loss", r"llamax/model/(loss|mtp)", "logits, cross-entropy"),
    Row("embedding", r"llamax/model/transformer\.py:\d+ Transformer\.(embed|_placed)", "lookup"),
    Row("stream", r"llamax/model/(block|transformer|execution)", "residual stream, layers sliced from their stack"),
    Row("optimizer", r"optax/|llamax/train/(optimizer|schedule)|llamax/train/step\.py:\d+ train_step", "update, norms"),
    Row("step", r"llamax/train/", "batches, metrics, gradients"),
    Row("no source", r"", "made by the compiler"),
)


class Operation(NamedTuple):
    """What the summary says of one instruction."""

    category: str
    part: str
    where: str  # `attention.py:229 SelfAttention._project`
    backward: bool
    label: str  # `dot f32[128,384]`
    flops: float


def describe(program: Program, span: Span) -> Operation:
    """The operation a span is of; one that is not in the program goes by the profiler's name for it.

    In a CUDA graph the operation of every kernel is the graph, `command_buffer_3`; kernels that XLA wrote are still
    called by their instructions.
    """
    ours = span.module in ("", program.name)
    instruction = (program.find(span.operation) or program.find(span.event)) if ours else None
    if instruction is None:
        return Operation(_first(CATEGORIES, span.event.lower()), PARTS[-1].name, "", False, span.event, 0.0)
    op_name, frames = program.source(instruction)
    category = _first(CATEGORIES, _words_of(program, instruction, span))
    part, where = _place(frames)
    backward = "transpose(" in op_name
    return Operation(
        category, part, where, backward, _label(instruction, category, op_name), program.flops(instruction)
    )


def _words_of(program: Program, instruction: Instruction, span: Span) -> str:
    """Opcodes; of a custom call also its target, JAX's path, and the kernel the profiler saw."""
    opcodes = program.opcodes(instruction)
    if "custom-call" not in opcodes:
        return " ".join(opcodes)
    targets = [part.target for part in program.inside(instruction)]
    return " ".join([*opcodes, *targets, instruction.op_name, span.event]).lower()


def _first(rows: Sequence[Row], words: str) -> str:
    return next(row.name for row in rows if re.search(row.pattern, words))


def _place(frames: Sequence[str]) -> tuple[str, str]:
    """(part, the line that decided it): the innermost frame of any part but the last."""
    for frame in frames:
        for row in PARTS[:-1]:
            if re.search(row.pattern, frame):
                path, _, function = frame.partition(" ")
                return row.name, f"{path.rsplit('/', 1)[-1]} {_short(function)}"
    return PARTS[-1].name, ""


def _short(function: str) -> str:
    """`f.<locals>.g.<locals>.<lambda>` as `f.g`."""
    return re.sub(r"\.?<\w+>", "", function)


def _label(instruction: Instruction, category: str, op_name: str) -> str:
    """`dot f32[2,3]`: what the compiler calls it, or where that says nothing JAX's name of its last primitive."""
    name = re.sub(r"(_fusion)?[.\d]*$", "", instruction.name)
    primitive = op_name.rpartition("/")[2]
    name = "dot" if category == "matmul" else primitive if primitive and name in ("ynn", "fusion") else name
    return f"{name} {instruction.shape}"


# ---------------------------------------------------------------- adding up
def summarize(figures: dict[str, Any], program: Program, devices: dict[str, list[Span]]) -> dict[str, Any]:
    """The summary: `figures` as measured, with the time of one device divided in three ways.

    `shares` is by category, `parts` by part and category (`backward`: of a part, in the backward pass), `operations`
    by line of the source and shape, heaviest first; all in seconds a step. Categories and idle add up to
    `window_seconds`, from the first operation's start to the last one's end, a step; so do the parts with idle.

    Raises:
        UserError: no operation was recorded.
    """
    if not devices:
        raise UserError("the trace has no operations in it; this platform's profiler records none, use another")
    device = min(devices)
    spans = devices[device]
    found = {key: describe(program, Span(0, 0, "", *key)) for key in {span[3:] for span in spans}}
    operations = [found[span[3:]] for span in spans]
    container = [operation.category == "loop" for operation in operations]
    charged, idle = self_times(spans, container)
    unit = 1e-9 / figures["traced_steps"]
    window = (max(span.end for span in spans) - min(span.start for span in spans)) * unit
    table: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    groups: dict[tuple[Any, ...], list[tuple[float, Span]]] = defaultdict(list)
    backward: dict[str, float] = defaultdict(float)
    for span, operation, time in zip(spans, operations, charged, strict=True):
        table[operation.part][operation.category] += time * unit
        backward[operation.part] += time * unit * operation.backward
        groups[operation].append((time * unit, span))
    categories = {row.name: sum(cells.get(row.name, 0.0) for cells in table.values()) for row in CATEGORIES}
    return {
        "format": FORMAT,
        **figures,
        "traced_device": device,
        "window_seconds": window,
        "shares": {name: _amount(seconds, window) for name, seconds in [*categories.items(), (IDLE, idle * unit)]},
        "parts": {row.name: dict(table[row.name]) for row in PARTS if row.name in table},
        "backward": {row.name: backward[row.name] for row in PARTS if row.name in table},
        "operations": [_group(key, rows, window, figures["traced_steps"]) for key, rows in _heaviest(groups)],
        "rules": RULES | {row.name: row.meaning for row in (*CATEGORIES, *PARTS)},
    }


def _amount(seconds: float, window: float) -> dict[str, float]:
    return {"seconds": seconds, "share": seconds / window}


def _heaviest(groups: dict[Any, list[tuple[float, Span]]]) -> list[tuple[Any, list[tuple[float, Span]]]]:
    return sorted(groups.items(), key=lambda item: -sum(time for time, _ in item[1]))


def _group(operation: Operation, rows: list[tuple[float, Span]], window: float, steps: int) -> dict[str, Any]:
    """A group of like operations as JSON data; `names` are the instructions, as the trace shows them."""
    seconds = sum(time for time, _ in rows)
    names = sorted({span.operation for _, span in rows})
    flops = operation.flops * len(rows) / steps
    return {
        **operation._asdict(),
        **_amount(seconds, window),
        "flops": flops,
        "flops_per_second": flops / seconds if flops and seconds else None,
        "count": len(rows) / steps,
        "names": names,
    }


RULES = {
    "step_seconds": "median of untraced dispatches",
    "step_seconds_traced": "the same with the profiler on",
    "window_seconds": "first operation's start to last one's end on one device, divided by the traced steps",
    "shares": "each moment goes in equal parts to the operations then running; a loop has what is left",
    "idle": "no operation running on the device",
    "tokens_per_second": "batch x seq / step",
    "flops_per_second": "FLOPs of the causal convention / step",
    "mfu": "that / (peak of a device x devices)",
    "host_seconds_per_step": "load batches, call program, wait for it",
    "processor_seconds_per_step": "of this process, all threads",
    "compile_seconds": "tracing to HLO, then XLA",
    "memory_bytes": "argument + output - alias + temp + code",
    "operations": "flops: 2 x output x contracted size of each product; count and seconds are of one step",
}
