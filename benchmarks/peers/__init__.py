"""The same models in other frameworks, for the benchmarks to run against. llm_jax never imports them."""
