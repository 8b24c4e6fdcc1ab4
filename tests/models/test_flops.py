"""The FLOP counter against the matrix products in the traced program."""

import dataclasses
import math

import families
import jax
import pytest

from llm_jax.models import flops


def dot_flops(jaxpr):
    """2 * multiply-adds of every dot_general and ragged_dot, inner programs included."""
    total = 0
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    total += dot_flops(getattr(inner, "jaxpr", inner))
        if equation.primitive.name == "dot_general":
            (contract, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contract)
        if equation.primitive.name.startswith("ragged_dot"):  # every row meets one of the matrices
            total += 2 * math.prod(equation.invars[0].aval.shape) * equation.outvars[0].aval.shape[-1]
    return total


@pytest.mark.parametrize("family", families.FAMILIES)
def test_training_flops(family):
    config = dataclasses.replace(families.FAMILIES[family], scan_layers=False)
    layout = families.layout_of()
    model, params = families.make(config, layout)
    batch = families.batch()

    def loss(params):
        variables = {"params": params}
        x = model.apply(variables, batch.inputs, batch.positions, batch.segments)[0]
        return model.apply(variables, x, method="logits").sum()

    with jax.set_mesh(layout.mesh):
        traced = dot_flops(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)
    counted = flops.training_flops_per_token(config, families.LENGTH) * batch.inputs.size
    assert counted == pytest.approx(traced, rel=1e-3)


def test_causal_is_half_the_attention():
    c = families.DECODER
    full, causal = (flops.training_flops_per_token(c, 1024, causal) for causal in (False, True))
    products = 6 * flops.matmul_parameters(c)
    assert (causal - products) / (full - products) == pytest.approx(0.5, rel=1e-2)
