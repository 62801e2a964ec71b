"""From launching `llamax train` to its first logged step: ladder/d16, with and without a compilation cache.

    python tools/bench_startup.py                        # two minutes on two cores
    python tools/bench_startup.py --root . --root OTHER  # two checkouts in turn, to compare them
    python tools/bench_startup.py --repeats 5 --json

`cold` compiles, `warm` finds the compilation cache, both with a ready token store; `first ever` also builds the store
of the default corpus. Each start is a process; rounds go cold, warm, cold, warm, ..., and figures are medians.
Processor seconds are user + system time of the process: on a shared machine they mean more than its wall seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RUN: dict[str, Any] = {
    "model": {"base": "ladder/d16", "max_seq_len": 128},
    "train": {"batch_size": 16, "seq_len": 128, "steps": 40},
    "data": {"eval_tokens": 65536},
}
Figures = dict[str, float]


def launch(python: str, root: Path, run: dict[str, Any], here: Path) -> Figures:
    """One `llamax train` of the checkout at `root`: seconds and processor seconds to its first row and to its end.

    `here` holds the caches. Raises RuntimeError with the end of the run's log if it fails.
    """
    where, config = here / "run", here / "run.yaml"
    shutil.rmtree(where, ignore_errors=True)
    config.write_text(json.dumps(run))  # JSON is YAML
    environment = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu", "LLAMAX_CACHE": f"{here}/cache"}
    start_it = "from llamax.cli import main; main()"
    command = [python, "-c", start_it, "train", str(config), "--run-dir", str(where)]
    log = (here / "log").open("w+")  # a pipe nobody reads would fill and block the run
    start = time.perf_counter()
    process = subprocess.Popen(command, env=environment, cwd=root, stdout=subprocess.DEVNULL, stderr=log)
    figures: Figures = {}
    while True:
        if not figures and _size(where / "metrics.jsonl"):
            figures["first_step_seconds"] = time.perf_counter() - start
            figures["first_step_processor_seconds"] = _processor_seconds(process.pid)
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        time.sleep(0.005)
    figures["total_seconds"] = time.perf_counter() - start
    figures["total_processor_seconds"] = usage.ru_utime + usage.ru_stime
    process.returncode = os.waitstatus_to_exitcode(status)
    log.seek(0)
    if process.returncode or len(figures) < 4:
        raise RuntimeError(f"llamax train failed: {log.read()[-2000:]}")
    log.close()
    return figures


def _size(path: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


def _processor_seconds(pid: int) -> float:
    """User + system time of a running process so far; NaN where the system does not tell."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return float("nan")


def bench_startup(
    python: str, repeats: int = 3, root: Path = ROOT, run: dict[str, Any] | None = None
) -> dict[str, Figures]:
    """{first_ever, cold, warm: figures of `launch`}, medians of `repeats` for the last two."""
    return compare_startup(python, [root], repeats, run)[str(root)]


def compare_startup(
    python: str, roots: list[Path], repeats: int = 3, run: dict[str, Any] | None = None
) -> dict[str, dict[str, Figures]]:
    """{checkout: figures of `bench_startup`}, the checkouts in turn within every round."""
    with tempfile.TemporaryDirectory() as folder:
        heres = {root: Path(folder) / str(i) for i, root in enumerate(roots)}
        found: dict[Path, dict[str, list[Figures]]] = {root: {"cold": [], "warm": []} for root in roots}
        for root, here in heres.items():
            here.mkdir()
            found[root]["first_ever"] = [launch(python, root, run or RUN, here)]
        for i in range(repeats):
            for kind in ("cold", "warm"):
                for root, here in heres.items():
                    print(f"start-up: {kind} {i + 1} of {repeats}, {root}", file=sys.stderr, flush=True)
                    if kind == "cold":
                        shutil.rmtree(here / "cache" / "xla")
                    found[root][kind].append(launch(python, root, run or RUN, here))
    return {
        str(root): {
            kind: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
            for kind, rows in sorted(kinds.items(), key=lambda item: ("first_ever", "cold", "warm").index(item[0]))
        }
        for root, kinds in found.items()
    }


def table(result: dict[str, dict[str, Figures]]) -> str:
    """The result as Markdown."""
    lines = ["| checkout | cache | first step s | processor s | 40 steps and the end s | processor s |"]
    lines.append("|---|---|--:|--:|--:|--:|")
    for root, kinds in result.items():
        for kind, row in kinds.items():
            lines.append(
                f"| {Path(root).name} | {kind.replace('_', ' ')} | {row['first_step_seconds']:.2f} "
                f"| {row['first_step_processor_seconds']:.2f} | {row['total_seconds']:.2f} "
                f"| {row['total_processor_seconds']:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--root", type=Path, action="append", help="a checkout; give several to compare them")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of the table")
    options = parser.parse_args()
    roots = [root.resolve() for root in options.root or [ROOT]]
    result = compare_startup(sys.executable, roots, options.repeats)
    print(json.dumps(result) if options.json else table(result))


if __name__ == "__main__":
    main()
