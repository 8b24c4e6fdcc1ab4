"""A scaling law on two cores: three budgets, five sizes each, and a run of three times the last one foretold.

  python scripts/ladder.py --tier=cpu                              # the plan
  python scripts/ladder.py --tier=cpu --run --workdir=runs/ladder
  python scripts/ladder.py --tier=cpu:mlm --run --workdir=runs/ladder_mlm

Bytes of the Python source that the interpreter carries, rows of 128, four a step; the modern preset but for
value residuals. Muon's best rate is 0.01 from 25 thousand to 800 thousand parameters (docs/log.md), so it
stays.
"""

from llm_jax.scaling.ladder import Ladder, Shape
from llm_jax.scaling.recipes import Recipe
from llm_jax.training.experiment import default_config, override
from llm_jax.training.presets import MODERN

WIDTHS = (16, 32, 48, 64, 80, 96, 112, 128, 160, 192)
LAYERS = 3  # of all, so that sizes differ in one thing


def get_config(arg=""):
    config = override(
        default_config(tokenizer="byte", objective=arg or "clm"), MODERN | {"model.value_residual": False}
    )
    config.steps = 1000  # each run has its own
    config.global_batch_size = 4
    config.steps_per_dispatch = 10
    config.data.text = ("python:source",)
    config.data.sequence_length = 128
    config.data.validation_fraction = 0.02
    config.model.causal = arg != "mlm"
    config.model.vocab_size = 261
    config.model.scan_layers = False
    config.optimizer.learning_rate = 0.01
    config.schedule.warmup_steps = 40
    config.schedule.decay_share = 0.3
    config.evaluation.batch_size = 16
    config.samples.count = 0
    return config


def ladder(arg=""):
    return Ladder(
        shapes=tuple(Shape(width, LAYERS) for width in WIDTHS),
        head_dim=16,
        budgets=(3e11, 1e12, 3e12),
        held_out=9e12,
        first_params=9e4,
        recipe=Recipe(),
        machine="cpu",
        speed=4e10,
        overhead=10.0,
        workers=2,
        repeats=3,
    )
