"""The registry of laws: its contents, its starts, and what it says about bad columns."""

import math

import numpy as np
import pandas as pd
import pytest

from llamax.errors import UserError
from llamax.scaling import ChinchillaLaw, CoupledLaw
from llamax.scaling.registry import LAWS, LawSpec, Parameter, law

from .synthetic import BENT, CHINCHILLA, isoflop


@pytest.mark.parametrize(("name", "plain"), [("chinchilla", CHINCHILLA), ("coupled", BENT)])
def test_the_two_laws_are_those_of_numpy(name: str, plain: ChinchillaLaw | CoupledLaw) -> None:
    frame = isoflop(plain, budgets=(1e17, 1e19, 1e23))
    assert law(name).predict(plain.as_dict(), frame) == pytest.approx(frame["loss"].to_numpy(), rel=1e-13)


def test_an_unknown_law_lists_the_names() -> None:
    with pytest.raises(UserError, match=r"law 'chincila'.*chinchilla, coupled"):
        law("chincila")


@pytest.mark.parametrize("name", ["chinchilla", "coupled"])
def test_starts_are_good_sorted_and_inside(name: str) -> None:
    spec, frame = law(name), isoflop(BENT)
    data, target = spec.read(frame), frame["loss"].to_numpy()
    starts = spec.starts(data, target, 8)
    assert starts.shape == (8, len(spec.names))
    assert np.all((starts >= spec.lower) & (starts <= spec.upper))
    misfit = [np.abs(np.log(spec.evaluate(s[None], data)[0] / target)).mean() for s in starts]
    assert misfit == sorted(misfit)
    assert misfit[0] < 0.03
    assert np.array_equal(starts, spec.starts(data, target, 8))


def test_a_linear_solve_is_exact_where_the_exponents_are_on_the_grid() -> None:
    frame = isoflop(ChinchillaLaw(E=1.5, A=300.0, B=900.0, alpha=0.35, beta=0.2))
    best = law("chinchilla").starts(law("chinchilla").read(frame), frame["loss"].to_numpy(), 1)[0]
    assert best == pytest.approx([1.5, 300.0, 900.0, 0.35, 0.2], rel=1e-6)


def test_bad_columns_are_named() -> None:
    frame, spec = isoflop(), law("chinchilla")
    with pytest.raises(UserError, match=r"law chinchilla: it reads columns n, d, loss; missing: d \(training tokens"):
        spec.read(frame.drop(columns="d"))
    for bad in (math.nan, -1.0, 0.0, math.inf):
        broken = frame.astype(float).assign(n=np.where(frame.index == 2, bad, frame["n"]))
        with pytest.raises(UserError, match=r"column n: .* in row 2"):
            spec.read(broken)
    assert set(spec.read(pd.DataFrame({"n": [1.0], "d": [2.0]}), target=False)) == {"n", "d"}
    with pytest.raises(UserError, match="it has E, A, B, alpha, beta"):
        spec.vector({"E": 1.0, "a": 2.0})
    with pytest.raises(UserError, match="give lower below upper"):
        Parameter("a", 1.0, 1.0)
    with pytest.raises(UserError, match="parameter a"):
        Parameter("a", 0.0, 1.0, log=True)


@pytest.mark.parametrize("spec", LAWS.values(), ids=list(LAWS))
def test_every_entry_is_whole(spec: LawSpec) -> None:
    assert set(spec.linear) <= set(spec.names)
    assert spec.formula
    assert "arXiv:" in spec.source
    for values in spec.published.values():
        inside = spec.vector(values)
        assert np.all((inside >= spec.lower) & (inside <= spec.upper))
    for parameter in spec.parameters:
        assert all(parameter.lower <= s <= parameter.upper for s in parameter.starts)
