"""A jinja2 environment for templates that came with downloaded weights: no way to Python, no endless work.

The sandbox of jinja2 keeps a template from attributes of Python's own objects; what it does not do is stop one that
runs or grows without end. Every loop step, call and filter therefore draws from one budget of steps and seconds, and
no value may grow over MAX_SIZE. A single operation of the standard library that never ends is not covered.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_STEPS = 5_000_000  # loop steps and calls of one rendering; a long chat with tools takes some thousands
MAX_SECONDS = 20.0
MAX_SIZE = 10_000_000  # characters or items of one value


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment chat templates are written for, as transformers sets it up, with a budget."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        # Without `optimized=False` constant parts run while the template is compiled.
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[Generation, loopcontrols])
        self.begin()
        del self.globals["lipsum"]
        self.filters.update({name: self._limited(name, f) for name, f in self.filters.items()})
        self.filters["tojson"] = _tojson
        self.filters |= {"budget": self._spend, "built": self._built}
        self.finalize = self._write
        self.globals |= {"raise_exception": _raise, "strftime_now": _now, "dict": _Dict(), "namespace": _Names}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """The template with every loop drawing from the budget, and what it builds being measured."""
        template = super()._parse(source, name, filename)
        _measure_built(template)
        for loop in template.find_all(nodes.For):
            loop.iter = _filtered(loop.iter, "budget")
        return template

    def _built(self, value: Any) -> Any:
        """`value`, its whole tree drawn from the budget: lists of one list twice, forty deep, are small in memory."""
        self.step(_leaves(value))
        return _sized(value)

    def _write(self, value: Any) -> Any:
        """`value` on its way into the text."""
        size = len(value) if isinstance(value, str) else _leaves(value)
        self.written += size
        _check_size(self.written)
        return value

    def _spend(self, items: Iterable[Any]) -> Any:
        """`items`, each drawn from the budget; what has a length keeps it, since `loop.length` and `loop.last` ask."""
        if isinstance(items, str | list | tuple | dict | range):
            self.step(len(items))
            return items
        return self._drawn(items)

    def _drawn(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.step()
            yield item

    def begin(self) -> None:
        """A new budget."""
        self.steps, self.written, self.until = 0, 0, time.monotonic() + MAX_SECONDS

    def step(self, count: int = 1) -> None:
        """Draws from the budget."""
        self.steps += count
        if self.steps > MAX_STEPS or time.monotonic() > self.until:
            raise SecurityError(f"more than {MAX_STEPS} steps or {MAX_SECONDS:.0f} seconds; it may never end")

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self.step()
        if isinstance(__obj, LoopContext) and args:  # `loop(...)` of a recursive loop
            args = (__self._spend(args[0]), *args[1:])
        name = getattr(__obj, "__name__", "")
        method = getattr(__obj, "__wrapped__", __obj)  # jinja2 wraps str.format
        _check_growth(name, getattr(method, "__self__", None), args, kwargs)
        return _sized(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(v) if isinstance(v, str | list | tuple) else v if isinstance(v, int) else 0 for v in (left, right)]
        if operator == "**" and any(abs(size) > 1000 for size in sizes):
            raise SecurityError(f"a power of {sizes[0]} and {sizes[1]}")
        if operator == "*" and not all(isinstance(v, int | float) for v in (left, right)):
            _check_size(sizes[0] * sizes[1])
        if operator == "%" and isinstance(left, str):
            _check_widths(left)
        self.step()
        return _sized(super().call_binop(context, operator, left, right))

    def _limited(self, name: str, f: Any) -> Any:
        """A built-in filter whose arguments cannot ask for more than MAX_SIZE, nor its result be larger."""

        @functools.wraps(f)
        def run(*args: Any, **kwargs: Any) -> Any:
            self.step()
            plain = [a for a in args if not isinstance(a, jinja2.Environment | jinja2.runtime.Context)]
            _check_growth(name, plain[0] if plain else None, tuple(plain[1:]), kwargs)
            return _sized(f(*args, **kwargs))

        return run


def _measure_built(node: nodes.Node) -> None:
    """Every list, dictionary, tuple and joined text below `node` wrapped in the filter that measures it."""
    for name, child in node.iter_fields():
        children = child if isinstance(child, list) else [child]
        for i, part in enumerate(children):
            if not isinstance(part, nodes.Node):
                continue
            _measure_built(part)
            literal = isinstance(part, nodes.List | nodes.Dict | nodes.Concat)
            if literal or (isinstance(part, nodes.Tuple) and part.ctx == "load"):
                wrapped = _filtered(part, "built")
                if isinstance(child, list):
                    child[i] = wrapped
                else:
                    setattr(node, name, wrapped)


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _leaves(value: Any) -> int:
    """How many values a value holds, itself included; counting stops past MAX_STEPS."""
    count, waiting = 0, [value]
    while waiting and count <= MAX_STEPS:
        item = waiting.pop()
        count += 1
        if isinstance(item, dict):
            waiting.extend(item.values())
        elif isinstance(item, list | tuple):
            waiting.extend(item)
    return count


class Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`, which marks what an assistant said: rendered as its content."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The body in place of the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _check_growth(name: str, of: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuses the calls that make much of little: replace, join, and numbers or widths larger than MAX_SIZE."""
    given = [*args, *kwargs.values()]
    for value in given:
        if isinstance(value, int) and not isinstance(value, bool):
            _check_size(value)
    if name == "replace" and isinstance(of, str) and len(given) > 1 and all(isinstance(v, str) for v in given[:2]):
        old, new = given[:2]
        _check_size((of.count(old) if old else len(of) + 1) * len(new) + len(of))
    if name in ("join", "map", "translate", "expandtabs", "indent", "batch", "slice"):
        texts = [of, *given]
        longest = max((len(v) for v in texts if isinstance(v, str)), default=0)
        widths = max((v for v in given if isinstance(v, int)), default=1)
        count = max((len(v) for v in texts if isinstance(v, str | list | tuple | dict)), default=0)
        _check_size(max(longest, widths) * max(count, 1) if name != "map" else count)
    if name in ("format", "format_map") and isinstance(of, str):
        _check_widths(of)


def _check_widths(pattern: str) -> None:
    for number in re.findall(r"\d+", pattern):
        _check_size(int(number[:12]))


def _check_size(size: int) -> None:
    if abs(size) > MAX_SIZE:
        raise SecurityError(f"a value of size {size}, over {MAX_SIZE}")


def _sized(value: Any) -> Any:
    if isinstance(value, str | bytes | list | tuple | dict):
        _check_size(len(value))
    return value


def _raise(message: str) -> None:
    raise TemplateError(message)


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as templates expect it; jinja2's own filter escapes HTML."""
    _check_size((indent or 0) * 1000 if isinstance(indent, int) else 0)
    return str(
        _sized(json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys))
    )


class _Dict:
    """`dict(...)` without the type's own attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


class _Names(Namespace):
    """`namespace(...)` without names that begin with an underscore."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace field {name!r}")
        super().__setitem__(name, value)
