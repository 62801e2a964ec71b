"""What ran when: a profiler's trace as intervals, and the time that each of them is to be charged with.

`jax.profiler` writes planes of lines of events, alike in form and not in content:

    CPU    plane /host:CPU, one line a thread. An event with `hlo_op` is an operation; it may only have been started
           there and end later, where an event `end: NAME` of the same number says so. Loops lie over their bodies.
    GPU    planes /device:GPU:N, one line a stream. An event is a kernel, whose `hlo_op` names the operation.
    TPU    planes /device:TPU:N, one of their lines is `XLA Ops`, with loops over their bodies.
"""

from __future__ import annotations

import itertools
import re
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llamax.errors import UserError


class Span(NamedTuple):
    """An operation from `start` to `end` (nanoseconds) on `lane`, where at most the innermost runs at a time."""

    start: float
    end: float
    lane: str
    operation: str  # the HLO instruction
    event: str  # what the profiler calls it: a kernel's name
    module: str  # the program it belongs to, empty where the profiler does not say


def read_spans(folder: Path) -> dict[str, list[Span]]:
    """The spans of each device in the newest trace under `folder`. Raises UserError if there is none."""
    from jax.profiler import ProfileData

    found = sorted(folder.glob("**/*.xplane.pb"))
    if not found:
        raise UserError(f"{folder}: no trace there (*.xplane.pb); record one with `llamax profile`")
    data = ProfileData.from_file(str(found[-1]))  # the planes are views into it
    return spans_of(data.planes)


def spans_of(planes: Iterable[Any]) -> dict[str, list[Span]]:
    """The spans by device (`/device:GPU:0`, `cpu:0`); of planes as `jax.profiler.ProfileData` has them."""
    found: dict[str, list[Span]] = {}
    for plane in planes:
        if plane.name == "/host:CPU":
            for device, span in _cpu_spans(plane):
                found.setdefault(device, []).append(span)
        elif re.match(r"/device:(GPU|TPU):\d+$", plane.name) and (spans := _device_spans(plane)):
            found[plane.name] = spans
    accelerators = {device: spans for device, spans in found.items() if device.startswith("/device:")}
    return accelerators or found  # beside an accelerator, the CPU's operations are small change


def _device_spans(plane: Any) -> list[Span]:
    """The events of a TPU's `XLA Ops`, of a GPU's streams."""
    lines = list(plane.lines)
    chosen = [line for line in lines if line.name == "XLA Ops" or line.name.startswith("Stream")]
    streams = [line for line in chosen if line.name.startswith("Stream")]
    return [span for line in streams or chosen for span in _line_spans(line)]


def _line_spans(line: Any) -> list[Span]:
    spans = []
    for event in line.events:
        stats = dict(event.stats)
        name = re.match(r"%?([\w.\-]+)", event.name)  # a TPU's event is called by its instruction's whole text
        operation = stats.get("hlo_op") or (name[1] if name else event.name)
        spans.append(_span(event, line.name, operation, stats))
    return spans


def _cpu_spans(plane: Any) -> list[tuple[str, Span]]:
    """(device, span) of each operation, up to where it ended on whatever thread; each on a lane of its own."""
    begun, ends = [], {}
    for line in plane.lines:
        for event in line.events:
            if event.name.startswith("end: "):
                ends[dict(event.stats).get("_c")] = event.start_ns
            elif "hlo_op" in (stats := dict(event.stats)):
                begun.append((event, stats))
    spans = []
    for i, (event, stats) in enumerate(begun):
        span = _span(event, str(i), stats["hlo_op"], stats)
        end = ends.get(stats.get("_p"), span.end)
        spans.append((f"cpu:{stats.get('device_ordinal', 0)}", span._replace(end=max(span.end, end))))
    return spans


def _span(event: Any, lane: str, operation: str, stats: dict[str, Any]) -> Span:
    start = float(event.start_ns)
    return Span(start, start + float(event.duration_ns), lane, operation, event.name, str(stats.get("hlo_module", "")))


def self_times(spans: Sequence[Span], is_container: Sequence[bool]) -> tuple[list[float], float]:
    """(nanoseconds each span is charged with, nanoseconds in which none ran), which add up to first start to last end.

    At every moment the time goes in equal parts to the spans that run: of each lane the one begun last, without the
    containers (a loop, a call), which only have what is left when nothing else runs.
    """
    charged = [0.0] * len(spans)
    idle = 0.0
    marks = sorted({time for span in spans for time in (span.start, span.end)})
    waiting = deque(sorted(range(len(spans)), key=lambda i: (spans[i].start, -spans[i].end)))
    running: list[int] = []
    for now, then in itertools.pairwise(marks):
        while waiting and spans[waiting[0]].start <= now:
            running.append(waiting.popleft())
        running = [i for i in running if spans[i].end > now]
        top = {spans[i].lane: i for i in running}  # of each lane the one begun last, for they are in order
        working = [i for i in top.values() if not is_container[i]] or running[-1:]
        for i in working:
            charged[i] += (then - now) / len(working)
        idle += 0.0 if working else then - now
    return charged, idle
