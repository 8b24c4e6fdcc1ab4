"""The training step: a pure function (state, batch) -> (state, metrics)."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llm_jax.data.batch import Batch
from llm_jax.models import context, moe
from llm_jax.models.transformer import Transformer, scorer
from llm_jax.objectives.cross_entropy import PredictsTokens
from llm_jax.training import norms
from llm_jax.training.guard import GuardConfig
from llm_jax.training.loss_scale import LossScaleConfig
from llm_jax.training.moments import choose
from llm_jax.training.optimizers import GAINS_AND_BIASES, Optimizer
from llm_jax.training.rules import parameter_name
from llm_jax.training.state import State

Metrics = dict[str, Any]
DROPOUT = 1  # the purpose of a draw, folded into the seed; initialisation uses the seed itself


def make_step(
    model: Transformer,
    objective: PredictsTokens,
    optimizer: Optimizer,
    seed: int,
    ema_decay: float = 0.0,
    scaling: LossScaleConfig = LossScaleConfig(),  # noqa: B008 (frozen)
    guard: GuardConfig = GuardConfig(),  # noqa: B008
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """One update. The batch has leaves [accumulation, rows, length]; metrics are float32 scalars, and
    ``grad_squares`` the sums of squares of ``norms.squares``.

    Losses are sums over the whole batch divided by weights summed over the whole batch, so that the
    number of micro-batches and of devices never changes the mean. A step that ``guard`` finds bad changes
    nothing but the step count, the count of bad steps and the loss scale; its ``update_norm`` is of the
    update that was left out. ema_decay and scaling are for a state that has an ``ema`` or a ``loss_scale``;
    the running mean becomes decay * mean + (1 - decay) * params.
    """
    gradients = make_gradients(model, objective, seed)

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        weights = loss_weights(model, objective, batch)
        means, grads = gradients(state, batch, weights)
        grad_squares = norms.squares(grads)
        grad_norm = norms.total(grad_squares)
        scale = 1.0 if state.loss_scale is None else state.loss_scale.scale
        verdict = guard.judge(state.guard, means["loss"], grad_norm, scale)
        applied = verdict.applied
        updates, opt_state = optimizer.transformation.update(
            grads, state.opt_state, state.params, applied=applied
        )
        params = choose(applied, optax.apply_updates(state.params, updates), state.params)
        # Before their norms are made, which is 5 times as fast so (log).
        params, updates = model.layout.in_memory((params, updates))
        ema = state.ema
        if ema is not None:
            mean = jax.tree.map(lambda mean, p: mean + (1.0 - ema_decay) * (p - mean), ema, params)
            ema = choose(applied, mean, ema)
        new = state.replace(
            step=state.step + 1, params=params, opt_state=opt_state, guard=verdict.guard, ema=ema
        )
        metrics = means | {
            "grad_norm": grad_norm,
            "grad_squares": grad_squares,
            "param_norm": optax.tree.norm(params),
            "update_norm": optax.tree.norm(updates),
            "learning_rate": optimizer.learning_rate(state.opt_state),
            "target_tokens": weights["loss"],
            **verdict.metrics,
        }
        if state.loss_scale is not None:
            metrics["loss_scale"] = scale
            new = new.replace(loss_scale=scaling.after(state.loss_scale, verdict.finite))
        return new, metrics

    return step


def make_gradients(
    model: Transformer, objective: PredictsTokens, seed: int
) -> Callable[[State, Batch, Metrics], tuple[Metrics, Any]]:
    """(state, batch [accumulation, rows, length], weights) -> ({name: mean}, gradients), summed over
    micro-batches one after another. A loss scale multiplies the loss before it is differentiated and
    divides the gradients; the means do not see it."""
    losses, layout = make_losses(model, objective), model.layout
    coefficients = objective.coefficients | moe.coefficients(model.config)

    def gradients(state: State, batch: Batch, weights: Metrics) -> tuple[Metrics, Any]:
        key, whole = dropout_key(seed, state.step), _gathered(model, state.params)
        scale = 1.0 if state.loss_scale is None else state.loss_scale.scale

        def loss(params: Any, micro: Batch, index: jax.Array) -> tuple[jax.Array, Metrics]:
            means = losses(params, micro, weights, jax.random.fold_in(key, index))
            return scale * sum(means[name] * c for name, c in coefficients.items()), means

        def accumulate(total: Any, micro: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            (_, means), grads = jax.value_and_grad(loss, has_aux=True)(whole, *micro)
            if layout.zero == 2:
                grads = jax.tree.map(layout.scatter, grads, state.params)
            return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, (means, grads)), None

        count = batch.inputs.shape[0]
        # Zeros that a GPU's compiler knows it may fill very slowly (models/look_up.py); for one part it needs
        # none, if it knows them.
        zero = layout.in_memory(jnp.zeros(())) if count > 1 else jnp.zeros(())
        zeros = dict.fromkeys(weights, jnp.zeros(())), jax.tree.map(partial(_spread, zero), whole)
        if layout.zero == 2:
            zeros = zeros[0], jax.tree.map(jnp.zeros_like, state.params)
        (means, grads), _ = jax.lax.scan(accumulate, zeros, (batch, jnp.arange(count)))
        if layout.zero == 1:
            grads = jax.tree.map(layout.scatter, grads, state.params)
        return means, jax.tree.map(lambda g: g / scale, grads)

    return gradients


def _gathered(model: Transformer, params: Any) -> Any:
    """What a micro-batch is given: the parameters as they rest, to be gathered layer by layer (ZeRO-3), or
    the matrices whole, gathered once a step. A router stays float32: it computes in it."""
    if model.layout.zero == 3:
        return params

    def gather(path: Any, w: jax.Array) -> jax.Array:
        name = parameter_name(path)
        if re.fullmatch(GAINS_AND_BIASES, name):
            return w
        cut = "fsdp" in jax.tree.leaves(tuple(jax.typeof(w).sharding.spec))
        whole = model.layout.gather(w, model.dtype if cut and not name.endswith("/router") else w.dtype)
        # Without the barrier XLA cuts a table again inside the micro-batch and gathers it a second time, and
        # where tensor cuts it, too, Shardy (jaxlib 0.10.2, 0.12.0) aborts.
        return jax.lax.optimization_barrier(whole)

    return jax.tree_util.tree_map_with_path(gather, params)


def _spread(zero: jax.Array, w: jax.Array) -> jax.Array:
    """float32 zeros to add the gradients of ``w`` to: parts to be summed, where ``w`` was gathered."""
    spec = jax.typeof(w).sharding.spec
    return jax.sharding.reshard(
        jnp.broadcast_to(zero, w.shape), spec.update(reduced=frozenset(), unreduced=spec.reduced)
    )


def dropout_key(seed: int, step: jax.Array) -> jax.Array:
    """The key of a step's draws; the number of a micro-batch is folded into it."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), DROPOUT), step)


