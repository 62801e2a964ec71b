"""What a training step costs here: llamax beside a PyTorch `transformers` Llama of the same shape, and start-up.

    python tools/bench.py                            # S1 S2 S3, all sides, start-up; about ten minutes on two cores
    python tools/bench.py --shapes S1 --sides llamax-f32 llamax-bf16 --no-startup
    python tools/bench.py --torch-python OTHER/bin/python --json --out benchmarks

Every side is a process that stays alive; rounds run them in turn (A B C, A B C, ...), so a slow minute of the machine
falls on all. Figures are medians over rounds; ratios are medians of the ratios within a round. CPU only. The PyTorch
sides need `pip install llamax[torch]`, or another interpreter that has torch and transformers (--torch-python).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench_sides import SHAPES, run_config
from bench_startup import bench_startup

ROOT = Path(__file__).resolve().parents[1]
SIDES = ("llamax-f32", "llamax-bf16", "torch-eager-f32", "torch-compile-f32", "torch-compile-bf16")
REFERENCE = "torch-compile-f32"
STEP_MULTIPLE = 10  # llamax runs ten steps a dispatch


STARTED = time.perf_counter()


def say(text: str) -> None:
    """Progress with elapsed seconds, on stderr."""
    print(f"{time.perf_counter() - STARTED:5.0f} s  {text}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- one side
class Worker:
    """A side in its own process; `about` is what it said when it was built."""

    def __init__(self, side: str, shape: str, python: str):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "LLAMAX_COMPILATION_CACHE": "0"}
        command = [python, str(ROOT / "tools" / "bench_sides.py"), side, shape]
        log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (read back if the side dies)
        self.side, self.log = side, log
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        )
        self.about = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.log.seek(0)
            last = (self.log.read().strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"{self.side}: {last}")
        return json.loads(line)

    def seconds(self, steps: int) -> float:
        """Wall seconds of `steps` steps."""
        assert self.process.stdin is not None
        print(json.dumps({"steps": steps}), file=self.process.stdin, flush=True)
        return self._answer()["seconds"]

    def finish(self) -> dict[str, Any]:
        """End the process; what it said last, with its peak memory."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        answer = self._answer()
        self.process.wait()
        return answer


@contextlib.contextmanager
def workers(sides: list[str], shape: str, pythons: dict[str, str]) -> Iterator[dict[str, Worker]]:
    """The sides that start; one that cannot is reported and left out."""
    running: dict[str, Worker] = {}
    try:
        for side in sides:
            say(f"{shape}: building {side}")
            try:
                running[side] = Worker(side, shape, pythons[side.split("-")[0]])
            except RuntimeError as error:
                say(f"{shape}: left out {error}")
        yield running
    finally:
        for worker in running.values():
            worker.process.kill()
            worker.process.wait()


# ---------------------------------------------------------------- a shape
def bench_shape(
    shape: str, sides: list[str], pythons: dict[str, str], rounds: int, seconds: float
) -> dict[str, dict[str, Any]]:
    """{side: figures} of one shape, sides interleaved."""
    from llamax.accounting.flops import training_flops_per_token

    config = run_config(SHAPES[shape], "float32")
    tokens = config.train.batch_size * config.train.seq_len
    flops = training_flops_per_token(config.model, config.train.seq_len)["causal"] * tokens
    with workers(sides, shape, pythons) as running:
        steps = {}
        for side, worker in running.items():
            worker.seconds(STEP_MULTIPLE)
            per_step = worker.seconds(STEP_MULTIPLE) / STEP_MULTIPLE
            steps[side] = max(STEP_MULTIPLE, STEP_MULTIPLE * round(seconds / per_step / STEP_MULTIPLE))
        milliseconds: dict[str, list[float]] = {side: [] for side in running}
        for i in range(rounds):
            say(f"{shape}: round {i + 1} of {rounds}")
            for side, worker in running.items():
                time.sleep(0.3)  # the last side's idle threads spin for a while
                milliseconds[side].append(1e3 * worker.seconds(steps[side]) / steps[side])
        ends = {side: worker.finish() for side, worker in running.items()}
    rows = {}
    for side, times in milliseconds.items():
        median = statistics.median(times)
        rows[side] = {
            **ends[side],
            "milliseconds": median,
            "milliseconds_rounds": times,
            "steps_per_round": steps[side],
            "tokens_per_second": 1e3 * tokens / median,
            "gflops": flops / median / 1e6,
        }
        if REFERENCE in milliseconds:
            rows[side]["ratio"] = statistics.median(a / b for a, b in zip(times, milliseconds[REFERENCE], strict=True))
    return rows


