"""The small pieces every model is made of.

Arrays carry their shape as a suffix, one letter an axis: b batch, l length (queries), m length (keys),
d model, h query heads, g key-value heads, r query heads per key-value head, k head, f mlp, v vocabulary.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from llm_jax.layout import Layout, turned
from llm_jax.models import fp8


def param(
    module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...], std: float
) -> jax.Array:
    """Declares a float32 parameter, normal with ``std``, and gives it whole along fsdp.

    The module has a ``layout`` and a ``dtype``. Called inside a rematerialised block, the gather happens
    there too, so that gathered weights are not kept for the backward pass.
    """
    layout: Layout = module.layout

    def init(key: jax.Array) -> jax.Array:
        return layout.store(std * jax.random.normal(key, shape, jnp.float32), *axes)

    return layout.gather(module.param(name, init), module.dtype)


def vector_param(
    module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple, value: float
) -> jax.Array:
    """Declares a float32 parameter of equal values, the gain of a norm or a bias. It is too small to be cut
    along fsdp: gathers of a few kilobytes would cost more time than they save memory."""
    layout: Layout = module.layout
    return module.param(name, lambda _: layout.shard(jnp.full(shape, value, jnp.float32), *axes))


def dense(
    module: nn.Module,
    name: str,
    equation: str,
    x: jax.Array,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    std: float,
) -> jax.Array:
    """einsum(equation, x, w) for a fresh parameter w, with a bias where the config has them.

    equation: ``bld,dhk->blhk`` and the like; the axes of w that stay are the last of the result, and the
    bias has their shape. Where w is cut along an axis that is summed over, the parts of the result are
    summed and cut along the length at once, a reduce-scatter.

    Where the length is whole it is one product of two matrices, tokens x features: XLA's CPU compiler copies
    the operands of any other form into that one, transposed, a quarter of a small model's step (log).
    """
    layout: Layout = module.layout
    letters, out = equation.split(",")[1].split("->")
    named = dict(zip(letters, axes, strict=True))
    # In computation "embed" is whole, so a result's axes are named by the weight's, but for that one.
    stay = [named.get(letter) for letter in out[2:]]
    summed = tuple(a for letter in letters if letter not in out for a in layout.computed(named[letter]))
    spec = layout.spec("batch", "length", *stay, summed=summed)
    w, bias = _weight_and_bias(module, name, shape, axes, std, len(out) - 2)
    x, w = (fp8.operand(a) if module.config.fp8 else a for a in (x, w))
    if layout.axes("length"):
        y = jnp.einsum(equation, x, w, out_sharding=spec)
    else:
        y = _matmul(layout, x, w, out_sharding=spec)
    y = fp8.result(y) if module.config.fp8 else y
    if summed:
        y = layout.shard(y, "batch", "residual", *stay)
    return y if bias is None else y + bias.astype(y.dtype)


class Output(NamedTuple):
    """One of several results of the same input: its name, the shape of its weight, [d, ...], and its axes."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]


def dense_together(
    module: nn.Module, outputs: list[Output], x_bld: jax.Array, std: float, untouched: bool = False
) -> list[jax.Array]:
    """[batch, length, ...] each, as ``dense`` gives them one by one; where nothing cuts their features, by
    one product with all the weights beside each other, of larger matrices and fewer. untouched: that they go
    into an attention kernel as they are. A GPU would copy parts of a product for it, and their gradients back
    beside each other, and has products of their own instead (by its bytes 3.3 of BERT base's 70 ms; log)."""
    layout: Layout = module.layout
    cut = any(layout.computed(axis) for output in outputs for axis in output.axes[1:])
    # Weights gathered for a layer would be kept for the backward pass once they are joined (ZeRO-3), jax.vmap
    # over stages cannot join what was gathered, and 8 bits want a scale for each weight.
    gathered = layout.zero == 3 and layout.axes("embed")
    copied = untouched and layout.platform == "gpu"
    if cut or gathered or copied or layout.axes("length") or layout.apart or module.config.fp8:
        return [dense(module, o.name, _EQUATIONS[len(o.shape)], x_bld, o.shape, o.axes, std) for o in outputs]
    declared = [_weight_and_bias(module, *output, std, len(output.shape) - 1) for output in outputs]
    flat = [_flat(w) for w, _ in declared]
    y_blo = _matmul(layout, x_bld, jnp.concatenate(flat, axis=1), layout.spec("batch", "length", None))
    parts = jax.lax.split(y_blo, [w.shape[1] for w in flat], axis=2)
    results = []
    for part, output, (_, bias) in zip(parts, outputs, declared, strict=True):
        spec = layout.spec("batch", "length", *output.axes[1:])
        y = jnp.reshape(part, (*x_bld.shape[:2], *output.shape[1:]), out_sharding=spec)
        results.append(y if bias is None else y + bias.astype(y.dtype))
    return results


_EQUATIONS = {2: "bld,df->blf", 3: "bld,dhk->blhk"}  # by the axes of the weight


def _weight_and_bias(
    module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...], std: float, kept: int
) -> tuple[jax.Array, jax.Array | None]:
    """kept: how many of the weight's last axes are the result's, and the bias's."""
    w = param(module, name, shape, axes, std)
    if not module.config.biases:
        return w, None
    return w, vector_param(module, f"{name}_bias", shape[-kept:], axes[-kept:], 0.0)


def _flat(w: jax.Array) -> jax.Array:
    """[d, ...] to [d, features], of a weight that nothing cuts."""
    spec = jax.typeof(w).sharding.spec
    return jnp.reshape(w, (w.shape[0], -1), out_sharding=spec.update(partitions=(None, None)))


