"""Eight simulated devices in one process, one compilation cache for the whole run."""

import os
import tempfile

import jax
from bucket import bucket, doors  # noqa: F401  fixtures

# What compiles fast; what is tested here does not depend on it. Optimisation level 0 halves the time of the
# model tests, loops not made through MLIR take another third (91 to 55 s of test_parallel.py's core time;
# jax 0.12 has no other way). Without MLIR, and in the order that favours concurrency, devices of a pipeline
# with experts met different collectives first, and waited for ever (log). Proofs about bits at full
# optimisation run in processes of their own.
FLAGS = {
    "xla_cpu_multi_thread_eigen": "false",
    "xla_backend_optimization_level": "0",
    "xla_cpu_enable_concurrency_optimized_scheduler": "false",
}
if jax.__version_info__ < (0, 11):
    FLAGS["xla_cpu_use_fusion_emitters"] = "false"
os.environ["XLA_FLAGS"] = " ".join(f"--{name}={value}" for name, value in FLAGS.items())

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
