"""A decoder that learns to write Python and its documentation, in three minutes on two cores.

  make quickstart

The text is what the running interpreter carries, so it differs between Python releases, and so does the
loss to expect.
"""

import sys

from llm_jax.training.experiment import default_config

# Final validation loss, nats a token: the range of three seeds on two cores, widened by 0.05 to both sides.
EXPECTED = {(3, 11): (3.31, 3.43), (3, 12): (3.10, 3.23), (3, 13): (3.25, 3.37)}


def get_config(arg=""):
    config = default_config(tokenizer="sentencepiece")
    config.steps = 600
    config.global_batch_size = 16
    config.steps_per_dispatch = 10
    config.expected_loss = EXPECTED.get(sys.version_info[:2], ())
    config.data.text = ("python:source", "python:docs")
    config.data.sequence_length = 128
    config.data.validation_fraction = 0.02
    config.tokenizer.vocab_size = 2048
    config.tokenizer.sample_lines = 50_000
    config.model.num_layers = 4
    config.model.model_dim = 128
    config.model.num_heads = 4
    config.model.scan_layers = False
    config.optimizer.learning_rate = 3e-3
    config.schedule.warmup_steps = 60
    config.evaluation.every = 200
    config.evaluation.batches = 40
    config.evaluation.batch_size = 32
    config.checkpoint.every = 200
    config.samples.prompt = "def main("
    config.samples.tokens = 120
    return config
