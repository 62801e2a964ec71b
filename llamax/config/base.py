"""The base of every config object: frozen, strict, hashable by value."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)  # it has no public name

_PLUGINS = "PYDANTIC_DISABLE_PLUGINS"


class _WithoutPlugins(ModelMetaclass):
    """Classes are built without looking for pydantic's plugins, for which it reads the metadata of every installed
    package: a quarter of the time that `llamax model list` takes. Other models of the process keep theirs."""

    def __new__(cls, *arguments: Any, **options: Any) -> Any:
        before = os.environ.get(_PLUGINS)
        os.environ[_PLUGINS] = "__all__"
        try:
            return super().__new__(cls, *arguments, **options)
        finally:
            if before is None:
                del os.environ[_PLUGINS]
            else:
                os.environ[_PLUGINS] = before


class Frozen(BaseModel, metaclass=_WithoutPlugins):
    """Immutable config data. Unknown keys and wrong types are errors; equality and hash are by value.

    Parts are built with what holds them, or when they are first read by themselves; what files hold is built at once.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        defer_build=True,
        strict=True,
        allow_inf_nan=False,
        ignored_types=(functools.cached_property,),
    )

    def as_dict(self) -> dict[str, Any]:
        """The resolved config as plain JSON-compatible data, defaults included."""
        return self.model_dump(mode="json")

    def canonical(self) -> str:
        """One line of JSON with sorted keys: equal configs have equal text."""
        return json.dumps(self.as_dict(), sort_keys=True, separators=(",", ":"))

    def digest(self) -> str:
        """SHA-256 of the canonical text, in hex."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self.canonical())

    def __hash__(self) -> int:  # segments hold dicts of overrides, which pydantic's own hash refuses
        return self._hash
