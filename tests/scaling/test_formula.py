"""Formulas of users: parsed as arithmetic and nothing else."""

import math

import numpy as np
import pytest

from llamax.errors import UserError
from llamax.scaling import fit_law
from llamax.scaling.registry import LAWS, formula_law, law

from .synthetic import CHINCHILLA, isoflop


def test_a_written_chinchilla_law_is_the_chinchilla_law() -> None:
    frame = isoflop(CHINCHILLA, budgets=(1e18, 1e20, 1e22))
    spec = law("E + A / n**alpha + B / d**beta")
    assert (spec.names, spec.columns, spec.target) == (("E", "A", "alpha", "B", "beta"), ("n", "d"), "loss")
    assert spec.linear == ("E", "A", "B")
    assert spec.predict(CHINCHILLA.as_dict(), frame) == pytest.approx(frame["loss"].to_numpy(), rel=1e-12)
    found = fit_law(spec, frame, starts=8)
    assert found.params == pytest.approx(CHINCHILLA.as_dict(), rel=1e-5)


def test_operators_functions_and_precedence() -> None:
    x = {"n": np.array([2.0, 5.0]), "d": np.array([3.0, 7.0])}
    spec = law("a*n - b/d + -c**2**0.5 + log(n)*exp(-d) + sqrt(n) + min(n, d) + max(n, 4) + 1e-3")
    p = {"a": 1.5, "b": 2.5, "c": 0.7}
    wanted = [
        1.5 * n - 2.5 / d + -(0.7**2**0.5) + math.log(n) * math.exp(-d) + math.sqrt(n) + min(n, d) + max(n, 4) + 1e-3
        for n, d in zip(*x.values(), strict=True)
    ]
    assert spec.predict(p, x) == pytest.approx(wanted, rel=1e-12)


def test_a_target_of_its_own_and_more_columns() -> None:
    spec = law("lr = c * n**a * width**b", columns=["width"])
    assert (spec.target, spec.columns, spec.names) == ("lr", ("n", "width"), ("c", "a", "b"))
    assert spec.linear == ("c",)
    rng = np.random.default_rng(0)
    data = {"n": rng.uniform(1e6, 1e9, 20), "width": rng.uniform(64, 4096, 20)}
    wanted = {"c": 3.0, "a": -0.4, "b": -0.7}
    target = spec.evaluate(spec.vector(wanted)[None], data)[0]
    assert fit_law(spec, data | {"lr": target}, starts=4).params == pytest.approx(wanted, rel=1e-6)


def test_bounds_and_starts_of_ones_own() -> None:
    spec = formula_law("E + A * exp(-n / scale)", bounds={"scale": (1e6, 1e9)}, starts={"scale": [1e7, 1e8], "A": 2.0})
    by_name = {p.name: p for p in spec.parameters}
    assert (by_name["scale"].lower, by_name["scale"].upper, by_name["scale"].starts) == (1e6, 1e9, (1e7, 1e8))
    assert by_name["scale"].log
    assert by_name["A"].starts == (2.0,)
    with pytest.raises(UserError, match="inside its bounds"):
        formula_law("E + A / n**alpha", starts={"alpha": 9.0})
    with pytest.raises(UserError, match="the formula has parameters E, A, alpha"):
        formula_law("E + A / n**alpha", bounds={"beta": (0, 1)})


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true') + n*a",
        "n.real * a",
        "(lambda: n)() + a",
        "[a for a in n] + 1",
        "n[0] + a",
        "a if n > 1 else 2*n",
        "a*n + 'x'",
        "a*n + True",
        "a*n % 2",
        "a*n // 2",
        "log(n, a) + 1",
        "log(x=n) + a",
        "print(n) + a",
        "log + a*n",
        "a*n; b*n",
        "a*n +",
        "a*n + 1j",
        "(" * 500 + "n" + ")" * 500 + "*a",
        "-" * 200 + "n*a",
        "a*n" + " + a*n" * 2000,
        "f'{n}' + a",
        "(a := 2) * n",
    ],
)
def test_anything_but_arithmetic_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="law"):
        formula_law(text)


def test_words_for_the_usual_slips() -> None:
    with pytest.raises(UserError, match=r"write a power as \*\*"):
        law("E + A / n^alpha")
    with pytest.raises(UserError, match="it needs one of each"):
        law("E + A / N**alpha")  # the columns are lower case: all names are parameters
    with pytest.raises(UserError, match="it needs one of each"):
        law("1 / n")
    with pytest.raises(UserError, match=", ".join(LAWS)):
        law("chincila")
