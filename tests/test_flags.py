"""Compiler flags: set once, never over what the user says, known to this jaxlib."""

import os
import subprocess
import sys

import jax
import pytest

from llm_jax import flags, hardware, mesh
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


@pytest.mark.parametrize("gpus", [1, 2])
def test_each_compiler_hears_its_own(gpus, monkeypatch):
    """A GPU alone has no collectives to hear of."""
    with_plugins(monkeypatch, libtpu=True, cuda=True)
    monkeypatch.setattr(hardware, "gpu_count", lambda: gpus)
    mesh.start(MeshConfig(cpu_devices=1), rows=1)
    assert len(os.environ["LIBTPU_INIT_ARGS"].split()) == len(flags.TPU)
    collectives = len(flags.GPU_OVERLAP) if gpus > 1 else 0
    assert len(os.environ["XLA_FLAGS"].split()) == len(flags.CPU) + len(flags.GPU) + collectives


def test_overlap_is_a_choice_and_how_a_gpu_multiplies_is_none(monkeypatch):
    with_plugins(monkeypatch, libtpu=True, cuda=True)
    monkeypatch.setattr(hardware, "gpu_count", lambda: 2)
    mesh.start(MeshConfig(cpu_devices=1, overlap_flags=False), rows=1)
    assert "LIBTPU_INIT_ARGS" not in os.environ
    assert len(os.environ["XLA_FLAGS"].split()) == len(flags.CPU) + len(flags.GPU)


@pytest.mark.parametrize(
    "config", [MeshConfig(cpu_devices=1, overlap_flags=False), MeshConfig(cpu_devices=1)]
)
def test_only_the_cpu_s_where_no_more_are_asked_for_or_no_accelerator_is_there(config, monkeypatch):
    with_plugins(monkeypatch, libtpu=not config.overlap_flags)
    mesh.start(config, rows=1)
    assert "LIBTPU_INIT_ARGS" not in os.environ
    assert os.environ["XLA_FLAGS"].split() == [f"--{name}={value}" for name, value in flags.CPU.items()]


def test_a_divided_cpu_has_products_on_one_core_each():
    mesh.start(MeshConfig(cpu_devices=2), rows=2)
    assert "--xla_cpu_multi_thread_eigen=false" in os.environ["XLA_FLAGS"].split()


@pytest.mark.parametrize("said", [{}, {"PJRT_NPROC": "5"}])
def test_more_devices_than_cores_have_threads_to_wait_with(said):
    """As many threads as devices may all be taken by collectives that wait for one another."""
    script = """
import os
from llm_jax import mesh
mesh._cores = lambda: 2
for count in (2, 8):
    mesh.start(mesh.MeshConfig(cpu_devices=count), rows=count)
    print(os.environ.get("PJRT_NPROC", "XLA's"))
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **said}
    process = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    two, eight = process.stdout.split()
    assert [two, eight] == ["5", "5"] if said else two == "XLA's" and int(eight) > 2 * 8


def test_this_jaxlib_knows_the_flags():
    """XLA ends a process at a flag that it does not know, and on a CPU it reads those for GPUs, too."""
    flags.add("gpu", flags.GPU | flags.GPU_OVERLAP | flags.CPU | flags.CPU_DIVIDED)
    process = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices('cpu')"],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-300:]


@pytest.fixture
def cache(monkeypatch):
    """What jax's cache is set to, put back afterwards."""
    names = [
        "jax_enable_compilation_cache",
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    ]
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield jax.config
    for name, value in before.items():
        jax.config.update(name, value)


def test_compiled_programs_are_kept(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    mesh.start(MeshConfig(cpu_devices=1), rows=1)
    assert cache.jax_compilation_cache_dir.startswith(str(tmp_path / "llm_jax" / "compiled"))
    assert cache.jax_persistent_cache_min_compile_time_secs == 0.0


@pytest.mark.parametrize("variable", ["XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"])
def test_programs_for_little_memory_are_kept_apart(variable, cache, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flags.keep_compiled()
    first = cache.jax_compilation_cache_dir
    cache.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv(variable, "0.1")
    flags.keep_compiled()
    assert cache.jax_compilation_cache_dir != first


def test_where_somebody_has_said_where_they_stay_there(cache, monkeypatch, tmp_path):
    cache.update("jax_compilation_cache_dir", "/elsewhere")
    flags.keep_compiled()
    assert cache.jax_compilation_cache_dir == "/elsewhere"
    cache.update("jax_compilation_cache_dir", None)
    cache.update("jax_enable_compilation_cache", False)
    flags.keep_compiled()
    assert cache.jax_compilation_cache_dir is None


def test_a_home_that_cannot_be_written_to_is_no_error(cache, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    flags.keep_compiled()
    assert cache.jax_compilation_cache_dir is None


@pytest.mark.slow
def test_a_damaged_program_is_compiled_anew(tmp_path):
    """The same program in three processes; what the first has kept is damaged before the last."""
    code = "import jax; from llm_jax import flags; flags.keep_compiled(); print(jax.jit(lambda x: x + 1)(2))"

    def run():
        env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)

    assert run().stdout == "3\n"
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and not path.name.endswith("-atime")]
    assert kept and run().stdout == "3\n"
    for path in kept:
        path.write_bytes(path.read_bytes()[:20])
    assert run().stdout == "3\n"
