"""Attention kernels, forward and backward, by length: dense against blockwise by size of block; on a GPU also
flash, by size of block, and cuDNN.

  python benchmarks/attention_kernels.py

On a CPU one row, 4 heads of 32, causal, float32; on a GPU 8 rows, 12 heads of 64, causal, bfloat16, of one
document each; median seconds of 3 and the compiler's temporaries, and on a GPU the largest difference of the
result from the dense kernel's in float32. Writes benchmarks/results/attention_kernels.json, or with _gpu.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import record

from llm_jax import mesh
from llm_jax.layout import Layout
from llm_jax.models import attend, blockwise, cudnn, flash, flash_kernel
from llm_jax.models.attend import Mask, Scoring

GPU = jax.default_backend() == "gpu"
ROWS, HEADS, HEAD_DIM, DTYPE = (8, 12, 64, jnp.bfloat16) if GPU else (1, 4, 32, jnp.float32)
LENGTHS = (1024, 4096, 16384)
BLOCKS = (128, 256, 512)
FLASH_BLOCKS = (32, 64, 128)
MOST_DENSE = 4096  # at 16,384 the scores of a row alone are 4 GB, several times over


def attention(kernel: attend.Kernel, layout: Layout) -> Callable:
    def run(q, k, v):
        ones = jnp.ones(q.shape[:2], jnp.int32)
        return attend.attend(q, k, v, Mask(ones, ones, causal=True), Scoring(), layout, kernel)

    return run


def measure(kernel: attend.Kernel, length: int, layout: Layout) -> dict:
    """Seconds and temporary bytes of one forward and backward pass."""
    run = attention(kernel, layout)
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = [jax.random.normal(key, (ROWS, length, HEADS, HEAD_DIM), DTYPE) for key in keys]
    step = jax.grad(lambda *arrays: run(*arrays).astype(jnp.float32).sum(), (0, 1, 2))
    compiled = jax.jit(step).lower(*arrays).compile()
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arrays))
        seconds.append(time.perf_counter() - start)
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    found = {"seconds": round(statistics.median(seconds[1:]), 5), "temporary_bytes": temporaries}
    if GPU and length <= MOST_DENSE:
        exact = jax.jit(attention(attend.dense, layout))(*(x.astype(jnp.float32) for x in arrays))
        found["difference"] = float(jnp.abs(jax.jit(run)(*arrays).astype(jnp.float32) - exact).max())
    return found


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    layout = mesh.make_layout(mesh.MeshConfig(), jax.devices()[:1])
    results: dict[str, dict] = {}
    with jax.set_mesh(layout.mesh):
        for length in LENGTHS:
            if length <= MOST_DENSE:
                results[f"dense, {length}"] = measure(attend.dense, length, layout)
            for block in BLOCKS:
                blockwise.BLOCK = block
                results[f"blockwise {block}, {length}"] = measure(blockwise.blockwise, length, layout)
            for block in FLASH_BLOCKS if GPU else ():
                flash_kernel.BLOCK = block
                results[f"flash {block}, {length}"] = measure(flash.flash, length, layout)
            if GPU:
                results[f"cudnn, {length}"] = measure(cudnn.cudnn, length, layout)
    for name, result in results.items():
        off = f"  off by {result['difference']:.1e}" if "difference" in result else ""
        mb = result["temporary_bytes"] / 1e6
        print(f"{name:24} {result['seconds']:9.4f} s  {mb:9.1f} MB{off}")
    name = "attention_kernels_gpu" if GPU else "attention_kernels"
    record.write(name, {**record.environment("jax", "jaxlib"), "results": results})


if __name__ == "__main__":
    main()
