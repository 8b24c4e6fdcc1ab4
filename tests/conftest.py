"""Eight simulated devices in one process, one compilation cache for the whole run."""

import os
import tempfile

# Optimisation level 0 halves the time of the model tests (36 s to 21 s); what is tested here does not
# depend on it. Proofs about bits at full optimisation run in processes of their own.
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false --xla_backend_optimization_level=0"

import jax
from bucket import bucket, doors  # noqa: F401  fixtures

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# The workers of one run share what they compile; the first process makes the directory and passes it on.
if "LLM_JAX_TESTS_CACHE" not in os.environ:
    os.environ["LLM_JAX_TESTS_CACHE"] = tempfile.mkdtemp(prefix="llm_jax_tests_")
jax.config.update("jax_compilation_cache_dir", os.environ["LLM_JAX_TESTS_CACHE"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
os.environ["XDG_CACHE_HOME"] = os.environ["LLM_JAX_TESTS_CACHE"]  # of the processes that tests start

assert jax.device_count() == 8  # also starts the backend, so that no test changes its devices
