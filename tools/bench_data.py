"""What data costs: windows to the device beside what training takes, and tokenizing beside SentencePiece itself.

    python tools/bench_data.py                # two minutes on two cores
    python tools/bench_data.py --json --rounds 5

feed      TrainBatches -> one stacked array a dispatch -> device, as the training loop loads them: microseconds a step
wait      a real run of the smallest shape: seconds its loop waited for batches (result.json `data_seconds`) as a share
          of its training seconds, and how many times faster than it trains the feed is
tokenize  building the store of the Python standard library with a 4096-piece tokenizer in two processes, beside one
          process on one core that only calls SentencePiece's `encode` over the same documents, read before; interleaved
          rounds, medians; processor seconds are user + system time of all processes
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]  # this checkout, also in spawned processes

from bench_sides import SHAPES, run_config  # noqa: E402

if TYPE_CHECKING:
    from llamax.config.run import Corpus
    from llamax.data.format import Store

PIECES = 4096


# ---------------------------------------------------------------- windows to the device
def feed(store: Store, batch: int, seq: int, devices: int = 1, dispatches: int = 200) -> dict[str, float]:
    """Seconds and tokens of loading ten steps at a time onto so many devices, the median of `dispatches` loads."""
    import jax

    from llamax.config.mesh import load_rules
    from llamax.config.run import MeshConfig
    from llamax.data.batches import TrainBatches
    from llamax.mesh.rules import batch_sharding, make_mesh
    from llamax.train.setup import load_dispatch

    place = batch_sharding(load_rules("default"), make_mesh(MeshConfig(), jax.devices()[:devices]), leading=1)
    batches = TrainBatches(store, batch_size=batch, seq_len=seq, seed=0)
    times, capacity = [], 10
    for i in range(dispatches):
        start = time.perf_counter()
        jax.block_until_ready(load_dispatch(batches, i * capacity, (i + 1) * capacity, capacity, place))
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times) / capacity
    return {"microseconds_per_step": 1e6 * seconds, "tokens_per_second": batch * seq / seconds}


def wait(store: Store, shape: dict[str, int], steps: int, folder: Path) -> dict[str, float]:
    """A run of `steps` steps of `shape`: the share of its training seconds in which the device may have waited."""
    from llamax.train.loop import train

    config = run_config(shape, "float32")
    data = config.data.model_copy(update={"store": str(store.path), "eval_tokens": 4096})
    config = config.model_copy(
        update={"data": data, "train": config.train.model_copy(update={"steps": steps, "on_divergence": "skip"})}
    )
    result = train(config, folder)
    seconds = result["tokens"] / result["tokens_per_second"]
    return {
        "train_seconds": seconds,
        "data_seconds": result["data_seconds"],
        "share": result["data_seconds"] / seconds,
        "tokens_per_second": result["tokens_per_second"],
    }


def bench_feed(folder: Path, corpus: Corpus | None = None, steps: int = 2000) -> dict[str, Any]:
    """{feed: {shape: figures}, wait: figures of S1, times_training: feed / training of S1}, on a store of bytes."""
    from llamax.config.load import load_corpus
    from llamax.config.run import Bytes
    from llamax.data.store import build_store
    from llamax.train.replicas import use_cores

    devices = use_cores(run_config(SHAPES["S1"], "float32"))  # as `llamax train` does
    store = build_store(corpus or load_corpus("python-stdlib"), Bytes(), folder / "bytes", workers=1)
    fed = {name: feed(store, shape["batch"], shape["seq"], devices) for name, shape in SHAPES.items()}
    waited = wait(store, SHAPES["S1"], steps, folder / "run")
    times = fed["S1"]["tokens_per_second"] / waited["tokens_per_second"]
    return {"feed": fed, "wait": waited, "times_training": times}


# ---------------------------------------------------------------- tokenizing
def _library_alone(corpus: Corpus, model: str) -> dict[str, float]:
    """In a process of its own: SentencePiece's `encode` over every different document, on one core."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    import sentencepiece

    from llamax.data.pieces import Document, read_piece
    from llamax.data.store import list_sources

    pieces = (piece for listing in list_sources(corpus) for piece in listing.pieces)
    texts = list(dict.fromkeys(d.text for piece in pieces for d in read_piece(piece) if isinstance(d, Document)))
    library = sentencepiece.SentencePieceProcessor(model_file=model)
    start, processor = time.perf_counter(), time.process_time()
    tokens = sum(len(library.encode(text)) for text in texts)
    return {
        "seconds": time.perf_counter() - start,
        "processor_seconds": time.process_time() - processor,
        "documents": len(texts),
        "tokens": tokens,
    }


