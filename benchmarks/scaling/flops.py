"""FLOPs of a training step, three ways: the formula of models/flops.py, the products of the traced program
with its layers unrolled, and what the compiler says of the compiled one.

  python -m benchmarks.scaling.flops

Each row is the gradient of the loss of a small model, four layers of width 64, 8 rows of 128 tokens; nothing
is run. "compiler" is its whole count, as cost_analysis has it, "its products" those of the products alone,
found in the compiled text. What is left of it in every row are additions and multiplications of norms,
softmax, activations and sums of gradients; the last column says why a row differs otherwise. Writes
benchmarks/results/flops.json; exit code 1 where formula and trace differ by more than 0.1% without a reason.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import record
from llm_jax.data.batch import Batch
from llm_jax.mesh import MeshConfig, make_layout, start
from llm_jax.models import flops
from llm_jax.models.config import ModelConfig
from llm_jax.models.transformer import Transformer, init_params
from llm_jax.objectives.clm import CLM
from llm_jax.objectives.mlm import MLM
from llm_jax.training import step

ROWS, LENGTH = 8, 128
DECODER = ModelConfig(
    num_layers=4,
    model_dim=64,
    num_heads=4,
    vocab_size=250,
    max_length=LENGTH,
    dtype="float32",
    kernel="dense",
    scan_layers=False,
)
GPT2 = {"activation": "gelu", "biases": True, "positions": "learnt", "norm": "layernorm"}


class Case(NamedTuple):
    """changes: to DECODER. why: a known difference. multiplied: changes to the model whose formula gives what
    is multiplied, where the formula leaves some of it out on purpose."""

    changes: dict[str, Any]
    why: str = ""
    multiplied: dict[str, Any] | None = None


CASES = {
    "a head of keys for each": Case({}),
    "two heads of keys": Case({"num_kv_heads": 2}),
    "one head of keys": Case({"num_kv_heads": 1}),
    "untied head": Case({"tied_head": False}),
    "GPT-2": Case(GPT2),
    "heads and MLP of their own sizes": Case({"head_dim": 24, "mlp_dim": 80}),
    "parallel, softcaps": Case({"block": "parallel", "attention_softcap": 30.0, "logit_softcap": 15.0}),
    "values mixed, queries normed": Case({"value_residual": True, "qk_norm": True}),
    "ALiBi": Case({"positions": "alibi"}),
    "encoder, norms behind": Case(GPT2 | {"causal": False, "block": "postnorm"}),
    "experts, 2 of 4 and 1 shared": Case(
        {"num_experts": 4, "shared_experts": 1},
        "on a CPU every expert multiplies every row, and what is not its own is masked",
    ),
    "windows of 32": Case(
        {"window": (32, 0)},
        "the dense kernel multiplies what a window hides, which the formula leaves out",
        {},
    ),
    "experts with room for 1.5": Case(
        {"num_experts": 4, "capacity_factor": 1.5},
        "empty places are multiplied, which the formula leaves out",
        {"num_experts": 4, "experts_per_token": 3},
    ),
    "scanned": Case({"scan_layers": True}, "the compiler counts a loop as one turn of it"),
    "recomputed": Case({"remat": True}, "blocks are made again, but for their last product"),
}


def measure(case: Case) -> dict[str, float]:
    """FLOPs a token."""
    config = dataclasses.replace(DECODER, **case.changes)
    layout = make_layout(start(MeshConfig(cpu_devices=1), ROWS))
    model, objective = Transformer(config, layout), CLM() if config.causal else MLM()
    ids, weights = jnp.ones((ROWS, LENGTH), jnp.int32), jnp.ones((ROWS, LENGTH), jnp.float32)
    targets = LENGTH if config.causal else objective.targets_of_row(LENGTH)
    batch = Batch(ids, ids, weights, ids, ids, None if config.causal else ids[:, :targets])
    with jax.set_mesh(layout.mesh):
        params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
        losses, totals = step.make_losses(model, objective), step.loss_weights(model, objective, batch)

        def gradients(params: Any, batch: Batch) -> Any:
            return jax.grad(lambda params: losses(params, batch, totals, None)["loss"])(params)

        traced = flops.traced_flops(jax.make_jaxpr(gradients)(params, batch))
        compiled = jax.jit(gradients).lower(params, batch).compile()
    own = flops.training_flops_per_token(config, LENGTH, scored=targets / LENGTH)
    counts = {
        "formula": own,
        "jaxpr": traced / ids.size,
        "compiler": compiled.cost_analysis()["flops"] / ids.size,
        "compiler_products": products(compiled.as_text()) / ids.size,
    }
    if case.multiplied is not None:
        same = dataclasses.replace(DECODER, **case.multiplied)
        counts["multiplied"] = flops.training_flops_per_token(same, LENGTH)
    return counts


def products(text: str) -> int:
    """FLOPs of the products in a compiled program's text, of each loop one turn."""
    shape = r"\w+\[([\d,]*)\]"
    found = re.findall(rf"(%[\w.-]+) = {shape}", text) + re.findall(rf"(%[\w.-]+): {shape}", text)
    shapes = {name: [int(size) for size in sizes.split(",") if size] for name, sizes in found}
    dots = re.findall(r"(%[\w.-]+) = \S+ dot\((%[\w.-]+), .*?lhs_contracting_dims={([\d,]*)}", text)
    total = 0
    for name, left, contracted in dots:
        total += 2 * math.prod(shapes[name]) * math.prod(shapes[left][int(i)] for i in contracted.split(","))
    return total


def main() -> None:
    rows, wrong = {}, []
    print(f"{'FLOPs a token':<34}{'formula':>10}{'jaxpr':>10}{'compiler':>10}{'its products':>14}  why")
    for name, case in CASES.items():
        rows[name] = counts = measure(case)
        shown = (counts["formula"], counts["jaxpr"], counts["compiler"])
        shown = "".join(f"{x:>10,.0f}" for x in shown)
        print(f"{name:<34}{shown}{counts['compiler_products']:>14,.0f}  {case.why}", flush=True)
        same = counts.get("multiplied", counts["formula"])
        if not case.changes.get("remat") and abs(same / counts["jaxpr"] - 1) > 1e-3:
            wrong.append(name)
    print("formula and jaxpr differ by more than 0.1%: " + (", ".join(wrong) or "nowhere"))
    why = {name: case.why for name, case in CASES.items() if case.why}
    record.write("flops", {**record.environment("jax", "jaxlib"), "rows": rows, "why": why})
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