def loss_weights(model: Transformer, objective: PredictsTokens, batch: Batch) -> Metrics:
    """{name: total weight} of the objective's losses and the model's own, of any number of batches."""
    return objective.weights(batch) | moe.loss_weights(model.config, batch.segments)


def make_losses(model: Transformer, objective: PredictsTokens) -> Callable[..., Metrics]:
    """(params, batch [rows, length], weights, dropout key) -> {name: sum / weight}.

    A weight of 0, a batch with nothing to predict, gives 0 and a gradient of 0.
    """

    def losses(params: Any, batch: Batch, weights: Metrics, key: jax.Array | None) -> Metrics:
        variables, batch = {"params": params}, context.deal(batch, model.layout, model.config.causal)
        hidden, aux = model.apply(variables, batch.inputs, batch.positions, batch.segments, key=key)
        sums = objective.sums(scorer(model, params), hidden, batch)
        sums |= {name: total for name, (total, _) in aux.losses.items()}
        return {name: total / jnp.maximum(weights[name], 1.0) for name, total in sums.items()}

    return losses


def make_steps(step: Callable[[State, Batch], tuple[State, Metrics]]) -> Callable:
    """Several steps in one dispatch: leaves [steps, accumulation, rows, length], metrics [steps]."""

    def steps(state: State, batches: Batch) -> tuple[State, Metrics]:
        return jax.lax.scan(step, state, batches)

    return steps
