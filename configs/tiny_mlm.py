"""A tiny encoder on the documentation text that Python carries: for tests, and to edit.

python scripts/train.py --config=configs/tiny_mlm.py --workdir=runs/tiny_mlm
"""

from llm_jax.training.experiment import default_config


def get_config(arg=""):
    config = default_config(objective="mlm")
    config.steps = 100
    config.global_batch_size = 16
    config.steps_per_dispatch = 10
    config.evaluation.every = 50
    config.checkpoint.every = 50
    config.model.causal = False
    config.model.num_layers = 2
    config.model.model_dim = 32
    config.model.num_heads = 2
    config.model.scan_layers = False
    config.samples.prompt = "the val<mask>e of the express<mask>on"
    return config
