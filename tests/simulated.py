"""Eight simulated devices in one process, one compilation cache for the whole run."""

import gc
import os
import tempfile
from importlib.metadata import version

import jax

from llm_jax import flags

# Optimisation level 0 halves the time of the model tests (36 s to 21 s), and loops without MLIR, which newer
# jaxlibs do not have, take a third of what is left; what is tested here depends on neither. Proofs about bits
# at full optimisation run in processes of their own.
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false --xla_backend_optimization_level=0"
AS_IN_A_RUN = {}  # options for a compiler to make loops as it does for a run
if version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
    AS_IN_A_RUN = {"xla_cpu_use_fusion_emitters": True}
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# The workers of one run share what they compile; the first process makes the directory and passes it on.
if "LLM_JAX_TESTS_CACHE" not in os.environ:
    os.environ["LLM_JAX_TESTS_CACHE"] = tempfile.mkdtemp(prefix="llm_jax_tests_")
jax.config.update("jax_compilation_cache_dir", os.environ["LLM_JAX_TESTS_CACHE"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
os.environ["XDG_CACHE_HOME"] = os.environ["LLM_JAX_TESTS_CACHE"]  # of the processes that tests start

flags.add_threads(8)
assert jax.device_count() == 8  # also starts the backend, so that no test changes its devices
del os.environ["PJRT_NPROC"]  # processes that tests start have devices of their own

# What tracing allocates lives on: looking it through for garbage every 700 objects was 5% of the time.
gc.freeze()
gc.set_threshold(200_000, 20, 20)
