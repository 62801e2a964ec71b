"""What packing buys: K members trained as one population beside the same K runs one by one.

    python tools/bench_packing.py                              # S1 S2 S3, K = 2 4 8, all cores; some minutes
    python tools/bench_packing.py --shapes S1 --members 4 --end-to-end
    python tools/bench_packing.py --json

Sides, interleaved in rounds (A B C, A B C, ...), each K members x the same steps:
  one by one        one process on all cores (or the accelerator): a dispatch of each run in turn
  packed            the same process: one program, a device a core on a CPU (llamax/train/population.py)
  worker a core     what `sweep run --workers CORES` does: a process pinned to each core, runs dealt among them
--end-to-end trains K short runs with checkpoints and evaluations, `train` after `train` and `train_packed`, each in a
fresh process, and reports the seconds of a further run and of a further member besides steps.

Ratios are medians of the ratios within a round, of wall time and of processor time (of this process and its children).
`compare` is what tools for accelerators call.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench_sides import SHAPES, run_config, tokens_of

ROOT = Path(__file__).resolve().parents[1]
ONE, PACKED, WORKERS = "one by one", "packed", "worker a core"
Timed = Callable[[int], dict[str, float]]  # steps -> {"wall", "processor"} seconds


def compare(
    config: Any,
    members: int,
    devices: Sequence[Any],
    *,
    seconds: float,
    rounds: int,
    more: dict[str, Timed] | None = None,
) -> dict[str, Any]:
    """Seconds a step of all members, {side: rounds}, of `ONE` on the first device, `PACKED` on all, and `more`.

    A round of a side is whole dispatches, as a run takes them, of about `seconds` one by one: a dispatch of fewer steps
    pays for its memory more often.

    `ratio` is packed / one by one; `loss_difference` the largest relative difference of a last loss between the two.
    """
    alone, packed = _one_by_one(config, members, devices[0]), _packed(config, members, devices)
    sides: dict[str, Timed] = {ONE: _timed(alone), PACKED: _timed(packed), **(more or {})}
    for _ in range(2):  # the second shows what a step takes
        once = {name: run(1)["wall"] for name, run in sides.items()}
    capacity = config.train.steps_per_dispatch
    steps = capacity * max(1, round(seconds / once[ONE] / capacity))
    difference = max(abs(a / b - 1) for a, b in zip(packed(steps), alone(steps), strict=True))
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            time.sleep(0.2)  # the last side's idle threads spin for a while
            rows[name].append({clock: seconds / steps for clock, seconds in run(steps).items()})
    return {
        "members": members,
        "steps_per_round": steps,
        "loss_difference": difference,
        "sides": {
            name: {clock: statistics.median(row[clock] for row in found) for clock in ("wall", "processor")}
            | {
                f"ratio_{clock}": statistics.median(r[clock] / o[clock] for r, o in zip(found, rows[ONE], strict=True))
                for clock in ("wall", "processor")
            }
            | {"rounds": [row["wall"] for row in found]}
            for name, found in rows.items()
        },
    }


def _timed(run: Callable[[int], list[float]]) -> Timed:
    def timed(steps: int) -> dict[str, float]:
        wall, before = time.perf_counter(), os.times()
        run(steps)
        after = os.times()
        return {
            "wall": time.perf_counter() - wall,
            "processor": after.user + after.system - before.user - before.system,
        }

    return timed


def _one_by_one(config: Any, members: int, device: Any) -> Callable[[int], list[float]]:
    """Runs each member `steps` on, one dispatch ahead of its metrics; their last losses."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from llamax.train.setup import share_places
    from llamax.train.state import hyper_of, initializer
    from llamax.train.step import make_dispatch

    rules, mesh, abstract = share_places(config, [device])
    build, capacity = initializer(config, abstract), config.train.steps_per_dispatch
    states = [build(hyper_of(config, 100), np.int32(i)) for i in range(members)]
    batches = jax.device_put(_batches(config), device)
    dispatch = make_dispatch(config, rules, mesh, abstract)
    dispatch = dispatch.lower(states[0], batches, jnp.int32(0)).compile()  # type: ignore[attr-defined]

    def run(steps: int) -> list[float]:
        losses = []
        for i in range(members):
            before = None
            for first in range(0, steps, capacity):
                count = min(capacity, steps - first)
                states[i], metrics, ran = dispatch(states[i], batches, jnp.int32(count))
                if before is not None:
                    jax.device_get(before)
                before = (metrics, ran)
            metrics, ran = jax.device_get(before)
            losses.append(float(metrics["loss"][int(ran) - 1]))
        return losses

    return run


