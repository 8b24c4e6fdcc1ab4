"""Which axes of a parameter make a matrix, for optimisers that treat matrices as such."""

from __future__ import annotations

import math
from typing import NamedTuple


class MatrixAxes(NamedTuple):
    """Axes of an array of matrices that map inputs to outputs: x_i -> x_i W_io.

    batch: one matrix for each index (layers, experts); inputs and outputs: flattened, in this order.
    """

    batch: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(matrices, inputs, outputs)."""
        return tuple(math.prod(shape[axis] for axis in axes) for axes in self)


def matrix_axes(name: str, ndim: int) -> MatrixAxes | None:
    """The axes of parameter ``name``; None for gains and biases, which are vectors in any number of axes.

    What lies in ``blocks/`` is stacked by layer. Attention writes [d, heads, head_dim] and, on the way out,
    [heads, head_dim, d]; anywhere else a matrix is the last two axes.
    """
    axes = tuple(range(ndim))
    lead = int(name.startswith("blocks/"))
    own = axes[lead:]
    if name.endswith(("scale", "bias")) or len(own) < 2:
        return None
    if "/attention/" in name and len(own) == 3:
        split = 2 if name.endswith("/out") else 1
        return MatrixAxes(axes[:lead], own[:split], own[split:])
    return MatrixAxes(axes[:-2], axes[-2:-1], axes[-1:])
