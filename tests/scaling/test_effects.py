"""From a table of runs to findings: known effects come back, factorial effects against a regression, refusals."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from llamax.errors import UserError
from llamax.scaling import ablation
from llamax.scaling.effects import factor_weights
from tests.scaling.made_ablation import FLOPS, base_loss, made_runs


def test_effects_are_paired_differences() -> None:
    runs = made_runs({"a": dict.fromkeys(FLOPS, 1.3), "b": dict.fromkeys(FLOPS, 1.0)})
    found = ablation(runs, draws=50)
    assert len(found.effects) == 8
    for row in found.effects.to_dict("records"):
        mine = runs[runs["size"] == row["size"]].pivot(index="seed", columns="variant", values="eval_loss")
        test = stats.ttest_rel(mine[row["variant"]], mine["base"])
        assert row["effect"] == pytest.approx((mine[row["variant"]] - mine["base"]).mean())
        assert row["own_p"] == pytest.approx(test.pvalue)
        assert row["p_holm"] >= row["p"]
        assert row["detectable_holm"] > row["detectable"] > 0
    assert "Holm's correction over all 8 comparisons" in " ".join(found.rules)


def test_log_losses_on_request() -> None:
    runs = made_runs(noise=1e-9, shared=0.0)
    found = ablation(runs, unit="log", draws=20)
    truth = [np.log(base_loss(1.25 * c) / base_loss(c)) for c in FLOPS.values()]
    assert found.effects["effect"].to_numpy() == pytest.approx(truth, abs=1e-6)
    assert found.gains["gain"].to_numpy() == pytest.approx(np.full(4, 1.25), rel=0.01)


def test_gains_and_their_trend_come_back() -> None:
    rising = dict(zip(FLOPS, (1.0, 1.1, 1.21, 1.331), strict=True))
    runs = made_runs({"steady": dict.fromkeys(FLOPS, 1.5), "rising": rising}, noise=1e-5, shared=0.0)
    found = ablation(runs, draws=200)
    for name, truth in (("steady", np.full(4, 1.5)), ("rising", np.array(list(rising.values())))):
        rows = found.gains[found.gains["variant"] == name]
        assert rows["gain"].to_numpy() == pytest.approx(truth, rel=0.02)
        assert ((rows["low"] <= rows["gain"]) & (rows["gain"] <= rows["high"])).all()
    slope = np.polyfit(np.log10(list(FLOPS.values())), np.log10(list(rising.values())), 1)[0]
    assert found.trends.set_index("variant").loc["rising", "factor"] == pytest.approx(10**slope, rel=0.02)


def test_sizes_are_in_order_of_compute_and_rows_may_be_in_any() -> None:
    runs = made_runs().sample(frac=1, random_state=0)
    found = ablation(runs, draws=20)
    assert list(found.effects["size"]) == list(FLOPS)
    again = ablation(made_runs(), draws=20)
    pd.testing.assert_frame_equal(found.effects, again.effects)


# ---------------------------------------------------------------- factorial
AXES = {"norm": ["rms", "ln"], "mlp": ["swiglu", "gelu", "relu2"], "position": ["rope", "nope"]}


def factorial(effect, seeds: int = 3, noise: float = 0.002) -> pd.DataFrame:
    """Runs of a full factorial at one size whose loss is 2 + effect(norm, mlp, position) + noise."""
    rng = np.random.default_rng(4)
    rows = []
    for levels in itertools.product(*AXES.values()):
        name = "+".join(x for x, own in zip(levels, ("rms", "swiglu", "rope"), strict=True) if x != own) or "base"
        for k in range(seeds):
            tags = {f"ablate.{axis}": level for axis, level in zip(AXES, levels, strict=True)}
            loss = 2 + effect(*levels) + noise * rng.standard_normal()
            rows.append(
                {
                    "variant": name,
                    "size": "d16",
                    "seed": k,
                    "eval_loss": loss,
                    "tokens": 1e6,
                    "flops_causal": 1e10,
                    **tags,
                }
            )
    return pd.DataFrame(rows)


def test_factorial_effects_are_those_of_the_cell_means() -> None:
    """By hand: averages over the other axes' levels, and the double difference for an interaction."""
    runs = factorial(lambda n, m, p: 0.01 * (n == "ln") + 0.03 * (m == "gelu") - 0.05 * (n == "ln") * (p == "nope"))
    found = ablation(runs).factors.set_index("factor")
    mean = runs.groupby(["ablate.norm", "ablate.mlp", "ablate.position"])["eval_loss"].mean()
    assert len(found) == 4 + 5
    ln = np.mean([mean["ln", m, p] - mean["rms", m, p] for m in AXES["mlp"] for p in AXES["position"]])
    gelu = np.mean([mean[n, "gelu", p] - mean[n, "swiglu", p] for n in AXES["norm"] for p in AXES["position"]])
    both = np.mean(
        [
            mean["ln", m, "nope"] - mean["ln", m, "rope"] - mean["rms", m, "nope"] + mean["rms", m, "rope"]
            for m in AXES["mlp"]
        ]
    )
    assert found.loc["ln", "effect"] == pytest.approx(ln)
    assert found.loc["gelu", "effect"] == pytest.approx(gelu)
    assert found.loc["ln x nope", "effect"] == pytest.approx(both)
    assert found.loc["ln x nope", "effect"] == pytest.approx(-0.05, abs=0.006)
    assert found.loc["ln x nope", "p_holm"] < 0.01 < found.loc["relu2", "p_holm"]
    assert found.loc["gelu", "low"] < 0.03 < found.loc["gelu", "high"]


