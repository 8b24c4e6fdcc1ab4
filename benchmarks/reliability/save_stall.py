"""What a save costs a run: the wait for its arrays to be copied, and the slower steps while it is written.

  python -m benchmarks.reliability.save_stall

Trains on random tokens, which cost what others do. Rounds without and with one save, by turns; the save is
complete before its round ends. The median difference of the two is the cost, and its share of five minutes
is what a save every five minutes costs. Writes benchmarks/results/reliability_save_stall.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks import record
from llm_jax import cli
from llm_jax.data.batch import Batch
from llm_jax.training import experiment
from llm_jax.training.checkpoint import Checkpointer
from llm_jax.training.program import Program

ROOT = Path(__file__).resolve().parents[2]
EVERY_SECONDS = 300.0
VOCABULARY = 512
# {config: (rows, length, steps of a round)}; rounds of 20 s and more, so that a save fits in
CASES = {"quickstart": (32, 128, 150), "shakespeare_char_gpu": (8, 128, 40), "gpt2_124m": (2, 64, 25)}


def batch_of(program: Program) -> Batch:
    """One dispatch of random tokens on the devices."""
    e = program.experiment
    shape = (e.steps_per_dispatch, e.accumulation, e.micro_batch, e.data.sequence_length)
    tokens = np.random.default_rng(0).integers(5, e.model.vocab_size, shape, np.int32)
    ones = np.ones(shape, np.int32)
    places = np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape)
    batch = Batch(tokens, tokens, ones.astype(np.float32), places, ones)
    return jax.device_put(batch, program.layout.named(None, None, "batch"))


def build(name: str, rows: int, length: int) -> Program:
    """A shipped config at a small batch, without its text."""
    changes = {"data.text": "python:docs", "global_batch_size": str(rows), "accumulation": "1"}
    changes |= {"data.sequence_length": str(length), "steps_per_dispatch": "1"}
    config = experiment.override(cli.load_config(f"{ROOT}/configs/{name}.py"), changes)
    return Program.build(experiment.complete(experiment.resolve(config), VOCABULARY), Path("unused"))


def measure(program: Program, steps: int, rounds: int) -> dict:
    """Rounds of so many steps, with one save after the first step of every other."""
    state, batch = program.init(), batch_of(program)
    seconds = {"without": [], "with": []}
    stalls = []
    with tempfile.TemporaryDirectory() as directory:
        checkpointer = Checkpointer(Path(directory), keep=1)
        for number in range(rounds + 1):  # the first warms up
            for kind, times in seconds.items():
                jax.block_until_ready(state)
                began = time.perf_counter()
                for i in range(steps):
                    state, _ = program.steps(state, batch)
                    if i == 0 and kind == "with":
                        jax.block_until_ready(state)
                        saving = time.perf_counter()
                        checkpointer.save(number, state)
                        stalls.append(time.perf_counter() - saving)
                jax.block_until_ready(state)
                checkpointer.wait()
                times.append(time.perf_counter() - began)
        checkpointer.close()
    costs = [b - a for a, b in zip(seconds["without"][1:], seconds["with"][1:], strict=True)]
    return {
        "state_megabytes": round(sum(x.nbytes for x in jax.tree.leaves(state)) / 1e6, 1),
        "seconds_of_a_round": round(statistics.median(seconds["without"][1:]), 2),
        "stall_seconds": round(statistics.median(stalls[1:]), 3),
        "cost_seconds": round(statistics.median(costs), 2),
        "cost_seconds_spread": [round(min(costs), 2), round(max(costs), 2)],
        "share_of_five_minutes": round(statistics.median(costs) / EVERY_SECONDS, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    results = {}
    for name, (rows, length, steps) in CASES.items():
        results[name] = measure(build(name, rows, length), steps, args.rounds)
        print(name, results[name])
    environment = record.environment("jax", "orbax-checkpoint", "tensorstore")
    record.write("reliability_save_stall", environment | {"results": results})


if __name__ == "__main__":
    main()
