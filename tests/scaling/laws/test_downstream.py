"""Loss to accuracy, and whether a jump is the model's or its measure's."""

import numpy as np
import pytest

from llm_jax.errors import UserError
from llm_jax.scaling.laws import downstream
from llm_jax.scaling.laws.power import Kaplan

TRUTH = downstream.Sigmoid(0.25, 0.7, 4.0, 1.2)
LOSS = np.linspace(0.4, 2.4, 20)
FLOPS = np.geomspace(1e18, 1e24, 13)
SMOOTH = 6 * (FLOPS / 1e18) ** -0.25 + 0.02  # nats a token


def exact(loss):
    return downstream.exact_match(loss, 5)


@pytest.mark.parametrize("chance", [None, 0.25])
def test_a_known_sigmoid_is_recovered(chance):
    link = downstream.fit(LOSS, TRUTH.accuracy(LOSS), chance)
    assert vars(link) == pytest.approx(vars(TRUTH), rel=1e-4)


def test_an_outlier_does_not_move_it():
    seen = TRUTH.accuracy(LOSS) + 0.002 * np.random.default_rng(0).standard_normal(20)
    seen[7] += 0.3
    assert downstream.fit(LOSS, seen, 0.25).middle == pytest.approx(1.2, abs=0.02)


def test_two_steps():
    law = Kaplan(6.4e13, 1.8e13, 0.076, 0.103)
    chain = downstream.TwoStep(law, TRUTH)
    assert chain.accuracy(1e9, 1e11) == TRUTH.accuracy(law.loss(1e9, 1e11))
    assert chain.accuracy(1e12, 1e14) > chain.accuracy(1e9, 1e11)


def test_refit_has_repeats_first():
    seen = TRUTH.accuracy(LOSS) + 0.01 * np.random.default_rng(0).standard_normal(20)
    link = downstream.fit(LOSS, seen, 0.25)
    weights = np.random.default_rng(1).multinomial(20, np.full(20, 0.05), size=50)
    again = downstream.refit(link, LOSS, seen, weights, 0.25)
    assert again.accuracy(LOSS).shape == (50, 20) and np.all(again.low == 0.25)
    assert 0.002 < np.std(again.middle) < 0.05


def test_exact_match_of_a_smooth_loss_looks_emergent_and_is_explained():
    accuracy = exact(SMOOTH)
    assert accuracy[5] < 1e-3 and accuracy[-1] > 0.3  # flat, then up, on an axis of log compute
    found = downstream.emergence(FLOPS, SMOOTH, accuracy, exact)
    assert found.of_the_metric and found.share == pytest.approx(1, abs=0.1) and found.explained > 0.99


def test_a_jump_beside_a_smooth_loss_is_not_explained():
    accuracy = np.where(FLOPS > 3e21, 0.35, 0.01)
    found = downstream.emergence(FLOPS, SMOOTH, accuracy, exact)
    assert not found.of_the_metric and found.share < 0.3 and found.jump == pytest.approx(0.34)


def test_a_loss_that_jumps_is_not_explained_either():
    """The measure does its part, but what it is given is not smooth."""
    loss = np.where(FLOPS > 1e21, 0.1, 3.0)
    found = downstream.emergence(FLOPS, loss, exact(loss), exact)
    assert not found.of_the_metric


def test_both_the_jump_and_the_rest_must_be_explained():
    learnt = downstream.Sigmoid(0.0, 1.0, 3.0, 0.5)
    jump = learnt.accuracy(SMOOTH) + np.where(np.arange(13) > 10, 0.25, 0.0)
    found = downstream.emergence(FLOPS, SMOOTH, jump, learnt.accuracy)
    assert found.explained > 0.9 and found.share < 0.8 and not found.of_the_metric
    above = downstream.emergence(FLOPS, SMOOTH, exact(SMOOTH) + 0.3, exact)
    assert above.share > 0.8 and above.explained < 0.9 and not above.of_the_metric


def test_order_does_not_matter():
    back = slice(None, None, -1)
    found = downstream.emergence(FLOPS[back], SMOOTH[back], exact(SMOOTH)[back], exact)
    assert found == downstream.emergence(FLOPS, SMOOTH, exact(SMOOTH), exact)


def test_refusals():
    with pytest.raises(UserError, match="needs 5 runs of different loss"):
        downstream.fit(LOSS[:4], LOSS[:4])
    with pytest.raises(UserError, match="needs 5 runs of different loss"):
        downstream.fit(LOSS, np.full(20, 0.5))
    with pytest.raises(UserError, match="emergence needs 5 runs"):
        downstream.emergence(FLOPS[:4], SMOOTH[:4], SMOOTH[:4], exact)
    with pytest.raises(UserError, match="accuracy never rises"):
        downstream.emergence(FLOPS, SMOOTH, np.zeros(13), exact)
