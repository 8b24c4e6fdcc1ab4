"""What one chip can do. Nothing else in the project knows a number of a chip, but what XLA must be told of a
processor to compile for it (planning/gpu_target.py)."""

from __future__ import annotations

import ctypes
import os
import re
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from llm_jax.errors import UserError

TDP, MEASURED, POD = "TDP", "measured mean", "a chip's share of its pod's power"


@dataclass(frozen=True)
class Chip:
    """Peaks of one device as jax counts devices, from the vendor's data sheet.

    flops: dense bfloat16 FLOP/s; memory: bytes; bandwidth: bytes/s of that memory. link: bytes/s, one way, of
    a link to a neighbour, and torus: in how many directions there are two of them; torus 0 is a switch, and
    link what a device sends through it. network: bytes/s, one way, of a device's part of the network between
    slices or nodes. per_chip: how many such devices are one chip, as it is booked and paid for. watts: power
    of a chip, and watts_are: which power, TDP, MEASURED or POD. 0 = not known.
    """

    flops: float
    memory: float
    bandwidth: float
    link: float = 0.0
    torus: int = 0
    network: float = 0.0
    watts: float = 0.0
    watts_are: str = ""
    per_chip: int = 1


# Matched against jax.Device.device_kind, first hit wins. TPU v3 has two jax devices a chip, TPU7x too;
# v4 to v6e have one (megacore). Dense, no sparsity. Links of TPUs: the bidirectional bandwidth a chip of
# cloud.google.com/tpu/docs by its 4 or 6 links and both ways; of GPUs: NVLink, and one network card each.
# Power of GPUs: the most that the data sheet allows, of the SXM module but where PCIe is named (cards of V100
# and A100 draw 50 to 150 W less); of GH200 with its processor and memory. Of TPUs: the mean that Google
# measured on v3 and v4 (cloud.google.com/tpu/docs/v3, v4); of v5e, v5p and v6e it has published none. TPU7x:
# "nearly 10 MW" for a pod of 9,216 chips (blog.google, Ironwood, April 2025), so an upper bound.
_CHIPS = (
    (r"TPU v3", Chip(61.5e12, 16e9, 450e9, watts=220, watts_are=MEASURED, per_chip=2)),
    (r"TPU v4( lite|i)", Chip(138e12, 8e9, 614e9)),
    (r"TPU v4", Chip(275e12, 32e9, 1228e9, 50e9, 3, 0.0, 170, MEASURED)),
    (r"TPU v5( lite|e)", Chip(197e12, 16e9, 819e9, 50e9, 2, 3.1e9)),
    (r"TPU v5", Chip(459e12, 95e9, 2765e9, 100e9, 3, 6.2e9)),
    (r"TPU v6", Chip(918e12, 32e9, 1640e9, 100e9, 2, 12.5e9)),
    (r"TPU ?(v?7)", Chip(1153.5e12, 96e9, 3690e9, 100e9, 3, 6.2e9, 10e6 / 9216, POD, 2)),
    (r"V100", Chip(125e12, 32e9, 900e9, 150e9, 0, 12.5e9, 300, TDP)),
    (r"A100.*80GB", Chip(312e12, 80e9, 2039e9, 300e9, 0, 25e9, 400, TDP)),
    (r"A100", Chip(312e12, 40e9, 1555e9, 300e9, 0, 25e9, 400, TDP)),
    (r"H100 PCIe", Chip(756e12, 80e9, 2000e9, watts=350, watts_are=TDP)),
    (r"H100", Chip(989e12, 80e9, 3350e9, 450e9, 0, 50e9, 700, TDP)),
    (r"GH200", Chip(989e12, 96e9, 4000e9, 450e9, 0, 50e9, 1000, TDP)),
    (r"H200", Chip(989e12, 141e9, 4800e9, 450e9, 0, 50e9, 700, TDP)),
)


def lookup(device_kind: str) -> Chip | None:
    """The chip behind ``jax.devices()[0].device_kind``; None for a CPU or an unknown device."""
    for pattern, chip in _CHIPS:
        if re.search(pattern, device_kind):
            return chip
    return None


# What people call chips -> what jax calls their devices, and what Google's names of slices count of a chip:
# v4-128 is 128 TensorCores, two a chip; v6e-256 is 256 chips. By cloud.google.com/tpu/docs; that of tpu7x by
# GKE's TPU_ACCELERATOR_TYPE, which calls 4x4x4 chips tpu7x-128.
_TPUS = {
    "v3": ("TPU v3", 2),
    "v4": ("TPU v4", 2),
    "v5e": ("TPU v5e", 1),
    "v5litepod": ("TPU v5e", 1),
    "v5p": ("TPU v5p", 2),
    "v6e": ("TPU v6e", 1),
    "tpu7x": ("TPU7x", 2),
    "7x": ("TPU7x", 2),
}
_GPUS = re.compile(r"(GH200|H200|[VAH]100)([- ](SXM\d?|PCIE|\d+GB))*")


def named(name: str) -> tuple[Chip, int | None]:
    """The device meant by the name of a chip or of a TPU slice, and how many chips that is: ``H100`` and
    ``v5p`` leave it open (None); ``v4-128`` has 64, ``v6e-128`` and ``v5litepod-128`` have 128.

    Raises UserError for a name that is not known, and for half a chip.
    """
    kind, _, count = name.lower().rpartition("-")
    if not count.isdecimal():
        kind, count = name.lower(), ""
    gpu = _GPUS.fullmatch(name.upper())
    device, counted = _TPUS.get(kind, (name.upper().replace("-", " ").replace("PCIE", "PCIe"), 0))
    chip = lookup(device) if gpu or kind in _TPUS else None
    if chip is None:
        raise UserError(
            f"{name}: not a known chip; there are V100, A100, A100-80GB, H100, H100-PCIe, H200, GH200, "
            f"{', '.join(_TPUS)}, slices as v5p-256, and shapes as v5p:4x4x8 or H100:8"
        )
    if not count:
        return chip, None
    if not int(count) or int(count) % counted:
        raise UserError(f"{name}: such a name counts cores, {counted} a chip: {count} is no number of chips")
    return chip, int(count) // counted


def gpu_joules() -> float | None:
    """Energy that a GPU has used since the driver was loaded, the mean of all NVIDIA GPUs that this process
    may use: what a run used is a difference of two readings. None where there is no such GPU, or one (older
    than Volta, or cut by MIG) that does not say.

    From the driver's own library, without a package: NVML's nvmlDeviceGetTotalEnergyConsumption.
    """
    nvml, names = _gpus()
    total = 0
    for name in names:
        device, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
        if name.isdecimal():
            missing = nvml.nvmlDeviceGetHandleByIndex_v2(int(name), ctypes.byref(device))
        else:
            missing = nvml.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(device))
        if missing:
            return None
        if nvml.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(millijoules)):
            return None
        total += millijoules.value
    return total / 1e3 / len(names) if names else None


def gpu_count() -> int:
    """NVIDIA GPUs that this process may use, by their driver: known before jax asks for a device."""
    return len(_gpus()[1])


def _gpus() -> tuple[Any, list[str]]:
    """NVML, and the GPUs that it sees and CUDA_VISIBLE_DEVICES allows, by number or UUID; none without a
    driver."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None, []
    count = ctypes.c_uint()
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
        return None, []
    there = [str(index) for index in range(count.value)]
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(there)).split(",")

    def usable(name: str) -> bool:
        return name in there or name.startswith(("GPU-", "MIG-"))

    return nvml, list(takewhile(usable, map(str.strip, allowed)))  # CUDA, too, stops at what is none
