"""Every model choice at a small size on real text, one seed each: none diverges, none is another in disguise.

  python benchmarks/choices_model.py --text=tinyshakespeare.txt

Two layers of width 64, context 64, batch 32, 400 steps of AdamW; decoders and encoders. Prints a table and
writes benchmarks/results/choices_model.json. A sanity check, not a comparison: one seed, one learning rate.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import record

from llm_jax import cli
from llm_jax.training import experiment
from llm_jax.training.program import Program

BASE = {
    "steps": 400,
    "global_batch_size": 32,
    "steps_per_dispatch": 20,
    "data.validation": "position",
    "data.markers": False,
    "data.rows": "contiguous",
    "model.scan_layers": False,
    "optimizer.learning_rate": 3e-3,
    "evaluation.batch_size": 64,
}
CHOICES = {
    "base (pre-norm, RMSNorm, rotary, SwiGLU, tied)": {},
    "post-norm": {"model.block": "postnorm"},
    "parallel": {"model.block": "parallel"},
    "LayerNorm": {"model.norm": "layernorm"},
    "embedding norm": {"model.embedding_norm": True},
    "learnt positions": {"model.positions": "learnt"},
    "sinusoidal": {"model.positions": "sinusoidal"},
    "ALiBi": {"model.positions": "alibi"},
    "no positions": {"model.positions": "none"},
    "GELU": {"model.activation": "gelu"},
    "GELU, tanh": {"model.activation": "gelu_tanh"},
    "GeGLU": {"model.activation": "geglu"},
    "ReLU^2": {"model.activation": "relu2"},
    "GQA, 2 groups": {"model.num_kv_heads": 2},
    "MQA": {"model.num_kv_heads": 1},
    "QK-norm": {"model.qk_norm": True},
    "biases": {"model.biases": True},
    "untied head": {"model.tied_head": False},
    "logit soft-cap 30": {"model.logit_softcap": 30.0},
    "attention soft-cap 50": {"model.attention_softcap": 50.0},
    "window 16": {"model.window": (16,)},
    "windows 16, all": {"model.window": (16, 0)},
    "windows, local base": {"model.window": (16, 0), "model.rotary_local_base": 1000.0},
    "dropout 0.1": {"model.dropout": 0.1},
    "stochastic depth 0.1": {"model.stochastic_depth": 0.1},
    "z-loss 1e-4": {"objective.z_loss": 1e-4},
    "label smoothing 0.1": {"objective.label_smoothing": 0.1},
}
ENCODERS = {
    "encoder": {},
    "encoder, post-norm": {"model.block": "postnorm"},
    "encoder, ALiBi": {"model.positions": "alibi"},
    "encoder, window 16": {"model.window": (16,)},
    "encoder, whole words": {"objective.unit": "word"},
    "encoder, n-grams to 3": {"objective.max_ngram": 3},
    "encoder, 30% masked": {"objective.mask_rate": 0.3},
}


def train(changes: dict, text: str, directory: Path) -> dict:
    """First training loss and last validation loss of one choice."""
    config = experiment.default_config(objective="mlm" if changes.pop("mlm", False) else "clm")
    e = experiment.resolve(experiment.override(config, BASE | {"data.text": (text,)} | changes))
    start = time.perf_counter()
    program = Program.prepare(e, directory, say=lambda _: None)
    state, losses = program.init(), []
    for batches in program.batches.iterate(0, e.steps // e.steps_per_dispatch):
        state, metrics = program.steps(state, batches)
        losses.append(metrics["loss"])
    return {
        "first_loss": float(losses[0][0]),
        "validation_loss": program.evaluate(state.params)["loss"],
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", default="python:docs", help="a text file, or python:docs")
    args = parser.parse_args()
    encoder = {"mlm": True, "model.causal": False}
    runs = CHOICES | {name: encoder | changes for name, changes in ENCODERS.items()}
    results: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as directory:
        for name, changes in runs.items():
            r = results[name] = train(dict(changes), args.text, Path(directory) / "data")
            print(
                f"{name:48} {r['first_loss']:.4f} -> {r['validation_loss']:.4f}  {r['seconds']} s", flush=True
            )
    losses = [r["validation_loss"] for r in results.values()]
    diverged = [name for name, r in results.items() if not r["validation_loss"] < r["first_loss"] - 0.5]
    equal = len(losses) - len(set(losses))
    print(f"{len(results)} choices; diverged: {diverged or 'none'}; equal to another: {equal}")
    record.write("choices_model", {**record.environment("jax", "flax", "optax"), "choices": results})
    sys.exit(1 if diverged or equal else 0)


if __name__ == "__main__":
    cli.main(main)
