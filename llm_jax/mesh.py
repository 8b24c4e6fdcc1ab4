"""Devices to a mesh, and logical axes to mesh axes.

The mesh has Explicit axes: an array's sharding is part of its type, and a wrong one is an error at
trace time. Models name the *logical* axes of their arrays; a ``Layout`` says on which mesh axes these
lie. Parameters rest cut along ``fsdp`` and are gathered to be used: ZeRO-3 (Rajbhandari et al. 2020,
arXiv 1910.02054). This is the only file that knows axis types.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from llm_jax import flags, hosts
from llm_jax.config import runtime
from llm_jax.errors import UserError

# From the slowest network to the fastest: neighbours along the last axis are neighbours in the machine.
AXES = ("replica", "stage", "data", "fsdp", "expert", "context", "tensor")

# logical axis -> mesh axes. An axis that is not listed is not sharded.
TABLE = {
    "batch": ("replica", "data", "fsdp", "expert", "stage"),
    "length": ("context",),
    "residual": ("context", "tensor"),  # the length between layers (Korthikanti et al., arXiv 2205.05198)
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "experts": ("expert",),
    "groups": ("replica", "data", "fsdp"),  # the rows of a batch where the experts are dealt out
    "features": ("tensor",),  # of tokens on their way to experts
    "layers": ("stage",),
}
# Of parameters at rest, beside TABLE: in computation they are whole along fsdp.
STORED = {"embed": ("fsdp",), "vocab_rows": ("tensor", "fsdp")}

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


@dataclass(frozen=True)
class Layout:
    """A mesh and what lies where on it, frozen together: hashable, so that jit re-traces when it changes.

    zero, rounds, most_parts: MeshConfig's. whole: logical axes that are not cut here, though the mesh could;
    apart: mesh axes that cut nothing here. platform: of the devices, in jax's words: cpu, gpu or tpu; it need
    not be that of this process.
    """

    mesh: Mesh | AbstractMesh
    zero: int = 3
    whole: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    rounds: int = 1
    most_parts: int = 0
    platform: str = "cpu"

    @cached_property
    def _table(self) -> dict[str, tuple[str, ...]]:
        """TABLE and STORED with the axes that this mesh has: one of size 1 cuts nothing."""
        return {
            name: tuple(axis for axis in axes if self.mesh.shape[axis] > 1 and axis not in self.apart)
            for name, axes in (TABLE | STORED).items()
            if name not in self.whole
        }

    def axes(self, name: str | None) -> tuple[str, ...]:
        """The mesh axes that cut a logical axis."""
        return self._table.get(name, ())

    def computed(self, name: str | None) -> tuple[str, ...]:
        """The same in computation, where parameters are gathered."""
        return tuple(axis for axis in self.axes(name) if name not in STORED or axis != "fsdp")

    def ways(self, name: str) -> int:
        """Into how many shards a logical axis is cut."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes(name))

    def spec(self, *names: str | None, summed: tuple[str, ...] = ()) -> PartitionSpec:
        """Where an array with these logical axes lies in computation (None: not sharded). summed: mesh axes
        over which the devices hold parts whose sum is meant."""
        return _spec([self.computed(name) for name in names], unreduced=summed)

    def storage_spec(self, *names: str | None) -> PartitionSpec:
        """Where a parameter with these logical axes rests."""
        return _spec([self.axes(name) for name in names])

    def shard(self, x: jax.Array, *names: str | None) -> jax.Array:
        """``x`` moved to its compute layout; it needs no move where it lies there already."""
        return jax.sharding.reshard(x, self.spec(*names))

    def store(self, x: jax.Array, *names: str | None) -> jax.Array:
        """``x`` moved to its storage layout."""
        return jax.sharding.reshard(x, self.storage_spec(*names))

    def named(self, *names: str | None) -> NamedSharding:
        """The compute layout as a sharding, for arrays that come from outside."""
        return NamedSharding(self.mesh, self.spec(*names))

    def gather(
        self,
        w: jax.Array,
        dtype: str,
        whole: tuple[str, ...] = ("fsdp",),
        over: tuple[str, ...] = ("batch", "length"),
    ) -> jax.Array:
        """A parameter at rest made whole along the mesh axes ``whole``, in ``dtype``, to be multiplied with
        activations that are cut along the logical axes ``over``. On the way back its gradient is
        reduce-scattered, and what is left, a shard, all-reduced over the other axes: the compiler left to
        itself all-reduces all of it. Along an axis that still cuts it, experts along ``expert``, there is
        nothing to sum."""
        stored, w = jax.typeof(w).sharding.spec, w.astype(dtype)
        cuts = [
            tuple(a for a in mesh_axes(PartitionSpec(cut)) if a not in whole) for cut in stored.partitions
        ]
        gathered = _spec(cuts)
        summed = frozenset(a for name in over for a in self.axes(name)) - set(mesh_axes(gathered))
        if summed <= stored.reduced:  # one device, or gathered already: ``zero`` below 3
            return w
        if stored.reduced:  # gathered but for axes that only this use has
            return jax.sharding.reshard(w, gathered.update(reduced=summed))
        return _gather(stored, gathered, summed, w)

    def scatter(self, grad: jax.Array, like: jax.Array) -> jax.Array:
        """The gradient of what ``gather`` gave, cut and summed as the parameter ``like`` rests."""
        return _scatter(jax.typeof(like).sharding.spec, grad)

    def enter(self, x_bld: jax.Array) -> jax.Array:
        """From "residual" to "length": whole along tensor, for a layer whose weights are cut along it. The
        way back is a reduce-scatter."""
        return self.widen(x_bld, "batch", "length", None)

    def widen(self, x: jax.Array, *names: str | None) -> jax.Array:
        """``x`` made whole along the mesh axes that cut none of these logical axes. Its gradient, parts to be
        summed along them, is reduce-scattered on the way back."""
        cuts = [self.computed(name) for name in names]
        gathered = set(mesh_axes(jax.typeof(x).sharding.spec)) - {axis for cut in cuts for axis in cut}
        return jax.sharding.reshard(x, _spec(cuts, reduced=gathered))

    def decoding(self) -> Layout:
        """The same with the length whole, for one token at a time."""
        return dataclasses.replace(self, whole=("length", "residual"))

    def inside_stage(self) -> Layout:
        """The same for what one stage of a pipeline does."""
        return dataclasses.replace(self, apart=("stage",))

    def parts(self, rows: int) -> int:
        """Into how many parts a pipeline cuts so many rows: a multiple of the stages; 1 without one."""
        stages = self.ways("layers")
        if stages == 1:
            return 1
        most, own = self.most_parts or 4 * stages, rows * stages // self.ways("batch")
        return max(parts for parts in range(stages, most + 1, stages) if own % parts == 0)

    def local(self) -> Layout:
        """The same inside ``jax.shard_map``, where each device's part is all there is."""
        return dataclasses.replace(self, whole=(*TABLE, *STORED))

    def on_devices(
        self,
        local: Callable[..., jax.Array],
        args: tuple,
        out: jax.ShapeDtypeStruct,
        out_spec: PartitionSpec,
        check_vma: bool = True,
    ) -> jax.Array:
        """``jax.shard_map`` over all mesh axes, also inside a stage of a pipeline: there ``jax.vmap`` would
        leave out the axis of the stages, and then refuses parts to be summed over the others."""

        if not self.apart:
            specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, args)
            return jax.shard_map(local, in_specs=specs, out_specs=out_spec, check_vma=check_vma)(*args)

        @jax.custom_batching.custom_vmap
        def run(*_: Any) -> jax.Array:
            """Says the type; what is called is the rule."""
            return jax.sharding.reshard(jnp.zeros(out.shape, out.dtype), out_spec)

        @run.def_vmap
        def over_stages(_size: int, batched: list[bool], *args: Any) -> tuple[jax.Array, bool]:
            leaves, tree = jax.tree.flatten(args)
            lead = jax.tree.leaves(batched)

            def of_stage(*leaves: jax.Array) -> jax.Array:
                own = [x[0] if has else x for x, has in zip(leaves, lead, strict=True)]
                return local(*tree.unflatten(own))[None]

            specs = tuple(jax.typeof(x).sharding.spec for x in leaves)
            out = out_spec.update(partitions=(self.apart[0], *out_spec.partitions))
            return jax.shard_map(of_stage, in_specs=specs, out_specs=out, check_vma=check_vma)(*leaves), True

        return run(*args)


