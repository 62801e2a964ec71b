"""`llamax plan`: what a run would need on a topology, proven by compiling its real training step for it."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llamax.console import Json, Overrides, print_json
from llamax.errors import UserError

if TYPE_CHECKING:
    from llamax.accounting.topology import Topology
    from llamax.config.run import RunConfig

SETTINGS = "pretrain"  # of configs/train: what a model named by itself is trained with
ROOM = 0.5  # of a device's memory that the estimate may fill: a compiler's own buffers are not in it
EVERY = 30.0  # seconds between lines of progress where there is no terminal
Report = Callable[[str], None]


def plan(
    source: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A shipped config, a YAML path, or a model such as llama3/8b.")
    ],
    overrides: Overrides = None,
    topology: Annotated[
        str, typer.Option(help="v5p:2x2x4, v5e:16x16, v6e:4x8, tpu7x:4x4x4, h100:8x32 (GPUs a node x nodes), cpu:8.")
    ] = "",
    price: Annotated[float | None, typer.Option(help="Dollars an hour of one chip; default a list price.")] = None,
    as_json: Json = False,
) -> None:
    """Prove that a run fits before paying: compile its step for hardware that is not there, and say what it costs."""
    with _progress() as report:
        found = plan_run(source, overrides or [], topology, price, report)
    if as_json:
        print_json(found)
    else:
        from llamax.report.plan_page import plan_lines

        for line in plan_lines(found):
            print(line)


def plan_run(
    source: str, overrides: list[str], topology: str, price: float | None = None, report: Report = lambda phase: None
) -> dict[str, Any]:
    """The plan of a config or a model on a topology, as `report.plan.plan_of` gives it.

    Raises:
        UserError: an unknown config, model or topology; a mesh, batch or axis that does not fit it; no compiler for it.
    """
    from llamax.accounting.horizon import horizon
    from llamax.accounting.topology import find_topology
    from llamax.report.changes import changes
    from llamax.report.hlo import parse_program
    from llamax.report.plan import plan_of

    if not topology:
        raise UserError("--topology is missing: name the devices to plan for, such as v5p:2x2x4 or h100:8x32")
    if price is not None and not price >= 0:
        raise UserError(f"--price={price:g}: give the dollars an hour of one chip, 0 or more")
    where = find_topology(topology)
    config = _config(source, overrides, where)
    horizon(config)  # less than a step is refused before anything compiles
    answer, text = _compile(config, where, report)
    found = plan_of(source, config, where, answer, parse_program(text) if text else None, price)
    if not found["memory"]["fits"]:
        found["changes"] = changes(config, where, found["mesh"], found["memory"])
    return found


def _config(source: str, overrides: list[str], topology: Topology) -> RunConfig:
    """The run: a config as it is; a model by its name with SETTINGS, in as few microbatches as leave, by estimate, half
    of the memory: each of them gathers the weights again."""
    from llamax.config.files import find, read_yaml, shipped, unknown
    from llamax.config.load import load_run, model_names, named_model, run_from_data
    from llamax.train.remat import device_bytes

    if source in shipped("train") or Path(source).suffix in (".yaml", ".yml"):
        return load_run(source, overrides)
    try:
        named_model(source)
    except UserError:
        if "/" in source:
            raise
        raise UserError(unknown("config or model", source, [*shipped("train"), *model_names()])) from None
    config = run_from_data(
        {"base": SETTINGS, "model": source, "train": _lengths(source)}, overrides, where=f"{source} with {SETTINGS}"
    )
    if any(text.startswith(("train.grad_accumulation=", "train.batch_size=")) for text in overrides):
        return config
    rule = read_yaml(find("meshes", config.mesh.rules, "mesh rules"))["batch"]
    sizes = config.mesh.over(topology.devices)
    ways = math.prod(sizes[axis] for axis in ([rule] if isinstance(rule, str) else rule))
    rows = max(config.train.batch_size // ways, 1)
    policy = "full" if config.train.remat == "auto" else config.train.remat
    if config.mesh.layout == "auto":  # which layouts fit is asked once the batch is known; the one that holds least
        sizes = {**sizes, "data": 1, "fsdp": topology.devices}
    fewest = rows if sizes["stage"] > 1 else 1  # a pipeline's microbatches fill it
    for parts in (parts for parts in range(fewest, rows + 1) if rows % parts == 0):
        train = config.train.model_copy(update={"batch_size": rows * ways, "grad_accumulation": parts})
        config = config.model_copy(update={"train": train})
        if device_bytes(config, policy, True, sizes) <= ROOM * topology.kind.memory:
            break
    return config


def _lengths(model: str) -> dict[str, int]:
    """The sequence length of SETTINGS, or the longest that the model takes."""
    from llamax.config.load import load_model, load_run

    return {"seq_len": min(load_model(model).max_seq_len, load_run(SETTINGS).train.seq_len)}


# ---------------------------------------------------------------- the process that compiles
def _compile(config: RunConfig, topology: Topology, report: Report) -> tuple[dict[str, Any], str]:
    """(the answer of `llamax.train.ahead`, the optimized program's text, empty where it was refused)."""
    from llamax.train.ahead import ANSWER, PROGRAM, REQUEST, Request, environment

    platform, named = _compiler(topology)
    kind = topology.kind
    known = kind.platform != "cpu"
    limits = (float(kind.memory), float(kind.bandwidth)) if known else (None, None)
    request = Request(config.as_dict(), platform, named, topology.devices, kind.device_kind, *limits)
    with tempfile.TemporaryDirectory(prefix="llamax-plan-") as scratch:
        folder = Path(scratch)
        (folder / REQUEST).write_text(json.dumps(dataclasses.asdict(request)))
        command = [sys.executable, "-m", "llamax.train.ahead", scratch]
        with (folder / "errors.txt").open("w+") as errors:
            code = _run(command, {**os.environ, **environment(request)}, errors, report)
            errors.seek(0)
            said = errors.read()
        if not (folder / ANSWER).exists():
            raise UserError(_crash(code, said, topology))
        answer = json.loads((folder / ANSWER).read_text())
        if "error" in answer:
            raise UserError(f"{topology.name}: {answer['error']}")
        text = (folder / PROGRAM).read_text() if (folder / PROGRAM).exists() else ""
    return {**answer, "own": platform == kind.platform}, text


def _compiler(topology: Topology) -> tuple[str, str]:
    """(the platform whose compiler is used, the topology as it names it). Raises UserError where TPUs have none."""
    kind = topology.kind
    if kind.platform == "tpu":
        if importlib.util.find_spec("libtpu") is None:
            raise UserError(f"--topology {topology.name}: compiling for a TPU needs libtpu; install llamax[tpu]")
        return "tpu", topology.name
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    if kind.platform == "cuda" and any(importlib.util.find_spec(name) for name in plugins):
        return "cuda", f"1x{topology.hosts}x{topology.shape[0]}"
    return "cpu", topology.name


def _run(command: list[str], env: dict[str, str], errors: Any, report: Report) -> int:
    """Run a command whose lines of output are phases; its exit code. It ends with this process."""
    child = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        assert child.stdout is not None
        for line in child.stdout:
            report(line.strip())
        return child.wait()
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()


def _crash(code: int, said: str, topology: Topology) -> str:
    """What to say of a process that ended without an answer."""
    if code == -9:
        return f"{topology.name}: the compiler was killed, likely for its memory; run it on a machine with more"
    errors = [line.strip() for line in said.splitlines() if re.match(r"[\w.]+(Error|Exception)\b", line)]
    last = errors[-1][:500] if errors else said.strip()[-500:]
    return f"{topology.name}: the compiler failed (exit code {code}): {last}"


@contextlib.contextmanager
def _progress() -> Iterator[Report]:
    """A callback for phases that shows on stderr what is being done and for how long."""
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        with console.status("start") as status:
            yield lambda phase: status.update(phase)
        return
    began, current, stop = time.monotonic(), ["start"], threading.Event()

    def tell() -> None:
        while not stop.wait(EVERY):
            print(f"{current[0]:<8} {time.monotonic() - began:.0f} s", file=sys.stderr)

    def report(phase: str) -> None:
        current[0] = phase
        print(f"{phase:<8} {time.monotonic() - began:.0f} s", file=sys.stderr)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield report
    finally:
        stop.set()
