"""Multipliers against the papers' tables, and coordinate checks that a wrong variant fails."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamax.config.load import load_run, run_from_data
from llamax.config.parametrization import WIDTH, CompleteP, Factors, MuP
from llamax.config.run import RunConfig
from llamax.errors import UserError
from llamax.hub.dialects import write_config
from llamax.model.execution import Execution
from llamax.model.position import position_tables, rotary_kinds
from llamax.model.transformer import Transformer
from llamax.train.optimizer import hyperparameters, make_optimizer
from llamax.train.param_info import param_table
from llamax.train.state import TrainState, hyper_of
from llamax.train.step import train_step

EXECUTION = Execution(compute="float32")
STEPS, BATCH, SEQ = 4, 4, 16
MUP = {"kind": "mup", "base_width": 32, "base_head_dim": 8}
COMPLETEP = {"kind": "completep", "base_width": 32, "base_depth": 2, "base_head_dim": 8}


def config(width: int = 32, layers: int = 2, parametrization: Any = None, tied: bool = False, **more: Any) -> RunConfig:
    """A small model whose head_dim grows with its width from 8 on, by sqrt: heads and head_dim both scale."""
    dim = {32: 8, 64: 8, 128: 16, 256: 16}[width]
    model = {
        "vocab_size": 64,
        "d_model": width,
        "max_seq_len": SEQ,
        "segments": [{"repeat": layers}],
        "attention": {"kind": "gqa", "heads": width // dim},
        "position": {"kind": "rope"},
        "mlp": {"kind": "swiglu", "d_ff": 2 * width},
        "head": {"tied": tied},
        "init": {"kind": "fan_in", "depth_scaling": "total", "std": 0.3},
        **({"parametrization": parametrization} if parametrization else {}),
        **more,
    }
    return run_from_data(
        {
            "model": model,
            "optimizer": {"kind": "adamw", "lr": 0.02, "weight_decay": 0.0},
            "schedule": {"kind": "constant", "warmup": 0.0},
            "train": {"steps": STEPS, "batch_size": BATCH, "seq_len": SEQ, "compute_dtype": "float32"},
        }
    )


# ---------------------------------------------------------------- the papers' tables, by hand
def test_completep_table_1() -> None:
    """arXiv:2505.01618, table 1, at m_N = 8 and m_L = 4, column alpha = 0.5 and then 1."""
    for alpha, lr, eps in ((0.5, 0.5, 0.5), (1.0, 1.0, 0.25)):
        rule = CompleteP(kind="completep", base_width=32, base_depth=3, alpha=alpha)
        assert rule.residual_factor(12) == pytest.approx(4**-alpha)
        assert rule.output_factor(256) == 1 / 8
        hidden = rule.factors("hidden", True, 256, 12)
        assert hidden == pytest.approx((8**-0.5, lr / 8, 8.0, eps / 8))
        assert rule.factors("vector", True, 256, 12) == pytest.approx((1.0, lr, 1.0, eps / 8))  # pre-LN, hidden bias
        for role, in_block in (("input", False), ("output", False), ("vector", False)):  # embed, unembed, final LN
            assert rule.factors(role, in_block, 256, 12)[:3] == (1.0, 1.0, 1.0)
    assert MuP(kind="mup", base_width=32).factors("hidden", True, 256, 12) == pytest.approx((8**-0.5, 1 / 8, 8, 1 / 8))


def test_every_row_is_table_3_or_8_of_tensor_programs_v() -> None:
    """arXiv:2203.03466: both tables are one parametrization for Adam, by its own rule (lemma J.1): multiplier a, std b
    and lr c of a weight may become a / t, b t, c t. Of table 3 the invariant products at width n are, for Adam: input
    (1, 1, 1), hidden (1, n^-1/2, 1/n), output (1, 1/n, 1/n); weight decay x lr is the same for all in ours."""
    table3 = {"input": (0.0, 0.0), "hidden": (-0.5, -1.0), "output": (-1.0, -1.0), "router": (-1.0, -1.0)}
    for role, (std, lr) in table3.items():
        multiplier = -1.0 if role == "output" else 0.0
        row = WIDTH[role]
        assert (multiplier + row.std, multiplier + row.lr) == (std, lr)
        assert row.weight_decay + row.lr == 0.0
        # eps as the gradient: 1/n by the head's multiplier, and without it n times that
        assert row.eps == (0.0 if role == "router" else -1.0)


def test_multipliers_reach_every_parameter() -> None:
    moe = {"kind": "moe", "experts": 4, "top_k": 2, "expert": {"kind": "swiglu", "d_ff": 64}}
    model = config(128, 8, COMPLETEP | {"alpha": 0.5}, mlp=moe, head={"bias": True}).model
    table = {info.path: info for info in param_table(jax.eval_shape(lambda: Transformer(model, key=jax.random.key(0))))}
    hidden = (0.25 * 0.5, 4.0, 0.25 * 0.5)
    expected = {
        "embedding": (1.0, 1.0, 0.25),
        "head": (1.0, 1.0, 0.25),
        "head_bias": (1.0, 1.0, 0.25),
        "norm.scale": (1.0, 1.0, 0.25),
        "attention_norm.scale": (0.5, 1.0, 0.125),
        "mlp_norm.scale": (0.5, 1.0, 0.125),
        "mlp.router": (0.125, 4.0, 0.5),
        **{f"attention.{name}": hidden for name in ("query", "key", "value", "out")},
        **{f"mlp.{name}": hidden for name in ("up", "gate", "down")},
    }
    found = {path.removeprefix("stacks[0].blocks[0]."): (i.lr, i.weight_decay, i.eps) for path, i in table.items()}
    assert found == expected


def stds(run: RunConfig) -> dict[str, float]:
    """The std of every array at the start, by the last part of its path."""
    model = jax.jit(lambda: jax.tree.map(jnp.std, Transformer(run.model, key=jax.random.key(0))))()
    flat = jax.tree_util.tree_leaves_with_path(model)
    return {jax.tree_util.keystr(path[:-1]).rpartition(".")[2]: float(value) for path, value in flat}


def test_starts_have_the_tables_std() -> None:
    powers = {"embedding": 0.0, "head": 0.0, "query": -0.5, "out": -0.5, "up": -0.5, "down": -0.5}
    for kind, tied in (("fan_in", False), ("fan_in", True), ("normal", False)):
        init = {"kind": kind, "std": 0.3, "depth_scaling": "total"}
        base = stds(config(32, 2, tied=tied, init=init))
        wide = stds(config(256, 8, COMPLETEP, tied=tied, init=init))
        for name, power in powers.items():
            if name in base:
                assert wide[name] / base[name] == pytest.approx(8.0**power, rel=0.08), (kind, tied, name)


def program(run: RunConfig) -> str:
    """Everything that a run of one update computes, from the seed on, as text."""
    return str(jax.make_jaxpr(lambda k: updated(run, Transformer(run.model, key=jax.random.key(k)), 1))(0))


def test_the_base_model_is_the_standard_one_to_the_bit() -> None:
    standard = program(config(64, 4))
    assert program(config(64, 4, MUP | {"base_width": 64})) == standard
    assert program(config(64, 4, COMPLETEP | {"base_width": 64, "base_depth": 4})) == standard
    assert program(config(64, 4, MUP)) != standard


def test_completep_is_mup_at_the_base_depth() -> None:
    assert program(config(64, 2, COMPLETEP)) == program(config(64, 2, MUP))
    assert program(config(64, 4, COMPLETEP)) != program(config(64, 4, MUP))


def test_attention_is_one_over_head_dim() -> None:
    assert config(256, parametrization=MUP).model.layers[0].attention.scale == pytest.approx(math.sqrt(8) / 16)
    bare = {"kind": "mup", "base_width": 32}
    assert config(256, parametrization=bare).model.layers[0].attention.scale == pytest.approx(1 / 16)


def test_adamw_with_multipliers_is_adamw_with_these_numbers() -> None:
    """Two updates of every parameter against a loop with its own lr, decay and eps; eps large enough to matter."""
    run = config(128, 4, COMPLETEP | {"alpha": 0.5})
    optimizer = run.optimizer.model_copy(update={"eps": 0.1, "weight_decay": 0.3, "clip_norm": None})
    hyper = hyperparameters(optimizer, run.schedule, STEPS)
    model = jax.jit(lambda: Transformer(run.model, key=jax.random.key(0)))()
    rule = make_optimizer(optimizer, hyper, 0.02)
    state, m, v = rule.init(model), 0.0, 0.0
    infos, leaves = param_table(model), jax.tree.leaves(model)
    pairs = [[np.asarray(leaf, np.float64), m, v] for leaf in leaves]
    for step in (1, 2):
        gradients = jax.tree.map(lambda p, s=step: s * jnp.cos(jnp.arange(p.size)).reshape(p.shape), model)
        updates, state = rule.update(gradients, state, model)
        model = jax.tree.map(jnp.add, model, updates)
        for info, pair, g in zip(infos, pairs, jax.tree.leaves(gradients), strict=True):
            p, m, v = pair
            m, v = 0.9 * m + 0.1 * np.asarray(g), 0.95 * v + 0.05 * np.asarray(g) ** 2
            direction = m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.95**step)) + 0.1 * info.eps)
            decay = 0.3 * info.weight_decay * (info.group in ("matrix", "head"))
            pair[:] = p - 0.02 * info.lr * (direction + decay * p), m, v
    for (p, _, _), leaf in zip(pairs, jax.tree.leaves(model), strict=True):
        np.testing.assert_allclose(leaf, p, rtol=2e-4, atol=2e-6)


# ---------------------------------------------------------------- coordinate checks
def batch() -> dict[str, jax.Array]:
    """A fixed batch with something to learn: each token mostly decides the next."""
    rng = np.random.default_rng(0)
    follow, tokens = rng.permutation(64), np.zeros((BATCH, SEQ + 1), np.int32)
    tokens[:, 0] = rng.integers(64, size=BATCH)
    for t in range(SEQ):
        tokens[:, t + 1] = np.where(rng.random(BATCH) < 0.8, follow[tokens[:, t]], rng.integers(64, size=BATCH))
    return {"tokens": jnp.asarray(tokens)}


def updated(run: RunConfig, model: Transformer, steps: jax.Array | int, data: Any = None) -> Transformer:
    """`model` after some updates on the one batch."""
    data = batch() if data is None else data
    hyper = hyper_of(run, STEPS)
    moments = make_optimizer(run.optimizer, hyper, hyper["lr"]).init(model)
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(model, moments, zero, zero, jnp.float32(jnp.nan), hyper)
    return jax.lax.fori_loop(0, steps, lambda _, s: train_step(s, data, run, EXECUTION)[0], state).model


def activations(model: Transformer) -> dict[str, jax.Array]:
    """The embedded batch, the stream that leaves the last block, and the logits."""
    tokens = batch()["tokens"][:, :-1]
    tables = dict(zip(rotary_kinds(model.config), position_tables(model.config, SEQ).rotary, strict=True))
    stream = model.embed(tokens)
    seen = {"embedding": stream}
    for stack in model.stacks:
        stream, _ = stack(stream, tables, None, EXECUTION)
    return seen | {"stream": stream, "logits": model.logits(model.norm(stream), EXECUTION)}


def moved(run: RunConfig, seeds: int = 2) -> dict[str, float]:
    """rms over coordinates of how far STEPS updates move each of `activations`, the mean of some seeds."""

    @jax.jit
    def movement(seed: jax.Array, steps: jax.Array) -> dict[str, jax.Array]:
        model = Transformer(run.model, key=jax.random.key(seed))
        before, after = activations(model), activations(updated(run, model, steps))
        return jax.tree.map(lambda a, b: jnp.sqrt(jnp.mean((a - b) ** 2)), before, after)

    found = [movement(seed, STEPS) for seed in range(seeds)]
    return {name: float(np.mean([row[name] for row in found])) for name in found[0]}


@functools.cache
def base() -> dict[str, float]:
    """`moved` of the base model, which every parametrization, right or wrong, leaves as it is."""
    return moved(config())


def growth(runs: dict[int, RunConfig], first: int) -> dict[str, float]:
    """Exponent of each activation's movement in the size, by least squares on logs: 0 is Theta(1). The base, of size
    `first`, is added to `runs`."""
    sizes = np.log([first, *runs])
    rows = [base(), *(moved(run) for run in runs.values())]
    return {name: float(np.polyfit(sizes, np.log([row[name] for row in rows]), 1)[0]) for name in rows[0]}


# Right is 0 in the limit; here logits have -0.22, as the random head's share of them falls, and the stream -0.24 in
# depth. A factor that is missing has 0.5 or 1.
FLAT = 0.35


def flat(exponents: dict[str, float]) -> bool:
    return all(abs(value) < FLAT for value in exponents.values())


def test_coordinates_stay_the_same_size_in_width_under_mup() -> None:
    found = growth({width: config(width, parametrization=MUP) for width in (64, 256)}, 32)
    assert flat(found), found


def test_standard_parametrization_fails_in_width() -> None:
    found = growth({256: config(256)}, 32)
    assert found["stream"] > 2 * FLAT, found


@pytest.mark.parametrize("wrong", ["no_lr", "no_output", "hidden_std"])
def test_a_wrong_mup_fails_the_same_check(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if wrong == "no_lr":
        monkeypatch.setitem(WIDTH, "hidden", WIDTH["hidden"]._replace(lr=0.0))
    elif wrong == "no_output":
        monkeypatch.setattr(MuP, "output_factor", lambda self, d_model: 1.0)
    else:
        monkeypatch.setitem(WIDTH, "hidden", Factors(0.0, -1.0, 1.0, -1.0))
    found = growth({256: config(256, parametrization=MUP)}, 32)
    assert not flat(found), found


def test_coordinates_stay_the_same_size_in_depth_under_completep() -> None:
    found = growth({8: config(32, 8, COMPLETEP)}, 2)
    assert flat(found), found


def test_a_wrong_completep_fails_the_same_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CompleteP, "residual_factor", lambda self, layers: 1.0)
    found = growth({8: config(32, 8, COMPLETEP)}, 2)
    assert not flat(found), found


# ---------------------------------------------------------------- bad input, and who else must know
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.kind=muon", "model.parametrization.kind=completep is defined for optimizer.kind=adamw, not muon"),
        ("model.attention.scale=0.1", "attention.scale=0.1"),
        ("model.embedding.scale=sqrt_d_model", "embedding.scale=sqrt_d_model"),
        ("model.init.depth_scaling=layer", "init.depth_scaling=layer"),
        ("model.placement=sandwich", "placement=pre, not sandwich"),
        ("style=deepseek_v3", "attention.kind=mla"),
        ("model.segments=[{repeat: 2, unit: [{residual_factor: 2.0}]}]", "residual_factor is set by"),
        ("model.parametrization.base_width=0", "base_width = 0"),
        ("model.parametrization.alpha=0.3", "alpha = 0.3"),
    ],
)
def test_what_does_not_fit_is_refused(override: str, words: str) -> None:
    rule = "model.parametrization={kind: completep, base_width: 32, base_depth: 2}"
    with pytest.raises(UserError) as error:
        load_run("tiny", [rule, override])
    assert words in str(error.value)


def test_a_style_keeps_the_parametrization() -> None:
    run = load_run("tiny", ["model.parametrization={kind: mup, base_width: 32}", "style=qwen3"])
    assert run.model.parametrization == MuP(kind="mup", base_width=32)


def test_export_refuses_multipliers() -> None:
    with pytest.raises(UserError, match=r"parametrization\.kind=mup"):
        write_config(config(64, parametrization=MUP).model, "export")


def test_the_standard_field_is_not_part_of_the_hash() -> None:
    """Runs from before the field keep their directories; another parametrization is another run."""
    import hashlib
    import json

    run = config(64)
    data = {k: v for k, v in run.as_dict().items() if k in ("model", "data", "optimizer", "schedule", "train")}
    assert data["model"].pop("parametrization") == {"kind": "standard"}
    assert data["schedule"].pop("warmup_steps") is None  # the other field that came later
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    assert run.hash8 == hashlib.sha256(text.encode()).hexdigest()[:8]
    assert config(64, parametrization=MUP).hash8 != run.hash8
