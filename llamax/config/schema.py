"""The JSON Schema of a run config file, for editors: completion, hover text and red lines while typing.

It describes the *file*, which says less and more than the resolved config: every field may be left to a default or to
`base`, and a model may be a name. What only the whole config can show (two horizons, heads that do not divide) stays
with `llamax config show`.
"""

from __future__ import annotations

from typing import Any

from llamax.config.files import shipped
from llamax.config.load import model_names
from llamax.config.model import Block
from llamax.config.run import RunConfig


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a train config as YAML."""
    schema = RunConfig.model_json_schema()
    block = Block.model_json_schema()
    definitions = {**schema.pop("$defs"), **block.pop("$defs"), "Block": block}
    definitions["Segment"]["properties"]["unit"]["items"] = {"$ref": "#/$defs/Block"}
    model_name = _name(model_names(), "a shipped model, or its id on the Hugging Face hub")
    definitions["ModelConfig"]["properties"]["base"] = model_name
    schema["properties"]["model"] = {"anyOf": [model_name, {"$ref": "#/$defs/ModelConfig"}]}
    schema["properties"]["base"] = _name(list(shipped("train")), "a config this one starts from, by name or YAML path")
    _suggest(definitions["DataConfig"], "corpus", "corpora")
    _suggest(definitions["MeshConfig"], "rules", "meshes")
    top = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "llamax run config"}
    return _partial({**schema, **top, "$defs": definitions})


def _suggest(definition: dict[str, Any], field: str, folder: str) -> None:
    """Suggests the names shipped in `folder` for a text field of a definition, which keeps its default."""
    old = definition["properties"][field]
    name = _name(list(shipped(folder)), f"a name in configs/{folder}, or a path")
    definition["properties"][field] = {key: old[key] for key in ("default", "title")} | name


def _name(known: list[str], what: str) -> dict[str, Any]:
    """Any text, the known names suggested."""
    return {"description": what, "anyOf": [{"enum": known}, {"type": "string"}]}


def _partial(node: Any) -> Any:
    """`node` with nothing required and unions open, as a file that is merged over a base needs."""
    if isinstance(node, list):
        return [_partial(item) for item in node]
    if not isinstance(node, dict):
        return node
    renamed = {"anyOf" if key == "oneOf" else key: value for key, value in node.items()}
    return {key: _partial(value) for key, value in renamed.items() if key not in ("required", "discriminator")}
