"""llm_jax: language models in JAX, from text to a scaling law. See README.md for a map of the code."""

import time

BEGAN = time.time()  # seconds since 1970; no code of the project runs before
