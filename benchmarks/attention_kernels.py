"""Dense against blockwise attention, forward and backward, by length and size of block.

  python benchmarks/attention_kernels.py

One row, 4 heads of 32, causal, float32; median seconds of 3 and the compiler's temporaries. Writes
benchmarks/results/attention_kernels.json.
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import record

from llm_jax import mesh
from llm_jax.layout import Layout
from llm_jax.models import attend, blockwise
from llm_jax.models.attend import Mask, Scoring

HEADS, HEAD_DIM = 4, 32
LENGTHS = (1024, 4096, 16384)
BLOCKS = (128, 256, 512)


def measure(kernel: attend.Kernel, length: int, layout: Layout) -> dict:
    """Seconds and temporary bytes of one forward and backward pass."""

    def loss(q, k, v):
        ones = jnp.ones((1, length), jnp.int32)
        return attend.attend(q, k, v, Mask(ones, ones, causal=True), Scoring(), layout, kernel).sum()

    keys = jax.random.split(jax.random.key(0), 3)
    arrays = [jax.random.normal(key, (1, length, HEADS, HEAD_DIM)) for key in keys]
    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arrays).compile()
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arrays))
        seconds.append(time.perf_counter() - start)
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    return {"seconds": round(statistics.median(seconds[1:]), 4), "temporary_bytes": temporaries}


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    layout = mesh.make_layout(mesh.MeshConfig(), jax.devices()[:1])
    results: dict[str, dict] = {}
    with jax.set_mesh(layout.mesh):
        for length in LENGTHS:
            if length <= 4096:  # at 16,384 the scores alone are 4 GB, several times over
                results[f"dense, {length}"] = measure(attend.dense, length, layout)
            for block in BLOCKS:
                blockwise.BLOCK = block
                results[f"blockwise {block}, {length}"] = measure(blockwise.blockwise, length, layout)
    for name, result in results.items():
        print(f"{name:24} {result['seconds']:8.3f} s  {result['temporary_bytes'] / 1e6:9.1f} MB")
    record.write("attention_kernels", {**record.environment("jax", "jaxlib"), "results": results})


if __name__ == "__main__":
    main()
