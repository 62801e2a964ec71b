"""Axes and their names against brute force."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamax.config.load import run_from_data, validate
from llamax.config.sweep import SweepConfig, load_sweep
from llamax.errors import UserError
from llamax.sweep.expand import expand, exponent, number, safe, size_labels

BASE = {"model": "ladder/d32", "train": {"steps": 10, "seq_len": 64}}


def sweep(*axes: dict, **more: object) -> SweepConfig:
    return validate(SweepConfig, {"name": "s", "base": BASE, "axes": list(axes), **more}, "test")


def choices(spec: SweepConfig) -> list[tuple[tuple[str, object], ...]]:
    return [point.sets for point in expand(spec)]


def test_axes_multiply_as_nested_loops_do() -> None:
    lrs, kinds, seeds = [1e-3, 3e-3], ["rope", "alibi", "nope"], [0, 1]
    pairs = [(64, 1), (32, 2)]
    spec = sweep(
        {"kind": "product", "fields": {"optimizer.lr": lrs, "model.position.kind": kinds}},
        {"kind": "zip", "fields": {"train.seq_len": [64, 32], "train.grad_accumulation": [1, 2]}},
        {"kind": "seeds", "count": 2},
    )
    expected = []
    for lr in lrs:
        for kind in kinds:
            for seq, accumulation in pairs:
                for seed in seeds:
                    expected.append(
                        (
                            ("optimizer.lr", lr),
                            ("model.position.kind", kind),
                            ("train.seq_len", seq),
                            ("train.grad_accumulation", accumulation),
                            ("train.seed", seed),
                        )
                    )
    assert choices(spec) == expected
    names = [point.label for point in expand(spec)]
    assert len(set(names)) == len(names) == 24
    assert names[0] == "lr0.001-position_rope-seq_len64-grad_accumulation1-s0"


def test_isoflop_takes_one_list_or_one_a_budget() -> None:
    one = sweep({"kind": "isoflop", "budgets": [1e12, 2.5e12], "sizes": ["ladder/d32", "ladder/d64"]})
    assert choices(one) == [
        (("model.base", size), ("train.flops", budget))
        for budget, size in itertools.product([1e12, 2.5e12], ["ladder/d32", "ladder/d64"])
    ]
    assert [p.label for p in expand(one)] == ["C1e12-d32", "C1e12-d64", "C2.5e12-d32", "C2.5e12-d64"]
    assert expand(one)[2].tags == {"budget": 2.5e12, "size": "d32"}
    each = sweep({"kind": "isoflop", "budgets": [1e12, 2e12], "sizes": [["ladder/d32"], ["ladder/d64", "ladder/d96"]]})
    assert [p.label for p in expand(each)] == ["C1e12-d32", "C2e12-d64", "C2e12-d96"]


def test_ladder_sets_tokens_a_parameter() -> None:
    spec = sweep({"kind": "ladder", "sizes": ["ladder/d32", "ladder/d64"], "tokens_per_param": [10, 20]})
    assert choices(spec) == [
        (("model.base", m), ("train.tokens_per_param", r)) for m in ("ladder/d32", "ladder/d64") for r in (10.0, 20.0)
    ]
    assert [p.label for p in expand(spec)] == ["d32-t10", "d32-t20", "d64-t10", "d64-t20"]


def test_seeds_may_be_listed_and_no_axis_is_one_cell() -> None:
    assert [p.label for p in expand(sweep({"kind": "seeds", "values": [7, 3]}))] == ["s7", "s3"]
    assert [(p.label, p.sets) for p in expand(sweep())] == [("s", ())]


def test_equal_choices_keep_unique_names() -> None:
    spec = sweep({"kind": "product", "fields": {"model.norm": [{"kind": "rmsnorm"}, {"kind": "rmsnorm", "eps": 1e-6}]}})
    assert [p.label for p in expand(spec)] == ["norm_rmsnorm", "norm_rmsnorm-2"]


def test_two_families_with_one_size_name_stay_apart() -> None:
    assert size_labels(["a/7b", "b/7b", "b/70b"]) == {"a/7b": "a-7b", "b/7b": "b-7b", "b/70b": "70b"}


@given(st.floats(min_value=1e-12, max_value=1e30))
def test_number_names_are_exact_and_safe(value: float) -> None:
    assert float(number(value)) == value
    assert float(exponent(value)) == value
    assert safe(number(value)) == number(value)


@given(
    st.lists(
        st.lists(st.sampled_from(["a", "a-2", "b", 1, 1.0, "1"]), min_size=1, max_size=4).map(json.dumps),
        min_size=1,
        max_size=3,
    )
)
def test_names_are_unique_whatever_the_values(texts: list[str]) -> None:
    axes = [{"kind": "product", "fields": {f"x.f{i}": json.loads(text)}} for i, text in enumerate(texts)]
    names = [point.label for point in expand(sweep(*axes))]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("axes", "more", "message"),
    [
        ([{"kind": "zip", "fields": {"a.b": [1], "c.d": [1, 2]}}], {}, "zip needs lists of one length"),
        ([{"kind": "seeds"}], {}, "exactly one of count=None and values=None"),
        ([{"kind": "seeds", "count": 2, "values": [1]}], {}, "exactly one of"),
        ([{"kind": "isoflop", "budgets": [1e9], "sizes": [["m"], ["m"]]}], {}, "2 lists for 1 budgets"),
        ([{"kind": "isoflop", "budgets": [0.0], "sizes": ["m"]}], {}, "budgets.0"),
        ([{"kind": "grid", "fields": {}}], {}, "'grid'"),
        ([{"kind": "product", "fields": {"a.b": []}}], {}, "a.b"),
        ([], {"rules": {"lr": {"kind": "power_law", "coefficient": 1, "min": 2, "max": 1}}}, "min=2 is above max=1"),
        ([], {"rules": {"lr": {"kind": "power_law", "coefficent": 1}}}, "coefficent"),
        ([], {"name": "a/b"}, "name"),
    ],
)
def test_bad_specs_are_named(axes: list[dict], more: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sweep(*axes, **more)


@pytest.mark.parametrize(
    ("axes", "more", "message"),
    [
        (
            [{"kind": "seeds", "count": 2}, {"kind": "product", "fields": {"train.seed": [1]}}],
            {},
            r"train.seed is set by axes.0 \(seeds\) and by axes.1 \(product\)",
        ),
        ([{"kind": "seeds", "count": 2}], {"overrides": ["train.seed=3"]}, "train.seed is set by overrides"),
        (
            [{"kind": "product", "fields": {"optimizer.lr": [1.0]}}],
            {"rules": {"lr": {"kind": "fixed", "value": 1}}},
            "optimizer.lr is set by rules.lr",
        ),
        (
            [{"kind": "product", "fields": {"model.norm": [{"kind": "none"}], "model.norm.kind": ["none"]}}],
            {},
            "model.norm and model.norm.kind",
        ),
        (
            [
                {"kind": "isoflop", "budgets": [1e9], "sizes": ["ladder/d32"]},
                {"kind": "ladder", "sizes": ["ladder/d64"]},
            ],
            {},
            "model.base is set by",
        ),
    ],
)
def test_a_field_has_one_owner(axes: list[dict], more: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        expand(sweep(*axes, **more))


def test_overrides_reach_the_sweep_or_its_cells() -> None:
    spec = load_sweep(
        "quickstart", ["axes.0.budgets=[1e10, 2e10, 3e10, 4e10]", "rules.min_steps=7", "train.seq_len=64"]
    )
    assert spec.axes[0].budgets == (1e10, 2e10, 3e10, 4e10)
    assert spec.rules.min_steps == 7
    assert "train.seq_len=64" in spec.overrides
    with pytest.raises(UserError, match="sizes_"):
        load_sweep("quickstart", ["axes.0.sizes_=[1]"])
    with pytest.raises(UserError, match="quickstart"):
        load_sweep("quickstrat")


def test_base_of_these_tests_is_a_run() -> None:
    assert run_from_data(BASE).train.steps == 10
