"""The command line's side of import and export. Importing it must not import JAX."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llamax.console import AtHand, Json, emit


def model_import(
    source: Annotated[Path, typer.Argument(metavar="HF_DIR", help="A Hugging Face folder with safetensors.")],
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The run directory to make.")],
    as_json: Json = False,
) -> None:
    """Make a run directory of a Hugging Face model, for eval, generate and export."""
    from llamax.hub.convert import import_run

    emit(import_run(source, run_dir), as_json)


def model_export(
    run: Annotated[Path, AtHand(metavar="RUN_DIR", help="A run directory.")],
    folder: Annotated[Path, typer.Argument(metavar="HF_DIR", help="The folder to make.")],
    step: Annotated[int | None, typer.Option(help="The checkpoint; default the newest.")] = None,
    as_json: Json = False,
) -> None:
    """Write the model of a run as a folder that transformers loads."""
    from llamax.hub.convert import export_run

    emit(export_run(run, folder, step), as_json)
