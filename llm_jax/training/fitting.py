"""Whether an experiment fits where it is to run: the devices, and the step at which it goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping

from llm_jax.errors import UserError
from llm_jax.layout import TABLE
from llm_jax.models import moe
from llm_jax.training.experiment import Experiment


def check_start(e: Experiment, step: int) -> None:
    """Raises UserError where no dispatch begins at a step that a run would go on from."""
    if step % e.steps_per_dispatch:
        raise UserError(
            f"the newest checkpoint is of step {step:,}, where no dispatch of "
            f"config.steps_per_dispatch={e.steps_per_dispatch} begins; set it to "
            f"{math.gcd(step, e.steps_per_dispatch)}"
        )


def check_mesh(e: Experiment, sizes: Mapping[str, int]) -> None:
    """What the mesh cuts must divide. sizes: {mesh axis: size}. Names parameter and axis."""
    m, runs = e.model, sizes["stage"] * e.mesh.stage_rounds
    if m.num_layers % runs:
        raise UserError(
            f"config.model.num_layers={m.num_layers} is not divisible by mesh.stage x mesh.stage_rounds = "
            f"{runs}, the runs of layers that are dealt out; change one"
        )
    if m.value_residual and sizes["stage"] > 1:
        raise UserError("config.model.value_residual: a pipeline does not hand on values; set mesh.stage=1")
    along = [axis for axis in TABLE["batch"] if sizes[axis] > 1]
    batch = math.prod(sizes[axis] for axis in along)
    for key, rows in (
        ("global_batch_size / accumulation", e.micro_batch),
        ("evaluation.batch_size", e.evaluation_rows),
    ):
        if rows % batch:
            raise UserError(
                f"config.{key} = {rows} rows cannot be shared by {' x '.join(along)} = {batch} devices; "
                "change the batch or the mesh"
            )
    cuts = (
        ("model_dim", "blocks/*/*, embed", m.model_dim, "fsdp"),
        ("num_heads", "blocks/attention/query, heads", m.num_heads, "tensor"),
        ("num_kv_heads", "blocks/attention/key, kv_heads", m.kv_heads, "tensor"),
        ("mlp_dim", "blocks/mlp/in, mlp", m.mlp_size, "tensor"),
        ("vocab_size (padded)", "embedding, vocab", m.padded_vocab, "tensor"),
        ("num_experts", "blocks/mlp/in, experts", m.num_experts, "expert"),
    )
    length, pieces = math.prod(sizes[axis] for axis in TABLE["residual"]), 2 * sizes["context"]
    if e.data.sequence_length % length:
        raise UserError(
            f"config.data.sequence_length={e.data.sequence_length} is not divisible by context x tensor = "
            f"{length}, along which the length is cut between layers; change one"
        )
    if m.causal and pieces > 2 and e.data.sequence_length % pieces:
        raise UserError(
            f"config.data.sequence_length={e.data.sequence_length} is not divisible by 2 x context = "
            f"{pieces}, the pieces in which a decoder's length is dealt out; change one"
        )
    moe.check_mesh(m, e.data.sequence_length, sizes)
    for key, where, size, axis in cuts:
        if size % sizes[axis]:
            raise UserError(
                f"config.model.{key}={size} is not divisible by mesh.{axis}={sizes[axis]} "
                f"(parameter {where}); change one"
            )
