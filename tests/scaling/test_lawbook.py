"""The laws against what their papers print, and against other ways to write them."""

import itertools
import math

import numpy as np
import pytest

from llamax.scaling.registry import LAWS, law

from .synthetic import CHINCHILLA

TOKENS, SIZES = np.geomspace(2e8, 5e11, 9), np.geomspace(1e7, 3e9, 8)
PAIRS = np.array(list(itertools.product(SIZES, TOKENS))).T

# A vector of parameters for each law that does not print one, near those of the papers.
TRUTH = {
    "coupled": {"E": 1.5, "A": 5e4, "B": 4e6, "alpha": 0.55, "beta": 0.6, "gamma": 0.6},
    "precision": {
        "E": 2.2,
        "A": 600.0,
        "B": 3000.0,
        "alpha": 0.36,
        "beta": 0.4,
        "gamma_w": 2.7,
        "gamma_a": 2.2,
        "gamma_kv": 0.95,
    },
    "quantized": {
        "E": 1.8,
        "A": 480.0,
        "B": 2000.0,
        "alpha": 0.35,
        "beta": 0.37,
        "C": 0.06,
        "gamma_D": 0.51,
        "gamma_N": 0.34,
        "gamma_post": 0.6,
    },
    "annealing": {"L0": 2.6, "A": 0.4, "alpha": 0.5, "C": 0.3},
}


def truth(name: str) -> dict[str, float]:
    """A parameter vector of the law: the first published, or one near the paper's."""
    return dict(TRUTH.get(name) or next(iter(LAWS[name].published.values())))


def columns(name: str) -> dict[str, np.ndarray]:
    """A design that determines every parameter of the law."""
    n, d = PAIRS
    if name == "repeated":
        n, d, share = np.array(list(itertools.product(SIZES[::2], TOKENS[::2], (1.0, 0.3, 0.1, 0.03, 0.01)))).T
        return {"n": n, "d": d, "unique_tokens": d * share}
    if name == "moe":
        n, e = np.array(list(itertools.product(SIZES, (1, 2, 4, 8, 32, 64, 128, 256, 512)))).T
        return {"n_active": n, "experts": e}
    if name == "granularity":
        n, d, g = np.array(list(itertools.product(SIZES[::2], TOKENS[::2], (1, 2, 4, 8, 16)))).T
        return {"n": n, "d": d, "granularity": g}
    if name == "precision":
        few = (3.0, 6.0, math.inf)
        n, d, w, a, kv = np.array(list(itertools.product(SIZES[::3], TOKENS[::4], few, few, few))).T
        return {"n": n, "d": d, "bits_weights": w, "bits_activations": a, "bits_kv": kv}
    if name == "quantized":
        n, d, bits = np.array(list(itertools.product(SIZES[::2], TOKENS[::2], (3.0, 4.0, 6.0, math.inf)))).T
        return {"n": n, "d": d, "bits_post": bits}
    if name == "downstream":
        return {"loss": np.linspace(2.0, 4.5, 12)}
    if name in ("annealing", "multipower"):
        from llamax.scaling.traces import annealing_columns, power_columns

        from .test_traces import SCHEDULES

        make = annealing_columns if name == "annealing" else power_columns
        parts = [make(lr, np.arange(40, len(lr), 17), warmup=20) for lr in SCHEDULES]
        width = max(p["lr_drop"].shape[1] for p in parts) if name == "multipower" else 0
        fill = {"lr_drop": 0.0, "lr_then": 1.0, "lr_since": 0.0}
        return {
            key: np.concatenate(
                [
                    np.pad(p[key], ((0, 0), (0, width - p[key].shape[1])), constant_values=fill[key])
                    if key in fill
                    else p[key]
                    for p in parts
                ]
            )
            for key in parts[0]
        }
    return {"n": n, "d": d} if "n" in LAWS[name].columns else {"d": d}