def measure_peak(python: str, rounds: int = 3) -> dict[str, float]:
    """Best GFLOP/s of large matrix products seen, {f32, bf16} (bf16 operands, float32 result)."""
    say("matmul peak")
    worker = Worker("matmul", "S1", python)
    for _ in range(rounds):
        worker.seconds(1)
    return worker.finish()["best_gflops"]


# ---------------------------------------------------------------- output
def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    peak = result["matmul_peak_gflops"]
    lines = [
        f"Matmul peak: {peak.get('f32', float('nan')):.0f} GFLOP/s f32, "
        f"{peak.get('bf16', float('nan')):.0f} bf16 x bf16 -> f32.",
        "",
        f"| shape | side | compile s | ms/step (range) | tokens/s | GFLOP/s | of peak | MiB | time / {REFERENCE} |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for shape, sides in result["shapes"].items():
        for side, row in sides.items():
            best = peak.get(side.rsplit("-", 1)[1], float("nan"))
            spread = f"{min(row['milliseconds_rounds']):.1f}-{max(row['milliseconds_rounds']):.1f}"
            ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
            lines.append(
                f"| {shape} | {side} | {row['compile_seconds']:.1f} | {row['milliseconds']:.1f} ({spread}) "
                f"| {row['tokens_per_second']:,.0f} | {row['gflops']:.1f} | {row['gflops'] / best:.0%} "
                f"| {row['peak_mib']:.0f} | {ratio} |"
            )
    if startup := result.get("startup"):
        lines += ["", "| start-up, ladder/d16 | first step s | 40 steps and the end s |", "|---|--:|--:|"]
        for name, row in startup.items():
            lines.append(f"| {name.replace('_', ' ')} | {row['first_step_seconds']:.1f} | {row['total_seconds']:.1f} |")
    return "\n".join(lines)


def save(result: dict[str, Any], folder: Path | None) -> None:
    """Write the dated file, after every shape, so that an interrupted hour is not lost."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['date'][:10]}-cpu{os.cpu_count()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    say(f"wrote {path}")


def main() -> None:
    """Parse, run, print; write a dated file with --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.5, help="of one side in one round")
    parser.add_argument("--torch-python", default=sys.executable, help="interpreter with torch and transformers")
    parser.add_argument("--no-startup", action="store_true")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of the table")
    parser.add_argument("--out", type=Path, help="folder for a dated JSON file")
    options = parser.parse_args()

    pythons = {"llamax": sys.executable, "torch": options.torch_python}
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "load_before": os.getloadavg()[0]},
        "python": platform.python_version(),
        "rounds": options.rounds,
        "shapes": {},
    }
    peak = result["matmul_peak_gflops"] = measure_peak(sys.executable)
    for shape in options.shapes:
        result["shapes"][shape] = bench_shape(shape, options.sides, pythons, options.rounds, options.seconds)
        again = measure_peak(sys.executable)
        peak |= {name: max(value, again[name]) for name, value in peak.items()}
        save(result, options.out)
    if not options.no_startup:
        result["startup"] = bench_startup(sys.executable)
    result["machine"]["load_after"] = os.getloadavg()[0]
    save(result, options.out)
    print(json.dumps(result) if options.json else table(result))


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
