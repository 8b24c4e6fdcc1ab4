"""What a topology is called where it is booked: ``v5p:4x4x8`` for TPUs, ``h100:8x2`` for GPUs."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from llm_jax import hardware
from llm_jax.errors import UserError


@dataclass(frozen=True)
class Tpu:
    """Names of a TPU generation.

    accelerator_type: of the Cloud TPU API, "" where it has none (TPU7x is on GKE alone). counted: what it
    counts, a chip: v4 and v5p count TensorCores. runtime: the software of its machines. gke: its label
    cloud.google.com/gke-tpu-accelerator. axes: of the torus.

    Sources: cloud.google.com/tpu/docs (v5e, v5p, v6e, runtimes, queued-resources), GKE's "Plan TPUs".
    """

    accelerator_type: str
    counted: int
    runtime: str
    gke: str
    axes: int


TPUS = {
    "v4": Tpu("v4", 2, "tpu-ubuntu2204-base", "tpu-v4-podslice", 3),
    "v5e": Tpu("v5litepod", 1, "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", 2),
    "v5p": Tpu("v5p", 2, "v2-alpha-tpuv5", "tpu-v5p-slice", 3),
    "v6e": Tpu("v6e", 1, "v2-alpha-tpuv6e", "tpu-v6e-slice", 2),
    "tpu7x": Tpu("", 2, "", "tpu7x", 3),
}
CHIPS_PER_HOST = 4  # of every slice over several hosts
LARGEST_HOST = 8  # chips; v5e and v6e have machines of 1, 4 and 8
FLAT = (
    (1, 1),
    (2, 2),
    (2, 4),
    (4, 4),
    (4, 8),
    (8, 8),
    (8, 16),
    (16, 16),
)  # all that v5e and v6e are cut into
SMALL = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))  # the larger ones are made of cubes of 4 x 4 x 4


@dataclass(frozen=True)
class Topology:
    """A slice of a TPU, or nodes of GPUs. shape: the torus; for GPUs (GPUs a node, nodes)."""

    kind: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.kind}:{self.grid}"

    @property
    def grid(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def tpu(self) -> Tpu | None:
        """None for GPUs."""
        return TPUS.get(self.kind)

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def chips_per_host(self) -> int:
        if self.tpu is None:
            return self.shape[0]
        alone = self.tpu.axes == 2 and self.chips <= LARGEST_HOST
        return self.chips if alone else CHIPS_PER_HOST

    @property
    def hosts(self) -> int:
        return self.chips // self.chips_per_host

    @property
    def accelerator_type(self) -> str:
        """Of ``gcloud --accelerator-type``: v5p-256 has 128 chips, v5litepod-16 has 16."""
        return f"{self.tpu.accelerator_type}-{self.chips * self.tpu.counted}"


def parse(text: str) -> Topology:
    """The topology of ``KIND:AxB`` or ``KIND:AxBxC``. Raises UserError for one that cannot be booked."""
    kind, _, grid = text.partition(":")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", grid):
        raise UserError(f"--topology={text}: give a kind and a shape, as v5p:4x4x8, v5e:4x8 or h100:8x2")
    shape = tuple(map(int, grid.split("x")))
    if kind in TPUS:
        check_torus(text, TPUS[kind], shape)
    elif kind != "gpu" and not hardware.lookup(kind.upper()):
        raise UserError(
            f"--topology={text}: {kind!r} is not known; TPUs are {', '.join(TPUS)}, GPUs a100, h100, ... or "
            "just gpu"
        )
    elif len(shape) > 2:
        raise UserError(f"--topology={text}: of GPUs it is GPUs a node x nodes, as {kind}:8x2")
    return Topology(kind, shape if kind in TPUS else (*shape, 1)[:2])


def check_torus(text: str, tpu: Tpu, shape: tuple[int, ...]) -> None:
    """Raises UserError for a slice that is offered nowhere."""
    if tpu.axes == 2 and shape not in FLAT:
        offered = ", ".join("x".join(map(str, one)) for one in FLAT)
        raise UserError(f"--topology={text} is not offered; there are {offered}")
    cubes = len(shape) == 3 and list(shape) == sorted(shape) and all(size % 4 == 0 for size in shape)
    if tpu.axes == 3 and shape not in SMALL and not cubes:
        raise UserError(
            f"--topology={text} is not offered; there are 2x2x1, 2x2x2, 2x2x4, 2x4x4 and rising multiples of "
            "4, as 4x4x8"
        )
