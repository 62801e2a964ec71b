"""What the command line draws: progress, aligned results, or JSON where asked."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from llamax.config.run import RunConfig
    from llamax.train.progress import Progress

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


Overrides = Annotated[list[str] | None, typer.Argument(metavar="[a.b.c=value]...", help="Config fields to set.")]


def _at_hand(path: str, new: bool = False) -> Path:
    """A path of the command line; of an address in a bucket a folder that shows what is there.

    What the command writes in that folder is sent to the bucket when it ends, see `sending_back`.
    """
    if "://" not in str(path):
        return Path(path)
    from llamax.storage.copies import at_hand

    OPENED.append(at_hand(path, new=new))
    return OPENED[-1]


def _on_a_disk(path: str) -> Path:
    """A path of the command line where no bucket will do."""
    if "://" in str(path):
        from llamax.errors import UserError

        raise UserError(f"{path}: this command works on a disk alone; give a folder there")
    return Path(path)


@contextmanager
def sending_back() -> Iterator[None]:
    """Around a command: what it wrote into folders of buckets is sent there when it ends. Raises UserError."""
    OPENED.clear()
    ended = False
    try:
        yield
        ended = True
    except SystemExit:  # a command's own exit code, after it has written
        ended = True
        raise
    finally:
        for folder in OPENED if ended else ():
            from llamax.storage.copies import publish

            publish(folder)


OPENED: list[Path] = []  # by the parsers of arguments, which no argument can be passed to
AtHand = partial(typer.Argument, parser=_at_hand)
NewAtHand = partial(typer.Option, parser=partial(_at_hand, new=True))
OnDisk = partial(typer.Option, parser=_on_a_disk)
StudyPath = Annotated[Path, AtHand(metavar="DIR", help="A study, a run, or a folder of them; gs:// and s3:// too.")]
RunPath = Annotated[Path, AtHand(metavar="RUN", help="A run directory; gs:// and s3:// too.")]


def as_addresses(text: str) -> str:
    """`text` with addresses in place of the folders of the cache that stand for them."""
    if "/s3/" not in text and "/gs/" not in text:
        return text
    from llamax.storage.places import shown

    return shown(text)


def show(*renderables: Any) -> None:
    """Tables and text on stdout, 100 columns wide where that is no terminal."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 100)
    for item in renderables:
        console.print(item)


def print_json(value: Any) -> None:
    """A result for a program."""
    print(as_addresses(json.dumps(value, allow_nan=False, default=str)))


def emit(result: dict[str, Any], as_json: bool) -> None:
    """A result for a program as JSON, or for a person as aligned lines."""
    if as_json:
        print_json(result)
        return
    for line in lines(result):
        print(as_addresses(line))


def lines(result: dict[str, Any], indent: int = 0) -> Iterator[str]:
    """A nested result as aligned `name  value` lines, numbers with thousands separators or six digits."""
    width = max((len(str(key)) for key, value in result.items() if not isinstance(value, dict)), default=0)
    pad = " " * indent
    for key, value in result.items():
        if isinstance(value, dict):
            yield f"{pad}{key}"
            yield from lines(value, indent + 2)
        elif isinstance(value, list) and value and not all(isinstance(v, int | float) for v in value):
            yield f"{pad}{key}"
            for item in value:
                yield from lines(item, indent + 2) if isinstance(item, dict) else [f"{pad}  {item}"]
        else:
            yield f"{pad}{key:<{width}}  {shown(value)}"


