"""The command line, with eyes and faults: `python driver.py '{"rows": "rows.json"}' train ...`.

rows      a file that gets the rows of training and held-out batches that this process read, as JSON
versions  {package: version} that this process believes to have installed
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from signal import SIGKILL, SIGSTOP, SIGTERM, raise_signal
from typing import Any


def main() -> None:
    """Arm what is asked for, then run llamax as its command does."""
    asked = json.loads(sys.argv[1])
    sys.argv[1:] = sys.argv[2:]
    if "rows" in asked:
        watch_rows(Path(asked["rows"]))
    if "versions" in asked:
        from llamax.train import env

        found = env.versions()
        found.update(asked["versions"])
    for name, signal in (("sigterm_at", SIGTERM), ("kill_at", SIGKILL), ("stop_at", SIGSTOP)):
        if name in asked:
            at_step(asked[name], lambda step, signal=signal: raise_signal(signal))
    if "raise_at" in asked:
        at_step(asked["raise_at"], fail)
    from llamax.cli import main as llamax

    llamax()


def at_step(wanted: int, act: Callable[[int], None]) -> None:
    """Call `act` once, when the metrics of step `wanted` have come to this process."""
    from llamax.train.record import Record

    row, done = Record.row, []

    def watched(self: Record, step: int, *rest: Any) -> dict[str, Any]:
        if step >= wanted and not done:
            done.append(step)
            act(step)
        return row(self, step, *rest)

    Record.row = watched  # type: ignore[method-assign]


def fail(step: int) -> None:
    """The error that nobody expects."""
    raise RuntimeError(f"a fault at step {step}")


def watch_rows(file: Path) -> None:
    """Record the shape and the content of what the store was asked for."""
    from llamax.data import batches

    seen: dict[str, Any] = {"steps": {}, "held_out": []}
    of_steps, held_out = batches.TrainBatches.of_steps, batches._held_out_rows

    def watched(self: batches.TrainBatches, step: int, count: int) -> Any:
        found = of_steps(self, step, count)
        seen["steps"] |= {str(step + i): found["tokens"][i].tolist() for i in range(count)}
        file.write_text(json.dumps(seen))
        return found

    def watched_held_out(windows: Any, *rest: Any) -> Any:
        seen["held_out"].append(len(windows))
        file.write_text(json.dumps(seen))
        return held_out(windows, *rest)

    batches.TrainBatches.of_steps = watched  # type: ignore[method-assign]
    batches._held_out_rows = watched_held_out


if __name__ == "__main__":
    main()