def _packed(config: Any, members: int, devices: Sequence[Any]) -> Callable[[int], list[float]]:
    """The same of one population."""
    import jax
    import numpy as np

    from llamax.train.population import Ask, Population
    from llamax.train.setup import share_places
    from llamax.train.state import hyper_of, initializer

    devices = devices[:members]
    rules, mesh, abstract = share_places(config, [devices[0]])
    build, capacity = initializer(config, abstract), config.train.steps_per_dispatch
    batches = jax.device_put(_batches(config), devices[0])
    population = Population(config, rules, mesh, abstract, devices)
    asks = {i: Ask(build(hyper_of(config, 100), np.int32(i)), batches, 0) for i in range(members)}
    held = {i: answer.state for i, answer in population.serve(asks).items()}
    asks.clear()

    def run(steps: int) -> list[float]:
        before: dict[int, Any] = {}
        for first in range(0, steps, capacity):
            count = min(capacity, steps - first)
            answers = population.serve({i: Ask(held[i], batches, count) for i in held})
            jax.device_get([(answer.metrics, answer.ran) for answer in before.values()])
            before = answers
        found = jax.device_get([(answer.metrics, answer.ran) for answer in before.values()])
        return [float(metrics["loss"][int(ran) - 1]) for metrics, ran in found]

    return run


def _batches(config: Any) -> dict[str, Any]:
    train = config.train
    shape = {"vocab": config.model.vocab_size, "batch": train.batch_size, "seq": train.seq_len}
    return {"tokens": tokens_of(shape, train.steps_per_dispatch)}


# ---------------------------------------------------------------- processes
def _serve(pipe: Any, shape: str, members: int, compute: str, core: int) -> None:
    """A worker pinned to one core: {"steps"} -> seconds."""
    os.sched_setaffinity(0, [core])
    import jax

    run = _timed(_one_by_one(run_config(SHAPES[shape], compute), members, jax.devices()[0]))
    pipe.send(None)
    while (steps := pipe.recv()) is not None:
        pipe.send(run(steps))


def _workers(stack: ExitStack, shape: str, members: int, compute: str, cores: Sequence[int]) -> Timed:
    """All of `cores`, the members dealt among them; wall seconds until the last is done."""
    context, pipes = multiprocessing.get_context("spawn"), []
    for i, core in enumerate(cores[:members]):
        ours, theirs = context.Pipe()
        dealt = len(range(i, members, len(cores)))
        process = context.Process(target=_serve, args=(theirs, shape, dealt, compute, core), daemon=True)
        process.start()
        stack.callback(process.join)
        stack.callback(ours.send, None)
        pipes.append(ours)
    for pipe in pipes:
        pipe.recv()

    def timed(steps: int) -> dict[str, float]:
        start = time.perf_counter()
        for pipe in pipes:
            pipe.send(steps)
        found = [pipe.recv() for pipe in pipes]
        return {"wall": time.perf_counter() - start, "processor": sum(row["processor"] for row in found)}

    return timed


def bench_shape(shape: str, members: int, compute: str, rounds: int, seconds: float) -> dict[str, Any]:
    """`compare` on the CPU with a device a core, beside a worker a core; in a process of its own."""
    cores = sorted(os.sched_getaffinity(0))
    import jax

    jax.config.update("jax_num_cpu_devices", len(cores))
    config = run_config(SHAPES[shape], compute)
    with ExitStack() as stack:
        more = {WORKERS: _workers(stack, shape, members, compute, cores)}
        return {"shape": shape, **compare(config, members, jax.devices(), seconds=seconds, rounds=rounds, more=more)}


