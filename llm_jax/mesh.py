"""Devices to a mesh, and logical axes to mesh axes.

The mesh has Explicit axes: an array's sharding is part of its type, and a wrong one is an error at
trace time. Models name the *logical* axes of their arrays; a ``Layout`` says on which mesh axes these
lie. Parameters have two layouts: ``storage`` (how they rest between steps) and ``compute`` (how a
layer uses them). Storing ``embed`` on ``fsdp`` and computing with it whole is ZeRO-3 (Rajbhandari et
al. 2020, arXiv 1910.02054). This is the only file that knows axis types and device flags.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llm_jax import hosts
from llm_jax.config import runtime
from llm_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")

# logical axis -> mesh axes. An axis that is not listed is not sharded.
_COMPUTE = {
    "batch": ("data", "fsdp"),
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}
_STORAGE = {**_COMPUTE, "embed": "fsdp"}


@dataclass(frozen=True)
class MeshConfig:
    """How many devices lie along each axis; -1 (one axis at most) takes what is left.

    cpu_devices: into how many devices a CPU is divided; 0 chooses the number of cores, or the
    largest smaller number that divides the batch. Single-threaded devices share a small model's work
    better than one device whose products each use all cores.
    """

    data: int = runtime(-1)
    fsdp: int = runtime(1)
    tensor: int = runtime(1)
    cpu_devices: int = runtime(0)


@dataclass(frozen=True)
class Layout:
    """A mesh with its two tables, frozen together: hashable, so that jit re-traces when it changes."""

    mesh: Mesh
    compute: tuple[tuple[str, str | tuple[str, ...]], ...] = tuple(_COMPUTE.items())
    storage: tuple[tuple[str, str | tuple[str, ...]], ...] = tuple(_STORAGE.items())

    def spec(self, *axes: str | None) -> PartitionSpec:
        """Where an array with these logical axes lies in computation (None: not sharded)."""
        table = dict(self.compute)
        return PartitionSpec(*(table.get(axis) for axis in axes))

    def storage_spec(self, *axes: str | None) -> PartitionSpec:
        """Where a parameter with these logical axes rests."""
        table = dict(self.storage)
        return PartitionSpec(*(table.get(axis) for axis in axes))

    def shard(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """``x`` moved to its compute layout; it needs no move where it lies there already."""
        return jax.sharding.reshard(x, self.spec(*axes))

    def store(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """``x`` moved to its storage layout."""
        return jax.sharding.reshard(x, self.storage_spec(*axes))

    def named(self, *axes: str | None) -> NamedSharding:
        """The compute layout as a sharding, for arrays that come from outside."""
        return NamedSharding(self.mesh, self.spec(*axes))

    def ways(self, axis: str) -> int:
        """Into how many shards a logical axis is cut in storage."""
        names = dict(self.storage).get(axis, ())
        names = (names,) if isinstance(names, str) else names
        return math.prod(self.mesh.shape[name] for name in names)


def start(config: MeshConfig, rows: int) -> MeshConfig:
    """Sets device flags and gives the config with ``cpu_devices`` chosen.

    Call before anything asks jax for a device; later it has no effect on the devices.
    rows: the number of rows of one forward pass, which the CPU devices must be able to share.
    """
    count = config.cpu_devices or default_cpu_devices(rows)
    if count > 1:
        flags = os.environ.get("XLA_FLAGS", "")
        if "xla_cpu_multi_thread_eigen" not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()
    with contextlib.suppress(RuntimeError):  # jax is already running: a notebook, or the tests
        jax.config.update("jax_num_cpu_devices", count)
    return dataclasses.replace(config, cpu_devices=count)


def default_cpu_devices(rows: int) -> int:
    """The largest number, at most that of usable cores, that shares ``rows`` evenly over all processes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max((n for n in range(1, (cores or 1) + 1) if rows % (n * hosts.count()) == 0), default=1)


def make_layout(config: MeshConfig, devices: Iterable[jax.Device] | None = None) -> Layout:
    """The layout over ``devices`` (default: all). Raises UserError when the axes do not multiply out."""
    devices = list(jax.devices() if devices is None else devices)
    sizes = mesh_shape(config, len(devices))
    mesh = jax.make_mesh(sizes, AXES, axis_types=(AxisType.Explicit,) * 3, devices=devices)
    return Layout(mesh)


def mesh_shape(config: MeshConfig, device_count: int) -> tuple[int, ...]:
    """Sizes of the mesh axes in the order of ``AXES``, with -1 filled in."""
    sizes = [getattr(config, axis) for axis in AXES]
    written = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"config.mesh ({written}): sizes are at least 1, and at most one may be -1")
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and device_count % known == 0:
        sizes[sizes.index(-1)] = device_count // known
    if math.prod(sizes) != device_count:
        raise UserError(
            f"config.mesh ({written}) does not fit {device_count} devices; "
            f"their product must be {device_count} (mesh.cpu_devices says how many a CPU is divided into)"
        )
    return tuple(sizes)


def default_dtype() -> str:
    """The dtype of matrix products: bfloat16 on TPU and GPU, float32 on a CPU, which emulates it."""
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16).name