def _build(corpus: Corpus, model: str, workers: int, folder: str) -> dict[str, float]:
    """In a process of its own: the whole build, from an empty folder to an open store."""
    from llamax.config.run import SentencePiece
    from llamax.data.store import build_store

    before, own, start = _processor_seconds(), time.process_time(), time.perf_counter()
    store = build_store(corpus, SentencePiece(path=model), Path(folder), workers=workers)
    seconds = time.perf_counter() - start
    processor = {
        "processor_seconds": _processor_seconds() - before,
        "parent_processor_seconds": time.process_time() - own,
    }
    counts = {name: sum(store.manifest[name].values()) for name in ("documents", "tokens")}
    return {"seconds": seconds, **processor, **counts}


def _processor_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _alone(function: Any, *arguments: Any) -> dict[str, float]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def bench_tokenize(
    folder: Path, corpus: Corpus | None = None, pieces: int = PIECES, workers: int = 2, rounds: int = 3
) -> dict[str, Any]:
    """{library, build: median figures, speedup, processor_speedup: median ratios within a round, same_tokens}.

    `processor_speedup` is what idle cores would give: processor seconds of the library / (those of the parent + those
    of the workers / their number). A build ends every document with one token more than the library gives, which
    `same_tokens` allows for.
    """
    from llamax.config.load import load_corpus
    from llamax.config.run import SentencePiece
    from llamax.data.store import build_store

    corpus = corpus or load_corpus("python-stdlib")
    trained = build_store(corpus, SentencePiece(vocab_size=pieces), folder / "trained", workers=1)
    model = str(trained.path / "tokenizer.model")
    library, build = [], []
    for i in range(rounds):
        print(f"tokenize: round {i + 1} of {rounds}", file=sys.stderr, flush=True)
        library.append(_alone(_library_alone, corpus, model))
        build.append(_alone(_build, corpus, model, workers, str(folder / f"built{i}")))
    pairs = list(zip(library, build, strict=True))
    ratios = [one["seconds"] / two["seconds"] for one, two in pairs]
    idle = [one["processor_seconds"] / _on_idle_cores(two, workers) for one, two in pairs]
    result: dict[str, Any] = {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        for name, rows in (("library", library), ("build", build))
    }
    same = library[0]["tokens"] + build[0]["documents"] == build[0]["tokens"]
    speedups = {"speedup": statistics.median(ratios), "processor_speedup": statistics.median(idle)}
    return {**result, "workers": workers, **speedups, "same_tokens": same}


def _on_idle_cores(build: dict[str, float], workers: int) -> float:
    parent = build["parent_processor_seconds"]
    return parent + (build["processor_seconds"] - parent) / workers


# ---------------------------------------------------------------- output
def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = ["| windows to the device | us a step | tokens/s |", "|---|--:|--:|"]
    for name, row in result["feed"].items():
        lines.append(f"| {name} | {row['microseconds_per_step']:.0f} | {row['tokens_per_second']:,.0f} |")
    wait = result["wait"]
    rate, times = wait["tokens_per_second"], result["times_training"]
    lines += [
        "",
        f"S1 trains at {rate:,.0f} tokens/s: the feed is {times:.0f} times that. Its loop waited",
        f"{wait['data_seconds']:.4f} s for data of {wait['train_seconds']:.2f} s ({wait['share']:.2%}).",
    ]
    token = result["tokenize"]
    lines += ["", "| tokenizing | s | processor s | documents | tokens |", "|---|--:|--:|--:|--:|"]
    for name, label in (("library", "SentencePiece, one core"), ("build", f"build, {token['workers']} processes")):
        row = token[name]
        lines.append(
            f"| {label} | {row['seconds']:.2f} | {row['processor_seconds']:.2f} | {row['documents']:,.0f} "
            f"| {row['tokens']:,.0f} |"
        )
    speedups = f"{token['speedup']:.2f} in seconds, {token['processor_speedup']:.2f} by processor seconds"
    lines += ["", f"Library / build: {speedups}; same tokens: {token['same_tokens']}."]
    return "\n".join(lines)


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of tokenizing")
    parser.add_argument("--steps", type=int, default=2000, help="of the run whose waiting is measured")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of the tables")
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    with tempfile.TemporaryDirectory() as folder:
        result = bench_feed(Path(folder), steps=options.steps)
        result["tokenize"] = bench_tokenize(Path(folder), rounds=options.rounds)
    print(json.dumps(result) if options.json else table(result))


if __name__ == "__main__":
    main()