@pytest.mark.parametrize("name", list(LAWS))
def test_the_linear_parameters_are_linear(name: str) -> None:
    spec, rng = law(name), np.random.default_rng(1)
    data = spec.read(columns(name), target=False)
    start = spec.vector(truth(name))
    logged = [spec.linear_in == "log" and p.log for p in spec.parameters]
    coordinates = np.where(logged, np.log(np.abs(start)), start)

    def value(u):
        found = spec.evaluate(np.where(logged, np.exp(np.where(logged, u, 0)), u)[None], data)[0]
        return np.log(found) if spec.linear_in == "log" else found

    step = np.zeros(len(start))
    for linear in spec.linear:
        step[spec.names.index(linear)] = rng.uniform(0.01, 0.2) * abs(coordinates[spec.names.index(linear)])
    far, near, base = value(coordinates + 2 * step), value(coordinates + step), value(coordinates)
    assert far - 2 * near + base == pytest.approx(np.zeros(len(base)), abs=1e-9 * np.abs(base).max())


def test_overtraining_is_the_chinchilla_law_with_one_exponent() -> None:
    # As Gadre et al. derive it: eta = alpha / 2, a = A (1/6)^-eta, b = B (1/6)^-eta.
    alpha, (n, d) = 0.29, PAIRS
    tied = law("chinchilla").predict(
        {"E": 1.7, "A": 300.0, "B": 700.0, "alpha": alpha, "beta": alpha}, columns("chinchilla")
    )
    params = {"E": 1.7, "a": 300 * 6 ** (alpha / 2), "b": 700 * 6 ** (alpha / 2), "eta": alpha / 2}
    assert law("overtraining").predict(params, {"n": n, "d": d}) == pytest.approx(tied, rel=1e-12)
    by_hand = 1.7 + (params["a"] * (d / n) ** 0.145 + params["b"] * (d / n) ** -0.145) * (6 * n * d) ** -0.145
    assert by_hand == pytest.approx(tied, rel=1e-12)


def muennighoff(n: float, d: float, u: float) -> float:
    """Equations 5, 6 and 10 of arXiv:2305.16264 written out, with the unrounded values of its appendix."""
    a, b, e, exponent, r_d, r_n = 6.255414, 7.3049974, 0.6254804, 0.3526596, 15.387756, 5.309743
    g = (math.exp(a) / math.exp(b)) ** (1 / (2 * exponent))
    u = min(u, d)
    compute = 6 * (g * u) ** 2  # the compute whose best D is u: u = (C / 6)^0.5 / G
    un = min(n, g * (compute / 6) ** 0.5)
    data = u + u * r_d * (1 - math.exp(-(d / u - 1) / r_d))
    size = un + un * r_n * (1 - math.exp(-(n / un - 1) / r_n))
    return math.exp(e) + math.exp(a) / size**exponent + math.exp(b) / data**exponent


def test_repeated_data_as_the_paper_works_it_out() -> None:
    spec, params = law("repeated"), truth("repeated")
    assert [params["E"], params["A"], params["B"]] == pytest.approx([1.87, 521, 1488], rel=2e-3)
    g2 = (params["A"] / params["B"]) ** (1 / params["alpha"])
    assert g2 == pytest.approx(0.051, abs=5e-4)  # its U_N = 0.051 U_D
    cases = [(n, d, u) for n in (1e7, 1e9, 5e10) for d in (1e9, 5e10, 1e12) for u in (1e8, 1e9, 5e12)]
    n, d, u = np.array(cases).T
    found = spec.predict(params, {"n": n, "d": d, "unique_tokens": u})
    assert found == pytest.approx([muennighoff(*case) for case in cases], rel=1e-12)
    fresh = law("chinchilla").predict({k: params[k] for k in law("chinchilla").names}, {"n": n[:1], "d": d[:1]})
    once = spec.predict(params, {"n": n[:1], "d": d[:1], "unique_tokens": d[:1]})
    assert once == pytest.approx(fresh, rel=1e-12)


def test_four_epochs_are_worth_93_percent_of_fresh_tokens() -> None:
    from llamax.scaling.lawbook import useful

    assert math.exp(useful(0.0, 3.0, 15.387756)) / 4 == pytest.approx(0.93, abs=0.005)
    assert math.exp(useful(0.0, 15.0, 15.387756)) / 16 == pytest.approx(0.66, abs=0.005)
    assert math.exp(useful(0.0, 1e6, 15.387756)) == pytest.approx(1 + 15.387756, rel=1e-6)


