"""Compiles the training step of every shipped config on eight simulated devices; trains nothing.

  python benchmarks/compile_configs.py [NAME ...]

A config that compiles here has shapes that fit together on a mesh, with its own batch, sequence and remat;
how fast it is and whether it fits a chip is not shown. Writes benchmarks/results/compile_configs.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from pathlib import Path

import jax
import record

from llm_jax import cli
from llm_jax.planning import layout
from llm_jax.training import experiment
from llm_jax.training.program import Program

CONFIGS = record.HERE.parent / "configs"
DEVICES = 8


def compile_step(name: str) -> dict:
    """Parameters, seconds and bytes a device of one config's step."""
    config = cli.load_config(str(CONFIGS / f"{name}.py"))
    changes = {"data.text": ("python:docs",), "mesh.cpu_devices": DEVICES, "model.dtype": "bfloat16"}
    changes["mesh.fsdp"] = min(config.mesh.fsdp, DEVICES)  # a pod's
    e = experiment.resolve(experiment.override(config, changes))
    e = experiment.complete(e, getattr(e.tokenizer, "vocab_size", 128))
    if e.micro_batch % DEVICES:  # the character configs have batches for a laptop
        e = dataclasses.replace(e, global_batch_size=DEVICES * (e.accumulation or 1))
    program = Program.build(e, Path("not-read"))
    state, batch = program.abstract_state(), layout.batch(program, program.experiment.accumulation)
    start = time.perf_counter()
    with jax.set_mesh(program.layout.mesh):
        compiled = jax.jit(program.step_fn, donate_argnums=0).lower(state, batch).compile()
    memory = compiled.memory_analysis()
    return {
        "parameters": sum(math.prod(x.shape) for x in jax.tree.leaves(state.params)),
        "mesh": dict(program.layout.mesh.shape),
        "compile_seconds": round(time.perf_counter() - start, 1),
        "argument_bytes_a_device": memory.argument_size_in_bytes,
        "temporary_bytes_a_device": memory.temp_size_in_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="configs, default all")
    args = parser.parse_args()
    names = args.names or sorted(path.stem for path in CONFIGS.glob("*.py"))
    results = {}
    for name in names:
        results[name] = compile_step(name)
        print(f"{name}: {results[name]}", flush=True)
    if not args.names:
        result = record.environment("jax", "jaxlib", "flax", "optax")
        record.write("compile_configs", {**result, "devices": DEVICES, "configs": results})


if __name__ == "__main__":
    cli.main(main)
