"""Merging and overriding plain data."""

from __future__ import annotations

import pytest

from llamax.config.merge import apply_override, merge, numbers, parse_override
from llamax.errors import UserError


def test_mappings_merge_and_the_rest_is_replaced() -> None:
    base = {"a": {"b": 1, "c": [1, 2]}, "d": 3}
    assert merge(base, {"a": {"c": [9]}, "e": None}) == {"a": {"b": 1, "c": [9]}, "d": 3, "e": None}
    assert base == {"a": {"b": 1, "c": [1, 2]}, "d": 3}


def test_a_new_kind_starts_afresh_but_an_mlp_keeps_its_width() -> None:
    assert merge({"kind": "rope", "theta": 1.0}, {"kind": "nope"}) == {"kind": "nope"}
    assert merge({"kind": "rope", "theta": 1.0}, {"kind": "rope", "fraction": 0.5})["theta"] == 1.0
    assert merge({"kind": "swiglu", "d_ff": 8, "bias": True}, {"kind": "gelu"}) == {"kind": "gelu", "d_ff": 8}
    assert merge({"kind": "swiglu", "d_ff": 8}, {"kind": "moe", "experts": 2}) == {"kind": "moe", "experts": 2}


@pytest.mark.parametrize(
    ("text", "keys", "value"),
    [
        ("a=1", ("a",), 1),
        ("a.b=null", ("a", "b"), None),
        ("a=[1, x]", ("a",), [1, "x"]),
        ("a={k: 3e-4}", ("a",), {"k": 3e-4}),
        ("a=", ("a",), None),
        ("a=b=c", ("a",), "b=c"),
        ("a=1e-3", ("a",), 1e-3),
        ("a=-2E5", ("a",), -200000),
        ("a=yes", ("a",), True),
        ("a='1e3'", ("a",), 1000),
    ],
)
def test_parse(text: str, keys: tuple[str, ...], value: object) -> None:
    assert parse_override(text) == (keys, value)


def test_numbers_leaves_names_alone() -> None:
    for name in ("1e", "e5", "1e5b", "8x7b", "0x1e5", "1_0e3", "infe1", "run-1e5"):
        assert numbers(name) == name
    assert isinstance(numbers("1e400"), float)
    assert isinstance(numbers("2.5e-1"), float)
    assert isinstance(numbers("1e20"), float)


def test_lists_are_addressed_by_index() -> None:
    data = {"s": [{"r": 1}, {"r": 2}]}
    assert apply_override(data, ("s", "1", "r"), 5) == {"s": [{"r": 1}, {"r": 5}]}
    assert apply_override(data, ("s", "0"), 5) == {"s": [5, {"r": 2}]}
    with pytest.raises(UserError, match=r"s\.x: s is a list of 2; give an index from 0 to 1"):
        apply_override(data, ("s", "x"), 5)


def test_paths_are_made_where_absent_and_refused_through_values() -> None:
    assert apply_override({}, ("a", "b", "c"), 1) == {"a": {"b": {"c": 1}}}
    assert apply_override({"a": None}, ("a", "b"), 1) == {"a": {"b": 1}}
    with pytest.raises(UserError, match=r"a\.b\.c\.d: a\.b is 3, which has no fields; drop \.c\.d"):
        apply_override({"a": {"b": 3}}, ("a", "b", "c", "d"), 1)


def test_overrides_do_not_touch_their_input() -> None:
    data = {"a": {"b": [1]}}
    apply_override(data, ("a", "b", "0"), 2)
    assert data == {"a": {"b": [1]}}
