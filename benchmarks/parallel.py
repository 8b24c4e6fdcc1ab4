"""Every mesh axis alone, in pairs and in threes, against one device; and what is sent, against the formula.

  python -m benchmarks.parallel

One step's loss and gradients, float32, packed rows, two micro-batches: dense and with experts, causal and
masked, on 8 simulated devices of 1, 2 and 4 processes. Then the recipes on 1, 2, 4 and 8 devices and in 2 and
4 processes: bytes that the compiled step sends, by the planner's least. Exits 1 unless all are within their
bounds. About 20 minutes on two cores. Writes benchmarks/results/parallel.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import jax
import numpy as np

from benchmarks import record
from llm_jax import flags, hosts
from llm_jax.data.batch import Batch
from llm_jax.hosts.find import Cluster
from llm_jax.mesh import AXES, MeshConfig, make_layout
from llm_jax.models.config import ModelConfig
from llm_jax.models.transformer import Transformer, init_params
from llm_jax.planning import collectives, compiled, plan
from llm_jax.planning.machine import Machine
from llm_jax.training import experiment, step
from llm_jax.training.state import State

DEVICES, ROWS, LENGTH, VOCAB = 8, 16, 64, 96
LOSS, GRADIENT = 1e-5, 1e-4  # relative; of a leaf's largest entry
BYTES = 1.1  # by the least
DENSE = ModelConfig(
    num_layers=8, model_dim=32, num_heads=8, mlp_dim=64, vocab_size=VOCAB, max_length=LENGTH, remat=True
)
MODELS = {
    "dense": DENSE,
    # Balance is asked of every part of a pipeline, as of every micro-batch: not the same loss.
    "experts": dataclasses.replace(DENSE, num_experts=8, mlp_dim=16, balance_loss=0.0),
    "masked": dataclasses.replace(
        DENSE, causal=False, positions="learnt", norm="layernorm", activation="gelu"
    ),
}
RECIPES = {  # {name: (changes of the config, mesh)}; -1 takes what is left
    "ddp": ({}, {"data": -1}),
    "fsdp": ({}, {"fsdp": -1}),
    "tp": ({}, {"tensor": -1}),
    "long_context": ({}, {"context": -1}),
    "moe": ({"model.num_experts": 8, "model.mlp_dim": 64}, {"expert": -1}),
    "pipeline": ({}, {"stage": -1}),
}


def cases() -> Iterator[tuple[str, dict[str, int]]]:
    """(model, mesh of 8 devices)."""
    axes = [axis for axis in AXES if axis != "expert"]
    for model, names in (("dense", axes), ("masked", axes), ("experts", list(AXES))):
        for axis in names:
            yield model, {axis: 8}
        yield from ((model, {"data": 2, "fsdp": 4, "zero": zero}) for zero in (1, 2))
        for one, two in itertools.combinations(names, 2):
            if model != "experts" or "expert" in (one, two):
                yield model, {one: 2, two: 4}
        for three in itertools.combinations(names, 3):
            if model == "dense" or (model == "experts" and "expert" in three):
                yield model, dict.fromkeys(three, 2)


def few() -> Iterator[tuple[str, dict[str, int]]]:
    """Those that several processes are tried on."""
    yield from (("dense", {axis: 8}) for axis in AXES if axis != "expert")
    yield "experts", {"fsdp": 2, "expert": 2, "tensor": 2}
    yield "dense", {"stage": 2, "fsdp": 2, "tensor": 2}
    yield "dense", {"data": 2, "fsdp": 2, "context": 2}
    yield "dense", {"data": 2, "fsdp": 4, "zero": 1}


def packed_batch(causal: bool) -> Batch:
    """Two micro-batches of rows whose documents end at odd places, the same everywhere."""
    draw = np.random.default_rng(0)
    tokens, targets = draw.integers(5, VOCAB, (2, ROWS, LENGTH), dtype=np.int32)
    segments = np.tile(np.repeat(np.arange(1, 6, dtype=np.int32), (9, 22, 14, 3, 16)), (ROWS, 1))
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    weights = (draw.random((ROWS, LENGTH)) < 2 / 3).astype(np.float32)
    batch = Batch(tokens, targets, weights, np.array(positions), segments)
    if not causal:
        predict = np.sort(np.argsort(-weights, axis=1, kind="stable")[:, :20], axis=1).astype(np.int32)
        kept = np.zeros_like(weights)
        np.put_along_axis(kept, predict, np.take_along_axis(weights, predict, 1), 1)
        batch = batch.replace(weights=kept, predict=predict)
    return jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), batch)


def gradients(name: str, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    """{"loss": ..., leaf: its gradient} of one step on this mesh, on the host of every process."""
    config = dataclasses.replace(MODELS[name], dtype="float32")
    count = int(np.prod([size for axis, size in sizes.items() if axis in AXES]))
    layout = make_layout(MeshConfig(**{axis: 1 for axis in AXES} | sizes), jax.devices()[:count])
    model, objective = Transformer(config, layout), experiment.OBJECTIVES["clm" if config.causal else "mlm"]()
    sharding = layout.named(None, "batch")

    def place(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    with jax.set_mesh(layout.mesh):
        params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))

        @jax.jit
        def compute(params: object, batch: Batch) -> object:
            weights = step.loss_weights(model, objective, batch)
            found = step.make_gradients(model, objective, 0)(State.create(params, ()), batch, weights)
            return jax.tree.map(lambda x: jax.sharding.reshard(x, jax.sharding.PartitionSpec()), found)

        means, grads = compute(params, jax.tree.map(place, packed_batch(config.causal)))
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    found = {jax.tree_util.keystr(path): np.asarray(x.addressable_data(0)) for path, x in leaves}
    return {"loss": np.asarray(means["loss"].addressable_data(0)), **found}


def sent(name: str, devices: int) -> dict[str, float]:
    """Bytes of a compiled step by the least, both over all kinds and axes. XLA's CPU compiler makes a
    reduce-scatter an all-reduce, which is counted as the half that it is asked for."""
    changes, mesh = RECIPES[name]
    shape = {
        "data.text": "python:docs",
        "data.sequence_length": LENGTH,
        "global_batch_size": ROWS,
        "evaluation.batch_size": ROWS,
        "model.num_layers": 8,
        "model.num_heads": 8,
        "model.model_dim": 128,
        "model.remat": True,
        "model.tied_head": False,
        "steps_per_dispatch": 1,
        **changes,
    }
    config = experiment.override(experiment.default_config(), {k: str(v) for k, v in shape.items()})
    made = experiment.complete(experiment.resolve(config, find_text=False), 512)
    made = dataclasses.replace(made, mesh=MeshConfig(**{axis: 1 for axis in AXES} | mesh))
    found = compiled.compile_plan(plan.make(made, Machine.parse(f"cpu:{devices}")))
    least = collectives.by_kind(found.needed)
    scattered = sum(sent for (kind, _), sent in least.items() if kind == "reduce-scatter")
    written = sum(
        sent for (kind, _), sent in found.compiled["collectives"].items() if kind == "reduce-scatter"
    )
    total = sum(found.compiled["collectives"].values()) - (scattered - written)
    return {"bytes": total, "least": sum(least.values())}


def work(folder: Path, devices: int, jobs: list) -> None:
    """One process of a world: does the jobs, and its first writes what came of them."""
    flags.add("cpu", flags.CPU | flags.CPU_DIVIDED)
    for number, (kind, *job) in enumerate(jobs):
        found = gradients(*job) if kind == "gradients" else sent(*job)
        if hosts.leads():
            np.savez(folder / f"{number}.npz", **found)
            print(f"{devices} devices of {hosts.count()} processes: {kind} {job}", flush=True)


def world(processes: int, devices: int, jobs: list) -> list[dict[str, np.ndarray]]:
    """What ``work`` finds on so many devices, dealt out over so many processes."""
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        server.close()
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
        place = {"folder": folder, "port": port, "processes": processes, "devices": devices, "jobs": jobs}
        command = [sys.executable, "-m", "benchmarks.parallel", "--part"]
        logs = [(Path(folder) / f"{i}.log").open("w+") for i in range(processes)]
        started = [
            subprocess.Popen([*command, json.dumps({**place, "index": i})], env=environment, stderr=log)
            for i, log in enumerate(logs)
        ]
        if any([process.wait() for process in started]):
            said = "\n".join(Path(log.name).read_text()[-2000:] for log in logs)
            sys.exit(f"{processes} processes of {devices} devices failed\n{said}")
        return [dict(np.load(Path(folder) / f"{number}.npz")) for number in range(len(jobs))]


def part(place: dict) -> None:
    """This process, as ``world`` started it."""
    jax.config.update("jax_num_cpu_devices", place["devices"] // place["processes"])
    cluster = Cluster(f"localhost:{place['port']}", place["processes"], place["index"], "benchmark")
    with hosts.connected(cluster) if place["processes"] > 1 else nullcontext():
        work(Path(place["folder"]), place["devices"], place["jobs"])


def compare(found: dict[str, np.ndarray], alone: dict[str, np.ndarray]) -> dict[str, float]:
    """The largest relative differences."""
    loss = float(abs(found["loss"] - alone["loss"]) / abs(alone["loss"]))
    worst = max(
        float(np.abs(found[leaf] - x).max() / max(np.abs(x).max(), 1e-30))
        for leaf, x in alone.items()
        if leaf != "loss"
    )
    return {"loss": loss, "gradient": worst}


def written(mesh: dict[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in mesh.items())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        return part(json.loads(args.part))
    alone = dict(zip(MODELS, world(1, 1, [("gradients", name, {}) for name in MODELS]), strict=True))
    equal, bytes_sent, good = [], [], True
    for processes, listed in ((1, list(cases())), (2, list(few())), (4, list(few()))):
        for (name, mesh), found in zip(
            listed, world(processes, DEVICES, [("gradients", *one) for one in listed]), strict=True
        ):
            row = {
                "processes": processes,
                "model": name,
                "mesh": written(mesh),
                **compare(found, alone[name]),
            }
            good &= row["loss"] <= LOSS and row["gradient"] <= GRADIENT
            equal.append(row)
    for processes, devices in ((1, 1), (1, 2), (1, 4), (1, 8), (2, 8), (4, 8)):
        for name, found in zip(
            RECIPES, world(processes, devices, [("sent", name, devices) for name in RECIPES]), strict=True
        ):
            row = {"processes": processes, "devices": devices, "recipe": name}
            row |= {key: float(value) for key, value in found.items()}
            good &= row["bytes"] <= BYTES * row["least"] + (devices > 1) * 100_000  # gains and norms
            bytes_sent.append(row)
            share = row["bytes"] / max(row["least"], 1.0)
            print(f"{devices} devices of {processes} processes, {name}: {share:.3f} of the least")
    worst = {key: max(row[key] for row in equal) for key in ("loss", "gradient")}
    print(f"{len(equal)} meshes: loss within {worst['loss']:.1e}, gradients within {worst['gradient']:.1e}")
    record.write(
        "parallel", record.environment("jax") | {"worst": worst, "equal": equal, "bytes": bytes_sent}
    )
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
