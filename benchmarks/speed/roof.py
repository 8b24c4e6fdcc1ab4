"""The rate of a large product of matrices in each framework, the roof of every row, in a process of its own;
benchmarks/speed/run.py starts it."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

from benchmarks.speed import clock

ROUNDS = 7
AT_ONCE = 8  # so that waiting for them costs nothing: jax's took 0.5 of 2 ms on an H200


def of_jax() -> tuple[Callable[[], object], int]:
    """A product to be timed, and the size of its matrices."""
    import jax
    import jax.numpy as jnp

    gpu = jax.default_backend() == "gpu"
    x, y = jax.random.normal(jax.random.key(0), (2, *_shape(gpu)), jnp.bfloat16 if gpu else jnp.float32)
    product = jax.jit(jnp.matmul)
    return lambda: jax.block_until_ready([product(x, y) for _ in range(AT_ONCE)]), len(x)


def of_torch() -> tuple[Callable[[], object], int]:
    import torch

    gpu = torch.cuda.is_available()
    kind = {"device": "cuda", "dtype": torch.bfloat16} if gpu else {}
    x, y = torch.randn((2, *_shape(gpu)), **kind)

    def product() -> None:
        for _ in range(AT_ONCE):
            x @ y
        if gpu:
            torch.cuda.synchronize()

    return product, len(x)


def _shape(gpu: bool) -> tuple[int, int]:
    size = 8192 if gpu else 2048
    return size, size


def _rate(product: Callable[[], object], size: int) -> float:
    """FLOP/s, the median of ROUNDS of AT_ONCE products after two that warm up."""
    seconds = []
    for _ in range(ROUNDS + 2):
        start = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - start)
    return AT_ONCE * 2 * size**3 / statistics.median(seconds[2:])


if __name__ == "__main__":
    product, size = {"jax": of_jax, "torch": of_torch}[sys.argv[1]]()
    clock.serve(lambda: {"tflops": _rate(product, size) / 1e12}, product)
