"""A scaling law on one H200 in half an hour: four budgets, six sizes each, and three times the last foretold.

  python scripts/ladder.py --tier=gpu                              # the plan
  python scripts/ladder.py --tier=gpu --run --workdir=runs/ladder --config.data.text=corpus/

The shapes, budgets and seeds of the plan; rows of 512 tokens of a vocabulary of 8,192, the modern preset.
Not run yet: 1e14 FLOP/s is assumed, and so is the rate. The text that Python carries has 3 million tokens,
which the larger runs would read thirty times over: give it a corpus (the table has unique_tokens).
"""

from llm_jax.scaling.ladder import Ladder, Shape
from llm_jax.scaling.recipes import Recipe
from llm_jax.training.experiment import default_config, override
from llm_jax.training.presets import MODERN

SHAPES = ((64, 3), (128, 3), (160, 4), (192, 4), (256, 5), (320, 6), (384, 7), (512, 8), (640, 9))


def get_config(arg=""):
    config = override(default_config(tokenizer="sentencepiece"), MODERN | {"model.value_residual": False})
    config.steps = 1000  # each run has its own
    config.global_batch_size = 32
    config.steps_per_dispatch = 20
    config.data.text = ("python:source", "python:docs")
    config.data.sequence_length = 512
    config.data.validation_fraction = 0.02
    config.tokenizer.vocab_size = 8192
    config.model.vocab_size = 8192
    config.optimizer.learning_rate = 0.01
    config.schedule.warmup_steps = 100
    config.schedule.decay_share = 0.3
    config.samples.count = 0
    return config


def ladder(arg=""):
    return Ladder(
        shapes=tuple(Shape(*shape) for shape in SHAPES),
        head_dim=64,
        budgets=(3e14, 1e15, 3e15, 1e16),
        held_out=3e16,
        first_params=4e6,
        recipe=Recipe(),
        machine="H200",
        speed=1e14,
        overhead=20.0,
        sizes=6,
        fewest_steps=300,
        repeats=3,
    )
