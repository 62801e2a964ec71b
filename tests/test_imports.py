"""Imports point down one list, and what must start fast imports no JAX."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "llamax"

# A package imports from its own row or a lower one. Rows as in the design; the modules beside the packages (command
# line, quickstart and what they share) are the top row.
ROWS = [
    {"errors"},
    {"config"},
    {"storage"},
    {"accounting", "text"},
    {"mesh", "data", "model"},
    {"train"},
    {"tune", "quant", "hub", "generate"},
    {"report", "scaling", "sweep"},
    {"launch"},
    {path.stem for path in PACKAGE.glob("*.py")} - {"errors"},
]
LEVEL = {name: level for level, row in enumerate(ROWS) for name in row}


def imports() -> list[tuple[str, str, str]]:
    """(file, importing package, imported package) of every import inside llamax, also those inside functions."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for module in _modules(node, parts):
                if module[:1] == ("llamax",):
                    found.append((str(path.relative_to(PACKAGE)), parts[0], module[1] if module[1:] else "__init__"))
    return found


def _modules(node: ast.AST, parts: tuple[str, ...]) -> list[tuple[str, ...]]:
    if isinstance(node, ast.Import):
        return [tuple(alias.name.split(".")) for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    if node.level:
        base: tuple[str, ...] = ("llamax", *parts[: len(parts) - node.level])
        return [(*base, *(node.module or "").split("."))] if node.module else [(*base, a.name) for a in node.names]
    if node.module == "llamax":
        return [("llamax", alias.name) if (PACKAGE / alias.name).exists() else ("llamax",) for alias in node.names]
    return [tuple((node.module or "").split("."))]


def test_every_package_has_its_row() -> None:
    names = {path.parent.name for path in PACKAGE.glob("*/*.py")}
    assert "train" in names
    assert names <= set(LEVEL), f"give {names - set(LEVEL)} a row in tests/test_imports.py and the design"


def test_imports_point_down() -> None:
    edges = imports()
    assert len(edges) > 50
    wrong = [f"{file} imports llamax.{to}" for file, own, to in edges if own != to and LEVEL[to] > LEVEL[own]]
    assert wrong == []


def test_neighbours_in_a_row_do_not_import_each_other_in_a_circle() -> None:
    edges = {(own, to) for _, own, to in imports() if own != to and LEVEL[own] == LEVEL[to] < len(ROWS) - 1}
    assert [pair for pair in edges if (pair[1], pair[0]) in edges] == []


@pytest.mark.parametrize(
    "module",
    [
        "llamax",
        "llamax.config.load",
        "llamax.config.schema",
        "llamax.config.sweep",
        "llamax.accounting",
        "llamax.cli",
        "llamax.scaling",
    ],
)
def test_imports_without_jax(module: str) -> None:
    """In a fresh interpreter: neither JAX nor anything else slow."""
    heavy = ("jax", "flax", "optax", "orbax", "grain", "pandas", "scipy", "matplotlib", "torch")
    code = f"import sys, {module}; print(*(name for name in {heavy!r} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


@pytest.mark.parametrize("name", ["llamax", "llamax.scaling"])
def test_names_found_on_first_use_are_there(name: str) -> None:
    package = importlib.import_module(name)
    missing = [item for item in package.__all__ if not hasattr(package, item)]
    assert missing == []
    with pytest.raises(AttributeError, match=f"'{name}' has no attribute 'nothing'"):
        _ = package.nothing
    modules = {path.stem for path in Path(str(package.__file__)).parent.glob("*.py")}
    # An imported module becomes an attribute of its package, and would hide the function.
    assert modules & set(package.__all__) == set()
