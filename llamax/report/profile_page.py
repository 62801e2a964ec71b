"""The summary of a profile as one page: sections, for summary.md and for a terminal."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

from llamax.report.blocks import Block, Bullets, Grid, Section, Words
from llamax.report.profile import CATEGORIES, IDLE

WIDTH = 100
OPERATIONS = 16  # on the page; summary.json has all
SMALL = 0.0005  # of a step: not shown in the table of parts


def sections(summary: dict[str, Any]) -> tuple[Section, ...]:
    """The page: the step, where its time goes, its heaviest operations, how to go on."""
    return (
        Section("step", "The step", (Grid(("", "", ""), tuple(_facts(summary)), text=3),)),
        Section("parts", "Where it goes, % of the traced step", (_parts(summary), Words(_legend(summary)))),
        Section("operations", "Heaviest operations", (_operations(summary), Words(_note(summary)))),
        Section("files", "Look closer", (Bullets(tuple(_files(summary))),)),
    )


def _facts(summary: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    model, device, rules = summary["model"], summary["device"], summary["rules"]
    many = f"{device['count']} x " if device["count"] > 1 else ""
    yield (
        "what",
        f"{model['parameters']:,} parameters, {model['layers']} layers",
        f"batch {model['batch_size']} x {model['seq_len']} tokens, {model['compute_dtype']} products",
    )
    yield "where", f"{many}{device['kind']} ({device['platform']})", f"jax {summary['jax']}"
    yield "weights", summary["weights"], f"traced {_count(summary)}"
    step, traced = summary["step_seconds"], summary["step_seconds_traced"]
    yield "step", f"{1e3 * step:.4g} ms", rules["step_seconds"]
    yield "step, traced", f"{1e3 * traced:.4g} ms ({traced / step:.2f} x)", rules["step_seconds_traced"]
    yield "speed", f"{summary['tokens_per_second']:,.0f} tokens/s", rules["tokens_per_second"]
    yield "", f"{summary['flops_per_second'] / 1e9:,.4g} GFLOP/s", rules["flops_per_second"]
    used = summary["mfu"]
    if used is None:
        yield "MFU", "-", f"no peak known for {device['kind']!r} in {model['compute_dtype']}"
    else:
        peak = used["peak_flops_per_second"] / 1e12
        yield "MFU", f"{100 * used['fraction']:.1f} %", f"{rules['mfu']}; peak {peak:,.4g} TFLOP/s"
    busy, cores = summary["processor_seconds_per_step"], summary["cores"]
    load = f"; load average {summary['load_average']:.1f}" if summary["load_average"] is not None else ""
    used_cores = f"{1e3 * busy:.4g} ms ({busy / step:.2f} of {cores} cores)"
    yield "processor", used_cores, rules["processor_seconds_per_step"] + load
    host = summary["host_seconds_per_step"]
    yield "host", ", ".join(f"{k} {1e3 * v:.3g}" for k, v in host.items()) + " ms", rules["host_seconds_per_step"]
    compiling = summary["compile_seconds"]
    yield "compile", ", ".join(f"{k} {v:.1f} s" for k, v in compiling.items()), rules["compile_seconds"]
    yield "memory", *_memory(summary["memory_bytes"], rules["memory_bytes"])


def _memory(memory: dict[str, int | None], rule: str) -> tuple[str, str]:
    seen = "device" if memory["device_peak"] is not None else "process"
    return f"program {_mib(memory['program'])}, {seen} peak {_mib(memory[f'{seen}_peak'])}", rule


def _parts(summary: dict[str, Any]) -> Grid:
    """Parts of the model by category, in % of the window; the last row and column add up to all of it."""
    window, shares = summary["window_seconds"], summary["shares"]
    names = [row.name for row in CATEGORIES if shares[row.name]["share"] >= SMALL]
    rows = []
    for part, cells in summary["parts"].items():
        whole, back = sum(cells.values()), summary["backward"][part]
        if whole >= SMALL * window:
            seconds = [*(cells.get(name, 0.0) for name in names), whole, back]
            rows.append((part, *(_percent(value / window) for value in seconds)))
    rows.append((IDLE, *("" for _ in names), _percent(shares[IDLE]["share"]), ""))
    back = sum(summary["backward"].values()) / window
    rows.append(("all", *(_percent(shares[name]["share"]) for name in names), _percent(1.0), _percent(back)))
    return Grid(("part", *names, "all", "backward"), tuple(rows))


def _legend(summary: dict[str, Any]) -> str:
    rules, shares = summary["rules"], summary["shares"]
    named = [row.name for row in CATEGORIES if shares[row.name]["share"] >= SMALL]
    words = [f"{name}: {rules[name]}" for name in named if name != "matmul"]
    return "; ".join([*words, f"{IDLE}: {rules[IDLE]}"]) + f". {rules['shares'].capitalize()}."


def _operations(summary: dict[str, Any]) -> Grid:
    rows = []
    for row in summary["operations"][:OPERATIONS]:
        rate = row["flops_per_second"]
        where = (row["where"] or row["part"]).partition(" ")[0]
        rows.append(
            (
                row["label"],
                f"{where}{' back' if row['backward'] else ''}",
                row["category"],
                _percent(row["share"]),
                f"{1e3 * row['seconds']:.3g}",
                f"{row['count']:.3g}",
                "" if rate is None else f"{rate / 1e9:,.0f}",
            )
        )
    return Grid(("operation", "source", "kind", "%", "ms", "calls", "GFLOP/s"), tuple(rows), text=3)


def _note(summary: dict[str, Any]) -> str:
    shown = summary["operations"][:OPERATIONS]
    share = sum(row["share"] for row in shown)
    rest = len(summary["operations"]) - len(shown)
    return (
        f"{len(shown)} groups of like operations hold {100 * share:.0f} % of the step, {rest} more are in "
        "summary.json with the names the trace shows. ms and calls are of one step; GFLOP/s: 2 x output x "
        "contracted size of each product over the time it is charged with."
    )


def _files(summary: dict[str, Any]) -> Iterator[str]:
    files = summary["files"]
    yield f"ui.perfetto.dev, Open trace file: {files['perfetto']}"
    yield f"XProf: pip install xprof, then xprof --logdir {files['folder']}"
    yield f"all numbers: {files['summary']}"


def _count(summary: dict[str, Any]) -> str:
    steps, dispatches = summary["traced_steps"], summary["traced_dispatches"]
    first = summary["first_step"] + 1
    return f"{steps} steps in {dispatches} dispatch{'es' if dispatches > 1 else ''}, after step {first - 1}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}" if share else "-"


def _mib(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:,.0f} MiB"


# ---------------------------------------------------------------- drawing
def to_rich(parts: tuple[Section, ...]) -> Iterator[Any]:
    """The sections as rich renderables that fit in WIDTH columns."""
    from rich.text import Text

    for part in parts:
        yield Text(f"\n{part.title}", style="bold")
        yield from (_drawn(block) for block in part.blocks)


def to_text(title: str, parts: tuple[Section, ...]) -> str:
    """The sections as Markdown that reads alike as plain text: tables are set in columns, at most WIDTH wide."""
    lines = [f"# {title}"]
    for part in parts:
        lines += ["", f"## {part.title}"]
        for block in part.blocks:
            text = _plain(_drawn(block))
            lines += ["", "```", *text, "```"] if isinstance(block, Grid) else ["", *text]
    return "\n".join(lines) + "\n"


def _plain(drawn: Any) -> list[str]:
    from rich.console import Console

    console = Console(width=WIDTH, file=io.StringIO(), color_system=None, legacy_windows=False)
    with console.capture() as capture:
        console.print(drawn)
    return [line.rstrip() for line in capture.get().splitlines()]


def _drawn(block: Block) -> Any:
    from rich.table import Table
    from rich.text import Text

    if isinstance(block, Words):
        return Text(block.text, style="dim")
    if isinstance(block, Bullets):
        return Text("\n".join(f"- {item}" for item in block.items))
    assert isinstance(block, Grid)
    table = Table(box=None, header_style="bold", pad_edge=False, show_header=any(block.columns))
    for i, name in enumerate(block.columns):
        table.add_column(name, justify="left" if i < block.text else "right", overflow="fold")
    for row in block.rows:
        table.add_row(*(Text(cell) for cell in row))
    return table
