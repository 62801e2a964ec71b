"""Intervals of a trace: against a walk nanosecond by nanosecond, and planes as each platform writes them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from jax.profiler import ProfileData

from llamax.errors import UserError
from llamax.report.trace import Span, read_spans, self_times, spans_of


def span(start: int, end: int, lane: str = "a", operation: str = "op") -> Span:
    return Span(start, end, lane, operation, operation, "")


def walked(spans: Sequence[Span], containers: Sequence[bool]) -> tuple[list[float], float]:
    """`self_times`, one nanosecond at a time and with no cleverness."""
    charged, idle = [0.0] * len(spans), 0.0
    for now in range(int(min(s.start for s in spans)), int(max(s.end for s in spans))):
        running = [i for i, s in enumerate(spans) if s.start <= now < s.end]
        order = sorted(running, key=lambda i: (spans[i].start, -spans[i].end, i))
        innermost = {spans[i].lane: i for i in order}
        working = [i for i in innermost.values() if not containers[i]] or order[-1:]
        for i in working:
            charged[i] += 1 / len(working)
        idle += not working
    return charged, idle


@pytest.mark.parametrize("seed", range(30))
def test_self_times_are_those_of_a_walk(seed: int) -> None:
    rng = random.Random(seed)
    spans, containers = [], []
    for _ in range(rng.randint(1, 25)):
        start = rng.randint(0, 60)
        spans.append(span(start, start + rng.randint(0, 30), rng.choice("abc")))
        containers.append(rng.random() < 0.3)
    charged, idle = self_times(spans, containers)
    expected, empty = walked(spans, containers)
    assert charged == pytest.approx(expected)
    assert idle == pytest.approx(empty)
    assert sum(charged) + idle == pytest.approx(max(s.end for s in spans) - min(s.start for s in spans))


def test_a_loop_has_what_its_body_leaves() -> None:
    loop, first, second = span(0, 100, "a", "while"), span(10, 40, "a"), span(40, 70, "b")
    assert self_times([loop, first, second], [True, False, False]) == ([40, 30, 30], 0)


def test_nested_events_of_a_line_are_counted_once() -> None:
    assert self_times([span(0, 100), span(20, 50), span(60, 70)], [False] * 3) == ([60, 30, 10], 0)


def test_two_streams_share_the_time_and_a_gap_is_idle() -> None:
    assert self_times([span(0, 40, "a"), span(20, 40, "b"), span(50, 60, "b")], [False] * 3) == ([30, 10, 10], 10)


# ---------------------------------------------------------------- planes
Event = tuple[str, int, int, dict[str, Any]]  # name, start and length in ns, stats


def planes(content: dict[str, dict[str, list[Event]]]) -> Any:
    """Planes of lines of events, through the same parser as a recorded file."""
    text = ""
    for plane, lines in content.items():
        events: dict[str, int] = {}
        stats: dict[str, int] = {}
        body = ""
        for number, (line, rows) in enumerate(lines.items()):
            inner = ""
            for name, start, length, values in rows:
                event = events.setdefault(name, len(events) + 1)
                told = "".join(
                    f"stats {{ metadata_id: {stats.setdefault(key, len(stats) + 1)} "
                    + (f"int64_value: {value}" if isinstance(value, int) else f'str_value: "{value}"')
                    + " }"
                    for key, value in values.items()
                )
                inner += f"events {{ metadata_id: {event} offset_ps: {start}000 duration_ps: {length}000 {told} }}"
            body += f'lines {{ id: {number} name: "{line}" {inner} }}'
        for kind, names in (("event", events), ("stat", stats)):
            body += "".join(
                f'{kind}_metadata {{ key: {i} value {{ id: {i} name: "{name}" }} }}' for name, i in names.items()
            )
        text += f'planes {{ name: "{plane}" {body} }}\n'
    data = ProfileData.from_text_proto(text)
    planes.kept = data  # type: ignore[attr-defined]  # the planes are views into it
    return data.planes


def intervals(spans: list[Span]) -> list[tuple[float, float, str]]:
    return sorted((s.start, s.end, s.operation) for s in spans)


def test_cpu_operations_last_until_they_end_on_another_thread() -> None:
    def op(name: str, producer: int, device: int = 0) -> dict[str, Any]:
        return {"hlo_op": name, "hlo_module": "jit_f", "device_ordinal": device, "_p": producer}

    found = spans_of(
        planes(
            {
                "/host:CPU": {
                    "main": [
                        ("while.1", 0, 5, op("while.1", 1)),
                        ("dot.2", 10, 2, op("dot.2", 2)),
                        ("Execute", 0, 500, {}),
                    ],
                    "worker": [
                        ("end: dot.2", 30, 1, {"_c": 2}),
                        ("end: while.1", 90, 1, {"_c": 1}),
                        ("add.3", 40, 20, op("add.3", 3)),
                        ("add.3", 41, 20, op("add.3", 4, device=1)),
                    ],
                },
                "/host:metadata": {},
            }
        )
    )
    assert intervals(found["cpu:0"]) == [(0, 90, "while.1"), (10, 30, "dot.2"), (40, 60, "add.3")]
    assert intervals(found["cpu:1"]) == [(41, 61, "add.3")]
    assert {s.module for s in found["cpu:0"]} == {"jit_f"}
    assert len({s.lane for s in found["cpu:0"]}) == 3


def test_gpu_kernels_of_the_streams_and_nothing_of_the_host() -> None:
    kernel = {"hlo_op": "loop_add_fusion.3", "hlo_module": "jit_dispatch"}
    found = spans_of(
        planes(
            {
                "/host:CPU": {"python": [("convert", 0, 9, {"hlo_op": "convert"})]},
                "/device:GPU:0": {
                    "Stream #13(Compute)": [("loop_add_fusion_3", 100, 50, kernel), ("gemm_kernel", 150, 10, {})],
                    "Stream #14(MemcpyD2D)": [("MemcpyD2D", 120, 5, {})],
                    "XLA Ops": [("loop_add_fusion.3", 100, 60, kernel)],
                    "Steps": [("0", 0, 900, {})],
                },
                "/device:GPU:1": {"Stream #13(Compute)": [("loop_add_fusion_3", 7, 3, kernel)]},
            }
        )
    )
    assert sorted(found) == ["/device:GPU:0", "/device:GPU:1"]
    assert intervals(found["/device:GPU:0"]) == [
        (100, 150, "loop_add_fusion.3"),
        (120, 125, "MemcpyD2D"),
        (150, 160, "gemm_kernel"),
    ]
    assert {s.lane for s in found["/device:GPU:0"]} == {"Stream #13(Compute)", "Stream #14(MemcpyD2D)"}


def test_tpu_operations_go_by_the_name_in_their_text() -> None:
    text = "%fusion.7 = bf16[8,128]{1,0:T(8,128)} fusion(%p), kind=kLoop"
    found = spans_of(
        planes(
            {
                "/device:TPU:0": {
                    "XLA Modules": [("jit_dispatch(1)", 0, 100, {})],
                    "XLA Ops": [("%while.1 = (s32[]) while(%t)", 0, 100, {}), (text, 20, 30, {})],
                    "Async XLA Ops": [("copy-start.1", 0, 90, {})],
                },
                "/device:TPU:0 SparseCore 0": {"XLA Ops": [("x", 0, 1, {})]},
            }
        )
    )
    assert {device: intervals(spans) for device, spans in found.items()} == {
        "/device:TPU:0": [(0, 100, "while.1"), (20, 50, "fusion.7")]
    }


def test_a_folder_without_a_trace(tmp_path: Any) -> None:
    with pytest.raises(UserError, match=r"no trace there \(\*\.xplane\.pb\)"):
        read_spans(tmp_path)
