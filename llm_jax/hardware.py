"""What one chip can do. Nothing else in the project knows a number of a chip."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """Peaks of one device as jax counts devices, from the vendor's data sheet.

    flops: dense bfloat16 FLOP/s; memory: bytes; bandwidth: bytes/s of that memory. link: bytes/s, one way, of
    a link to a neighbour, and torus: in how many directions there are two of them; torus 0 is a switch, and
    link what a device sends through it. network: bytes/s, one way, of a device's part of the network between
    slices or nodes. 0 = not known.
    """

    flops: float
    memory: float
    bandwidth: float
    link: float = 0.0
    torus: int = 0
    network: float = 0.0


# Matched against jax.Device.device_kind, first hit wins. TPU v3 has two jax devices a chip, TPU7x too;
# v4 to v6e have one (megacore). Dense, no sparsity. Links of TPUs: the bidirectional bandwidth a chip of
# cloud.google.com/tpu/docs by its 4 or 6 links and both ways; of GPUs: NVLink, and one network card each.
_CHIPS = (
    (r"TPU v3", Chip(61.5e12, 16e9, 450e9)),
    (r"TPU v4( lite|i)", Chip(138e12, 8e9, 614e9)),
    (r"TPU v4", Chip(275e12, 32e9, 1228e9, 50e9, 3)),
    (r"TPU v5( lite|e)", Chip(197e12, 16e9, 819e9, 50e9, 2, 3.1e9)),
    (r"TPU v5", Chip(459e12, 95e9, 2765e9, 100e9, 3, 6.2e9)),
    (r"TPU v6", Chip(918e12, 32e9, 1640e9, 100e9, 2, 12.5e9)),
    (r"TPU ?(v?7)", Chip(1153.5e12, 96e9, 3690e9, 100e9, 3, 6.2e9)),
    (r"V100", Chip(125e12, 32e9, 900e9, 150e9, 0, 12.5e9)),
    (r"A100.*80GB", Chip(312e12, 80e9, 2039e9, 300e9, 0, 25e9)),
    (r"A100", Chip(312e12, 40e9, 1555e9, 300e9, 0, 25e9)),
    (r"H100 PCIe", Chip(756e12, 80e9, 2000e9)),
    (r"H100", Chip(989e12, 80e9, 3350e9, 450e9, 0, 50e9)),
    (r"GH200", Chip(989e12, 96e9, 4000e9, 450e9, 0, 50e9)),
    (r"H200", Chip(989e12, 141e9, 4800e9, 450e9, 0, 50e9)),
)


def lookup(device_kind: str) -> Chip | None:
    """The chip behind ``jax.devices()[0].device_kind``; None for a CPU or an unknown device."""
    for pattern, chip in _CHIPS:
        if re.search(pattern, device_kind):
            return chip
    return None