def _spec(axes: list[tuple[str, ...]], **sums: Iterable[str]) -> PartitionSpec:
    """A PartitionSpec as jax writes it: one axis bare, none as None."""
    cuts = (None if not a else a[0] if len(a) == 1 else a for a in axes)
    return PartitionSpec(*cuts, **{kind: frozenset(names) for kind, names in sums.items()})


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _gather(stored: PartitionSpec, whole: PartitionSpec, summed: frozenset[str], w: jax.Array) -> jax.Array:
    return jax.sharding.reshard(w, whole.update(reduced=summed))


def _gather_forward(*args: Any) -> tuple[jax.Array, None]:
    return _gather(*args), None


def _gather_backward(stored: PartitionSpec, _whole: Any, _summed: Any, _: None, grad: jax.Array) -> tuple:
    return (_scatter(stored, grad),)


_gather.defvjp(_gather_forward, _gather_backward)


def all_but_gathered(primitive: Any, *_: Any, **params: Any) -> bool:
    """A policy of jax.checkpoint: keep everything for the backward pass but what ``gather`` gave."""
    if primitive.name != "custom_vjp_call":
        return True
    equations = params["call_jaxpr"].jaxpr.eqns
    return [equation.primitive.name for equation in equations] != ["reshard"]


def _scatter(stored: PartitionSpec, grad: jax.Array) -> jax.Array:
    """Parts to be summed to shards of the sum: first over the axes that cut it, then over the others.

    What is to be cut is brought to the front: of cuts along the last dimension into shards of 128, libtpu
    0.0.42 makes an all-reduce of the whole and a slice.
    """
    for dim, cut in enumerate(stored):
        axes = {*mesh_axes(PartitionSpec(cut))} & jax.typeof(grad).sharding.spec.unreduced
        if axes:
            grad = jnp.moveaxis(grad, dim, 0)
            spec = jax.typeof(grad).sharding.spec
            first = PartitionSpec(cut, *spec.partitions[1:], unreduced=spec.unreduced - axes)
            grad = jnp.moveaxis(jax.sharding.reshard(grad, first), 0, dim)
    return jax.sharding.reshard(grad, stored)


