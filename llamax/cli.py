"""The command line: one function a verb, everything heavy imported inside it."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from llamax import (
    ablating,
    converting,
    curving,
    fitting,
    generating,
    launching,
    planning,
    predicting,
    profiling,
    studying,
    sweeping,
    training,
)
from llamax.console import Json, OnDisk, Overrides, RunPath, StudyPath, as_addresses, sending_back
from llamax.console import emit as _emit
from llamax.console import print_json as _print_json
from llamax.console import show as _print
from llamax.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Plan, train, fit, predict, check: scaling research on the open-weight Llama lineage.",
)
data_app = typer.Typer(no_args_is_help=True, help="Build and inspect token stores.")
model_app = typer.Typer(no_args_is_help=True, help="The shipped models and what they cost.")
config_app = typer.Typer(no_args_is_help=True, help="Show configs, or their JSON Schema.")
app.add_typer(sweeping.app, name="sweep")
app.add_typer(studying.app, name="study")
app.add_typer(ablating.app, name="ablate")
app.add_typer(data_app, name="data")
app.add_typer(model_app, name="model")
app.add_typer(config_app, name="config")
app.command("fit")(fitting.fit)
app.command("launch")(launching.launch)
app.command("generate")(generating.generate)
app.command("plan")(planning.plan)
app.command("profile")(profiling.profile)
app.command("curves")(curving.curves)
app.command("predict")(predicting.predict)
model_app.command("import")(converting.model_import)
model_app.command("export")(converting.model_export)

UsageError: Any = typer.BadParameter.__base__  # click's or, in newer versions, typer's own


def main() -> None:
    """Run the command line; bad input is one message on stderr and exit code 2."""
    gc.set_threshold(100_000)  # imports and tracing make a million objects that live on: collecting was a tenth of both
    try:
        with sending_back():
            code = _asked(sys.argv[1:])(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except UserError as error:
        print(as_addresses(f"error: {error}"), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)
    except typer.Abort:
        sys.exit(1)
    except UsageError as error:
        text, command = error.format_message(), error.ctx.command_path if error.ctx else "llamax"
        if text and not text.startswith("Usage"):  # `llamax sweep` alone has printed its help
            print(f"error: {text.rstrip('.')}; see {command} --help", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a path or a disk, outside what names its own field
        print(f"error: {error.filename or 'file'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)


def _asked(arguments: list[str]) -> typer.Typer:
    """`app` with the one verb that is asked for: a verb's options cost time to build, and there are forty. Help, and a
    verb that is not there, need all of them."""
    verb = next(iter(arguments), "")
    commands = [info for info in app.registered_commands if verb in (info.name, getattr(info.callback, "__name__", ""))]
    groups = [info for info in app.registered_groups if info.name == verb]
    if not commands and not groups:
        return app
    one = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    one.callback()(lambda: None)  # without it an app of one command takes no verb
    one.registered_commands, one.registered_groups = commands, groups
    return one


# ---------------------------------------------------------------- the main job
@app.command()
def quickstart(
    settings: Overrides = None,
    directory: Annotated[Path, OnDisk("--dir", help="Where the study goes; an existing one continues.")] = Path(
        "quickstart"
    ),
    fast: Annotated[
        bool, typer.Option("--fast", help="Fewer, smaller cells: under two minutes, no accuracy promised.")
    ] = False,
    workers: Annotated[int | None, typer.Option(help="Worker processes; default one a core, at most 8.")] = None,
    as_json: Json = False,
) -> None:
    """A whole scaling study on this machine: plan, train, fit, predict, check, report.

    Settings: corpus=python-all, tokenizer=sentencepiece, or any field of the cells as a.b.c=value.
    """
    from llamax.quickstart import run_quickstart

    result = run_quickstart(directory, fast=fast, settings=settings or [], workers=workers)
    if not as_json:  # the fits are in the report; a person wants the verdict
        result = {name: value for name, value in result.items() if name != "fit"}
    _emit(result, as_json)


app.command("train")(training.train)


@app.command("eval")
def evaluate(
    run: RunPath,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Held-out loss of a trained run, on its own data or on data.store=STORE."""
    from llamax.train.load import evaluate_run

    _emit(evaluate_run(run, overrides or []), as_json)


# ---------------------------------------------------------------- after the runs
@app.command()
def report(study: StudyPath, as_json: Json = False) -> None:
    """Write report.html and report.md for a study."""
    from llamax.report.html import write_report

    path = write_report(study)
    _emit({"report": str(path)}, as_json)