def test_experts_stop_helping_where_clark_says() -> None:
    # Table 3's coefficients have three decimals and c two digits, so log10 N at which d log L / d log E = 0 is known
    # to about 0.3; the paper prints 937, 85 and 83 billion parameters.
    for label, printed in (("S-BASE", 937e9), ("RL-R", 85e9), ("HASH", 83e9)):
        params = dict(law("moe").published[f"Clark et al. 2022, {label}"])
        low, high = (10 ** (-(params["b"]) / (params["c"] + shift)) for shift in (5e-4, -5e-4))
        assert low < printed < high
    params = truth("moe")
    n = 10 ** (-params["b"] / params["c"])
    flat = law("moe").predict(params, {"n_active": np.full(3, n), "experts": np.array([1.0, 16.0, 512.0])})
    assert flat == pytest.approx(np.full(3, flat[0]), rel=1e-12)
    # One expert counts as E_start and infinitely many as E_max: the saturating map's ends.
    ends = {"n_active": np.full(2, 1e9), "experts": np.array([1.0, 1e12])}
    wanted = [
        10 ** (-0.082 * 9 + (-0.108 + 0.009 * 9) * math.log10(e) + 1.104) for e in (params["E_start"], params["E_max"])
    ]
    assert law("moe").predict(params, ends) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    ("base", "d", "g", "printed"),
    [
        (100e6, 4.37e9, 8, 3.133),
        (1e9, 28.94e9, 16, 2.491),
        (3e9, 72.90e9, 16, 2.245),
        (7e9, 137.60e9, 32, 2.076),
        (70e9, 941.07e9, 32, 1.694),
        (300e9, 2.96e12, 64, 1.503),
        (1e12, 7.94e12, 64, 1.367),
    ],
)
def test_granularity_gives_the_losses_of_krajewskis_table_2(base: float, d: float, g: float, printed: float) -> None:
    # "64 x base" there: 8 E + 4 parameters a block and d_model^2 with E = 64 against 12 of the dense base (section
    # 6.1). The printed coefficients are rounded, which is worth about 1 %.
    columns = {"n": np.array([base * 516 / 12]), "d": np.array([d]), "granularity": np.array([float(g)])}
    assert law("granularity").predict(truth("granularity"), columns)[0] == pytest.approx(printed, rel=0.012)


def test_few_bits_leave_fewer_parameters() -> None:
    n, d, bits = 1e9, 2e10, np.array([2.0, 4.0, 8.0, math.inf])
    params = truth("precision")
    data = {"n": np.full(4, n), "d": np.full(4, d), "bits_weights": bits}
    data |= {"bits_activations": np.array([3.0] * 4), "bits_kv": np.full(4, math.inf)}
    kept = n * (1 - np.exp(-bits / 2.7)) * (1 - math.exp(-3 / 2.2))
    assert law("precision").predict(params, data) == pytest.approx(2.2 + 600 / kept**0.36 + 3000 / d**0.4, rel=1e-12)
    params = truth("quantized")
    rise = 0.06 * d**0.51 / n**0.34 * np.exp(-bits / 0.6)
    found = law("quantized").predict(params, {"n": np.full(4, n), "d": np.full(4, d), "bits_post": bits})
    assert found == pytest.approx(1.8 + 480 / n**0.35 + 2000 / d**0.37 + rise, rel=1e-12)


def test_step_law_at_the_paper_s_two_models() -> None:
    # 1.79 N^-0.713 D^0.307 and 0.58 D^0.571 by hand, at 1 billion parameters and 100 billion tokens.
    at = {"n": np.array([1e9]), "d": np.array([1e11])}
    rate = law("step_lr").predict(truth("step_lr"), at)[0]
    assert rate == pytest.approx(10 ** (math.log10(1.79) - 9 * 0.713 + 11 * 0.307), rel=1e-12)
    assert law("step_batch").predict(truth("step_batch"), at)[0] == pytest.approx(0.58 * 10 ** (11 * 0.571), rel=1e-12)
    assert law("step_lr").target == "lr"


def test_the_chinchilla_entry_is_the_plain_law() -> None:
    params = law("chinchilla").published["Hoffmann et al. 2022"]
    assert dict(params) == CHINCHILLA.as_dict()
