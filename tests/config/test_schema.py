"""The JSON Schema accepts every shipped config file as written and refuses what an editor should underline."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llamax.config.files import read_yaml, shipped
from llamax.config.load import load_run
from llamax.config.schema import json_schema

SCHEMA = json_schema()
TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}


def accepts(schema: dict[str, Any], value: Any) -> bool:
    """The part of JSON Schema that pydantic writes; an unknown keyword is an error."""
    known = {"$schema", "$defs", "title", "description", "default", "pattern"}
    for keyword, rule in schema.items():
        if keyword in known:
            continue
        if not CHECKS[keyword](rule, value, schema):
            return False
    return True


def is_type(rule: str, value: Any) -> bool:
    if rule in ("integer", "number"):
        whole = isinstance(value, int) or (rule == "number" and isinstance(value, float))
        return whole and not isinstance(value, bool)
    return isinstance(value, TYPES[rule])


def properties_fit(rule: dict[str, Any], value: Any) -> bool:
    return not isinstance(value, dict) or all(accepts(rule[key], item) for key, item in value.items() if key in rule)


def nothing_else(rule: Any, value: Any, schema: dict[str, Any]) -> bool:
    if not isinstance(value, dict):
        return True
    extra = [item for key, item in value.items() if key not in schema.get("properties", {})]
    return all(accepts(rule, item) for item in extra) if isinstance(rule, dict) else rule or not extra


CHECKS = {
    "$ref": lambda rule, value, _: accepts(SCHEMA["$defs"][rule.removeprefix("#/$defs/")], value),
    "anyOf": lambda rule, value, _: any(accepts(option, value) for option in rule),
    "type": lambda rule, value, _: is_type(rule, value),
    "enum": lambda rule, value, _: value in rule,
    "const": lambda rule, value, _: value == rule,
    "properties": lambda rule, value, _: properties_fit(rule, value),
    "additionalProperties": nothing_else,
    "items": lambda rule, value, _: not isinstance(value, list) or all(accepts(rule, item) for item in value),
    "minItems": lambda rule, value, _: not isinstance(value, list) or len(value) >= rule,
    "minimum": lambda rule, value, _: not is_type("number", value) or value >= rule,
    "maximum": lambda rule, value, _: not is_type("number", value) or value <= rule,
    "exclusiveMinimum": lambda rule, value, _: not is_type("number", value) or value > rule,
    "exclusiveMaximum": lambda rule, value, _: not is_type("number", value) or value < rule,
}


@pytest.mark.parametrize("name", shipped("train"))
def test_shipped_files_fit(name: str) -> None:
    assert accepts(SCHEMA, read_yaml(shipped("train")[name]))
    assert accepts(SCHEMA, load_run(name).as_dict())


@pytest.mark.parametrize(
    "data",
    [
        {"model": "llama3/8b"},
        {"model": "meta-llama/Meta-Llama-3-8B", "train": {"steps": 3}},
        {"base": "tiny", "model": {"base": "ladder/d64", "norm": {"eps": 1e-6}}},
        {"base": "./mine.yaml", "model": {"segments": [{"repeat": 2, "unit": [{"attention": {"window": 4}}, {}]}]}},
        {"train": {"steps": None, "flops": 1e12}},
        {"mesh": {"data": -1, "rules": "default"}},
    ],
)
def test_what_a_file_may_say(data: dict[str, Any]) -> None:
    assert accepts(SCHEMA, data)


@pytest.mark.parametrize(
    "data",
    [
        {"trian": {}},
        {"model": 3},
        {"model": {"attention": {"windw": 3}}},
        {"model": {"segments": [{"repeat": 2, "unit": [{"attention": {"windw": 4}}]}]}},
        {"model": {"norm": {"kind": "batchnorm"}}},
        {"model": {"position": {"kind": "alibi", "theta": 1.0}}},
        {"train": {"steps": "many"}},
        {"train": {"steps": 0}},
        {"train": {"remat": "half"}},
        {"optimizer": {"kind": "lion", "eps": 1e-8}},
        {"train": {"tokens": "1 billion"}},
    ],
)
def test_what_an_editor_underlines(data: dict[str, Any]) -> None:
    assert not accepts(SCHEMA, data)


def test_it_is_plain_json_with_text_for_hovering() -> None:
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA
    assert "horizon" in SCHEMA["$defs"]["TrainConfig"]["description"]
    assert "ladder/d64" in json.dumps(SCHEMA["properties"]["model"])
