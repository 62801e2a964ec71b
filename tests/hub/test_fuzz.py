"""Readers fed with anything: a UserError or a result, never another exception."""

from __future__ import annotations

import contextlib
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llamax.errors import UserError
from llamax.hub.dialects import read_config
from llamax.hub.safetensors import read_header

from .folders import NAMES, OWN, raw_file

LOOSE = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
SMALL = st.integers(-3, 40)
ODD = st.one_of(SMALL, st.none(), st.booleans(), st.floats(), st.text(max_size=4), st.integers(10**10, 10**30))
ANY = st.recursive(
    ODD, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "I64"]) | ODD,
        "shape": st.lists(SMALL, max_size=3) | ANY,
        "data_offsets": st.lists(SMALL, min_size=2, max_size=2) | ANY,
    }
)


@LOOSE
@given(header=st.dictionaries(st.text(max_size=4), ENTRY | ANY, max_size=4), size=st.integers(0, 60))
def test_headers(tmp_path: Path, header: dict[str, Any], size: int) -> None:
    path = raw_file(tmp_path / "x.safetensors", json.dumps(header).encode(), bytes(size))
    with contextlib.suppress(UserError):
        entries = read_header(path)
        assert all(entry.end <= path.stat().st_size for entry in entries.values())


@LOOSE
@given(data=st.binary(max_size=80))
def test_bytes(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(data)
    with contextlib.suppress(UserError):
        read_header(tmp_path / "x.safetensors")


@LOOSE
@given(place=st.integers(0), byte=st.integers(0, 255))
def test_one_byte_changed(tmp_path: Path, place: int, byte: int) -> None:
    data = bytearray((OWN / "mistral" / "model.safetensors").read_bytes())
    data[place % 2000] = byte
    (tmp_path / "x.safetensors").write_bytes(data)
    with contextlib.suppress(UserError):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", NAMES)
@settings(parent=LOOSE, max_examples=40)
@given(data=st.data())
def test_configs(name: str, data: st.DataObject) -> None:
    """Any fields of a config replaced by anything."""
    fields = json.loads((OWN / name / "config.json").read_text())
    for key in data.draw(st.lists(st.sampled_from(sorted(fields)), max_size=3)):
        if data.draw(st.booleans()):
            fields.pop(key, None)
        else:
            fields[key] = data.draw(ANY)
    with warnings.catch_warnings(), contextlib.suppress(UserError):
        warnings.simplefilter("ignore")
        read_config(fields, name)


@LOOSE
@given(data=ANY)
def test_any_config(data: Any) -> None:
    with contextlib.suppress(UserError):
        read_config(data, "config.json")
