"""Parameters and the one matrix product of the model."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key

from llamax.config.components import Init


def parameter(value: Array, axes: tuple[str, ...], group: str, inputs: int = 0) -> nnx.Param:
    """A float32 parameter that knows its logical axes, its optimizer group and how many leading axes are inputs."""
    return nnx.Param(value, axes=axes, group=group, inputs=inputs)


def weight(
    key: Key[Array, ""],
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    init: Init,
    *,
    inputs: int = 1,
    group: str = "matrix",
    gain: float | Array = 1.0,
) -> nnx.Param:
    """A normally distributed matrix. `inputs` leading axes (after an "experts" axis) are contracted with the input.

    std is init.std, or 1/sqrt(product of the input axes) for init.kind = fan_in; times `gain`.
    """
    batched = 1 if axes[0] == "experts" else 0
    fan_in = math.prod(shape[batched : batched + inputs])
    std = init.std if init.kind == "normal" else fan_in**-0.5
    return parameter(jax.random.normal(key, shape) * (std * gain), axes, group, inputs)


def residual_gain(init: Init, layer: Array | int, layers: int) -> Float[Array, ""]:
    """The factor on matrices that write to the residual stream, at `layer` of `layers` (see config Init)."""
    if init.depth_scaling == "none":
        return jnp.float32(1.0)
    depth = layers if init.depth_scaling == "total" else layer + 1
    return jax.lax.rsqrt(2.0 * jnp.asarray(depth, jnp.float32))


DOT = "dot"  # the name under which products are kept by remat=dots; a policy cannot see inside a custom rule


def contract(x: Array, w: Array, inputs: int, compute: str) -> Array:
    """x [..., I...] times w [I..., O...] over the `inputs` axes I: [..., O...] in x's dtype.

    Operands are cast to `compute` (float8: see `quantize`, e5m2 for what comes back), products accumulate in float32.
    The backward pass does the same, which autodiff of a mixed-precision product would not: it would multiply float32
    cotangents.
    """
    return checkpoint_name(_contract(x, w, inputs, compute), DOT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _contract(x: Array, w: Array, inputs: int, compute: str) -> Array:
    dims = (tuple(range(x.ndim - inputs, x.ndim)), tuple(range(inputs)))
    many = functools.partial(_general, dims=dims, compute=compute, out=x.dtype)
    if compute == "float8" or math.prod(x.shape[: x.ndim - inputs]) > 1:
        return many(x, w)
    one = functools.partial(_one_row, inputs=inputs, compute=compute)
    return jax.lax.platform_dependent(x, w, cuda=one, default=many)


def _one_row(x: Array, w: Array, inputs: int, compute: str) -> Array:
    """The product of a single row as a sum over the inputs of exact products, in float32: it only reads w once, which a
    GPU does faster than its products, most of all where the inputs are w's last axes in memory (serving.py)."""
    outputs = w.ndim - inputs
    w = jnp.moveaxis(w, range(inputs), range(outputs, w.ndim)).astype(compute)
    products = x.reshape(x.shape[x.ndim - inputs :]).astype(compute).astype(jnp.float32) * w.astype(jnp.float32)
    y = jnp.sum(products, axis=tuple(range(outputs, w.ndim)))
    return y.reshape(*x.shape[: x.ndim - inputs], *w.shape[:outputs]).astype(x.dtype)


E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"  # three bits of fraction, or two and a wider range


Contracted = tuple[tuple[int, ...], tuple[int, ...]]


def _general(
    a: Array, b: Array, dims: Contracted, compute: str, out: jnp.dtype, formats: tuple[str, str] = (E4M3, E4M3)
) -> Array:
    """The product of a and b over `dims` in dtype `out`; `formats` are the operands' under compute=float8."""
    if compute == "float8":
        (a, scale_a), (b, scale_b) = quantize(a, formats[0]), quantize(b, formats[1])
        return dot(a, b, (dims, ((), ())), out) * (scale_a * scale_b).astype(out)  # exact: a power of two
    return dot(a.astype(compute), b.astype(compute), (dims, ((), ())), out)


def dot(a: Array, b: Array, dims: tuple[Contracted, Contracted], out: jnp.dtype) -> Array:
    """`dot_general` with sums in float32, rounded once to `out`.

    Accelerators sum in float32 whatever type a result has, and a float32 result would be written and read once more;
    CPUs have their fast path, and exact sums, for float32 results only.
    """
    wide = functools.partial(jax.lax.dot_general, dimension_numbers=dims, preferred_element_type=jnp.float32)
    if jnp.float32 in (jnp.dtype(out), a.dtype):
        return wide(a, b).astype(out)
    direct = functools.partial(jax.lax.dot_general, dimension_numbers=dims, preferred_element_type=out)
    return jax.lax.platform_dependent(a, b, cpu=lambda a, b: wide(a, b).astype(out), default=direct)


def quantize(x: Float[Array, "*shape"], dtype: str) -> tuple[Float[Array, "*shape"], Float[Array, ""]]:
    """(x / scale rounded to a float8 format, scale): the power of two that puts the largest entry between half the
    format's largest number and all of it (current scaling per array, arXiv:2209.05433, section 3; a power of two, so
    that scaling back rounds nothing)."""
    largest = jnp.max(jnp.abs(x)).astype(jnp.float32)
    _, exponent = jnp.frexp(jnp.where(largest > 0, largest, 1.0) / float(jnp.finfo(dtype).max))
    scale = jnp.where(largest > 0, jnp.ldexp(jnp.float32(1.0), exponent), 1.0)
    return (x.astype(jnp.float32) / scale).astype(dtype), scale


def _forward(x: Array, w: Array, inputs: int, compute: str) -> tuple[Array, tuple[Array, Array]]:
    return _contract(x, w, inputs, compute), (x, w)


def _backward(inputs: int, compute: str, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = saved
    outputs, batch = w.ndim - inputs, x.ndim - inputs
    dx = _general(
        g, w, (tuple(range(batch, batch + outputs)), tuple(range(inputs, w.ndim))), compute, x.dtype, (E5M2, E4M3)
    )
    rows = tuple(range(batch)), tuple(range(batch))
    direct = functools.partial(_general, dims=rows, compute=compute, out=w.dtype, formats=(E4M3, E5M2))

    def narrow_first(x: Array, g: Array) -> Array:
        # The barrier keeps the compiler from turning the product, in bfloat16 into one that its CPU runtime cannot run.
        dw = jax.lax.optimization_barrier(_general(g, x, rows, compute, w.dtype, (E5M2, E4M3)))
        return dw.transpose(*range(outputs, w.ndim), *range(outputs))

    if math.prod(x.shape[batch:]) <= math.prod(g.shape[batch:]):
        return dx, direct(x, g)
    # A CPU turns the left operand of a sum over rows, a copy: the narrower of the two goes there.
    return dx, jax.lax.platform_dependent(x, g, cpu=narrow_first, default=direct)


_contract.defvjp(_forward, _backward)
