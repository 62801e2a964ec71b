"""Studies that anyone can rerun: every notebook executes from its stored data with the public API alone, and every
README answers the same five questions."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import requires
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="notebooks need nbformat; pip install 'llamax[dev]'")
ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = ROOT / "experiments"
STUDIES = sorted(path.parent for path in EXPERIMENTS.glob("*/README.md"))
NOTEBOOKS = sorted(EXPERIMENTS.glob("*/notebook.ipynb"))
SECTIONS = ("Question", "Command", "Cost", "Result", "What would change the mind")
SLOW: set[str] = set()  # studies whose notebook takes more than about ten seconds
# Import names where they differ from the distribution's, for what pyproject.toml declares.
DECLARED = {re.split(r"[^\w-]", text)[0].replace("-", "_") for text in requires("llamax") or []} | {"yaml"}


def named(path: Path) -> str:
    return path.parent.name


# ---------------------------------------------------------------- what may be written in a notebook
def used(code: str) -> Iterator[tuple[str, str]]:
    """(module, name) of everything the code takes from a module by name; the name is empty for the module itself."""
    tree = ast.parse(code)
    modules = {"llamax": "llamax"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, ""
                modules[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield "." * node.level + (node.module or ""), alias.name
                if (node.module or "").split(".")[0] == "llamax":
                    modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            if node.attr.startswith("_") and not node.attr.endswith("__"):
                yield "private", node.attr
            if isinstance(node.value, ast.Name) and modules.get(node.value.id, "").startswith("llamax"):
                yield modules[node.value.id], node.attr


def module(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None


def complaint(source: str, name: str) -> str | None:
    """Why a notebook may not use `name` of module `source`; None when it may."""
    parts = source.split(".")
    if source == "private" or any(part.startswith("_") for part in [*parts, name] if not part.endswith("__")):
        return f"{source}.{name} is private"
    if parts[0] != "llamax":
        known = parts[0] in sys.stdlib_module_names or parts[0] in DECLARED
        return None if known else f"{source}: not a dependency of llamax"
    found = module(source)
    if found is None:
        return None  # not a module but an object taken from one: that was judged where it was imported
    if not hasattr(found, "__all__"):
        return f"{source} has no __all__: it is not a public package"
    whole = f"{source}.{name}"
    if not name or name in found.__all__ or hasattr(module(whole), "__all__"):
        return None
    return f"{whole} is not in {source}.__all__"


def complaints(code: str) -> list[str]:
    try:
        found = [complaint(*pair) for pair in used(code)]
    except SyntaxError as error:
        return [f"line {error.lineno} is not plain Python ({error.msg}); no magics, no shell"]
    return [words for words in found if words]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("from llamax.scaling.laws import ChinchillaLaw", "not a public package"),
        ("from llamax.scaling import _hidden", "private"),
        ("from llamax.scaling import no_such", "not in llamax.scaling.__all__"),
        ("from llamax import *", "not in llamax.__all__"),
        ("import llamax\nllamax.ledger_of('x')", "not in llamax.__all__"),
        ("import llamax as lx\nlx.no_such('x')", "not in llamax.__all__"),
        ("from llamax import scaling\nscaling.no_such()", "not in llamax.scaling.__all__"),
        ("from .laws import x", "private|dependency"),
        ("import numpy as np\nnp._core", "private"),
        ("import polars", "not a dependency"),
        ("from tests.scaling import synthetic", "not a dependency"),
        ("!llamax ledger runs", "no magics"),
    ],
)
def test_what_is_not_public_is_found(code: str, words: str) -> None:
    assert re.search(words, "; ".join(complaints(code)))


def test_what_is_public_passes() -> None:
    code = """
        import json, pathlib
        import matplotlib.pyplot as plt
        import numpy as np, pandas as pd
        import llamax
        import llamax.scaling as scaling
        from llamax import UserError, ledger
        from llamax.scaling import fit_frame
        scaling.fit_frame(llamax.ledger("x")).as_dict(), llamax.__version__, llamax.scaling.score
    """
    assert complaints("\n".join(line.strip() for line in code.splitlines())) == []


# ---------------------------------------------------------------- the studies
def test_every_study_is_whole_and_listed() -> None:
    folders = {path.name for path in EXPERIMENTS.iterdir() if path.is_dir()}
    assert folders == {path.name for path in STUDIES} == {named(path) for path in NOTEBOOKS}
    listed = set(re.findall(r"\]\(([\w-]+)/README\.md\)", (EXPERIMENTS / "README.md").read_text()))
    assert listed == folders


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.name)
def test_readme_answers_the_five_questions(study: Path) -> None:
    heads = re.findall(r"^\*\*(.+?)\.\*\*", (study / "README.md").read_text(), flags=re.MULTILINE)
    assert [head for head in heads if head in SECTIONS] == list(SECTIONS)


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.name)
def test_data_are_small_parquet(study: Path) -> None:
    files = [path for path in (study / "results").rglob("*") if path.is_file()]
    assert files
    assert {path.suffix for path in files} <= {".parquet", ".jsonl", ".head"}  # tables, prediction ledgers as written
    assert sum(path.stat().st_size for path in files) < 2e6


@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_notebook_uses_the_public_api(path: Path) -> None:
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert complaints("\n\n".join(cell.source for cell in cells)) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_notebook_is_stored_as_it_ran(path: Path) -> None:
    """All cells ran in order without an error, a plot is there, and nothing of the machine is."""
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"] == []
    text = path.read_text()
    assert not re.search(r"(/home/|/tmp/|/work/|/root/|/Users/|site-packages|[A-Z]:\\\\)", text)
    assert len(text) < 1e6


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, id=named(p), marks=[pytest.mark.slow] if named(p) in SLOW else []) for p in NOTEBOOKS],
)
def test_notebook_executes(path: Path, tmp_path: Path) -> None:
    """In a copy, with nothing but its stored data; every cell gives the kinds of output that are stored."""
    for name in ("nbclient", "ipykernel"):
        pytest.importorskip(name, reason=f"executing notebooks needs {name}; pip install 'llamax[dev]'")
    sys.path.insert(0, str(ROOT / "tools"))
    from run_notebook import execute

    copy = shutil.copytree(path.parent, tmp_path / named(path))
    stored = nbformat.read(path, as_version=4)
    assert [kinds(cell) for cell in execute(stored, copy).cells] == [kinds(cell) for cell in stored.cells]


def kinds(cell: Any) -> list[list[str]]:
    """What a cell gave: for each output its kinds of content, such as image/png."""
    return [sorted(output["data"]) if "data" in output else [output.output_type] for output in cell.get("outputs", [])]
