"""llm_jax against PyTorch from equal weights on equal batches: gradients, then every loss of 50 steps.

  python -m benchmarks.parity --text=tinyshakespeare.txt
  python -m benchmarks.parity --write-fixtures

Needs torch. The first form writes benchmarks/results/parity.json and exits 1 when a tolerance is passed;
the second writes tests/fixtures/parity_*.npz, which hold tests/test_parity.py to PyTorch without torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

from benchmarks import record
from benchmarks.peers import torch_transformer as peer
from llm_jax import cli, mesh
from llm_jax.data.batch import Batch, Rows
from llm_jax.models import transformer
from llm_jax.models.config import ModelConfig
from llm_jax.objectives.clm import CLM
from llm_jax.objectives.mlm import MLM
from llm_jax.text.tokenizers import FIRST_TEXT_ID
from llm_jax.text.words import Vocabulary
from llm_jax.training import experiment as experiments
from llm_jax.training import step
from llm_jax.training.experiment import Experiment
from llm_jax.training.optimizers import AdamW
from llm_jax.training.program import Program
from llm_jax.training.schedules import WarmupCosine

ROOT = record.HERE.parent
CONFIGS = {"clm": "configs/shakespeare_char_cpu.py", "mlm": "configs/bert_char.py"}
TOLERANCE = 1e-4  # of a loss, in nats; of a gradient, as a share of the largest entry of its parameter


# ---- both sides -----------------------------------------------------------------------------


def torch_run(e: Experiment, params: dict, batches: list[Batch], steps: int) -> dict[str, Any]:
    """Hidden states and gradients of the first batch, and the losses of ``steps`` steps over ``batches``
    from ``params``, a nested dict of numpy. e: complete; batches are numpy [rows, length]."""
    model = peer.Transformer(e.model)
    peer.load(model, params)
    optimizer = peer.adamw(model, e.optimizer)
    out: dict[str, Any] = {"losses": []}
    for i in range(steps):
        inputs, targets, weights, positions, segments = _tensors(batches[i % len(batches)])
        hidden = model(inputs, positions, segments)
        loss = peer.mean_loss(model.logits(hidden), targets, weights)
        if i == 0:
            loss.backward(retain_graph=True)  # update clips the gradients it makes; these are whole
            out["hidden"], out["gradients"] = hidden.detach().numpy(), peer.gradients(model)
        s, peak = e.schedule, e.optimizer.learning_rate
        rate = peer.learning_rate(i, peak, s.warmup_steps, s.end_ratio, e.steps)
        peer.update(optimizer, loss, rate, e.optimizer.clip_norm)
        out["losses"].append(loss.item())
    return out


def _tensors(batch: Batch) -> list[torch.Tensor]:
    arrays = (batch.inputs, batch.targets, batch.weights, batch.positions, batch.segments)
    return [torch.tensor(a if a.dtype == np.float32 else a.astype(np.int64)) for a in arrays]


def jax_run(program: Program, steps: int) -> dict[str, Any]:
    """The same from llm_jax's own training path, and the weights and batches that it began with."""
    state, objective = program.init(), program.experiment.objective
    losses = step.make_losses(program.model, objective)

    def loss(params: Any, batch: Batch) -> jax.Array:
        batch = jax.tree.map(lambda x: x.squeeze((0, 1)), batch)
        return losses(params, batch, objective.weights(batch), None)["loss"]

    # Copies: the first step is given the state's memory.
    out: dict[str, Any] = {"params": jax.tree.map(np.array, state.params), "batches": [], "losses": []}
    with jax.set_mesh(program.layout.mesh):
        gradients = jax.jit(jax.grad(loss))(state.params, program.batches[0])
        out["gradients"] = peer.flatten(jax.tree.map(np.array, gradients))
    for i in range(steps):
        batch = program.batches[i]
        out["batches"].append(jax.tree.map(lambda x: np.array(x)[0, 0], batch))
        state, metrics = program.steps(state, batch)
        out["losses"].append(float(metrics["loss"][0]))
    return out