@app.command()
def ledger(
    path: StudyPath,
    out: Annotated[Path | None, typer.Option(help="Write the table as .csv or .parquet.")] = None,
    as_json: Json = False,
) -> None:
    """Every run under a folder as one table."""
    from llamax.report.ledger import ledger as read_ledger
    from llamax.report.ledger import ledger_table, save_ledger

    frame = read_ledger(path)
    if out is not None:
        save_ledger(frame, out)
    if as_json:
        _print_json({"runs": json.loads(frame.to_json(orient="records"))})
    else:
        _print(ledger_table(frame))


@app.command()
def diff(
    a: RunPath,
    b: RunPath,
    as_json: Json = False,
) -> None:
    """Why two runs differ: config fields, data, environment, and where the losses part."""
    from llamax.report.compare import compare, compare_table

    found = compare(a, b)
    if as_json:
        _print_json(found)
    else:
        _print(compare_table(found))


@app.command()
def export(
    run: RunPath,
    to: Annotated[str, typer.Option(help="tensorboard or wandb (offline).")] = "tensorboard",
    as_json: Json = False,
) -> None:
    """Hand a run directory's metrics to another tracker."""
    from llamax.report.exporters import export as export_run

    _emit({"written": str(export_run(run, to))}, as_json)


# ---------------------------------------------------------------- data, models, configs, machine
@data_app.command("build")
def data_build(
    out: Annotated[Path, typer.Option(help="The store to write.")],
    text: Annotated[list[Path] | None, typer.Option(help="A text file or folder; may be repeated.")] = None,
    paths: Annotated[list[Path] | None, typer.Argument(metavar="[PATH]...", help="More text files or folders.")] = None,
    corpus: Annotated[str | None, typer.Option(help="A shipped corpus or a YAML path, instead of --text.")] = None,
    tokenizer: Annotated[
        str, typer.Option(help="bytes, sentencepiece, or the path of a .model or tokenizer.json.")
    ] = "bytes",
    vocab_size: Annotated[int, typer.Option(help="Pieces, when sentencepiece is trained.")] = 4096,
    workers: Annotated[int | None, typer.Option(help="Processes; default one a core.")] = None,
    as_json: Json = False,
) -> None:
    """Tokenize text into a store that `data.store=STORE` trains on."""
    from llamax.console import build_from_cli

    sources = [str(path) for path in [*(text or []), *(paths or [])]]
    _emit(build_from_cli(out, sources, corpus, tokenizer, vocab_size, workers), as_json)


@data_app.command("inspect")
def data_inspect(store: Annotated[Path, typer.Argument(help="A token store.")], as_json: Json = False) -> None:
    """Counts, digests and a look at the text of a store."""
    from llamax.data.remote import fetched
    from llamax.data.store import inspect_store

    _emit(inspect_store(fetched(store)), as_json)


@model_app.command("list")
def model_list(as_json: Json = False) -> None:
    """Every shipped model with its exact counts."""
    from llamax.accounting.cards import list_models

    rows = list_models()
    if as_json:
        _print_json({"models": rows})
        return
    from llamax.museum import list_lines

    for line in list_lines(rows):
        print(line)


@model_app.command("show")
def model_show(
    name: Annotated[str, typer.Argument(help="A shipped model or its hub id, in any case.")],
    seq_len: Annotated[int | None, typer.Option(help="Context length for FLOPs; default the model's own.")] = None,
    device: Annotated[str, typer.Option(help="Kind of device to count for memory, such as h200 or tpu-v5p.")] = "h100",
    as_json: Json = False,
) -> None:
    """One model: its card, parameters by component, FLOPs a token, cache, and memory to train and to serve."""
    from llamax.accounting.cards import show_model

    found = show_model(name, seq_len, device)
    if as_json:
        _print_json(found)
        return
    from llamax.museum import show_lines

    for line in show_lines(found):
        print(line)


@config_app.command("show")
def config_show(
    name: Annotated[str, typer.Argument(help="A shipped config or a YAML path.")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """The resolved config, every field present."""
    from llamax.config.load import dump_yaml, load_run

    config = load_run(name, overrides or [])
    if as_json:
        _print_json(config.as_dict() | {"hash": config.hash8})
    else:
        print(f"# hash {config.hash8}\n{dump_yaml(config)}", end="")


@config_app.command("schema")
def config_schema() -> None:
    """JSON Schema of a config file, for editors."""
    from llamax.config.schema import json_schema

    _print_json(json_schema())


@app.command()
def doctor(as_json: Json = False) -> None:
    """Devices, versions, caches, and what is missing."""
    from llamax.doctor import examine

    _emit(examine(), as_json)


if __name__ == "__main__":
    main()