def test_an_incomplete_factorial_has_no_factor_effects() -> None:
    levels = pd.DataFrame(list(itertools.product("ab", "cd")), columns=pd.Index(["x", "y"]))
    assert len(factor_weights(levels)) == 3
    assert factor_weights(levels.iloc[:3]) == []
    assert ablation(made_runs(), draws=20).factors.empty


# ---------------------------------------------------------------- what is odd, and what is refused
def test_one_seed_is_reported_without_intervals() -> None:
    found = ablation(made_runs(seeds=1))
    assert np.isfinite(found.effects["effect"]).all()
    assert found.effects[["low", "high", "p", "p_holm", "detectable"]].isna().all(axis=None)
    assert np.isfinite(found.gains["gain"]).all()
    assert found.gains["low"].isna().all()
    assert any("one seed" in word for word in found.words)


def test_a_diverged_run_leaves_its_variant_out_at_that_size_and_says_so() -> None:
    runs = made_runs({"a": dict.fromkeys(FLOPS, 1.3), "b": dict.fromkeys(FLOPS, 1.1)})
    lost = (runs["variant"] == "a") & (runs["size"] == "d32") & (runs["seed"] == 1)
    runs.loc[lost, ["status", "eval_loss", "fraction"]] = ["diverged", np.nan, 0.3]
    found = ablation(runs, draws=50)
    assert "d32: a is left out, 1 of its 3 runs diverged" in found.words
    assert set(zip(found.effects["variant"], found.effects["size"], strict=True)) == {
        (v, s) for v in "ab" for s in FLOPS if (v, s) != ("a", "d32")
    }
    assert found.gains[found.gains["variant"] == "b"]["gain"].notna().all()
    assert found.trends.set_index("variant")["factor"].isna().to_dict() == {"a": True, "b": False}


