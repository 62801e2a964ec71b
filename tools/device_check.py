"""What llamax does on this machine's accelerator: kernels against their references, then speed.

    python tools/device_check.py --out benchmarks                 # all sections that fit into seven minutes
    python tools/device_check.py --only mfu-dense torch --minutes 5
    python tools/device_check.py --tiny --minutes 3               # the same code at toy sizes, on any CPU

Sections run one after another in processes of their own, in the order of their worth, each with a limit; what is left
when the time is up is named as skipped. The dated file is written after every row, so that a kill loses nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from device_sections import ROOT, SECTIONS

STARTED = time.perf_counter()
LEAST_SECONDS = 20.0  # a section that has less does not start
COLUMNS = {  # of the table: heading -> (field, format)
    "ms": ("milliseconds", "{:,.2f}"),
    "tokens/s": ("tokens_per_second", "{:,.0f}"),
    "MFU": ("mfu", "{:.1%}"),
    "GB": ("memory_gb", "{:.1f}"),
    "batch": ("batch", "{}"),
    "remat": ("remat", "{}"),
    "kernels": ("kernels", "{}"),
    "compile s": ("compile_seconds", "{:.0f}"),
}
NOTES = (
    "missing",
    "ratio",
    "loss_difference",
    "error_value",
    "error_gradient",
    "agrees",
    "of_bandwidth",
    "eval_loss",
    "too_large",
    "tflops",
    "load_entropy",
    "shares",
    "profile",
)


def say(text: str) -> None:
    """Progress with elapsed seconds, on stderr."""
    print(f"{time.perf_counter() - STARTED:5.0f} s  {text}", file=sys.stderr, flush=True)


def about() -> dict[str, Any]:
    """The device and the versions, asked in a process of its own: this one must not hold the device."""
    code = "import json; from llamax.mesh.start import start; start(); from llamax.train.env import environment as e; "
    code += "import jax; print(json.dumps({**e(), 'device': jax.devices()[0].device_kind}))"
    done = subprocess.run([sys.executable, "-c", code], env=_environment(), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"JAX does not start: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    (found.get("git") or {}).pop("diff", None)  # long, and the rows are to be read
    found["flags"].pop("LLAMAX_CACHE", None)  # a folder of this machine
    return found


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", **os.environ, "PYTHONPATH": path}


def run_section(name: str, tiny: bool, seconds: float, keep: Any) -> None:
    """One section's rows into keep(row) as they come; a last row says what ended it, if it did not end by itself."""
    command = [sys.executable, str(ROOT / "tools" / "device_sections.py"), name, *(["--tiny"] if tiny else [])]
    with tempfile.TemporaryFile("w+") as rows, tempfile.TemporaryFile("w+") as log:
        begun, done = time.perf_counter(), 0
        process = subprocess.Popen(command, env=_environment(), stdout=rows, stderr=log)

        def collect() -> None:
            nonlocal done
            rows.seek(0)
            whole = [line for line in rows.read().splitlines(keepends=True) if line.endswith("\n")]
            for line in whole[done:]:
                keep({"section": name, **json.loads(line)})
            done = len(whole)

        while process.poll() is None and time.perf_counter() - begun < seconds:
            time.sleep(0.2)
            collect()
        late = process.poll() is None
        if late:
            process.kill()
        code = process.wait()
        collect()
        if late:
            keep({"section": name, "what": "the rest", "missing": f"stopped after its {seconds:.0f} s"})
        elif code:
            log.seek(0)
            last = (log.read().strip().splitlines() or ["no message"])[-1]
            keep({"section": name, "what": "the rest", "missing": f"ended with code {code}: {last[:300]}"})


def table(result: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = [
        f"{result['device']}, {result['date'][:10]}, jax {result['versions']['jax']}, {result['flags']}",
        "",
        f"| section | what | {' | '.join(COLUMNS)} | notes |",
        "|---|---|" + "--:|" * len(COLUMNS) + "---|",
    ]
    for row in result["rows"]:
        cells = [
            ""
            if row.get(field) in (None, [])
            else form.format(", ".join(v) if isinstance(v := row[field], list) else v)
            for field, form in COLUMNS.values()
        ]
        notes = [f"{name} {_short(row[name])}" for name in NOTES if row.get(name) is not None]
        lines.append(f"| {row['section']} | {row['what']} | {' | '.join(cells)} | {', '.join(notes)} |")
    return "\n".join(lines)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name} {share:.0%}" for name, share in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    """Run what fits, print the table; with --out a dated file that grows row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, a test of this program")
    parser.add_argument("--minutes", type=float, default=7.0, help="for everything (default 7)")
    parser.add_argument("--out", type=Path, help="folder for a dated JSON file")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of the table")
    options = parser.parse_args()

    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    result: dict[str, Any] = {"date": now, "tiny": options.tiny, "rows": [], **about()}
    say(f"{result['device']}: {', '.join(options.only)}")

    def keep(row: dict[str, Any]) -> None:
        result["rows"].append(row)
        say(f"{row['section']}: {row['what']}: {row.get('missing') or _short(row.get('milliseconds', 'done'))}")
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            device = re.sub(r"[^a-z0-9]+", "-", result["device"].casefold()).strip("-")
            path = options.out / f"{now[:10]}-{device}{'-tiny' if options.tiny else ''}.json"
            path.write_text(json.dumps(result, indent=1) + "\n")

    for name in options.only:
        left = 60 * options.minutes - (time.perf_counter() - STARTED)
        if left < LEAST_SECONDS:
            keep({"section": name, "what": "all", "missing": f"skipped: {max(left, 0):.0f} s left"})
            continue
        run_section(name, options.tiny, min(left, SECTIONS[name][1]), keep)
    print(json.dumps(result) if options.json else table(result))


if __name__ == "__main__":
    main()
