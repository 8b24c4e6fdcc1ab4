"""Eight simulated devices in one process, one compilation cache for the whole run."""

import os
import tempfile

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp(prefix="llm_jax_tests_"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

assert jax.device_count() == 8  # also starts the backend, so that no test changes its devices
