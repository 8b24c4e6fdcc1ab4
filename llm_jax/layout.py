"""Logical axes to mesh axes: what lies where, and how it gets there.

The mesh has Explicit axes: an array's sharding is part of its type, and a wrong one is an error at trace
time. Models name the *logical* axes of their arrays; a ``Layout`` says on which mesh axes these lie.
Parameters rest cut along ``fsdp`` and are gathered to be used: ZeRO-3 (Rajbhandari et al. 2020, arXiv
1910.02054).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

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
    "groups": ("replica", "data", "fsdp", "stage"),  # the rows of a batch where the experts are dealt out
    "features": ("tensor",),  # of tokens on their way to experts
    "layers": ("stage",),
}
# Of parameters at rest, beside TABLE: in computation they are whole along fsdp.
STORED = {"embed": ("fsdp",), "vocab_rows": ("tensor", "fsdp")}


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

    def in_memory(self, tree: Any) -> Any:
        """``tree``, which on a GPU is in memory from here on: for what XLA would otherwise join with, or make
        again in, what reads it, into slower kernels."""
        return jax.lax.optimization_barrier(tree) if self.platform == "gpu" else tree

    def decoding(self) -> Layout:
        """The same with the length whole, for one token at a time."""
        return dataclasses.replace(self, whole=("length", "residual"))

    def inside_stage(self) -> Layout:
        """The same for what one stage of a pipeline does, under ``jax.vmap`` over the stages."""
        return dataclasses.replace(self, apart=self.axes("layers"))

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
        """``local(*args)`` on each device, ``jax.shard_map`` over all mesh axes, its inputs cut as they lie.

        Also inside a stage of a pipeline: there ``jax.vmap`` would leave out the axis of the stages, and then
        refuses parts to be summed over the others. out, out_spec: shape and dtype of the whole result, and
        how it is cut; check_vma: shard_map's.
        """
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


@jax.custom_vjp
def turned(w: jax.Array) -> jax.Array:
    """The transpose of a matrix to multiply with, whose gradient is made as it lies: one that is taller than
    wide takes a CPU a third longer than its transpose, which the barriers have XLA make (log)."""
    return jax.lax.optimization_barrier(w.T)


def _turned_forward(w: jax.Array) -> tuple[jax.Array, None]:
    return turned(w), None


def _turned_backward(_: None, grad: jax.Array) -> tuple:
    return (jax.lax.optimization_barrier(grad).T,)


turned.defvjp(_turned_forward, _turned_backward)
MADE_AGAIN = (["reshard"], ["transpose", "optimization_barrier"])  # what gather and turned do


def all_but_gathered(primitive: Any, *_: Any, **params: Any) -> bool:
    """A policy of jax.checkpoint: keep everything for the backward pass but what ``gather`` gave, and views
    and transposes, which may be of that and are made again for little."""
    if primitive.name == "reshape":
        return False
    if primitive.name != "custom_vjp_call":
        return True
    equations = params["call_jaxpr"].jaxpr.eqns
    return [equation.primitive.name for equation in equations] not in MADE_AGAIN


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


def platform_of(x: jax.Array) -> str:
    """That of the devices of the mesh in the type of ``x``, in jax's words; "" where it names none."""
    device = jax.typeof(x).sharding.mesh.abstract_device
    return device.platform if device else ""


def mesh_axes(spec: PartitionSpec) -> tuple[str, ...]:
    """The mesh axes that a PartitionSpec cuts along."""
    return tuple(a for cut in spec if cut for a in ((cut,) if isinstance(cut, str) else cut))


def abstractly(mesh: Mesh | AbstractMesh) -> contextlib.AbstractContextManager:
    """Within it shapes and shardings can be found, without a device."""
    return jax.sharding.use_abstract_mesh(mesh if isinstance(mesh, AbstractMesh) else mesh.abstract_mesh)
