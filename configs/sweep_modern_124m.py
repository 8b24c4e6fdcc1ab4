"""The modern preset against tuned AdamW at 124 M parameters and 0.26 M tokens a step, on one GPU.

  python scripts/sweep.py --config=configs/sweep_modern_124m.py:tune --workdir=runs/modern_124m_tune \\
      --config.data.text=corpus/
  python scripts/sweep.py --config=configs/sweep_modern_124m.py --workdir=runs/modern_124m \\
      --config.data.text=corpus/
  python -m benchmarks.modern_124m --tuned=runs/modern_124m_tune --sweep=runs/modern_124m

``tune``: GPT-2 small's baseline at four rates, 100 steps (26 M tokens). Then it at the best of them and the
preset at half of the steps, three seeds. Only this has been run, of Python source (95 MB, its own 50,304
pieces; H200, one seed): 4.531 nats at 1e-3 and 4.906 at 2e-3, the preset 3.291, and 4.076 at its 25th step
already. A step of the preset takes 1.14 times as long (582 to 509 ms): the baseline's loss in at most 0.29 of
its time. Those were single runs, with 0.135 of the memory.
"""

from pathlib import Path

from llm_jax import cli
from llm_jax.scaling.points import grid
from llm_jax.training.experiment import override
from llm_jax.training.presets import MODERN

STEPS = 100
SHORT = {
    "global_batch_size": 256,
    "accumulation": 16,
    "steps_per_dispatch": 5,
    "data.rows": "contiguous",
    "data.validation_fraction": 0.02,
    "tokenizer.sample_lines": 200_000,
    "model.scan_layers": False,
    "schedule.warmup_steps": 15,
    "evaluation.every": 25,
    "evaluation.batches": 43,
    "evaluation.batch_size": 16,
    "checkpoint.every": 50,
}


def get_config(arg=""):
    return override(cli.load_config(str(Path(__file__).with_name("gpt2_124m.py"))), SHORT)


def sweep(arg=""):
    if arg == "tune":
        return grid({"steps": (STEPS,), "optimizer.learning_rate": (3e-4, 6e-4, 1e-3, 2e-3)})
    baseline = {"steps": STEPS, "optimizer.learning_rate": 1e-3}
    preset = {"steps": STEPS // 2, "optimizer.learning_rate": 7e-3, **MODERN}
    return grid([baseline, preset], {"seed": (0, 1, 2)})
