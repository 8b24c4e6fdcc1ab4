import ctypes

import jax
import pytest

from llm_jax.errors import UserError
from llm_jax.hardware import _CHIPS, gpu_count, gpu_joules, lookup, named

# What jax calls devices -> peak bfloat16 TFLOP/s and GB of memory, by the vendors' data sheets.
KINDS = {
    "TPU v3": (61.5, 16),
    "TPU v4": (275, 32),
    "TPU v4 lite": (138, 8),
    "TPU v5 lite": (197, 16),
    "TPU v5e": (197, 16),
    "TPU v5": (459, 95),
    "TPU v5p": (459, 95),
    "TPU v6 lite": (918, 32),
    "TPU7x": (1153.5, 96),
    "Tesla V100-SXM2-32GB": (125, 32),
    "NVIDIA A100-SXM4-40GB": (312, 40),
    "NVIDIA A100-SXM4-80GB": (312, 80),
    "NVIDIA A100 80GB PCIe": (312, 80),
    "NVIDIA H100 PCIe": (756, 80),
    "NVIDIA H100 80GB HBM3": (989, 80),
    "NVIDIA H200": (989, 141),
    "NVIDIA GH200 480GB": (989, 96),
}


@pytest.mark.parametrize("kind", KINDS)
def test_known_chips(kind):
    chip = lookup(kind)
    assert (chip.flops / 1e12, chip.memory / 1e9) == KINDS[kind]


@pytest.mark.parametrize("kind", ["cpu", "", "NVIDIA H20", "NVIDIA GeForce RTX 4090", "TPU", "AMD MI300X"])
def test_unknown_chip_has_no_numbers(kind):
    assert lookup(kind) is None


def test_this_cpu_is_no_chip():
    assert lookup(jax.devices("cpu")[0].device_kind) is None


def test_every_entry_is_reached_and_in_its_units():
    """A slip of a thousand in any number leaves the range of real FLOPs per byte."""
    assert {lookup(kind) for kind in KINDS} == {chip for _, chip in _CHIPS}
    for pattern, chip in _CHIPS:
        assert 100 < chip.flops / chip.bandwidth < 600, pattern
        assert 2e12 < chip.flops / (chip.memory / 1e9) < 50e12, pattern


# Names of chips and slices -> peak bfloat16 TFLOP/s of a chip, chips, by the vendors' tables.
NAMES = {
    "V100": (125, None),
    "A100": (312, None),
    "a100-80GB": (312, None),
    "H100": (989, None),
    "H100-PCIe": (756, None),
    "h200": (989, None),
    "v3": (123, None),
    "v3-32": (123, 16),
    "v4-128": (275, 64),
    "v5p-256": (459, 128),
    "v5litepod-16": (197, 16),
    "v5e-16": (197, 16),
    "v6e-256": (918, 256),
    "tpu7x-128": (2307, 64),
    "7x": (2307, None),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_chips_and_slices(name):
    chip, chips = named(name)
    assert (chip.flops * chip.per_chip / 1e12, chips) == NAMES[name]


@pytest.mark.parametrize(
    "name", ["", "v5", "v2-8", "H100-8", "RTX4090", "v4-", "xH100", "H1000", "v4-0", "v5p-7"]
)
def test_names_that_mean_nothing(name):
    with pytest.raises(UserError, match=f"^{name}: "):
        named(name)


def test_power_says_what_it_is():
    """A slip of a thousand leaves the range of real FLOPs per joule; no number stands without its kind."""
    for pattern, chip in _CHIPS:
        assert bool(chip.watts) == bool(chip.watts_are), pattern
        assert chip.watts == 0 or 0.3e12 < chip.flops * chip.per_chip / chip.watts < 3e12, pattern
    assert not named("v5p")[0].watts  # Google has published none: a number here must come with its source


class Driver:
    """Stands in for NVML: GPUs whose counters are given, in millijoules; None = not supported."""

    def __init__(self, *millijoules):
        self.millijoules = millijoules

    def nvmlInit_v2(self):
        return 0

    def nvmlDeviceGetCount_v2(self, count):
        count._obj.value = len(self.millijoules)
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index, device):
        device._obj.value = index + 1
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, device, energy):
        energy._obj.value = self.millijoules[device.value - 1] or 0
        return 3 if self.millijoules[device.value - 1] is None else 0

    def nvmlDeviceGetHandleByUUID(self, name, device):
        device._obj.value = int(name.removeprefix(b"GPU-")) + 1
        return 0


@pytest.mark.parametrize(
    ("visible", "count", "joules"),
    [("1", 1, 7.0), ("2, 0", 2, 5.0), ("GPU-1", 1, 7.0), ("", 0, None), ("-1", 0, None), ("0,9,1", 1, 2.0)],
)
def test_only_gpus_that_the_process_may_use_count(visible, count, joules, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(2000, 7000, 8000))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_count() == count and gpu_joules() == joules


@pytest.mark.parametrize(
    "driver, joules", [(Driver(2000, 5500), 3.75), (Driver(), None), (Driver(2000, None), None)]
)
def test_energy_of_gpus_is_their_mean_or_not_known(driver, joules, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    assert gpu_joules() == joules


def test_no_driver_no_energy(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert gpu_joules() is None
