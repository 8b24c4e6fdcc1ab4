"""Devices to a mesh: its axes, the recipes that people run, and how many devices lie along each.

The axes are Explicit (layout.py says what that is for); this is the only file that knows axis types.
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
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh

from llm_jax import flags, hardware, hosts
from llm_jax.config import runtime
from llm_jax.errors import UserError
from llm_jax.layout import Layout

# From the slowest network to the fastest: neighbours along the last axis are neighbours in the machine.
AXES = ("replica", "stage", "data", "fsdp", "expert", "context", "tensor")

# What people run, by name: {mesh axis: size}; -1 takes what is left, and an axis that is not named is 1.
RECIPES = {
    "ddp": {"data": -1},
    "fsdp": {"fsdp": -1},
    "hsdp": {"data": -1, "fsdp": 8},
    "tp": {"tensor": -1},
    "fsdp_tp": {"fsdp": -1, "tensor": 4},
    "long_context": {"fsdp": -1, "context": 4},
    "moe": {"fsdp": -1, "expert": 4},
    "pipeline": {"data": -1, "stage": 4},
    "multislice": {"replica": 2, "fsdp": -1},
}


@dataclass(frozen=True)
class MeshConfig:
    """How many devices lie along each axis: 0 = as the recipe says, -1 (one axis at most) = what is left.

    replica: whole copies over a slow network, between slices of TPUs; data: copies, fsdp: parameters cut and
    gathered for use, expert: experts dealt out, stage: layers dealt out, a pipeline: the batch is cut along
    all five. tensor: heads, features and vocabulary cut; context: the length cut.

    stage_rounds: how many runs of layers a stage has; stage_parts: into how many parts at most a pipeline
    cuts the rows of a forward pass, a multiple of stage; 0 = 4 * stage. More of both make the bubble smaller
    (pipeline.py).

    zero: 3 = a layer is gathered where it is used, 2 = all are once a step, and gradients are cut in every
    micro-batch, 1 = gradients are added up whole and cut once a step, 0 = 3 where fsdp cuts, else 1.
    Parameters and optimiser state always rest cut. cpu_devices: into how many devices a CPU is divided; 0
    chooses the number of cores, or the largest smaller number that divides the batch. Single-threaded devices
    share a small model's work better than one device whose products each use all cores. overlap_flags: tell
    the compilers for TPUs and GPUs to run collectives beside computation (flags.py).
    """

    data: int = runtime(0)
    fsdp: int = runtime(0)
    tensor: int = runtime(0)
    replica: int = runtime(0)
    context: int = runtime(0)
    expert: int = runtime(0)
    stage: int = runtime(0)
    recipe: str = runtime("ddp")
    zero: int = runtime(3)
    stage_rounds: int = runtime(1)
    stage_parts: int = runtime(0)
    cpu_devices: int = runtime(0)
    overlap_flags: bool = runtime(True)

    @property
    def sizes(self) -> dict[str, int]:
        """{axis: size}, the recipe applied; -1 is still there."""
        if self.recipe not in RECIPES:
            raise UserError(f"config.mesh.recipe is '{self.recipe}'; choose one of {', '.join(RECIPES)}")
        said = {axis: getattr(self, axis) for axis in AXES}
        if -1 in said.values():  # the recipe's own -1 gives way
            recipe = {axis: size for axis, size in RECIPES[self.recipe].items() if size != -1}
        else:
            recipe = RECIPES[self.recipe]
        return {axis: said[axis] or recipe.get(axis, 1) for axis in AXES}


def start(config: MeshConfig, rows: int) -> MeshConfig:
    """Sets compiler flags and where compiled programs are kept; gives the config with ``cpu_devices`` chosen.

    Call before anything asks jax for a device; later it has no effect on the devices.
    rows: the number of rows of one forward pass, which the CPU devices must be able to share.
    """
    count = config.cpu_devices or default_cpu_devices(rows)
    flags.add("cpu", flags.CPU | (flags.CPU_DIVIDED if count > 1 else {}))
    flags.add_accelerators(config.overlap_flags, hosts.count() > 1 or hardware.gpu_count() > 1)
    flags.keep_compiled()
    with contextlib.suppress(RuntimeError):  # jax is already running: a notebook, or the tests
        jax.config.update("jax_num_cpu_devices", count)
        if count > _cores():
            flags.add_threads(count)
    return dataclasses.replace(config, cpu_devices=count)


def default_cpu_devices(rows: int) -> int:
    """The largest number, at most that of usable cores, that shares ``rows`` evenly over all processes."""
    return max((n for n in range(1, _cores() + 1) if rows % (n * hosts.count()) == 0), default=1)


def _cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_layout(config: MeshConfig, devices: Iterable[jax.Device] | None = None) -> Layout:
    """The layout over ``devices`` (default: all). Raises UserError when the axes do not multiply out."""
    devices = list(jax.devices() if devices is None else devices)
    sizes = mesh_shape(config, len(devices))
    mesh = Mesh(_arrange(sizes, devices), AXES, axis_types=(AxisType.Explicit,) * len(AXES))
    return _layout(config, mesh, devices[0].platform)


def abstract_layout(config: MeshConfig, device_count: int, slices: int, device: AbstractDevice) -> Layout:
    """The layout over devices that are not there: for shapes and shardings, not for values."""
    sizes = mesh_shape(config, device_count)
    _check_slices(sizes, slices)
    mesh = AbstractMesh(sizes, AXES, axis_types=(AxisType.Explicit,) * len(AXES), abstract_device=device)
    return _layout(config, mesh, device.platform)


def _layout(config: MeshConfig, mesh: Mesh | AbstractMesh, platform: str) -> Layout:
    stages, rounds, parts = mesh.shape["stage"], config.stage_rounds, config.stage_parts
    if rounds < 1:
        raise UserError(f"config.mesh.stage_rounds={rounds} must be at least 1")
    if rounds > 1 and stages == 1:
        raise UserError(f"config.mesh.stage_rounds={rounds} is of a pipeline; set mesh.stage, too")
    if parts < 0 or parts % stages or (parts and stages == 1):
        raise UserError(f"config.mesh.stage_parts={parts} must be a multiple of mesh.stage={stages}, above 1")
    zero = _zero(config, mesh.shape["fsdp"])
    return Layout(mesh, zero=zero, rounds=rounds, most_parts=parts, platform=platform)


def _zero(config: MeshConfig, fsdp: int) -> int:
    """The stage that holds; see MeshConfig."""
    if config.zero not in (0, 1, 2, 3):
        raise UserError(f"config.mesh.zero={config.zero} is none; choose 1, 2, 3, or 0 for the usual one")
    return config.zero or (3 if fsdp > 1 else 1)


def _check_slices(sizes: tuple[int, ...], slices: int) -> None:
    if sizes[0] % slices:
        raise UserError(f"config.mesh.replica={sizes[0]} is not a multiple of the {slices} slices; change it")


def _arrange(sizes: tuple[int, ...], devices: list[jax.Device]) -> np.ndarray:
    """Devices in the shape of the mesh: the last axes are neighbours, slices lie along ``replica``."""
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    _check_slices(sizes, slices)
    inside, across = (sizes[0] // slices, *sizes[1:]), (slices, *[1] * (len(sizes) - 1))
    return mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)


def mesh_shape(config: MeshConfig, device_count: int) -> tuple[int, ...]:
    """Sizes of the mesh axes in the order of ``AXES``, with -1 filled in."""
    sizes = config.sizes
    written = ", ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1) or "one device"
    left = [axis for axis, size in sizes.items() if size == -1]
    if len(left) > 1 or any(size < -1 for size in sizes.values()):
        raise UserError(f"config.mesh ({written}): sizes are at least 1, and at most one may be -1")
    known = math.prod(size for size in sizes.values() if size != -1)
    if left and device_count % known == 0:
        sizes[left[0]] = device_count // known
    if math.prod(sizes.values()) != device_count:
        raise UserError(
            f"config.mesh ({written}) does not fit {device_count} devices; "
            f"their product must be {device_count} (mesh.cpu_devices says how many a CPU is divided into)"
        )
    return tuple(sizes.values())


def default_dtype() -> str:
    """The dtype of matrix products: bfloat16 on TPU and GPU, float32 on a CPU, which emulates it."""
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16).name
