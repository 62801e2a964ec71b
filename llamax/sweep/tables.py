"""Plans and states as rich tables that fit 100 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llamax.train.goodput import shares

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

    from llamax.sweep.packing import Group
    from llamax.sweep.plan import Plan

STYLES = {"done": "green", "diverged": "yellow", "running": "cyan", "failed": "red", "pending": "dim"}


def plan_tables(plan: Plan, workers: int = 1, groups: Sequence[Group] = ()) -> list[RenderableType]:
    """What a plan prints: the cells, their FLOPs under each convention, groups, the rules, totals, warnings."""
    from rich.text import Text

    from llamax.sweep.design_report import design_tables
    from llamax.sweep.throughput import wall_seconds

    columns = ("cell", "N", "D", "D/N", "batch", "steps", "lr", "epochs", "memory", "time")
    sizes = plain_table(*columns, title=f"Plan {plan.spec.name}")
    for c in plan.cells:
        epochs = "?" if c.epochs is None else f"{c.epochs:.3g}"
        shape = f"{c.batch}x{c.config.train.seq_len}"
        row = (c.name, si(c.n), si(c.tokens), f"{c.tokens_per_param:.3g}", shape, f"{c.steps:,}", f"{c.lr:.3g}", epochs)
        sizes.add_row(*row, si(c.memory_bytes, "B"), duration(c.seconds))
    conventions = list(plan.cells[0].flops) if plan.cells else []
    trained = ["trained 6n"] if plan.trunks else []
    flops = plain_table("cell", *conventions, *trained, title="Training FLOPs by convention")
    for c in plan.cells:
        own = [f"{c.trained_flops('6n'):.3e}"] if trained else []
        flops.add_row(c.name, *(f"{c.flops[name]:.3e}" for name in conventions), *own)
    wall = wall_seconds([c.seconds for c in plan.cells], workers)
    before = {c.name: c.seconds for c in plan.cells if c.name in plan.trunks}
    wall = max([wall, *(c.seconds + before[c.trunk] for c in plan.cells if c.trunk is not None)])
    totals = (
        f"{len(plan.cells)} cells, {plan.totals.get('flops_6n', 0.0):.3g} FLOPs (6n), "
        f"about {duration(wall)} with {workers} worker{'s' * (workers != 1)}"
    )
    lines = [
        *_population_lines(groups),
        Text.from_markup("[bold]Rules[/]"),
        *(Text(f"  {rule}") for rule in plan.rules.values()),
    ]
    if plan.cells:
        lines.append(Text(f"  for {plan.cells[0].name}:", style="dim"))
        lines += [Text(f"    {rule}") for rule in plan.cells[0].rules.values()]
    lines.append(Text(totals, style="bold"))
    if plan.trunks:
        lines.append(Text(saving(plan.totals["flops_6n"], plan.totals["separate_flops_6n"])))
    designed = design_tables(plan.design) if plan.design else []
    return [*designed, sizes, flops, *lines, *(Text(f"warning: {w}", style="yellow") for w in plan.warnings)]


def _population_lines(groups: Sequence[Group]) -> list[Text]:
    """Cells that can train together, whether they will, and why."""
    from rich.text import Text

    lines = [Text("Cells of one shape", style="bold")] if groups else []
    for group in groups:
        names = ", ".join(group.cells[:3]) + (f" and {len(group.cells) - 3} more" if len(group.cells) > 3 else "")
        how = "one by one" if group.size < 2 else f"{group.size} at a time as one population"
        time = "" if group.expected is None else f", expected {group.expected:.2f} of the time one by one"
        lines.append(Text(f"  {names}: {how}{time}; {group.rule}"))
    return lines


def saving(trained: float, separate: float) -> str:
    """What trunks save, in a sentence; FLOPs as 6 N D."""
    return (
        f"trunks and branches take {trained:.3g} FLOPs (6n) as trained; each horizon from scratch would take "
        f"{separate:.3g}, so {1 - trained / separate:.0%} is saved"
    )


def status_table(state: Mapping[str, Any], most: int | None = None) -> Table:
    """One row a cell; with `most`, only running, failed and the latest others up to that many rows."""
    counts = ", ".join(f"{n} {name}" for name, n in state["counts"].items() if n)
    left = f", about {duration(state['seconds_left'])} left" if state["left"] else ""
    columns = ("cell", "state", "step", "loss", "tokens/s", "time", "left", "note")
    table = plain_table(*columns, title=f"{state['study']}: {counts}{left}")
    if state.get("spent"):
        table.caption = f"time of all cells: {shares(state['spent'])}"
    rows = list(state["cells"])
    if most is not None and len(rows) > most:
        order = {"running": 0, "failed": 1, "diverged": 2, "pending": 3, "done": 4}
        kept = {row["name"] for row in sorted(rows, key=lambda row: order[row["state"]])[:most]}
        rows = [row for row in rows if row["name"] in kept]
    for row in rows:
        loss = "" if row["loss"] is None else f"{row['loss']:.4f}"
        rate = "" if row["tokens_per_second"] is None else si(row["tokens_per_second"])
        note = row["error"] or row["phase"] or ""
        state_text, step = f"[{STYLES[row['state']]}]{row['state']}[/]", f"{row['step'] or 0:,}/{row['steps']:,}"
        times = (duration(row["seconds"]), duration(row["seconds_left"]))
        table.add_row(row["name"], state_text, step, loss, rate, *times, _plain(note))
    return table


def jobs_table(jobs: Sequence[Mapping[str, Any]]) -> Table:
    """One row a launched job that lives or cannot be asked after, and how many have ended."""
    ended = sum(job["live"] is False for job in jobs)
    title = f"Launched workers: {len(jobs)}, {ended} of them ended"
    table = plain_table("job", "launcher", "state", "note", title=title)
    for job in jobs:
        if job["live"] is not False:
            table.add_row(job["id"], job["launcher"], job["state"], _plain(job["note"]))
    return table


def si(value: float, unit: str = "") -> str:
    """Three digits and a letter: 34.9k, 7.15M, 25.7MB."""
    for power, letter in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 10**power:
            return f"{value / 10**power:.3g}{letter}{unit}"
    return f"{value:.3g}{unit}"


def duration(seconds: float | None) -> str:
    """8s, 2m05s, 1h10m, 3d4h; empty for None."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.0f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d{hours % 24}h"
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"


def plain_table(*columns: str, title: str, texts: int = 1, narrow: bool = False) -> Table:
    """An empty table in the style of all of them: the first `texts` columns left, numbers right."""
    from rich import box
    from rich.table import Table

    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, int(not narrow)), pad_edge=False
    )
    for i, column in enumerate(columns):
        text = column in ("state", "note")
        table.add_column(
            column, justify="left" if i < texts or text else "right", no_wrap=not text, overflow="ellipsis"
        )
    return table


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text if len(text) <= 60 else text[:59] + "…")
