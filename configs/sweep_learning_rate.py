"""Six tiny decoders, of two widths at three learning rates each.

python scripts/sweep.py --config=configs/sweep_learning_rate.py --workdir=runs/learning_rate --workers=2

Validation losses on Python 3.11, in nats a character: 2.40, 2.03, 1.96 at width 32 and 2.07, 1.95, 2.24 at
width 64, so that the wider one wants the smaller rate. 3 minutes on two cores that were busy with other work.
"""

from llm_jax.scaling.points import grid
from llm_jax.training.experiment import default_config


def get_config(arg=""):
    config = default_config()
    config.steps = 200
    config.global_batch_size = 16
    config.steps_per_dispatch = 10
    config.evaluation.every = 100
    config.checkpoint.every = 100
    config.model.num_layers = 2
    config.model.num_heads = 2
    config.model.scan_layers = False
    config.schedule.warmup_steps = 20
    config.samples.prompt = "The "
    return config


def sweep(arg=""):
    return grid({"model.model_dim": (32, 64), "optimizer.learning_rate": (3e-3, 1e-2, 3e-2)})
