"""What a plan is for: ``v5p:4x4x8`` with slices, ``h100:8x2``, ``cpu:8``."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jax.sharding import AbstractDevice

from llm_jax import hardware
from llm_jax.errors import UserError
from llm_jax.hardware import Chip
from llm_jax.planning import launch_slices

DEVICES_PER_CHIP = {"tpu7x": 2}  # as jax counts them; one elsewhere


@dataclass(frozen=True)
class Machine:
    """devices: of all slices; shape: the torus of one, or (GPUs a node, nodes). chip: None for a CPU."""

    name: str
    devices: int
    slices: int
    shape: tuple[int, ...]
    chip: Chip | None

    @classmethod
    def parse(cls, topology: str, slices: int = 1) -> Machine:
        """Raises UserError for a topology that does not exist."""
        kind, _, count = topology.partition(":")
        if kind == "cpu":
            if not count.isdecimal() or slices > 1:
                raise UserError(f"--topology={topology}: of a CPU give the number of devices, as cpu:8")
            return cls(topology, int(count), 1, (int(count),), None)
        booked = launch_slices.parse(topology)
        chip = hardware.lookup(f"TPU {kind.removeprefix('tpu')}" if booked.tpu else kind.upper())
        devices = booked.chips * DEVICES_PER_CHIP.get(kind, 1) * slices
        return cls(topology, devices, slices, booked.shape, chip)

    @property
    def is_tpu(self) -> bool:
        return bool(self.chip and self.chip.torus)

    @property
    def device(self) -> AbstractDevice:
        """One of them, as jax speaks of a device that is not there."""
        kind, platform = self.name.partition(":")[0].upper(), "tpu" if self.is_tpu else "gpu"
        return AbstractDevice(kind, None, platform if self.chip else "cpu")

    def bandwidth(self, axes: tuple[str, ...], group: int, reach: int) -> float:
        """The most bytes/s that a device can send to a group along these mesh axes: of a torus, both ways
        along as many directions as the group must span; of GPUs, inside a node if the group's reach is. Wrap-
        around links are taken for granted, so that times made of it are lower bounds. 0 = not known."""
        if self.chip is None:
            return 0.0
        if "replica" in axes and self.slices > 1:
            return self.chip.network
        if not self.chip.torus:
            return self.chip.link if reach <= self.shape[0] else self.chip.network
        spanned = next(
            (n for n in range(1, len(self.shape)) if math.prod(sorted(self.shape)[-n:]) >= group),
            len(self.shape),
        )
        return 2 * self.chip.link * spanned
