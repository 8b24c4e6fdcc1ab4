"""A scaling law on 128 chips of TPU v5p in a day: five budgets, seven sizes each, and 1e21 FLOPs foretold.

  python scripts/ladder.py --tier=pod --price=4.2                  # the plan
  python -m benchmarks.tpu_plans --only=ladder_pod_held_out        # compiled for the chips, with none
  python scripts/ladder.py --tier=pod --run --workdir=gs://... --config.data.text=corpus/

Rows of 2,048 tokens of a vocabulary of 32,768, the modern preset. Planned and compiled, not run: 45% MFU is
assumed, and so is the rate, with (T0/T)^0.3 between horizons.
"""

from llm_jax.scaling.ladder import Ladder, Shape
from llm_jax.scaling.recipes import Recipe
from llm_jax.training.experiment import default_config, override
from llm_jax.training.presets import MODERN

WIDTHS = (512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048, 2560)
LAYERS = (8, 9, 10, 12, 14, 16, 20, 24, 26, 32)
SPEED = 128 * 459e12 * 0.45  # chips, peak, MFU


def get_config(arg=""):
    config = override(default_config(tokenizer="sentencepiece"), MODERN | {"model.value_residual": False})
    config.steps = 1000  # each run has its own
    config.global_batch_size = 512
    config.steps_per_dispatch = 10
    config.data.text = ("corpus/",)
    config.data.sequence_length = 2048
    config.data.validation_fraction = 0.001
    config.tokenizer.vocab_size = 32_768
    config.tokenizer.sample_lines = 5_000_000
    config.model.vocab_size = 32_768
    config.optimizer.learning_rate = 0.01
    config.schedule.warmup_steps = 200
    config.schedule.decay_share = 0.2
    config.mesh.recipe = "fsdp"
    config.evaluation.batches = 20
    config.checkpoint.every = 500
    config.samples.count = 0
    return config


def ladder(arg=""):
    return Ladder(
        shapes=tuple(Shape(*shape) for shape in zip(WIDTHS, LAYERS, strict=True)),
        head_dim=64,
        budgets=(1e18, 3e18, 1e19, 3e19, 1e20),
        held_out=1e21,
        first_params=1e8,
        recipe=Recipe(tuned_tokens=3e9),
        machine="v5p:4x4x8",
        speed=SPEED,
        overhead=180.0,
        sizes=7,
        repeats=3,
    )
