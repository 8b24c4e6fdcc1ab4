import jax
import pytest

from llm_jax.hardware import _CHIPS, lookup

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
