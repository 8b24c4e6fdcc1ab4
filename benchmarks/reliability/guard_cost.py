"""What the guard costs: the compiled training step with it, against the same step without it.

  python -m benchmarks.reliability.guard_cost

Without it: its judgement is replaced by "always applied", and XLA removes what followed from it. Of both:
collectives by kind and transfers to the host, counted in the compiled program; bytes accessed and FLOPs, as
XLA's cost analysis has them (layers unrolled, so that loops are counted whole); the wall time of steps made
by turns, its ratio by pairs with the 10th and 90th percentile. 2,048 tokens a step, so that the parameters
matter more than in any real training. Exits 1 if anything is added but 0.5% of bytes and of FLOPs. Writes
benchmarks/results/reliability_guard_cost.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import record
from llm_jax.data.batch import Batch
from llm_jax.mesh import MeshConfig, make_layout, start
from llm_jax.models.config import ModelConfig
from llm_jax.models.transformer import Transformer, init_params
from llm_jax.objectives.clm import CLM
from llm_jax.training import optimizers, step
from llm_jax.training.guard import GuardConfig, Verdict
from llm_jax.training.schedules import WarmupCosine
from llm_jax.training.state import State

MESHES = [(1, 1, 1), (8, 1, 1), (2, 2, 2)]
GUARDS = {"finite": GuardConfig(), "6 sigma": GuardConfig(sigma=6.0)}
MODEL = ModelConfig(
    num_layers=2,
    model_dim=256,
    num_heads=4,
    vocab_size=4096,
    max_length=256,
    dtype="float32",
    scan_layers=False,
)
ROWS = 8
MOST = 0.005  # of bytes and FLOPs
COLLECTIVES = re.compile(
    r"\b(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast)(?:-start)?\("
)
HOST = re.compile(r"\b(infeed|outfeed|send|recv)\(|custom_call_target=\"[^\"]*callback|S\(5\)")


def no_judgement(self, old, loss, grad_norm, scale) -> Verdict:
    """Instead of GuardConfig.judge: every step is applied."""
    always = jnp.bool_(True)
    return Verdict(always, always, old, {"skipped": jnp.float32(0.0)})


def compile_step(mesh: tuple[int, int, int], guard: GuardConfig) -> tuple[Callable, State, Batch]:
    """(compiled step, its first state, a batch), with AdamW, clipping and a running mean."""
    devices = jax.devices()[: int(np.prod(mesh))]
    layout = make_layout(MeshConfig(*mesh), devices)
    model = Transformer(MODEL, layout)
    optimizer = optimizers.build(optimizers.AdamW(), WarmupCosine().build(1e-3, 1000))
    with jax.set_mesh(layout.mesh):

        def create(key: jax.Array) -> State:
            params = init_params(model, key)
            return State.create(params, optimizer.transformation.init(params), guard.create(), ema=True)

        state = jax.jit(create)(jax.random.key(0))
        draw = np.random.default_rng(0)
        shape = (1, ROWS, MODEL.max_length)
        tokens = draw.integers(0, MODEL.vocab_size, shape, dtype=np.int32)
        places = np.broadcast_to(np.arange(shape[2], dtype=np.int32), shape)
        host = Batch(tokens, tokens, np.ones(shape, np.float32), np.array(places), np.ones_like(tokens))
        batch = jax.device_put(host, layout.named(None, "batch"))
        one = step.make_step(model, CLM(), optimizer, 0, ema_decay=0.999, guard=guard)
        return jax.jit(one, donate_argnums=0).lower(state, batch).compile(), state, batch


def count(compiled: Callable) -> dict:
    """What is in a compiled program."""
    text, cost = compiled.as_text(), compiled.cost_analysis()
    return {
        "collectives": dict(sorted(Counter(COLLECTIVES.findall(text)).items())),
        "host_transfers": len(HOST.findall(text)),
        "bytes": cost["bytes accessed"],
        "flops": cost["flops"],
    }


def wall(steps: list[list], pairs: int) -> dict:
    """Seconds of steps made by turns. steps: [compiled, state, batch] of both."""
    seconds = [[], []]
    for i in range(2 * (pairs + 2)):
        which = i % 2 if (i // 2) % 2 else 1 - i % 2  # so that neither is always the first of a pair
        compiled, state, batch = steps[which]
        began = time.perf_counter()
        state, _ = jax.block_until_ready(compiled(state, batch))
        seconds[which].append(time.perf_counter() - began)
        steps[which][1] = state
    with_, without = (np.array(part[2:]) for part in seconds)
    low, middle, high = np.percentile(with_ / without, (10, 50, 90))
    return {
        "pairs": pairs,
        "seconds_with": round(float(np.median(with_)), 5),
        "seconds_without": round(float(np.median(without)), 5),
        "ratio": round(float(middle), 4),
        "ratio_10th_90th": [round(float(low), 4), round(float(high), 4)],
    }


def measure(mesh: tuple[int, int, int], name: str, pairs: int) -> dict:
    guard = GUARDS[name]
    guarded = compile_step(mesh, guard)
    with mock.patch.object(GuardConfig, "judge", no_judgement):
        bare = compile_step(mesh, guard)
    with_, without = count(guarded[0]), count(bare[0])
    row = {
        "mesh": "x".join(map(str, mesh)),
        "guard": name,
        "collectives_with": with_["collectives"],
        "collectives_without": without["collectives"],
        "host_transfers": with_["host_transfers"],
        **{f"{key}_without": without[key] for key in ("bytes", "flops")},
        **{f"{key}_more": round(with_[key] / without[key] - 1, 7) for key in ("bytes", "flops")},
    }
    print(row, flush=True)
    return row | {"wall": wall([list(guarded), list(bare)], pairs)}


def cheap(row: dict) -> bool:
    more = max(row["bytes_more"], row["flops_more"])
    return (
        row["collectives_with"] == row["collectives_without"] and not row["host_transfers"] and more <= MOST
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=40, help="steps of each kind that are timed")
    args = parser.parse_args()
    start(MeshConfig(cpu_devices=8), ROWS)
    rows = [measure(mesh, name, args.pairs) for mesh in MESHES for name in GUARDS]
    for row in rows:
        print(row["mesh"], row["guard"], row["wall"])
    parameters = sum(x.size for x in jax.tree.leaves(compile_step(MESHES[0], GUARDS["finite"])[1].params))
    content = {
        **record.environment("jax", "jaxlib", "optax"),
        "model": dataclasses.asdict(MODEL),
        "parameters": parameters,
        "tokens_a_step": ROWS * MODEL.max_length,
        "passed": all(map(cheap, rows)),
        "table": rows,
    }
    record.write("reliability_guard_cost", content)
    sys.exit(0 if content["passed"] else 1)


if __name__ == "__main__":
    main()
