"""From a pydantic error to lines a person can act on: the field as they wrote it, the value, the fix."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError


def explain(cls: type[BaseModel], data: Any, error: ValidationError) -> list[str]:
    """One line a wrong field of `data`, which failed to become a `cls`."""
    return [_line(cls, data, item) for item in error.errors(include_url=False)]


def _line(cls: type[BaseModel], data: Any, error: Any) -> str:
    path = ".".join(_written(cls, error["loc"], data))
    value, kind, context = error.get("input"), error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown field {path} = {value!r}; {_nearest(cls, error['loc'])}"
    if kind == "missing":
        return f"{path} is missing; give it a value"
    if kind == "value_error":
        return f"{path + ': ' if path else ''}{context['error']}"
    if kind == "union_tag_invalid":
        return f"{path}.kind = {context['tag']!r} is not one of {context['expected_tags']}"
    if kind == "union_tag_not_found":
        return f"{path}.kind is missing; choose one of {', '.join(_kinds(cls, error['loc']))}"
    if isinstance(value, Mapping):
        return f"{path}: {_lower(error['msg'])}, not a mapping of fields ({', '.join(map(str, value)) or 'empty'})"
    hint = f", for example {{kind: {value}}}" if value in _kinds(cls, error["loc"]) else ""
    value = list(value) if isinstance(value, tuple) else value
    return f"{path} = {value!r}: {_lower(error['msg'])}{hint}"


# Pydantic speaks of objects and tuples; the reader wrote YAML.
_WORDS = {"be an object": "be a mapping of fields", "valid array": "list", "Tuple ": "List ", " after validation": ""}


def _lower(message: str) -> str:
    """Pydantic's sentence inside ours."""
    for theirs, ours in _WORDS.items():
        message = message.replace(theirs, ours)
    return message[:1].lower() + message[1:]


def _written(cls: type[BaseModel], loc: Sequence[Any], data: Any) -> list[str]:
    """The path as it is written in a file: without the union tags that pydantic puts between fields, which are those of
    `kind` or, where the file leaves it to a default, of that."""
    path: list[str] = []
    for i, part in enumerate(loc):
        if isinstance(data, Mapping) and part not in data and part in (data.get("kind"), *_kinds(cls, loc[:i])):
            continue
        path.append(str(part))
        if isinstance(data, Mapping):
            data = data.get(part)
        elif isinstance(data, Sequence) and not isinstance(data, str) and isinstance(part, int) and part < len(data):
            data = data[part]
    return path


def _nearest(cls: type[BaseModel], loc: Sequence[Any]) -> str:
    fields = [name for model in _models_at(cls, loc[:-1]) for name in model.model_fields]
    near = difflib.get_close_matches(str(loc[-1]), fields, n=1)
    if near:
        return f"did you mean {near[0]}?"
    return f"remove it or use one of {', '.join(dict.fromkeys(fields))}"


def _kinds(cls: type[BaseModel], loc: Sequence[Any]) -> list[str]:
    return [kind for model in _models_at(cls, loc) for kind in _tags(model)]


def _tags(model: type[BaseModel]) -> tuple[Any, ...]:
    return get_args(model.model_fields["kind"].annotation) if "kind" in model.model_fields else ()


def _models_at(cls: type[BaseModel], loc: Sequence[Any]) -> list[type[BaseModel]]:
    """The config classes that can stand at `loc`: one, or the members of a union."""
    models = [cls]
    for part in loc:
        tagged = [model for model in models if part in _tags(model)]
        if tagged:
            models = tagged
        elif isinstance(part, str):
            fields = [model.model_fields[part].annotation for model in models if part in model.model_fields]
            models = [model for annotation in fields for model in _models_in(annotation)]
    return models


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models_in(inner)]
