"""llm_jax: language models in JAX, from text to a scaling law. See README.md for a map of the code."""
