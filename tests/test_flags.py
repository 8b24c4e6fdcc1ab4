"""Compiler flags: set once, never over what the user says, known to this jaxlib."""

import os
import subprocess
import sys

import pytest

from llm_jax import flags, mesh
from llm_jax.mesh import MeshConfig


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for variable in flags.VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)


def with_plugins(monkeypatch, libtpu=False, cuda=False):
    plugins = [flags.importlib.metadata.EntryPoint("xla_cuda13", "jax_plugins.xla_cuda13", "jax_plugins")]
    monkeypatch.setattr(flags.importlib.util, "find_spec", lambda name: libtpu and name == "libtpu")
    monkeypatch.setattr(flags.importlib.metadata, "entry_points", lambda group: plugins if cuda else [])


def test_a_flag_of_the_user_stays(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_b=7 --noxla_c --xla_dump_to=/d")
    flags.add("gpu", {"xla_a": "true", "xla_b": "true", "xla_c": "true"})
    flags.add("gpu", {"xla_a": "false"})
    assert os.environ["XLA_FLAGS"] == "--xla_b=7 --noxla_c --xla_dump_to=/d --xla_a=true"
    assert flags.describe("gpu") == f"flags: XLA_FLAGS={os.environ['XLA_FLAGS']!r}"
    assert flags.describe("tpu") == "flags: none"


def test_each_compiler_hears_its_own(monkeypatch):
    with_plugins(monkeypatch, libtpu=True, cuda=True)
    mesh.start(MeshConfig(cpu_devices=1), rows=1)
    assert len(os.environ["LIBTPU_INIT_ARGS"].split()) == len(flags.TPU)
    assert len(os.environ["XLA_FLAGS"].split()) == len(flags.GPU)


@pytest.mark.parametrize(
    "config", [MeshConfig(cpu_devices=1, overlap_flags=False), MeshConfig(cpu_devices=1)]
)
def test_none_where_none_is_asked_for_or_no_accelerator_is_there(config, monkeypatch):
    with_plugins(monkeypatch, libtpu=not config.overlap_flags)
    mesh.start(config, rows=1)
    assert not {*flags.VARIABLES.values()} & {*os.environ}


def test_this_jaxlib_knows_the_flags():
    """XLA ends a process at a flag that it does not know, and on a CPU it reads those for GPUs, too."""
    flags.add("gpu", flags.GPU | flags.CPU)
    process = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices('cpu')"],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-300:]
