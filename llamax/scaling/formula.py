"""A law from a formula that a user writes, such as `E + A / n**alpha + B / d**beta`: parsed, never run as code."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llamax.errors import UserError
from llamax.scaling.laws import Scalar
from llamax.scaling.lawspec import COLUMNS, LawSpec, Parameter, Values

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "log": jnp.log,
    "exp": jnp.exp,
    "sqrt": jnp.sqrt,
    "min": jnp.minimum,
    "max": jnp.maximum,
}
OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.Pow: lambda a, b: a**b,
}
LONGEST, DEEPEST = 2000, 60


def formula_law(
    text: str,
    *,
    columns: Iterable[str] = (),
    bounds: Mapping[str, tuple[Scalar, Scalar]] | None = None,
    starts: Mapping[str, Scalar | Iterable[Scalar]] | None = None,
    target: str = "loss",
    name: str = "formula",
) -> LawSpec:
    """The law `target = text`; `text` may also be `column = ...` to name the target.

    Numbers, names, + - * / **, parentheses, and log, exp, sqrt, min, max. A name is a column when COLUMNS or `columns`
    has it, otherwise a parameter. A parameter in a power is an exponent, -3 .. 3; any other is positive and fitted as
    its logarithm (write `- C`, not a negative C); `bounds` and `starts` say otherwise. Which parameters are linear is
    found from the formula. Raises UserError for anything else in the text, with the place.
    """
    head, equals, tail = text.partition("=")
    if equals:
        target, text = head.strip(), tail
    known = {c for c in (*COLUMNS, *columns) if c != target}
    tree = _parse(text)
    names = list(dict.fromkeys(node.id for node in _walk(tree) if isinstance(node, ast.Name)))
    read = tuple(n for n in names if n in known)
    free = [n for n in names if n not in known and n not in FUNCTIONS]
    if not read or not free:
        raise UserError(
            f"law {text.strip()!r}: reads columns {list(read)} and has parameters {free}; it needs one of each "
            f"(columns: {', '.join(sorted(known))})"
        )
    if wrong := [n for n in {**(bounds or {}), **(starts or {})} if n not in free]:
        raise UserError(f"bounds or starts of {', '.join(wrong)}: the formula has parameters {', '.join(free)}")
    exponents = {
        leaf.id
        for node in _walk(tree)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow)
        for leaf in _walk(node.right)
        if isinstance(leaf, ast.Name)
    }
    parameters = tuple(_parameter(n, n in exponents, (bounds or {}).get(n), (starts or {}).get(n)) for n in free)

    def loss(params: Values, data: Values) -> Any:
        return _value(tree, {**{k: data[k] for k in read}, **{k: params[k] for k in free}})

    linear = _linear(loss, read, parameters)
    return LawSpec(
        name=name,
        formula=f"{target} = {text.strip()}",
        source="a formula of the user's",
        columns=read,
        parameters=parameters,
        loss=loss,
        target=target,
        linear=linear,
    )


def _parse(text: str) -> ast.expr:
    text = text.strip()
    if len(text) > LONGEST:
        raise UserError(f"law: a formula of {len(text)} characters; at most {LONGEST}")
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        place = f" at character {error.offset}" if isinstance(error, SyntaxError) and error.offset else ""
        raise UserError(f"law {text!r}: not a formula{place}; write it like 'E + A / n**alpha'") from error
    _check(tree, text, 0)
    return tree


def _check(node: ast.expr, text: str, depth: int) -> None:
    """Raise UserError unless the tree is made of numbers, names, the operators and the functions only."""
    if depth > DEEPEST:
        raise UserError(f"law {text[:60]!r}...: nested more than {DEEPEST} deep")
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        children: list[ast.expr] = [node.left, node.right]
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        children = [node.operand]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS:
        wanted = 2 if node.func.id in ("min", "max") else 1
        if node.keywords or len(node.args) != wanted:
            raise UserError(f"law {text!r}: {node.func.id} takes {wanted} value{'s' * (wanted > 1)}")
        children = list(node.args)
    elif (isinstance(node, ast.Name) and node.id not in FUNCTIONS) or (
        isinstance(node, ast.Constant) and type(node.value) in (int, float)
    ):
        children = []
    else:
        power = isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitXor)
        piece = ast.get_source_segment(text, node) or text
        raise UserError(
            f"law {text!r}: {piece!r} is not allowed; "
            + ("write a power as **" if power else f"use numbers, names, + - * / ** and {', '.join(FUNCTIONS)}")
        )
    for child in children:
        _check(child, text, depth + 1)


def _walk(node: ast.AST) -> Iterable[ast.AST]:
    """Every node, left to right."""
    yield node
    for child in ast.iter_child_nodes(node):
        yield from _walk(child)


def _value(node: ast.expr, values: Mapping[str, Any]) -> Any:
    """The value of a checked tree."""
    if isinstance(node, ast.BinOp):
        if isinstance(node.op, ast.Pow) and not isinstance(node.right, ast.Constant):
            base, power = _value(node.left, values), _value(node.right, values)
            return jnp.exp(power * jnp.log(base))  # n**-alpha without overflow of either on its own
        return OPERATORS[type(node.op)](_value(node.left, values), _value(node.right, values))
    if isinstance(node, ast.UnaryOp):
        value = _value(node.operand, values)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.Call):
        assert isinstance(node.func, ast.Name)
        return FUNCTIONS[node.func.id](*(_value(child, values) for child in node.args))
    if isinstance(node, ast.Name):
        return values[node.id]
    assert isinstance(node, ast.Constant)
    return float(node.value)  # type: ignore[arg-type]


def _parameter(
    name: str, is_exponent: bool, bounds: tuple[Scalar, Scalar] | None, starts: Scalar | Iterable[Scalar] | None
) -> Parameter:
    lower, upper = map(float, bounds or ((-3.0, 3.0) if is_exponent else (1e-12, 1e40)))
    given = None if starts is None else tuple(np.atleast_1d(np.asarray(starts, float)).tolist())
    usual = (0.2, 0.4, 0.8, -0.3) if is_exponent else (1.0, 0.1, 10.0, 1e3)
    inside = tuple(float(s) for s in given or usual if lower <= s <= upper)
    if given and len(inside) < len(given):
        raise UserError(f"starts of {name}: {list(given)}; give values inside its bounds {lower:g} .. {upper:g}")
    log = lower > 0
    middle = float(np.sqrt(lower * upper)) if log else (lower + upper) / 2
    return Parameter(name, lower, upper, log=log, starts=inside or (middle,), about="of the formula")


def _linear(
    loss: Callable[[Values, Values], Any], read: tuple[str, ...], parameters: tuple[Parameter, ...]
) -> tuple[str, ...]:
    """Parameters in which the formula is linear together: no second difference at a few random points."""
    rng = np.random.default_rng(0)
    found: list[str] = []
    points = [
        ({p.name: rng.uniform(0.5, 1.5) for p in parameters}, {c: rng.uniform(1.5, 3.0, 4) for c in read})
        for _ in range(3)
    ]

    def straight(a: str, b: str) -> bool:
        for params, data in points:
            corners = []
            for i, j in itertools.product((0.0, 1.0), repeat=2):
                moved = params | {a: params[a] + i}
                corners.append(np.asarray(loss(moved | {b: moved[b] + j}, data), float))
            bend = np.abs(corners[0] - corners[1] - corners[2] + corners[3]).max()
            if not bend <= 1e-9 * max(float(np.abs(v).max()) for v in corners):
                return False
        return True

    with jax.enable_x64(True):
        for parameter in parameters:
            if all(straight(parameter.name, other) for other in (*found, parameter.name)):
                found.append(parameter.name)
    return tuple(found)
