"""What the compilers are told beside the program: that collectives run while the device computes, who makes a
GPU's products, and where to keep what is compiled; and XLA's client for CPUs, how many threads it has.

They read it from the environment when jax first asks for a device: libtpu from LIBTPU_INIT_ARGS, XLA for
GPUs and CPUs from XLA_FLAGS, the client from PJRT_NPROC. What is already there stays as it is.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
from pathlib import Path
from platform import machine, processor

import jax

# From public recipes for v5e, v5p and v6e (MaxText's benchmarks/xla_flags_library.py). Gathers of weights are
# taken apart and fused with the products beside them; reductions over the slow network run with the backward
# pass. libtpu 0.0.42 knows them all: it ends the process at one that it does not know.
TPU = {
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    "xla_enable_async_all_gather": "true",
    "xla_enable_async_collective_permute": "true",
    "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
    "xla_tpu_data_parallel_opt_different_sized_ops": "true",
}
# Products by cuBLAS alone. Triton takes what makes an operand into the product's kernel, and where cuBLAS is
# chosen after all, that is left as kernels of its own, one for each product that reads it: gradients put side
# by side twice, gates made twice (log).
GPU = {"xla_gpu_enable_triton_gemm": "false"}
# Of a program, not of a process: what is no product is made of blocks, by Triton. A thread reads 32 bytes at
# once in place of 8: GELU and its gradient take 7.5 ms of BERT base's step for 9.8. But sums and what is put
# side by side take longer, and zeros very long (models/look_up.py): nothing is won for a gated decoder (log).
BLOCKS = {"xla_gpu_experimental_enable_fusion_block_level_rewriter": True}
# From NVIDIA's advice (JAX-Toolbox, GPU_performance.md), for several GPUs. The scan over layers is unrolled
# once, so that the next layer's gathers find products to hide behind. Named in jaxlib 0.10.2 and 0.12.0. One
# GPU goes without: on an H200 a step took as long, and the loop over steps was compiled twice over (log).
GPU_OVERLAP = {
    "xla_gpu_enable_latency_hiding_scheduler": "true",
    "xla_gpu_enable_pipelined_all_gather": "true",
    "xla_gpu_enable_pipelined_reduce_scatter": "true",
    "xla_gpu_enable_pipelined_all_reduce": "true",
    "xla_gpu_enable_while_loop_double_buffering": "true",
}
# Vectors as wide as those of a processor's products: 3 to 4% of a small step with AVX-512 (log).
CPU = {"xla_cpu_prefer_vector_width": "512"}
# Devices that divide a CPU share its cores: a product on one need not use them all.
CPU_DIVIDED = {"xla_cpu_multi_thread_eigen": "false"}
# XLA has a thread a device here. A collective that waits for other devices holds one, so that all wait for
# ever where some have two under way: a pipeline with experts on two cores (log). Not where cores are as many
# as devices: eight threads made a small step of two a third longer.
THREADS_PER_SIMULATED_DEVICE = 3

KEEP_ALL = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
VARIABLES = {"tpu": "LIBTPU_INIT_ARGS", "gpu": "XLA_FLAGS", "cpu": "XLA_FLAGS"}


def add(platform: str, flags: dict[str, str]) -> None:
    """Sets the flags that the platform's variable does not name yet."""
    variable = VARIABLES[platform]
    there = os.environ.get(variable, "").split()
    names = {flag.lstrip("-").split("=")[0].removeprefix("no") for flag in there}
    new = [f"--{name}={value}" for name, value in flags.items() if name not in names]
    if new:
        os.environ[variable] = " ".join([*there, *new])


def add_accelerators(overlap: bool, several_gpus: bool) -> None:
    """Sets the flags of the accelerators that jax has a plugin for; overlap: those of collectives, too."""
    if overlap and importlib.util.find_spec("libtpu"):
        add("tpu", TPU)
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    if any(plugin.name.startswith("xla_cuda") for plugin in plugins):
        add("gpu", GPU | (GPU_OVERLAP if overlap and several_gpus else {}))


def add_threads(devices: int) -> None:
    """Threads for so many CPU devices that share fewer cores, unless somebody has said how many."""
    os.environ.setdefault("PJRT_NPROC", str(THREADS_PER_SIMULATED_DEVICE * devices))


def keep_compiled() -> None:
    """Turns on jax's cache of compiled programs, unless somebody has said where it is: in the user's cache
    directory, apart for each kind of processor, since code for one may end another by SIGILL, and for each
    share of a GPU's memory, by which XLA makes things again. All programs are kept, however small: a run has
    some thirty.
    """
    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    try:
        directory = home / "llm_jax" / "compiled" / _compiled_for()
        directory.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # a home that is not there, or may not be written to
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    for option, value in KEEP_ALL.items():
        if option.upper() not in os.environ:
            jax.config.update(option, value)


def _compiled_for() -> str:
    """Names what the cache's key of a program leaves out: a hash of what the processor can do, and of a GPU's
    share of memory. A step compiled with a sixth of it, a tenth of which was making things again, was read by
    a process that had enough to keep them (log)."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        able = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        able = ""
    share = os.environ.get("XLA_CLIENT_MEM_FRACTION") or os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION")
    words = [machine(), processor(), able, *([share] if share else [])]
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:16]


def describe(platform: str) -> str:
    """One line: what the platform's compiler is told, whoever said it."""
    variable = VARIABLES[platform]
    return f"flags: {variable}={os.environ[variable]!r}" if os.environ.get(variable) else "flags: none"