def test_two_ways_of_matching_are_told_apart() -> None:
    runs = made_runs({"a": dict.fromkeys(FLOPS, 1.3)})
    other = runs[runs["variant"] == "a"].assign(match="none", eval_loss=lambda f: f["eval_loss"] + 0.1)
    shared = made_runs({"c": dict.fromkeys(FLOPS, 1.1)}, seed=5).query("variant == 'c'").assign(match="params+none")
    found = ablation(pd.concat([runs, other, shared]), draws=50)
    assert list(found.noise["match"].unique()) == ["params", "none"]
    a = found.effects[found.effects["variant"] == "a"].groupby("match")["effect"].mean()
    assert a["none"] - a["params"] == pytest.approx(0.1)
    assert (found.effects[found.effects["variant"] == "c"].groupby("size").size() == 2).all()


def test_findings_are_json() -> None:
    text = json.dumps(ablation(made_runs(seeds=1)).as_dict(), allow_nan=False)
    assert json.loads(text)["effects"][0]["p"] is None


def changed(**columns: object) -> pd.DataFrame:
    runs = made_runs()
    for column, value in columns.items():
        runs[column] = runs[column].astype(object)
        runs.loc[len(runs) - 1, column] = value
    return runs


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        (changed(status="running", fraction=0.4), "gelu d48 seed 2 .running, 40 % of its steps.*different fractions"),
        (changed(fraction=0.5), "not at the end of their schedule"),
        (changed(status="pending", fraction=0.0), "0 % of its steps"),
        (changed(status="failed"), "failed"),
        (changed(tokens=2e6, flops_causal=1.2e12), "2 x the tokens"),
        (changed(fingerprint="other"), "other data"),
        (changed(seed=7), "no base run of that size and seed"),
        (changed(seed=1), "is there 2 times"),
        (changed(eval_loss=float("nan")), "eval_loss = nan"),
        (changed(eval_loss=-1.0), "eval_loss = -1"),
        (changed(flops_causal=0.0), "flops_causal = 0"),
        (made_runs().iloc[:-1], "no run of seed 2, which the base has"),
        (made_runs().query("variant != 'base'"), "no run is the base"),
        (made_runs().query("variant == 'base'"), "all runs are the base"),
        (made_runs().query("size != 'd16' or variant != 'base'"), "no base run"),
        (made_runs().iloc[:0], "empty"),
        (made_runs().drop(columns="tokens"), "no column 'tokens'"),
        (made_runs().assign(eval_loss=1.5), "exactly the loss"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_words(runs: pd.DataFrame, words: str) -> None:
    with pytest.raises(UserError, match=words):
        ablation(runs, draws=10)


def test_an_unknown_unit_is_refused() -> None:
    with pytest.raises(UserError, match="nats, log"):
        ablation(made_runs(), unit="bits")


def diverged(runs: pd.DataFrame, which: pd.Series) -> pd.DataFrame:
    """Those runs stopped after a third of their steps, which is a third of the tokens and FLOPs too."""
    short = runs.loc[which, ["tokens", "flops_causal"]] / 3
    runs.loc[which, ["tokens", "flops_causal"]] = short
    runs.loc[which, ["status", "eval_loss", "fraction"]] = ["diverged", np.nan, 0.33]
    return runs


def test_a_seed_that_the_base_lost_is_no_pair() -> None:
    runs = made_runs(seeds=4)
    lost = (runs["variant"] == "base") & (runs["size"] == "d24") & (runs["seed"] == 0)
    found = ablation(diverged(runs, lost), draws=50)
    assert found.effects.set_index("size")["seeds"].to_dict() == {"d16": 4, "d24": 3, "d32": 4, "d48": 4}
    assert "base d24 seed 0 diverged" in found.words
    assert found.gains[["gain", "low", "high"]].notna().all(axis=None)


def test_a_base_or_variants_that_all_diverged_leave_nothing_to_compare() -> None:
    runs = made_runs()
    with pytest.raises(UserError, match="d16: every run of the base diverged"):
        ablation(diverged(runs.copy(), (runs["variant"] == "base") & (runs["size"] == "d16")))
    with pytest.raises(UserError, match="no variant has all its runs"):
        ablation(diverged(runs.copy(), (runs["variant"] == "gelu") & (runs["seed"] == 0)))