def _matmul(layout: Layout, x: jax.Array, w: jax.Array, out_sharding: PartitionSpec) -> jax.Array:
    """[batch, length, in...] times [in..., out...], through matrices; only the first of several features may
    be cut."""
    count = x.ndim - 2
    inputs, outputs = math.prod(w.shape[:count]), math.prod(w.shape[count:])
    x_spec, w_spec = jax.typeof(x).sharding.spec, jax.typeof(w).sharding.spec
    rows, _, features, *_ = x_spec.partitions
    cut_in, cut_out = w_spec.partitions[0], w_spec.partitions[count]
    x_ni = jnp.reshape(x, (-1, inputs), out_sharding=x_spec.update(partitions=(rows, features)))
    w_io = jnp.reshape(w, (inputs, outputs), out_sharding=w_spec.update(partitions=(cut_in, cut_out)))
    by_row = out_sharding.update(partitions=(rows, out_sharding.partitions[2]))
    if layout.platform == "cpu" and inputs > outputs:
        y_no = jnp.einsum("ni,oi->no", x_ni, turned(w_io), out_sharding=by_row)
    else:
        y_no = jnp.einsum("ni,io->no", x_ni, w_io, out_sharding=by_row)
    return jnp.reshape(y_no, (*x.shape[:2], *w.shape[count:]), out_sharding=out_sharding)


class RMSNorm(nn.Module):
    """x / rms(x) * scale in float32 (Zhang and Sennrich 2019, arXiv 1910.07467). [..., d] to [..., d]."""

    layout: Layout
    dtype: str
    biases: bool = False
    axis: str = "embed"
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        rms = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.epsilon)
        return _gain(self, x32 * rms)


class LayerNorm(nn.Module):
    """(x - mean) / std * scale in float32 (Ba et al. 2016, arXiv 1607.06450). [..., d] to [..., d].

    Of bfloat16 the variance is the mean square less the squared mean, one pass over a row for both: what that
    loses of float32 where the mean is large is less than x has lost already.
    """

    layout: Layout
    dtype: str
    biases: bool = False
    axis: str = "embed"
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x32, average = x.astype(jnp.float32), partial(jnp.mean, axis=-1, keepdims=True)
        if x.dtype == jnp.bfloat16:
            mean, square = average(x32), average(x32 * x32)
            variance = jnp.maximum(square - mean * mean, 0.0)
            x32 = x32 - self.layout.in_memory(mean)
        else:
            x32 = x32 - average(x32)
            variance = average(x32 * x32)
        return _gain(self, x32 * self.layout.in_memory(jax.lax.rsqrt(variance + self.epsilon)))


def _gain(norm: nn.Module, x: jax.Array) -> jax.Array:
    """x * scale (+ bias), in the norm's dtype."""
    shape, axes = x.shape[-1:], (norm.axis,)
    scale = vector_param(norm, "scale", shape, axes, 1.0)
    bias = vector_param(norm, "bias", shape, axes, 0.0) if norm.biases else None
    length_whole = x.ndim == 3 and jax.typeof(x).sharding.spec.partitions[1] is None
    by_groups = norm.layout.platform == "gpu" and length_whole and x.shape[1] % GROUP == 0
    return (_scaled_by_groups if by_groups else _scaled)(x, scale, bias).astype(norm.dtype)


GROUP = 128  # tokens whose gradients a GPU sums first


def _scaled(x_bld: jax.Array, scale_d: jax.Array, bias_d: jax.Array | None) -> jax.Array:
    return x_bld * scale_d if bias_d is None else x_bld * scale_d + bias_d


# With gradients that are summed over GROUP tokens and then over the groups: with XLA's own groups, of 256 or
# more, a GPU reads bfloat16 by two bytes in place of eight, 0.17 ms for 0.13 of 65,536 x 768 (log).
_scaled_by_groups = jax.custom_vjp(_scaled)


def _scaled_forward(x_bld: jax.Array, scale_d: jax.Array, bias_d: jax.Array | None) -> tuple:
    return _scaled(x_bld, scale_d, bias_d), (x_bld, scale_d, bias_d)


def _scaled_backward(kept: tuple, d_bld: jax.Array) -> tuple:
    x_bld, scale_d, bias_d = kept
    (b, l, d), rows = x_bld.shape, jax.typeof(x_bld).sharding.spec.partitions[0]

    def total(z_bld: jax.Array) -> jax.Array:
        by_group = PartitionSpec(rows, None, None, None)
        z_bgnd = jnp.reshape(z_bld, (b, l // GROUP, GROUP, d), out_sharding=by_group)
        return jnp.sum(jax.lax.optimization_barrier(jnp.sum(z_bgnd, axis=2)), axis=(0, 1))

    return d_bld * scale_d, total(d_bld * x_bld), None if bias_d is None else total(d_bld)


_scaled_by_groups.defvjp(_scaled_forward, _scaled_backward)


NORMS = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes a ``rate`` share of ``x`` and scales the rest up (Srivastava et al. 2014).

    The mask is drawn in the sharding of ``x`` and is the same on any mesh. key=None: evaluation.
    """
    if rate == 0.0 or key is None:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape, out_sharding=jax.typeof(x).sharding)
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)


def drop_path(x: jax.Array, rate: jax.Array | None, key: jax.Array | None) -> jax.Array:
    """Zeroes whole rows of a residual branch with probability ``rate`` and scales the others up.

    Stochastic depth (Huang et al. 2016, arXiv 1603.09382). rate: float scalar; None or key=None: no change.
    """
    if rate is None or key is None:
        return x
    by_row = jax.sharding.PartitionSpec(jax.typeof(x).sharding.spec[0])
    draw = jax.random.uniform(key, x.shape[:1], out_sharding=by_row)
    keep = jnp.reshape(draw >= rate, (-1, *[1] * (x.ndim - 1)))
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)
