"""Optimizers against hand-written numpy steps, optax's own aliases, and algebra."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from llamax.config.run import Adafactor, AdamW, Group, Groups, Lion, Muon, Schedule, Sgd
from llamax.train import optimizer as optimizers
from llamax.train.optimizer import hyperparameters, keep_if, make_optimizer
from llamax.train.param_info import GROUPS, is_variable, param_table

FLAT = Groups(**{group: Group() for group in GROUPS})  # every multiplier 1
KINDS = {kind().kind: kind for kind in (AdamW, Muon, Lion, Adafactor, Sgd)}


def param(rng, shape, axes, group, inputs):
    return nnx.Param(jnp.asarray(rng.standard_normal(shape), jnp.float32), axes=axes, group=group, inputs=inputs)


class Layer(nnx.Module):
    """One layer, or a stack of them: `stack` is the leading shape that `axes` does not name."""

    def __init__(self, rng, stack=(), d=8, heads=2, experts=3, d_ff=12):
        self.norm = param(rng, (*stack, d), ("d_model",), "norm", 0)
        self.query = param(rng, (*stack, d, heads, 4), ("d_model", "heads", "head_dim"), "matrix", 1)
        self.out = param(rng, (*stack, heads, 4, d), ("heads", "head_dim", "d_model"), "matrix", 2)
        self.router = param(rng, (*stack, d, experts), ("d_model", "experts"), "router", 1)
        self.up = param(rng, (*stack, experts, d, d_ff), ("experts", "d_model", "d_ff"), "matrix", 1)


class Toy(nnx.Module):
    def __init__(self, seed, layers=2):
        rng = np.random.default_rng(seed)
        self.embedding = param(rng, (6, 8), ("vocab", "d_model"), "embedding", 0)
        self.blocks = Layer(rng, (layers,))
        self.head = param(rng, (8, 6), ("d_model", "vocab"), "head", 1)
        self.bias = param(rng, (6,), ("vocab",), "bias", 0)


class One(nnx.Module):
    def __init__(self, value, group="matrix", inputs=1):
        axes = tuple(f"a{i}" for i in range(value.ndim))
        self.w = nnx.Param(jnp.asarray(value), axes=axes, group=group, inputs=inputs)


def like(model, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), model)


RATES = (0.01, 0.02, 0.03, 0.02, 0.01)


@functools.partial(jax.jit, static_argnums=0)
def init(kind, model, hyper):
    return make_optimizer(KINDS[kind](), hyper, 0.0).init(model)


@functools.partial(jax.jit, static_argnums=0)
def update(kind, model, state, grads, hyper, lr):
    return make_optimizer(KINDS[kind](), hyper, lr).update(grads, state, model)


def trained(config, model):
    """Parameters after five updates on gradients `like(model, step)`."""
    hyper = hyperparameters(config, Schedule(), 5)
    state = init(config.kind, model, hyper)
    for i, lr in enumerate(RATES):
        updates, state = update(config.kind, model, state, like(model, i), hyper, lr)
        model = jax.tree.map(np.add, model, updates)
    return model


def one_update(config, model, grads, lr=1.0):
    hyper = hyperparameters(config, Schedule(), 1)
    return update(config.kind, model, init(config.kind, model, hyper), grads, hyper, lr)[0]


def by_path(model):
    return dict(zip((info.path for info in param_table(model)), jax.tree.leaves(model), strict=True))


def values(model):
    return {path: np.asarray(x, np.float64) for path, x in by_path(model).items()}


def close(a, b, rtol=2e-5, atol=2e-6):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


# ---------------------------------------------------------------- by hand, in float64 numpy
def adamw_step(p, g, s, t, lr, wd):
    m, v = 0.9 * s.get("m", 0) + 0.1 * g, 0.95 * s.get("v", 0) + 0.05 * g**2
    direction = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
    return p - lr * direction - lr * wd * p, {"m": m, "v": v}


def lion_step(p, g, s, t, lr, wd):
    m = s.get("m", np.zeros_like(p))
    return p - lr * (np.sign(0.9 * m + 0.1 * g) + wd * p), {"m": 0.99 * m + 0.01 * g}


def sgd_step(p, g, s, t, lr, wd):
    m = 0.9 * s.get("m", 0) + g
    return p - lr * (m + wd * p), {"m": m}


@pytest.mark.parametrize(("kind", "rule"), [(AdamW, adamw_step), (Lion, lion_step), (Sgd, sgd_step)])
@pytest.mark.parametrize("clip", [None, 1.5])
def test_five_steps_by_hand_with_group_multipliers_and_clipping(kind, rule, clip):
    embedding, norm = Group(lr=2.0, weight_decay=0.0), Group(lr=3.0, weight_decay=0.25)
    groups = Groups(embedding=embedding, matrix=Group(lr=0.5), norm=norm)
    model = Toy(1)
    group_of = {info.path: info.group for info in param_table(model)}
    params, states = values(model), {path: {} for path in group_of}
    for t, lr in enumerate(RATES, 1):
        grads = values(like(model, t - 1))
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        scale = 1.0 if clip is None else min(1.0, clip / norm)
        for path, group in group_of.items():
            g = getattr(groups, group)
            p, s = rule(params[path], grads[path] * scale, states[path], t, lr * g.lr, 0.1 * g.weight_decay)
            params[path], states[path] = p, s
    ours = values(trained(kind(clip_norm=clip, weight_decay=0.1, groups=groups), model))
    for path in group_of:
        np.testing.assert_allclose(ours[path], params[path], rtol=2e-5, atol=2e-6, err_msg=path)


def test_clipping_leaves_small_gradients_alone():
    model, config = Toy(0), Sgd(momentum=0.0, weight_decay=0.0, clip_norm=1e6, groups=FLAT)
    grads = like(model, 0)
    jax.tree.map(np.testing.assert_array_equal, one_update(config, model, grads), jax.tree.map(np.negative, grads))


NORMS = (optimizers._norms, optimizers._norms_at_once, optimizers.norms)


@pytest.mark.parametrize("norms", NORMS)
@pytest.mark.parametrize("good", [True, False])
def test_norms_are_those_of_all_weights_and_of_what_the_optimizer_changed(norms, good):
    old, updates = Toy(0), jax.tree.map(lambda g: 1e-3 * g, like(Toy(0), 1))
    moved = np.sqrt(sum((g**2).sum() for g in values(updates).values())) if good else 0.0
    old.moved = param(np.random.default_rng(0), (3,), ("experts",), "buffer", 0)
    updates.moved = jax.tree.map(jnp.zeros_like, old.moved)
    new = keep_if(jnp.bool(good), optax.apply_updates(old, updates), old)
    new.moved = jax.tree.map(lambda b: b + 1, old.moved)  # by a rule of its own
    whole = np.sqrt(sum((w.astype(np.float64) ** 2).sum() for w in values(new).values()))
    np.testing.assert_allclose(jax.jit(norms)(new, old), (whole, moved), rtol=1e-5)


@pytest.mark.parametrize("norms", NORMS)
def test_a_refused_update_of_no_numbers_has_norm_zero(norms):
    old = Toy(0)
    updates = jax.tree.map(lambda g: jnp.nan * g, old)
    refused = keep_if(jnp.bool(False), optax.apply_updates(old, updates), old)
    assert norms(refused, old)[1] == 0.0


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("kind", KINDS.values())
def test_gradients_of_zero_move_nothing(kind, clip):
    model = Toy(0)
    moved = one_update(kind(clip_norm=clip, weight_decay=0.0), model, jax.tree.map(jnp.zeros_like, model))
    jax.tree.map(lambda u: np.testing.assert_array_equal(u, np.zeros(u.shape)), moved)


# ---------------------------------------------------------------- against optax
def by_optax(transform, model):
    state = transform(0.0).init(model)

    @jax.jit
    def step(model, state, grads, lr):
        updates, state = transform(lr).update(grads, state, model)
        return optax.apply_updates(model, updates), state

    for i, lr in enumerate(RATES):
        model, state = step(model, state, like(model, i), lr)
    return model


@pytest.mark.parametrize(
    ("config", "transform"),
    [
        (AdamW(clip_norm=None, groups=FLAT), lambda lr: optax.adamw(lr, 0.9, 0.95, weight_decay=0.1)),
        (Lion(clip_norm=None, groups=FLAT), lambda lr: optax.lion(lr, weight_decay=0.1)),
        (Sgd(clip_norm=None, weight_decay=0.0, groups=FLAT), lambda lr: optax.sgd(lr, momentum=0.9)),
    ],
)
def test_uniform_groups_are_optax(config, transform):
    model = Toy(2)
    close(trained(config, model), by_optax(transform, model), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(130, 150), (20, 30), (40,)])
def test_adafactor_is_optax_on_one_array(shape):
    model = One(np.random.default_rng(0).standard_normal(shape).astype(np.float32), inputs=1 if len(shape) == 2 else 0)
    ours = trained(Adafactor(clip_norm=None, weight_decay=0.0), model)
    close(ours, by_optax(lambda lr: optax.adafactor(lr, multiply_by_parameter_scale=False), model))


def test_adafactor_factors_matrices_not_layers():
    config = Adafactor()
    stack = nnx.Param(jnp.ones((300, 128, 8, 16)), axes=("d_model", "heads", "head_dim"), group="matrix", inputs=1)
    model = One(np.ones((2, 2)))
    model.w = stack
    state = make_optimizer(config, hyperparameters(config, Schedule(), 1), 0.0).init(model)
    shapes = {x.shape for x in jax.tree.leaves(state)}
    assert shapes == {(300,), (300, 128), (300, 1)}


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (16, 16)])
def test_muon_is_optax_on_one_matrix(shape):
    model = One(np.random.default_rng(0).standard_normal(shape).astype(np.float32))
    ours = trained(Muon(clip_norm=None, groups=FLAT), model)
    muon = functools.partial(optax.contrib.muon, weight_decay=0.1, consistent_rms=0.2)
    plain = by_optax(muon, {"w": model.w.get_value()})
    np.testing.assert_allclose(ours.w.get_value(), plain["w"], rtol=2e-5, atol=2e-6)


# ---------------------------------------------------------------- Muon's algebra
def test_muon_orthogonalizes_every_matrix_of_every_stack():
    model = Toy(3, 3)
    updates = one_update(Muon(weight_decay=0.0), model, like(model, 0))
    seen = 0
    for info in param_table(updates):
        if info.group != "matrix":
            continue
        for matrix in np.asarray(by_path(updates)[info.path]).reshape(info.view):
            scale = 0.2 * np.sqrt(max(matrix.shape))
            singular = np.linalg.svd(matrix / scale, compute_uv=False)
            assert singular.min() > 0.5
            assert singular.max() < 1.3
            seen += 1
    assert seen == 3 + 3 + 3 * 3


def test_muon_update_has_the_rms_of_adam():
    for shape in [(64, 64), (32, 256), (256, 32)]:
        model = One(np.zeros(shape, np.float32))
        update = one_update(Muon(weight_decay=0.0), model, like(model, 0)).w.get_value()
        assert 0.13 < float(jnp.sqrt(jnp.mean(update**2))) < 0.25


def test_muon_uses_adam_at_its_own_rate_elsewhere():
    model = Toy(3)
    grads = like(model, 0)
    muon = one_update(Muon(adam_lr=0.25, groups=FLAT), model, grads)
    adam = one_update(AdamW(groups=FLAT), model, grads)
    for path in ("embedding", "head", "bias"):
        np.testing.assert_allclose(getattr(muon, path).get_value(), 0.25 * getattr(adam, path).get_value(), rtol=1e-6)
    for path in ("router", "norm"):
        ours, theirs = getattr(muon.blocks, path).get_value(), getattr(adam.blocks, path).get_value()
        np.testing.assert_allclose(ours, 0.25 * theirs, rtol=1e-6)


# ---------------------------------------------------------------- every kind
@pytest.mark.parametrize("kind", KINDS)
def test_a_stack_of_layers_moves_as_its_layers(kind):
    config = KINDS[kind](clip_norm=None)
    stack = Layer(np.random.default_rng(0), (3,))
    grads = like(stack, 7)
    together = one_update(config, stack, grads)
    for i in range(3):
        row = functools.partial(jax.tree.map, lambda x, i=i: x[i])
        close(row(together), one_update(config, row(stack), row(grads)))


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_over_hyperparameters_is_separate_runs(kind):
    cells = [(0.1, 0.0, None), (0.01, 0.5, 2.0)]
    configs = [KINDS[kind](lr=lr, weight_decay=wd, clip_norm=clip) for lr, wd, clip in cells]
    models = [Toy(i) for i in range(2)]
    grads = [like(model, 10 + i) for i, model in enumerate(models)]
    hypers = [hyperparameters(config, Schedule(), 10) for config in configs]

    def stack(*trees):
        return jax.tree.map(lambda *xs: np.stack(xs), *trees)

    model, grad, hyper = stack(*models), stack(*grads), stack(*hypers)
    state = stack(*[init(kind, m, h) for m, h in zip(models, hypers, strict=True)])
    vmapped = jax.jit(jax.vmap(functools.partial(update, kind)))
    for _ in range(2):
        updates, state = vmapped(model, state, grad, hyper, hyper["lr"])
        model = jax.tree.map(np.add, model, updates)
    for i in range(2):
        alone, own = models[i], init(kind, models[i], hypers[i])
        for _ in range(2):
            updates, own = update(kind, alone, own, grads[i], hypers[i], hypers[i]["lr"])
            alone = jax.tree.map(np.add, alone, updates)
        close(jax.tree.map(lambda x, i=i: x[i], (model, state)), (alone, own))


@pytest.mark.parametrize("kind", KINDS)
def test_no_value_recompiles_or_changes_the_state(kind):
    model, traces = Toy(0), 0
    grads = like(model, 0)

    @jax.jit
    def step(model, state, hyper, lr):
        nonlocal traces
        traces += 1
        return make_optimizer(KINDS[kind](), hyper, lr).update(grads, state, model)

    base = hyperparameters(KINDS[kind](), Schedule(), 100)
    state = init(kind, model, base)
    first, _ = step(model, state, base, np.float32(0.1))
    for name in base:
        other = {**base, name: base[name] * np.float32(0.5)}
        jax.tree.map(np.testing.assert_array_equal, state, init(kind, model, other))
        last, new_state = step(model, state, other, np.float32(0.3))
        assert jax.tree.structure(new_state) == jax.tree.structure(state)
        assert [x.shape for x in jax.tree.leaves(new_state)] == [x.shape for x in jax.tree.leaves(state)]
    assert traces == 1
    assert not np.allclose(first.head.get_value(), last.head.get_value())


def test_only_the_kind_of_the_config_is_structure():
    model = Toy(0)
    hyper = hyperparameters(AdamW(), Schedule(), 10)
    texts = set()
    for config in (AdamW(), AdamW(lr=1.0, b1=0.5, clip_norm=None, weight_decay=0.0, groups=FLAT)):
        update = lambda m, h, c=config: make_optimizer(c, h, h["lr"]).update(m, make_optimizer(c, h, 0).init(m), m)  # noqa: E731
        texts.add(str(jax.make_jaxpr(update)(model, hyper)))
    assert len(texts) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_state_is_float32_and_a_bad_batch_can_be_skipped_bit_for_bit(kind):
    model, hyper = Toy(0), hyperparameters(KINDS[kind](), Schedule(), 10)

    def step(model, state, grads):
        updates, new = update(kind, model, state, grads, hyper, 0.1)
        good = np.isfinite(sum(np.sum(g) for g in jax.tree.leaves(grads)))
        return jax.jit(keep_if)(good, (jax.tree.map(np.add, model, updates), new), (model, state))

    model, state = step(model, init(kind, model, hyper), like(model, 0))
    assert {x.dtype for x in jax.tree.leaves((model, state))} <= {jnp.dtype("float32"), jnp.dtype("int32")}
    bad = like(model, 1)
    bad.head = jax.tree.map(lambda x: x.at[0, 0].set(jnp.nan), bad.head)
    jax.tree.map(np.testing.assert_array_equal, step(model, state, bad), (model, state))
    moved, _ = step(model, state, like(model, 1))
    assert not np.allclose(moved.head.get_value(), model.head.get_value())


def test_hyperparameters_are_the_config():
    config = AdamW(lr=0.5, clip_norm=None, groups=Groups(head=Group(lr=0.25)))
    hyper = hyperparameters(config, Schedule(warmup=0.1), 200)
    expected = {"lr": 0.5, "weight_decay": 0.1, "b1": 0.9, "b2": 0.95, "eps": 1e-8, "clip_norm": np.inf}
    expected |= {"head_lr": 0.25, "head_weight_decay": 1.0, "norm_weight_decay": 0.0, "embedding_weight_decay": 0.0}
    expected |= {"warmup_steps": 20, "total_steps": 200, "final": 0.1, "decay_steps": 40}
    assert {name: hyper[name] for name in expected} == {name: np.float32(x) for name, x in expected.items()}
    assert {type(x) for x in hyper.values()} == {np.float32}
    assert set(hyper) == set(expected) | {f"{g}_{what}" for g in GROUPS for what in ("lr", "weight_decay")}


# ---------------------------------------------------------------- metadata
def test_param_table_reads_stacks_experts_and_abstract_values():
    table = {info.path: info for info in param_table(jax.eval_shape(lambda: Toy(0)))}
    assert table["blocks.query"].view == (2, 8, 8)
    assert table["blocks.out"].view == (2, 8, 8)
    assert table["blocks.up"].view == (2 * 3, 8, 12)
    assert table["blocks.router"][2:6] == (("d_model", "experts"), "router", 1, 1)
    assert table["blocks.norm"].view == (2, 8)
    assert table["embedding"].shape == table["embedding"].view[1:] == (6, 8)
    assert not table["bias"].is_matrix


def test_metadata_that_is_missing_is_named():
    model = One(np.ones((2, 3)))
    model.w = nnx.Param(jnp.ones((2, 3)), axes=("a", "b"), group="matrices", inputs=1)
    with pytest.raises(Exception, match=r"parameter w of shape \(2, 3\) has .*group=matrices; give nnx.Param"):
        param_table(model)
    assert len(jax.tree.leaves(model, is_leaf=is_variable)) == 1


def test_param_table_of_the_real_model_has_every_parameter_in_its_group():
    from llamax.config.load import load_model
    from llamax.model.transformer import Transformer

    config = load_model("mixtral/8x7b")
    model = jax.eval_shape(lambda key: Transformer(config, key=key), jax.random.key(0))
    table = {info.path: info for info in param_table(model)}
    by_group = {group: [info.view for info in table.values() if info.group == group] for group in GROUPS}
    d, d_ff, layers, kv = 4096, 14336, 32, 1024
    attention = [(layers, d, d), (layers, d, kv), (layers, d, kv), (layers, d, d)]
    experts = [(layers * 8, d, d_ff), (layers * 8, d, d_ff), (layers * 8, d_ff, d)]
    assert sorted(by_group["matrix"]) == sorted(attention + experts)
    assert by_group["router"] == [(layers, d, 8)]
    assert by_group["embedding"] == [(1, 32000, d)]
    assert by_group["head"] == [(1, d, 32000)]
    assert sorted(by_group["norm"]) == [(1, d), (layers, d), (layers, d)]
    assert by_group["bias"] == []
