"""What XLA must know of an NVIDIA GPU that is not there, to compile for it."""

from __future__ import annotations

import re

from llm_jax.errors import UserError
from llm_jax.hardware import Chip
from llm_jax.planning.machine import Machine

# Of the processor of H100, GH200 and H200, by what CUDA says of one (cudaDeviceProp) and the whitepaper; no
# versions of cuDNN and CUDA but the least that jax's plugin for CUDA 13 brings.
HOPPER = """
gpu_device_info {{
  cuda_compute_capability {{ major: 9 }}
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  clock_rate_ghz: 1.98
  l2_cache_size: 52428800
  memory_bandwidth: {bandwidth:.0f}
  device_memory_size: {memory:.0f}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 }}
device_description_str: "NVIDIA {name}"
"""
PREALLOCATED = 0.75  # of its memory is what jax takes of a GPU where nobody says


def target(machine: Machine) -> str:
    """A GpuTargetConfigProto in text. Raises UserError for a GPU whose processor is not known."""
    name, chip = machine.name.partition(":")[0].upper(), machine.chip
    if not isinstance(chip, Chip) or not re.match(r"(H100|H200|GH200)(?!.*PCIE)", name):
        raise UserError(
            f"--compile for {machine.name}: of GPUs H100, H200 and GH200 (SXM) are known; or leave it out"
        )
    return HOPPER.format(name=name, bandwidth=chip.bandwidth, memory=PREALLOCATED * chip.memory)