def mesh_axes(spec: PartitionSpec) -> tuple[str, ...]:
    """The mesh axes that a PartitionSpec cuts along."""
    return tuple(a for cut in spec if cut for a in ((cut,) if isinstance(cut, str) else cut))


def start(config: MeshConfig, rows: int) -> MeshConfig:
    """Sets compiler flags and gives the config with ``cpu_devices`` chosen.

    Call before anything asks jax for a device; later it has no effect on the devices.
    rows: the number of rows of one forward pass, which the CPU devices must be able to share.
    """
    count = config.cpu_devices or default_cpu_devices(rows)
    if count > 1:
        flags.add("cpu", flags.CPU)
    if config.overlap_flags:
        flags.overlap()
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
    mesh = Mesh(_arrange(sizes, devices), AXES, axis_types=(AxisType.Explicit,) * len(AXES))
    return _layout(config, mesh, devices[0].platform)


def abstract_layout(config: MeshConfig, device_count: int, slices: int = 1, platform: str = "cpu") -> Layout:
    """The layout over devices that are not there: for shapes and shardings, not for values."""
    sizes = mesh_shape(config, device_count)
    _check_slices(sizes, slices)
    mesh = AbstractMesh(sizes, AXES, axis_types=(AxisType.Explicit,) * len(AXES))
    return _layout(config, mesh, platform)


def _layout(config: MeshConfig, mesh: Mesh | AbstractMesh, platform: str) -> Layout:
    stages, rounds, parts = mesh.shape["stage"], config.stage_rounds, config.stage_parts
    if rounds < 1 or (rounds > 1 and stages == 1):
        raise UserError(f"config.mesh.stage_rounds={rounds} is of a pipeline and at least 1; set mesh.stage")
    if parts < 0 or parts % stages or (parts and stages == 1):
        raise UserError(f"config.mesh.stage_parts={parts} must be a multiple of mesh.stage={stages}, above 1")
    return Layout(mesh, _zero(config, mesh.shape["fsdp"]), (), (), rounds, parts, platform)


def _zero(config: MeshConfig, fsdp: int) -> int:
    """The stage that holds; see MeshConfig."""
    if config.zero not in (0, 1, 2, 3):
        raise UserError(f"config.mesh.zero={config.zero} is none; choose 1, 2, 3, or 0 for the usual one")
    return config.zero or (3 if fsdp > 1 else 1)


def abstractly(mesh: Mesh | AbstractMesh) -> contextlib.AbstractContextManager:
    """Within it shapes and shardings can be found, without a device."""
    return jax.sharding.use_abstract_mesh(mesh if isinstance(mesh, AbstractMesh) else mesh.abstract_mesh)


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
