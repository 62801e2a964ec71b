"""An ablation's cells: which there are, what changes in them, and matching against a search by brute force."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from llamax.accounting import count_params, horizon, training_flops_per_token
from llamax.config.load import load_run, validate
from llamax.config.sweep import SweepConfig
from llamax.errors import UserError
from llamax.sweep.plan import Plan, load_plan, make_plan, save_plan

BASE = {"model": {"base": "ladder/d32", "max_seq_len": 128}, "train": {"steps": 200, "seq_len": 128, "batch_size": 8}}
LADDER = {"kind": "ladder", "sizes": ["ladder/d16", "ladder/d32"], "tokens_per_param": [20]}
MOE = {"kind": "moe", "experts": 8, "top_k": 2, "expert": {"kind": "swiglu", "d_ff": {"of": "d_ff", "times": 0.5}}}


def plan(ablate: dict, *axes: dict, **more: object) -> Plan:
    data = {"name": "a", "base": BASE, "axes": list(axes), "ablate": ablate, **more}
    return make_plan(validate(SweepConfig, data, "test"))


def by_name(made: Plan) -> dict:
    return {(c.tags["rung"], c.tags["variant"], c.tags["match"], c.tags["seed"]): c for c in made.cells}


# ---------------------------------------------------------------- which cells
def test_full_is_every_combination_and_the_base_comes_first() -> None:
    made = plan(
        {"norm": ["rmsnorm", "layernorm"], "mlp": ["gelu", "swiglu", "relu2"], "mode": "full", "seeds": 2}, LADDER
    )
    assert len(made.cells) == 2 * 2 * 3 * 2
    assert [c.name for c in made.cells[:3]] == ["d16-t20-base-s0", "d16-t20-base-s1", "d16-t20-gelu-s0"]
    seen = {(c.config.model.norm.kind, c.config.model.mlp.kind, c.tags["seed"]) for c in made.cells}
    assert seen == set(itertools.product(["rmsnorm", "layernorm"], ["swiglu", "gelu", "relu2"], [0, 1]))
    for c in made.cells:
        assert (c.tags["ablate.norm"], c.tags["ablate.mlp"]) == (c.config.model.norm.kind, c.config.model.mlp.kind)
        changed = [x for x in (c.tags["ablate.norm"], c.tags["ablate.mlp"]) if x not in ("rmsnorm", "swiglu")]
        assert c.tags["variant"] == ("+".join(changed) or "base")


def test_one_at_a_time_changes_one_axis() -> None:
    made = plan({"norm": ["layernorm"], "position": ["nope", "alibi"], "seeds": 1})
    assert [c.tags["variant"] for c in made.cells] == ["base", "layernorm", "nope", "alibi"]
    assert [c.tags["ablate.norm"] for c in made.cells] == ["rmsnorm", "layernorm", "rmsnorm", "rmsnorm"]


def test_runs_of_a_size_differ_in_nothing_but_the_axis() -> None:
    """Same data order, batch, learning rate and steps for all; rules are resolved for the base alone."""
    rules = {"lr": {"kind": "power_law", "coefficient": 0.53, "n_exponent": -0.3333}}
    made = by_name(plan({"mlp": ["gelu"], "position": ["learned"], "match": "none"}, LADDER, rules=rules))
    for (rung, _, _, seed), cell in made.items():
        base = made[rung, "base", "base", seed]
        assert (cell.lr, cell.batch, cell.steps) == (base.lr, base.batch, base.steps)
        assert cell.config.data == base.config.data
        assert cell.config.train.seed == base.config.train.seed == seed


def test_seeds_count_up_from_the_bases_own() -> None:
    made = plan({"norm": ["layernorm"], "seeds": 3}, overrides=["train.seed=7"])
    assert [c.config.train.seed for c in made.cells] == [7, 8, 9] * 2


def test_a_cells_overrides_rebuild_it(tmp_path: Path) -> None:
    spec = {
        "name": "a",
        "base": "quickstart",
        "axes": [LADDER],
        "ablate": {"mlp": ["gelu", MOE], "match": ["params", "flops"]},
    }
    made = make_plan(validate(SweepConfig, spec, "test"))
    for cell in made.cells:
        assert load_run("quickstart", cell.overrides) == cell.config
    save_plan(made, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json").as_dict() == made.as_dict()


def test_levels_are_kinds_parts_values_or_any_field() -> None:
    made = plan(
        {
            "position": ["rope", {"theta": 500000.0}, {"kind": "rope", "fraction": 0.5}],
            "placement": ["sandwich"],
            "fields": {"model.attention.qk_norm": [{"kind": "rmsnorm"}], "optimizer.weight_decay": [0.1, 0.0]},
            "seeds": 1,
            "match": "none",
        }
    )
    cells = {c.tags["variant"]: c.config for c in made.cells}
    assert cells["theta500000"].model.position.theta == 500000.0
    assert cells["rope.fraction0.5"].model.position.fraction == 0.5
    assert cells["sandwich"].model.placement == "sandwich"
    assert cells["rmsnorm"].model.attention.qk_norm is not None
    assert cells["weight_decay0"].optimizer.weight_decay == 0.0
    assert len(cells) == 6, "the base's own levels are no variants"
    assert {c.tags["ablate.position"] for c in made.cells} == {"rope", "theta500000", "rope.fraction0.5"}


# ---------------------------------------------------------------- matching
@pytest.mark.parametrize("match", ["params", "active"])
def test_the_width_is_the_nearest_of_all(match: str) -> None:
    made = by_name(plan({"mlp": ["gelu", MOE], "seeds": 1, "match": match, "tolerance": 0.001}, LADDER))
    count = (lambda m: count_params(m).total) if match == "params" else (lambda m: count_params(m).active_matmul)
    for (rung, variant, _, _), cell in made.items():
        if variant == "base":
            continue
        goal = count(made[rung, "base", "base", 0].config.model)
        path = "mlp.d_ff" if variant == "gelu" else "mlp.expert.d_ff"
        sizes = {w: count(rebuilt(cell, f"model.{path}={w}").model) for w in range(1, 200)}
        best = min(abs(size - goal) for size in sizes.values())
        assert abs(count(cell.config.model) - goal) == best
        assert cell.tags["matched"] == (best / goal <= 0.001)
        assert cell.config.train.steps == made[rung, "base", "base", 0].steps


def rebuilt(cell, *more: str):
    from llamax.config.load import run_from_data

    return run_from_data(BASE, [*cell.overrides, *more])


def test_widths_keep_to_a_multiple() -> None:
    made = plan({"mlp": ["gelu"], "seeds": 1, "multiple": 16, "tolerance": 0.001}, LADDER)
    assert all(c.config.model.mlp.d_ff % 16 == 0 for c in made.cells)


def test_the_steps_are_the_nearest_of_all() -> None:
    for convention in ("causal", "6n"):
        made = by_name(
            plan({"mlp": ["gelu", MOE], "seeds": 1, "match": "flops", "tolerance": 0.0005, "flops": convention}, LADDER)
        )
        for (rung, variant, _, _), cell in made.items():
            base = made[rung, "base", "base", 0]
            a_step = training_flops_per_token(cell.config.model, 128)[convention] * 8 * 128
            goal = base.flops[convention]
            best = min(range(1, 2000), key=lambda steps: abs(steps * a_step - goal))
            assert variant == "base" or cell.steps == best
            assert horizon(cell.config).flops[convention] == pytest.approx(goal, rel=0.5 / cell.steps + 1e-9)


def test_what_is_near_enough_is_left_as_it_is() -> None:
    made = by_name(plan({"norm": ["layernorm"], "seeds": 1, "match": "params", "tolerance": 0.01}, LADDER))
    for rung in ("d16-t20", "d32-t20"):
        base, cell = made[rung, "base", "base", 0], made[rung, "layernorm", "params", 0]
        assert cell.config.model.mlp == base.config.model.mlp
        off = count_params(cell.config.model).total / count_params(base.config.model).total - 1
        assert 0 < off <= 0.01
        assert cell.tags["params_unmatched"] == count_params(cell.config.model).total


def test_what_cannot_be_matched_is_said() -> None:
    made = plan({"mlp": [{**MOE, "experts": 64}], "seeds": 1, "match": "params"}, LADDER)
    assert [c.tags["matched"] for c in made.cells] == [True, False] * 2
    assert len(made.warnings) >= 2
    assert "could not be matched" in made.warnings[0]
    assert "NOT within" in made.cells[1].rules["match"]


def test_before_matching_is_told_too() -> None:
    made = by_name(plan({"mlp": ["gelu"], "seeds": 1}, LADDER))
    cell = made["d32-t20", "gelu", "params", 0]
    plain = rebuilt(cell, f"model.mlp.d_ff={made['d32-t20', 'base', 'base', 0].config.model.mlp.d_ff}")
    assert cell.tags["params_unmatched"] == count_params(plain.model).total
    assert cell.tags["flops_unmatched"] == pytest.approx(horizon(plain).flops["causal"])
    assert f"-> {count_params(cell.config.model).total}" in cell.rules["match"].replace(",", "")


def test_two_ways_of_matching_share_the_runs_that_are_alike() -> None:
    made = plan({"mlp": ["gelu"], "position": ["nope"], "seeds": 1, "match": ["params", "none"]})
    assert [(c.tags["variant"], c.tags["match"]) for c in made.cells] == [
        ("base", "base"),
        ("gelu", "params"),
        ("gelu", "none"),
        ("nope", "params+none"),
    ]
    assert len({c.hash for c in made.cells}) == 4


def test_a_rule_takes_the_sizes_own_numbers() -> None:
    made = by_name(plan({"mlp": [MOE], "seeds": 1, "match": "none"}, LADDER))
    for rung in ("d16-t20", "d32-t20"):
        dense = made[rung, "base", "base", 0].config.model.mlp.d_ff
        assert made[rung, "moe", "none", 0].config.model.mlp.expert.d_ff == dense // 2


# ---------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("ablate", "words"),
    [
        ({"seeds": 3}, "no axis"),
        ({"nrom": ["layernorm"]}, "nrom"),
        ({"norm": []}, "norm"),
        ({"norm": ["rmsnorm"]}, "no level but the base's own"),
        ({"norm": ["lernorm"]}, "ablate.norm='lernorm'"),
        ({"norm": ["layernorm", "layernorm"]}, "name each level once"),
        ({"mlp": [{"kind": "gelu", "d_ff": {"of": "deff"}}]}, "deff"),
        ({"norm": ["layernorm"], "match": "flop"}, "match"),
        ({"norm": ["layernorm"], "match": ["none", "none"]}, "repeats itself"),
        ({"norm": ["layernorm"], "seeds": 0}, "seeds"),
        ({"norm": ["layernorm"], "tolerance": 0.5}, "tolerance"),
        ({"fields": {"modle.norm": [1]}}, "no field of a run"),
        ({"fields": {"train.seed": [1]}}, "place of its own"),
        ({"fields": {"model.norm": ["layernorm"]}}, "ablate.norm"),
        ({"fields": {"model.attention.qk_nrom": [None]}}, "qk_nrom"),
        ({"fields": {"model.mlp.d_ff": [48]}, "match": "params"}, "is the base itself"),
    ],
)
def test_bad_input_is_named(ablate: dict, words: str) -> None:
    with pytest.raises(UserError, match=words.replace("'", ".").replace("(", ".")):
        plan(ablate)


def test_an_axis_and_the_ablation_do_not_set_one_field() -> None:
    with pytest.raises(UserError, match=r"train\.seed is set by"):
        plan({"norm": ["layernorm"]}, {"kind": "seeds", "count": 2})
    with pytest.raises(UserError, match=r"ablate\.norm"):
        plan({"norm": ["layernorm"]}, {"kind": "product", "fields": {"model.norm.kind": ["rmsnorm", "none"]}})


def test_plans_without_jax(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(json.dumps({"name": "a", "base": BASE, "ablate": {"mlp": ["gelu"], "seeds": 2}}))
    code = f"""
import sys, llamax.cli, llamax.sweep.ablate
print([m for m in ("jax", "pandas", "scipy") if m in sys.modules])
llamax.cli.app(["ablate", "plan", {str(tmp_path / "a.yaml")!r}, "--json"], standalone_mode=False)
print([m for m in ("jax", "flax", "optax", "pandas") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, *plan, last = done.stdout.strip().splitlines()
    assert (first, last) == ("[]", "[]")
    assert json.loads("".join(plan))["power"]["detectable"] > 0


def test_levels_of_one_name_on_two_axes_are_told_apart() -> None:
    fields = {"model.attention.qk_norm": [{"kind": "layernorm"}]}
    made = plan({"norm": ["layernorm"], "fields": fields, "seeds": 1, "match": "none"})
    assert [c.tags["variant"] for c in made.cells] == ["base", "norm_layernorm", "qk_norm_layernorm"]


def test_trunks_and_branches_are_not_ablated() -> None:
    with pytest.raises(UserError, match="do not go together"):
        plan({"norm": ["layernorm"]}, {"kind": "horizons", "tokens": [1e5, 2e5]})
