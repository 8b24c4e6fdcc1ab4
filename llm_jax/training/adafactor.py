"""Adafactor: second moments of a matrix as a row and a column (Shazeer and Stern 2018, arXiv 1804.04235)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llm_jax.training.matrices import MatrixAxes, matrix_axes
from llm_jax.training.moments import Applied, choose
from llm_jax.training.rules import parameter_name

TINY = 1e-30  # added to squared gradients
SMALLEST = 1e-3  # root mean square that a parameter is taken to have at least


class FactoredState(NamedTuple):
    """count: int32 updates made; moments: for each parameter a tuple of second moments.

    That is (by input, by output) with the other axes kept as ones, or (all,) where it is not factored.
    """

    count: jax.Array
    moments: Any


def scale_by_factored_moments(
    decay_rate: float, clip_threshold: float, relative: bool, min_factored: int
) -> optax.GradientTransformation:
    """Gradients over the root of their second moments, clipped by root mean square.

    decay_rate: after t updates moments decay by 1 - t^-decay_rate. relative: updates are multiplied by the
    root mean square of their matrix. min_factored: matrices with fewer inputs or outputs are not factored.
    Every mean is over one matrix, never over layers. Own code: optax's factors over the two longest axes,
    of which one may be the layers, and its moments lose their sharding on an Explicit mesh.
    """

    def init(params: Any) -> FactoredState:
        def one(path: tuple, p: jax.Array) -> tuple[jax.Array, ...]:
            # Means of the parameter only for their shapes and shardings.
            return tuple(jnp.zeros_like(x) for x in _moments(p, _factors(path, p, min_factored)))

        moments = jax.tree_util.tree_map_with_path(one, params)
        return FactoredState(jnp.zeros((), jnp.int32), moments)

    def update(
        updates: Any, state: FactoredState, params: Any, *, applied: Applied = True, **_: Any
    ) -> tuple[Any, FactoredState]:
        decay = 1.0 - (state.count + 1.0) ** -decay_rate

        def moments(path: tuple, g: jax.Array, old: tuple) -> tuple[jax.Array, ...]:
            new = _moments(g * g + TINY, _factors(path, g, min_factored))
            return tuple(decay * a + (1 - decay) * b for a, b in zip(old, new, strict=True))

        def scaled(path: tuple, g: jax.Array, v: tuple, p: jax.Array) -> jax.Array:
            every = _matrix(path, g)
            if len(v) == 1:
                u = g * jax.lax.rsqrt(v[0])
            else:
                by_input, by_output = v
                mean = jnp.mean(by_input, axis=every.inputs, keepdims=True)
                u = g * jax.lax.rsqrt(by_input / mean) * jax.lax.rsqrt(by_output)
            axes = every.inputs + every.outputs
            u = u / jnp.maximum(1.0, _rms(u, axes) / clip_threshold)
            return u * jnp.maximum(SMALLEST, _rms(p, axes)) if relative else u

        new = jax.tree_util.tree_map_with_path(moments, updates, state.moments)
        new = choose(applied, FactoredState(state.count + 1, new), state)
        return jax.tree_util.tree_map_with_path(scaled, updates, new.moments, params), new

    return optax.GradientTransformationExtraArgs(init, update)


def _matrix(path: tuple, x: jax.Array) -> MatrixAxes:
    """The axes over which a mean is taken: of a matrix, or of a vector as a matrix of one input."""
    name = parameter_name(path)
    lead = int(name.startswith("blocks/"))
    axes = tuple(range(x.ndim))
    return matrix_axes(name, x.ndim) or MatrixAxes(axes[:lead], (), axes[lead:])


def _factors(path: tuple, x: jax.Array, min_factored: int) -> MatrixAxes | None:
    """The axes to factor, or None."""
    axes = _matrix(path, x)
    _, inputs, outputs = axes.sizes(x.shape)
    return axes if min(inputs, outputs) >= min_factored else None


def _moments(squares: jax.Array, axes: MatrixAxes | None) -> tuple[jax.Array, ...]:
    if axes is None:
        return (squares,)
    by_input = jnp.mean(squares, axis=axes.outputs, keepdims=True)
    return by_input, jnp.mean(squares, axis=axes.inputs, keepdims=True)


def _rms(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.sqrt(jnp.mean(x * x, axis=axes, keepdims=True))
