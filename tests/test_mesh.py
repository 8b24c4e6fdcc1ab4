"""How many devices a CPU is divided into, where nobody says it."""

import pytest

from llm_jax import flags, hosts, mesh


@pytest.mark.parametrize(
    ("cores", "processes", "rows", "devices"),
    [(2, 1, 12, 2), (2, 1, 9, 1), (4, 1, 6, 3), (8, 1, 12, 6), (8, 2, 12, 6), (4, 2, 6, 3), (2, 1, 1, 1)],
)
def test_cpu_devices_are_the_most_that_share_the_rows(cores, processes, rows, devices, monkeypatch):
    """The largest divisor of the rows of a process that its cores allow: no core waits for a row too many."""
    monkeypatch.setattr(mesh, "_cores", lambda: cores)
    monkeypatch.setattr(hosts, "count", lambda: processes)
    for variable in flags.VARIABLES.values():
        monkeypatch.setenv(variable, "")
    assert mesh.default_cpu_devices(rows) == devices
    assert mesh.start(mesh.MeshConfig(), rows).cpu_devices == devices
    assert mesh.start(mesh.MeshConfig(cpu_devices=1), rows).cpu_devices == 1
