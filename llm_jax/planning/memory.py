"""How many bytes of a device a step takes, by what they are for."""

from __future__ import annotations

from llm_jax.layout import Layout
from llm_jax.objectives import cross_entropy
from llm_jax.planning import residuals
from llm_jax.planning.layout import Array, Tokens, layer_runs
from llm_jax.training.experiment import Experiment
from llm_jax.training.program import Program

BATCH_LEAVES = 5  # inputs, targets, weights, positions, segments: four bytes each
# Of what the forward pass keeps by jax's account, what is there when XLA has fused unrolled layers for a GPU:
# 0.29 to 0.59 without recomputation. Of scanned ones, which are fused one by one, it was 0.75 to 0.99 (six
# steps compiled for an H200; log).
FUSED = 0.6
RESERVED = 0.03  # of a device's memory that its system and the program's code take
PARTS = {"params": "parameters", "opt_state": "optimizer", "ema": "running mean"}


def estimate(program: Program, state: dict[str, list[Array]]) -> dict[str, float]:
    """{cause: bytes on a device} at the worst moment of a step, and "total".

    Parameters, optimiser, batch and what the forward pass keeps are counted exactly, but for unrolled layers
    on a GPU, which keeps less. The rest is what must be there beside them when the loss is computed or a
    layer differentiated, whichever is more.
    """
    e, layout = program.experiment, program.layout
    causes = {PARTS[part]: float(sum(a.bytes for a in state[part])) for part in PARTS if part in state}
    rows = e.micro_batch // layout.ways("batch") * e.accumulation * e.steps_per_dispatch
    causes["batch"] = rows * e.data.sequence_length * 4.0 * BATCH_LEAVES
    causes["gradients"] = gradients(layout, state["params"])
    fused = FUSED if layout.platform == "gpu" and not e.model.scan_layers else 1.0
    without_remat = fused * residuals.kept(program, False)
    causes["activations"] = residuals.kept(program, True) if e.model.remat else without_remat
    in_loss = {"head": head(e, layout), "logits": logits(e, layout)}
    in_layer = {"gathered layer": 2 * gathered_layer(program, state["params"])}
    if e.model.remat:
        kept = max(without_remat - causes["activations"], 0.0)
        at_once = 1 if layout.rounds == 1 else e.model.num_layers // (layout.ways("layers") * layout.rounds)
        in_layer["layer"] = kept / layer_runs(e, layout) * at_once
    causes |= max(in_loss, in_layer, key=lambda worst: sum(worst.values()))
    return {**causes, "total": sum(causes.values())}


def gradients(layout: Layout, params: list[Array]) -> float:
    """The float32 sum over micro-batches: cut as parameters are, or whole along fsdp (ZeRO-1)."""
    whole = layout.mesh.shape["fsdp"] if layout.zero == 1 else 1
    return float(sum(a.bytes * (whole if "fsdp" in a.axes else 1) for a in params))


def gathered_layer(program: Program, params: list[Array]) -> float:
    """The gradients of a layer's matrices before they are cut; the next layer, on its way, is as large."""
    mesh, width = program.layout.mesh.shape, Tokens.of(program.experiment, program.layout).width
    blocks = [a for a in params if a.name.startswith("blocks/") and len(a.shape) > 2]
    layers = 1 if program.layout.zero == 3 else blocks[0].shape[0] // mesh["stage"]  # all of them at once
    return sum(a.bytes / 4 * width * mesh["fsdp"] / (a.shape[0] // mesh["stage"]) for a in blocks) * layers


def head(e: Experiment, layout: Layout) -> float:
    """The gathered head as it is multiplied, and its gradient in float32."""
    c, t = e.model, Tokens.of(e, layout)
    return c.padded_vocab / layout.ways("vocab") * c.model_dim * (t.width + 4)


def logits(e: Experiment, layout: Layout) -> float:
    """Float32 scores of a chunk, their exponentials and their gradient; on a GPU scores and gradient as they
    are rounded (head_product.py), the rest is fused."""
    c, t = e.model, Tokens.of(e, layout)
    all_of_them = e.scored * t.count * c.padded_vocab / layout.ways("vocab")
    width = 2 * t.width if layout.platform == "gpu" else 3 * 4
    return width * min(all_of_them, cross_entropy.most_logits(layout.mesh))
