"""The sweep on the terminal while it trains: a table that renews itself, or plain lines when nobody watches."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

from llamax.sweep.tables import duration, si, status_table

LINE_SECONDS = 10.0


@contextmanager
def live(file: IO[str] | None = None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A report function for `run_local`, on stderr by default: rich Live on a terminal, plain lines elsewhere."""
    from rich.console import Console

    out = file or sys.stderr
    console = Console(file=out)
    if not console.is_terminal:
        yield _Lines(out)
        return
    from rich.live import Live

    with Live(console=console, refresh_per_second=4, transient=False) as view:
        yield lambda state: view.update(status_table(state, most=max(4, console.height - 6)))


class _Lines:
    """One line when a cell starts or ends, and one a running cell every ten seconds."""

    def __init__(self, out: IO[str]) -> None:
        self.out, self.states, self.due = out, {}, {}  # type: IO[str], dict[str, str], dict[str, float]

    def __call__(self, state: dict[str, Any]) -> None:
        done = len(state["cells"]) - state["left"]
        for row in state["cells"]:
            name, now = row["name"], time.monotonic()
            before = self.states.get(name, "pending")
            if row["state"] != before:
                self.states[name], self.due[name] = row["state"], now + LINE_SECONDS
                self._say(row, done, state)
            elif row["state"] == "running" and now >= self.due.get(name, 0.0):
                self.due[name] = now + LINE_SECONDS
                self._say(row, done, state)

    def _say(self, row: dict[str, Any], done: int, state: dict[str, Any]) -> None:
        parts = [f"[{done}/{len(state['cells'])}] {row['name']} {row['state']}"]
        if row["phase"]:
            parts.append(row["phase"])
        if row["step"]:
            parts.append(f"step {row['step']}/{row['steps']}")
        if row["loss"] is not None:
            parts.append(f"loss {row['loss']:.4f}")
        if row["tokens_per_second"] is not None:
            parts.append(f"{si(row['tokens_per_second'])} tokens/s")
        if row["error"]:
            parts.append(row["error"])
        if state["left"]:
            parts.append(f"{duration(state['seconds_left'])} left overall")
        print(", ".join(parts), file=self.out, flush=True)