def shown(value: Any) -> str:
    """One value for a person."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else str(value)
    if isinstance(value, list):
        return ", ".join(shown(v) for v in value) or "none"
    return str(value)


def print_run_plan(config: RunConfig, where: str) -> None:
    """What is about to be trained, each derived number with its rule, on stderr."""
    from llamax.accounting import count_params, horizon, memory_bytes

    plan, params = horizon(config), count_params(config.model)
    rows = {
        "run": where,
        "hash": config.hash8,
        "parameters": f"{params.total:,} ({plan.n:,} in matrix products a token = N)",
        "horizon": plan.rule,
        "tokens per parameter": f"{plan.tokens_per_param:.3g} = {plan.tokens:,} / {plan.n:,}",
        "training FLOPs": ", ".join(f"{name} {value:.3g}" for name, value in plan.flops.items()),
        "memory": f"{memory_bytes(config)['total'] / 2**20:,.0f} MiB estimated for a step, over the mesh",
    }
    for line in lines(rows):
        print(line, file=sys.stderr)


class TrainProgress:
    """A progress bar on stderr fed by the training loop; plain lines every few seconds where there is no terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        console = Console(stderr=True)
        columns = (
            TextColumn("{task.fields[phase]:<8}"),
            BarColumn(24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self.bar = Bar(*columns, TimeRemainingColumn(), console=console) if console.is_terminal else None
        self.task = self.bar.add_task("train", phase="start", note="") if self.bar else None
        self.last = 0.0

    def __enter__(self) -> TrainProgress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def __call__(self, progress: Progress) -> None:
        note = "" if progress.loss is None else f"loss {progress.loss:.4f}"
        note += "" if progress.tokens_per_second is None else f"  {progress.tokens_per_second:,.0f} tokens/s"
        if self.bar and self.task is not None:
            self.bar.update(self.task, completed=progress.step, total=progress.steps, phase=progress.phase, note=note)
            return
        import time

        if progress.phase != "train" or time.monotonic() - self.last > 5:
            self.last = time.monotonic()
            left = "" if progress.seconds_left is None else f"  {progress.seconds_left:.0f} s left"
            print(f"{progress.phase:<8} {progress.step}/{progress.steps}  {note}{left}", file=sys.stderr)


@contextmanager
def step_progress() -> Iterator[Any]:
    """A `progress(label, done, total)` callback drawn as bars on stderr; nothing where there is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(24),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as bar:
        tasks: dict[str, Any] = {}

        def update(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = bar.add_task(label, total=total)
            bar.update(tasks[label], completed=done, total=total)

        yield update


def build_from_cli(
    out: Path, sources: list[str], corpus: str | None, tokenizer: str, vocab_size: int, workers: int | None
) -> dict[str, Any]:
    """`llamax data build`: the store's manifest in short. Raises UserError for a wrong combination of arguments."""
    from llamax.config.load import load_corpus, validate
    from llamax.config.run import Bytes, Corpus, HuggingFace, SentencePiece, Tokenizer
    from llamax.data.store import build_store
    from llamax.errors import UserError

    if bool(sources) == bool(corpus):
        raise UserError("data build: give either --text PATH (one or more) or --corpus NAME")
    if corpus:
        parts = load_corpus(corpus)
    else:
        parts = validate(Corpus, {"sources": [{"source": {"kind": "text", "paths": sources}}]}, "--text")
    spec: Tokenizer
    if tokenizer == "bytes":
        spec = Bytes()
    elif tokenizer == "sentencepiece":
        spec = SentencePiece(vocab_size=vocab_size)
    elif tokenizer.endswith(".model"):
        spec = SentencePiece(path=tokenizer)
    elif tokenizer.endswith(".json"):
        spec = HuggingFace(path=tokenizer)
    else:
        raise UserError(
            f"--tokenizer {tokenizer!r}: use bytes, sentencepiece, or the path of a .model or tokenizer.json file"
        )
    from llamax.data.remote import build_folder, send
    from llamax.storage.places import is_address, written

    folder = build_folder(out)
    with step_progress() as progress:
        store = build_store(parts, spec, folder, workers=workers, progress=progress)
    if is_address(out):
        send(folder, out)
    return {
        "store": written(out),
        "vocab_size": store.vocab_size,
        "fingerprint": store.fingerprint,
        **store.manifest,
    }
