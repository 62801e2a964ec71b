"""What saving and data cost a run: on the shapes of the bench, from the accounts that the runs themselves keep.

    python tools/bench_goodput.py                 # a few minutes on two cores
    python tools/bench_goodput.py --seconds 60 --every 5 --json

Of each shape one run without checkpoints and one with a checkpoint every few seconds, in turns. What a save costs is
counted three ways: `stood` seconds in which the loop stood still for it (time.json, "checkpoint"), `slower` seconds by
which the same steps took longer with the writing behind them, `processor` seconds of all threads. Each is then given as
a share of the default interval. On a machine that others use, believe `stood` and `processor`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from bench_sides import SHAPES, run_config  # noqa: E402


def one(shape: dict[str, int], store: Path, folder: Path, steps: int, every: float | None) -> dict[str, float]:
    """A run of `steps` steps with a checkpoint every `every` seconds: {saves, wall, processor, kinds of time.json}."""
    from llamax.train.checkpoints import Checkpoints
    from llamax.train.loop import train
    from llamax.train.run_dir import read_time

    saves: list[int] = []
    save = Checkpoints.save

    def counted(self: Checkpoints, step: int, *rest: Any, **named: Any) -> None:
        saves.append(step)
        save(self, step, *rest, **named)

    config = run_config(shape, "float32")
    changes = {
        "data": config.data.model_copy(update={"store": str(store), "eval_tokens": 4096}),
        "train": config.train.model_copy(update={"steps": steps, "on_divergence": "skip"}),
        "checkpoint": config.checkpoint.model_copy(update={"every_seconds": every}),
    }
    Checkpoints.save = counted  # type: ignore[method-assign]
    try:
        before = _processor()
        train(config.model_copy(update=changes), folder)
    finally:
        Checkpoints.save = save  # type: ignore[method-assign]
    seconds = (read_time(folder) or {})["seconds"]
    return {"saves": len(saves), "processor": _processor() - before, **seconds}


def _processor() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def bench(shape: dict[str, int], store: Path, folder: Path, seconds: float, every: float) -> dict[str, float]:
    """What a save and what data cost runs of about `seconds` of training; shares are of the default interval."""
    from llamax.config.run import CheckpointConfig

    default = CheckpointConfig().every_seconds or 0.0
    trial = one(shape, store, folder / "trial", 200, None)
    steps = max(200, round(200 * seconds / trial["step"]))
    plain = one(shape, store, folder / "plain", steps, None)
    saving = one(shape, store, folder / "saving", steps, every)
    more = saving["saves"] - plain["saves"]  # both save once at the end
    cost = {
        "stood": (saving["checkpoint"] - plain["checkpoint"]) / max(more, 1),
        "slower": (saving["step"] - plain["step"]) / max(more, 1),
        "processor": (saving["processor"] - plain["processor"]) / max(more, 1),
    }
    shares = {f"{name}_share": value / default for name, value in cost.items()}
    waited = plain["data"] / (plain["step"] + plain["data"])
    return {"steps": steps, "step_seconds": plain["step"], "saves": more, **cost, **shares, "data_share": waited}


def table(result: dict[str, dict[str, float]]) -> str:
    """The result as Markdown."""
    lines = ["| shape | training s | saves | stood s | slower s | processor s | stood, of 300 s | data wait |"]
    lines.append("|---|--:|--:|--:|--:|--:|--:|--:|")
    for name, row in result.items():
        costs = f"{row['stood']:.3f} | {row['slower']:.3f} | {row['processor']:.3f} | {row['stood_share']:.3%}"
        lines.append(f"| {name} | {row['step_seconds']:.1f} | {row['saves']:.0f} | {costs} | {row['data_share']:.2%} |")
    return "\n".join(lines)


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="of training, a run")
    parser.add_argument("--every", type=float, default=3.0, help="seconds between saves of the run that saves")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), help="of bench_sides.py")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of the table")
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    from llamax.config.load import load_corpus
    from llamax.config.run import Bytes
    from llamax.data.store import build_store

    result = {}
    with tempfile.TemporaryDirectory() as folder:
        store = build_store(load_corpus("python-stdlib"), Bytes(), Path(folder) / "store", workers=1).path
        for name in options.shapes:
            print(f"{name}: three runs", file=sys.stderr, flush=True)
            shape = {**SHAPES[name], "vocab": 256}  # the store's tokens are bytes
            result[name] = bench(shape, store, Path(folder) / name, options.seconds, options.every)
            print(table({name: result[name]}), file=sys.stderr, flush=True)
    print(json.dumps(result) if options.json else table(result))


if __name__ == "__main__":
    main()