# ---- parity ---------------------------------------------------------------------------------


def shortened(e: Experiment, steps: int) -> Experiment:
    """With the schedule pressed into ``steps``, so that all of it is passed, one step at a time."""
    return dataclasses.replace(
        e,
        steps=steps,
        steps_per_dispatch=1,
        schedule=dataclasses.replace(e.schedule, warmup_steps=steps // 5),
        evaluation=dataclasses.replace(e.evaluation, every=0),
        checkpoint=dataclasses.replace(e.checkpoint, every=0),
    )


def compare(e: Experiment, steps: int, directory: Path, tolerance: float = TOLERANCE) -> dict[str, Any]:
    """Differences of one experiment, resolved, over ``steps`` steps; shards go to ``directory``."""
    e = shortened(e, steps)
    program = Program.prepare(e, directory, say=lambda _: None)
    ours = jax_run(program, steps)
    theirs = torch_run(program.experiment, ours["params"], ours["batches"], steps)
    by_leaf = {
        name: float(np.abs(ours["gradients"][name] - g).max() / np.abs(g).max())
        for name, g in theirs["gradients"].items()
    }
    worst = max(by_leaf, key=by_leaf.get)
    loss_differences = np.abs(np.subtract(ours["losses"], theirs["losses"]))
    return {
        "steps": steps,
        "vocab_size": program.experiment.model.vocab_size,
        "parameters": sum(g.size for g in theirs["gradients"].values()),
        "max_gradient_difference": by_leaf[worst],
        "worst_gradient": worst,
        "gradient_differences": by_leaf,
        "max_loss_difference": float(loss_differences.max()),
        "worst_loss_step": int(loss_differences.argmax()),
        "first_loss": [ours["losses"][0], theirs["losses"][0]],
        "last_loss": [ours["losses"][-1], theirs["losses"][-1]],
        "passed": bool(max(by_leaf[worst], loss_differences.max()) < tolerance),
        "tolerance": tolerance,
    }


def parity(text: str, steps: int) -> bool:
    """Compares all configs, prints and writes the result."""
    result: dict[str, Any] = {"tolerance": TOLERANCE, **record.environment("torch", "jax", "jaxlib", "numpy")}
    with tempfile.TemporaryDirectory() as directory:
        for name, config_file in CONFIGS.items():
            start = time.perf_counter()
            config = experiments.override(cli.load_config(str(ROOT / config_file)), {"data.text": (text,)})
            found = compare(experiments.resolve(config), steps, Path(directory) / "data")
            r = result[name] = {"config": config_file} | found
            print(
                f"{name}: gradients within {r['max_gradient_difference']:.1e} of their largest entry "
                f"({r['worst_gradient']}), {steps} losses within {r['max_loss_difference']:.1e} "
                f"({r['first_loss'][0]:.4f} to {r['last_loss'][0]:.4f}): "
                f"{'pass' if r['passed'] else 'FAIL'} at {TOLERANCE:g}, "
                f"{time.perf_counter() - start:.0f} s"
            )
    record.write("parity", result)
    return all(result[name]["passed"] for name in CONFIGS)


# ---- fixtures -------------------------------------------------------------------------------

TINY = {"num_layers": 2, "model_dim": 32, "num_heads": 2, "vocab_size": 60, "max_length": 16}
# Every value that a model can have stands in one of the two, written out: defaults may change.
DECODER = {
    "causal": True,
    "positions": "rotary",
    "norm": "rmsnorm",
    "activation": "swiglu",
    "num_kv_heads": 1,
}
ENCODER = {"causal": False, "positions": "learnt", "norm": "layernorm", "activation": "gelu"}
FIXTURES = {"parity_clm": (DECODER, CLM()), "parity_mlm": (ENCODER, MLM())}
FIXTURE_STEPS = 20
FIXTURE_BATCHES = 4


def fixture(kind: dict[str, Any], objective: Any) -> dict[str, np.ndarray]:
    """A tiny model, its batches, and what PyTorch makes of them."""
    rng = np.random.default_rng(0)
    e = Experiment(
        steps=FIXTURE_STEPS,
        model=ModelConfig(**TINY, **kind, rotary_base=10000.0, dtype="float32"),
        objective=objective,
        optimizer=AdamW(1e-2, beta1=0.9, beta2=0.99, epsilon=1e-8, weight_decay=0.1, clip_norm=1.0),
        schedule=WarmupCosine(warmup_steps=5, end_ratio=0.1),
    )
    no_words = np.zeros(e.model.vocab_size, bool)
    vocabulary = Vocabulary(e.model.vocab_size, no_words, no_words)
    batches = []
    for i in range(FIXTURE_BATCHES):
        rows, draws = packed_rows(rng, 4, e.model.max_length, e.model.vocab_size), np.arange(4) + 4 * i
        batches.append(objective.to_batch(rows, draws, seed=0, vocabulary=vocabulary))
    params = initial_weights(e.model, rng)
    theirs = torch_run(e, params, batches, FIXTURE_STEPS)
    sections = {name: dataclasses.asdict(getattr(e, name)) for name in ("model", "optimizer", "schedule")}
    sections["optimizer"].pop("rules")
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
    return {
        "config": np.array(json.dumps(sections | {"steps": e.steps})),
        **{f"params/{name}": x for name, x in peer.flatten(params).items()},
        **{f"batches/{name}": x for name, x in vars(stacked).items() if x is not None},
        "hidden": theirs["hidden"],
        **{f"gradients/{name}": x for name, x in theirs["gradients"].items()},
        "losses": np.array(theirs["losses"], np.float32),
    }


def initial_weights(c: ModelConfig, rng: np.random.Generator) -> dict:
    """llm_jax's initialiser, with gains moved off 1: equal gains would hide that two are swapped."""
    layout = mesh.make_layout(mesh.MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(layout.mesh):
        params = transformer.init_params(transformer.Transformer(c, layout), jax.random.key(0))

    def move(path: tuple, x: jax.Array) -> np.ndarray:
        gain = path[-1].key == "scale"
        return np.array(x) + (0.1 * rng.standard_normal(x.shape, np.float32) if gain else 0.0)

    return jax.tree_util.tree_map_with_path(move, params)


def packed_rows(rng: np.random.Generator, rows: int, length: int, vocab_size: int) -> Rows:
    """Three documents of 3 to 5 tokens a row, then padding."""
    shape = (rows, length + 1)
    tokens, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
    for row in range(rows):
        start = 0
        for segment, size in enumerate(rng.integers(3, 6, 3), start=1):
            here = slice(start, start + size)
            tokens[row, here] = rng.integers(FIRST_TEXT_ID, vocab_size, size)
            segments[row, here], positions[row, here] = segment, np.arange(size)
            start += size
    return Rows(tokens, segments, positions)


def write_fixtures() -> None:
    for name, (kind, objective) in FIXTURES.items():
        path = ROOT / "tests" / "fixtures" / f"{name}.npz"
        path.parent.mkdir(exist_ok=True)
        content = fixture(kind, objective)
        np.savez_compressed(path, **content)
        size, losses = path.stat().st_size / 1000, content["losses"]
        print(f"written: {path.relative_to(ROOT)}, {size:.0f} kB, loss {losses[0]:.3f} to {losses[-1]:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", help="a text file to train on")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--write-fixtures", action="store_true", help="write tests/fixtures/ as well")
    args = parser.parse_args()
    if not args.text and not args.write_fixtures:
        parser.error("give --text, --write-fixtures or both")
    passed = parity(args.text, args.steps) if args.text else True
    if args.write_fixtures:
        write_fixtures()
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    cli.main(main)