# ---------------------------------------------------------------- end to end
def end_to_end(shape: str, members: int, compute: str, steps: int) -> dict[str, Any]:
    """Wall and processor seconds of short runs one by one and packed, of `members` and of one.

    Each in a fresh process with an empty compilation cache; further runs of one process find what the first compiled.
    """
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for side in (ONE, PACKED):
            for count in (1, members):
                found[side, count] = in_process(_train_several, folder, shape, count, compute, steps, side)
    further = {
        side: (found[side, members]["processor"] - found[side, 1]["processor"]) / (members - 1)
        for side in (ONE, PACKED)
    }
    ones, packed = found[ONE, members], found[PACKED, members]
    return {
        "shape": shape, "members": members, "steps": steps, ONE: ones, PACKED: packed,
        "ratio_wall": packed["wall"] / ones["wall"],
        "ratio_processor": packed["processor"] / ones["processor"],
        "processor_seconds_further": further,
    }  # fmt: skip


def _train_several(folder: str, shape: str, members: int, compute: str, steps: int, name: str) -> dict[str, float]:
    os.environ["LLAMAX_CACHE"] = f"{folder}/cache-{name.replace(' ', '-')}-{members}"
    cores = len(os.sched_getaffinity(0))
    import jax

    jax.config.update("jax_num_cpu_devices", cores if name == PACKED else 1)
    from llamax.config.load import run_from_data
    from llamax.train.loop import train
    from llamax.train.packed import train_packed

    base = run_config(SHAPES[shape], compute).as_dict()
    (Path(folder) / "text").mkdir(exist_ok=True)
    if not (store := Path(folder) / "store").exists():
        from llamax.config.run import Bytes, Corpus
        from llamax.data.store import build_store

        for i in range(40):
            (Path(folder) / "text" / f"{i}.txt").write_text(f"text {i} " + " ".join(map(str, range(i, 3000))))
        source = {"kind": "text", "paths": (f"{folder}/text",)}
        build_store(Corpus.model_validate({"sources": [{"source": source}], "held_out_fraction": 0.2}), Bytes(), store)
    base |= {"data": {"store": str(store), "eval_tokens": 4096}}
    configs = [run_from_data(base, [f"train.steps={steps}", f"train.seed={i}"], where="bench") for i in range(members)]
    folders = [Path(folder) / f"{name.replace(' ', '-')}-{members}" / str(i) for i in range(members)]

    def run(_: int) -> list[float]:
        if name == PACKED:
            train_packed(configs, folders)
        else:
            for config, path in zip(configs, folders, strict=True):
                train(config, path)
        return []

    return _timed(run)(0)


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's value, computed in a fresh process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise RuntimeError(f"{function.__name__}{arguments} died") from None
    finally:
        process.join()


def _answer(pipe: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    pipe.send(function(*arguments))


# ---------------------------------------------------------------- output
def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = ["| shape | K | side | ms a member's step | processor ms | wall / one by one | processor / one by one |"]
    lines += ["|---|--:|---|--:|--:|--:|--:|"]
    for row in result["steps"]:
        for name, side in row["sides"].items():
            each = [f"{1e3 * side[clock] / row['members']:.2f}" for clock in ("wall", "processor")]
            ratios = [f"{side[f'ratio_{clock}']:.2f}" for clock in ("wall", "processor")]
            lines.append(f"| {row['shape']} | {row['members']} | {name} | {' | '.join(each + ratios)} |")
    for row in result["end_to_end"]:
        further = row["processor_seconds_further"]
        lines.append(
            f"\n{row['shape']}, {row['members']} runs of {row['steps']} steps end to end: packed / one by one "
            f"{row['ratio_wall']:.2f} (wall), {row['ratio_processor']:.2f} (processor); processor seconds of a further "
            f"run {further[ONE]:.2f}, of a further member {further[PACKED]:.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--members", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--compute", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of one side in one round")
    parser.add_argument("--end-to-end", action="store_true")
    parser.add_argument("--steps", type=int, default=20, help="of a run end to end")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of the table")
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    result: dict[str, Any] = {"compute": options.compute, "cores": len(os.sched_getaffinity(0)), "steps": []}
    result["end_to_end"] = []
    for shape in options.shapes:
        for members in options.members:
            print(f"{shape}, {members} members", file=sys.stderr, flush=True)
            if options.end_to_end:
                result["end_to_end"].append(end_to_end(shape, members, options.compute, options.steps))
            else:
                job = (shape, members, options.compute, options.rounds, options.seconds)
                result["steps"].append(in_process(bench_shape, *job))
    print(json.dumps(result) if options.json else table(result))


sys.path.insert(0, str(ROOT))  # also in the processes it starts
if __name__ == "__main__":
    main()
