"""What happens inside one step, layer by layer: where numbers stop being finite, going forward and back.

Arrays carry their shape as a suffix: n places, b rows, l length, d model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.data.batch import Batch
from llm_jax.models import context
from llm_jax.models.transformer import scorer
from llm_jax.training import norms, step
from llm_jax.training.program import Program
from llm_jax.training.rules import parameter_name
from llm_jax.training.state import State

LOSS = "logits and loss"
BadNames = dict[str, list[str]]  # {place: parameters in it}


@dataclass(frozen=True)
class Insides:
    """Of a step, on the host; rows are those of all micro-batches, one after another.

    places: of the forward pass, in order; largest: magnitude among the finite numbers of each one's output;
    finite_nbl: whether all of a token's numbers are finite after each place; losses_bl: a token's weight
    times its loss; params, gradients: what is not finite; grad_norms: by layer.
    """

    places: list[str]
    largest: dict[str, float]
    finite_nbl: np.ndarray
    losses_bl: np.ndarray
    params: BadNames
    gradients: BadNames
    grad_norms: dict[str, float]

    @property
    def bad_rows(self) -> dict[str, int]:
        """{place: rows that are not finite after it}."""
        counts = np.sum(~self.finite_nbl.all(axis=2), axis=1)
        return dict(zip(self.places, counts.tolist(), strict=True))


def look(program: Program, state: State, batch: Batch) -> Insides:
    """batch: of one step, [accumulation, rows, length]. The state is not used up.

    It takes the memory of the output of every layer for one micro-batch, and of the gradients.
    """
    with jax.set_mesh(program.layout.mesh):
        forward = jax.jit(partial(_forward, program))
        parts = []
        for i in range(batch.inputs.shape[0]):
            key = jax.random.fold_in(step.dropout_key(program.experiment.seed, state.step), i)
            parts.append(jax.device_get(forward(state.params, jax.tree.map(lambda x: x[i], batch), key)))  # noqa: B023
        squares, gradients = jax.jit(partial(_backward, program))(state, batch)
        params = jax.jit(not_finite)(state.params)
    largest_n, finite_nbl, losses_bl = zip(*parts, strict=True)
    places = places_of(program, state.params)
    return Insides(
        places,
        dict(zip(places, np.max(largest_n, axis=0).tolist(), strict=False)),
        np.concatenate(finite_nbl, axis=1),
        np.concatenate(losses_bl),
        named(params),
        named(gradients),
        norms.by_layer(squares),
    )


def places_of(program: Program, params: Mapping[str, Any]) -> list[str]:
    """The places of a forward pass in the order in which they are met."""
    blocks = [f"blocks/{i}" for i in range(program.experiment.model.num_layers)]
    return ["embedding", *blocks, *(["final_norm"] if "final_norm" in params else []), LOSS]


def _forward(program: Program, params: Any, micro: Batch, key: jax.Array) -> tuple[jax.Array, ...]:
    """(largest [n], finite [n, b, l], losses [b, l]) of one micro-batch; the last place is the loss."""
    model, objective, variables = program.model, program.experiment.objective, {"params": params}
    order = {"layout": program.layout, "causal": model.config.causal}
    dealt = context.deal(micro, **order)
    embedded_bld = model.apply(variables, dealt.inputs, dealt.positions, method="embed")
    hidden_bld, aux = model.apply(
        variables, dealt.inputs, dealt.positions, dealt.segments, key=key, capture=("hidden",)
    )
    last = [hidden_bld[None]] if "final_norm" in params else []
    parts = (embedded_bld[None], aux.layers.hidden, *last)
    whole = [program.layout.shard(part, None, "batch", "length", None) for part in parts]
    stream_nbld = jnp.concatenate(whole).astype(jnp.float32)
    finite_nbld = jnp.isfinite(stream_nbld)
    largest_n = jnp.max(jnp.where(finite_nbld, jnp.abs(stream_nbld), 0.0), axis=(1, 2, 3))
    finite_nbl = program.layout.shard(jnp.all(finite_nbld, axis=-1), None, "batch", None)
    finite_nbl = jax.vmap(partial(context.restore, **order))(finite_nbl)

    def sums(weights_bl: jax.Array) -> list[jax.Array]:
        weighed = dealt.replace(weights=context.deal(weights_bl, **order))
        found = objective.sums(scorer(model, params), hidden_bld, weighed)
        return [found["loss"], sum(found[name] for name in objective.coefficients)]

    # Sums are linear in the weights: their derivatives by one of them are that token's own, and one that is
    # not a number does not reach the others.
    own_2bl = jnp.stack([jax.grad(lambda w, i=i: sums(w)[i])(micro.weights) for i in range(2)])
    losses_bl, differentiated_bl = jnp.where(micro.weights != 0.0, micro.weights * own_2bl, 0.0)
    finite_bl = jnp.isfinite(losses_bl) & jnp.isfinite(differentiated_bl)
    return largest_n, jnp.concatenate([finite_nbl, finite_bl[None]]), losses_bl


def _backward(program: Program, state: State, batch: Batch) -> tuple[norms.Squares, Any]:
    """(sums of squares by layer, what is not finite) of the gradients of the whole step."""
    e = program.experiment
    gradients = step.make_gradients(program.model, e.objective, e.seed)
    _, grads = gradients(state, batch, step.loss_weights(program.model, e.objective, batch))
    return norms.squares(grads), not_finite(grads)


def not_finite(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Whether a parameter, or something shaped like one, has an entry that is not finite: a bool for every
    leaf, but [layers] for those of ``blocks``, which are stacked."""

    def one(name: str, x: jax.Array) -> jax.Array:
        return jnp.any(~jnp.isfinite(x), axis=range(int(name == "blocks"), x.ndim))

    return {name: jax.tree.map(partial(one, name), section) for name, section in tree.items()}


def named(flags: Mapping[str, Any]) -> BadNames:
    """The flagged ones of ``not_finite``: {"blocks/1": ["mlp/in"], "embedding": ["embedding"]}."""
    found: BadNames = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(flags)):
        section, _, rest = parameter_name(path).partition("/")
        if np.ndim(leaf):
            for i in np.flatnonzero(leaf):
                found.setdefault(f"{section}/{i}", []).append(rest)
        elif leaf:
            found.setdefault(section, []).append(rest or section)
    return found


def backward_order(insides: Insides) -> list[str]:
    """Places with parameters, in the order in which a backward pass meets them. What comes before the blocks
    comes last; a tied head's gradient is part of the embedding's."""
    last_block = [name for name in insides.places if name.startswith("blocks/")][::-1]
    after = [name for name in ("head", "final_norm") if name in insides.grad_norms]
    rest = [name for name in insides.grad_norms if name not in (*after, *last_block)]
    return [*after, *last_block, *sorted(rest, key=lambda name: name == "embedding")]
