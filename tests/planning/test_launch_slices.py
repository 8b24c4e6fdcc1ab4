"""What slices are called, and how many machines they have."""

import pytest

from llm_jax.planning.launch_slices import FLAT, parse


@pytest.mark.parametrize(
    "text, accelerator_type, hosts, a_host",
    [
        ("v5p:4x4x8", "v5p-256", 32, 4),
        ("v5p:2x2x1", "v5p-8", 1, 4),
        ("v4:2x2x2", "v4-16", 2, 4),
        ("v5e:1x1", "v5litepod-1", 1, 1),
        ("v5e:2x4", "v5litepod-8", 1, 8),
        ("v5e:4x8", "v5litepod-32", 8, 4),
        ("v6e:16x16", "v6e-256", 64, 4),
    ],
)
def test_names_and_hosts_of_a_slice(text, accelerator_type, hosts, a_host):
    """By the vendor's tables: v5p-256 is 128 chips in 32 machines; 8 chips of v5e or v6e are one machine."""
    found = parse(text)
    assert (found.accelerator_type, found.hosts, found.chips_per_host) == (accelerator_type, hosts, a_host)
    assert str(found) == text


def test_hosts_make_up_the_slice():
    for kind in ("v5e", "v6e"):
        for shape in FLAT:
            found = parse(f"{kind}:{'x'.join(map(str, shape))}")
            assert found.hosts * found.chips_per_host == found.chips
    assert parse("tpu7x:4x4x4").hosts == 16 and parse("h100:8x2").hosts == 2 and parse("gpu:1").hosts == 1
