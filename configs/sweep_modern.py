"""The modern preset and each part of it, against a GPT-2-like decoder with tuned AdamW: in how many tokens?

  python scripts/sweep.py --config=configs/sweep_modern.py:tune --workdir=runs/modern_tune --workers=2
  python scripts/sweep.py --config=configs/sweep_modern.py --workdir=runs/modern --workers=2
  python -m benchmarks.modern --tuned=runs/modern_tune --sweep=runs/modern

4 layers of width 128, rows of 128 characters, 32 of them a step, Python's own source. The baseline has 600
steps (2.5 M tokens), the preset 360, six tenths, and 180; its parts are left out, one after another, at 180.
Learning rates are near the best of ``tune``'s; what is left out leaves the rate as it is.
"""

from llm_jax.scaling.points import chain, grid
from llm_jax.training.experiment import default_config
from llm_jax.training.presets import MODERN

STEPS, FEWER, FEWEST = 600, 360, 180
BASELINE = {"steps": STEPS, "optimizer.learning_rate": 4e-3}
PRESET = {"steps": FEWER, "optimizer.learning_rate": 7e-3} | MODERN
# What a part is replaced by where it is left out.
WITHOUT = (
    {"model.positions": "learnt"},
    {"model.norm": "layernorm"},
    {"model.activation": "gelu"},
    {"model.qk_norm": False},
    {"model.zero_init": False},
    {"model.value_residual": False},
    {"model.tied_head": True},
    {"model.logit_softcap": 0.0},
    {"schedule.name": "cosine", "schedule.end_ratio": 0.1},
)


def get_config(arg=""):
    config = default_config()
    config.global_batch_size = 32
    config.steps_per_dispatch = 10
    config.data.text = ("python:source",)
    config.data.sequence_length = 128
    config.data.validation_fraction = 0.02
    config.model.num_layers = 4
    config.model.num_heads = 4
    config.model.model_dim = 128
    config.model.positions = "learnt"
    config.model.norm = "layernorm"
    config.model.activation = "gelu"
    config.model.init_std = 0.02
    config.model.scan_layers = False
    config.schedule.warmup_steps = 40
    config.evaluation.batches = 60
    config.evaluation.batch_size = 32
    config.samples.tokens = 10
    config.samples.prompt = "def main("
    return config


def sweep(arg=""):
    if arg == "tune":
        return chain(
            _rates(BASELINE, (2e-3, 4e-3, 8e-3, 1.6e-2)), _rates(PRESET, (2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2))
        )
    short = PRESET | {"steps": FEWEST}
    adamw = {key: value for key, value in short.items() if not key.startswith("optimizer.")}
    points = [
        BASELINE,
        PRESET,
        short,
        adamw | {"optimizer.learning_rate": BASELINE["optimizer.learning_rate"]},
        *(_without(short, part) for part in WITHOUT),
    ]
    return grid(points, {"seed": (0, 1, 2)})


def _rates(point, rates):
    return [point | {"optimizer.learning_rate": rate} for rate in rates]


def _without(point, part):
    """The point with a part replaced; another schedule has none of the old one's fields."""
    gone = "schedule." if "schedule.name" in part else "?"
    return {key: value for key, value in point.items() if not key.startswith(gone)} | part
