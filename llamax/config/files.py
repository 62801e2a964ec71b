"""Finding and reading the YAML under configs/, in a checkout or inside an installed wheel."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from llamax.config.merge import numbers
from llamax.errors import UserError

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def configs_dir() -> Path:
    """The folder of shipped configs: `llamax/configs` in a wheel, `configs` beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "configs", package.parent / "configs"):
        if folder.is_dir():
            return folder
    raise UserError(f"the shipped configs are missing beside {package}; reinstall llamax")


def cache_dir() -> Path:
    """Where stores and compiled programs are kept: LLAMAX_CACHE, else $XDG_CACHE_HOME/llamax or ~/.cache/llamax."""
    if named := os.environ.get("LLAMAX_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "llamax"


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping, read with the safe loader.

    Raises:
        UserError: unreadable, not UTF-8, not YAML, a duplicated key, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; give the path of a readable YAML file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; save it as UTF-8") from None
    try:
        data = yaml.load(text, Loader=_Unique)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}: not YAML{line}: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(data, dict):
        raise UserError(
            f"{path}: expected a mapping of fields, found {type(data).__name__}; start with `key: value` lines"
        )
    return numbers(data)


class _Unique(_Loader):  # type: ignore[misc, valid-type]
    """The safe loader, refusing a key given twice: YAML would keep the last one silently."""


def _mapping(loader: Any, node: yaml.MappingNode) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    result: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, str) and key in result and key_node.start_mark.line >= node.start_mark.line:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", key_node.start_mark)
        result[key] = loader.construct_object(value_node, deep=True)
    return result


_Unique.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


@lru_cache
def shipped(folder: str) -> dict[str, Path]:
    """Shipped YAML files of one folder of configs/, by stem."""
    return {path.stem: path for path in sorted((configs_dir() / folder).glob("*.yaml"))}


def find(folder: str, name: str, what: str) -> Path:
    """The shipped file `configs/<folder>/<name>.yaml`, or `name` itself when it is the path of a file.

    Raises:
        UserError: neither exists; close names are suggested.
    """
    if name in shipped(folder):
        return shipped(folder)[name]
    if name.endswith((".yaml", ".yml")) or "/" in name:
        path = Path(name).expanduser()
        if path.is_file():
            return path
    raise UserError(unknown(what, name, list(shipped(folder))) + " (a path ending in .yaml also works)")


def unknown(what: str, name: str, known: list[str]) -> str:
    """The message for a name that is not there, with the nearest known ones."""
    import difflib

    near = difflib.get_close_matches(name, known, n=3) or known[:12]
    return f"{what} {name!r} is not known; nearest: {', '.join(near)}"
