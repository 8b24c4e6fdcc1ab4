"""Which checkpoints are made and which stay."""

import random

from llm_jax.training.experiment import CheckpointConfig
from llm_jax.training.policy import SavePolicy, kept


def test_newest_best_and_for_ever():
    losses = {10: 3.0, 20: 1.0, 30: 2.0, 40: 1.5}
    steps = [10, 20, 30, 40, 45, 50]
    assert kept(steps, losses, newest=1) == {50}
    assert kept(steps, losses, newest=2) == {45, 50}
    assert kept(steps, losses, newest=1, best=1) == {20, 50}
    assert kept(steps, losses, newest=1, best=2) == {20, 40, 50}
    assert kept(steps, losses, newest=1, every=30) == {30, 50}
    assert kept(steps, losses, newest=1, at=(20, 45, 60)) == {20, 45, 50}
    assert kept(steps, losses, newest=9, best=9, every=9) == set(steps)
    assert kept([], losses, newest=2, best=2, every=10) == set()


def test_of_equal_losses_the_earlier_and_without_a_loss_none():
    assert kept([1, 2, 3, 4], {1: 1.0, 2: 1.0, 3: 1.0}, newest=1, best=2) == {1, 2, 4}
    assert kept([1, 2, 3, 4], {}, newest=1, best=3) == {4}
    assert kept([2, 3], {1: 0.1, 2: 0.5}, newest=1, best=1) == {2, 3}  # 1 is gone: it counts for nothing


def test_pruning_step_by_step_loses_nothing_that_pruning_at_the_end_keeps():
    """The best and the newest of a whole run survive, although every save forgets what it drops."""
    draw = random.Random(0)
    for _ in range(200):
        steps = sorted(draw.sample(range(1, 100), 12))
        losses = {step: draw.choice([1.0, 2.0, 3.0, 4.0]) for step in draw.sample(steps, 8)}
        rule = {"newest": draw.randrange(1, 4), "best": draw.randrange(3), "every": draw.choice([0, 7, 10])}
        rule["at"] = draw.sample(range(1, 100), 20)
        on_disk = set()
        for step in steps:
            on_disk = kept({*on_disk, step}, {s: losses[s] for s in on_disk | {step} if s in losses}, **rule)
        assert on_disk == kept(steps, losses, **rule)


def test_by_step_and_by_time():
    now = 0.0
    policy = SavePolicy(CheckpointConfig(every=20, every_minutes=1.0, keep_every=50), clock=lambda: now)
    assert [step for step in range(10, 110, 10) if policy.due(step)] == [20, 40, 50, 60, 80, 100]
    now = 59.0
    assert not policy.due(10)
    now = 60.0
    assert policy.due(10)
    policy.saved()
    assert not policy.due(10)
    now = 120.0
    assert policy.due(10)
    named = SavePolicy(CheckpointConfig(at=(30, 40)), clock=lambda: now)
    assert [step for step in range(10, 110, 10) if named.due(step)] == [30, 40]
    never = SavePolicy(CheckpointConfig(), clock=lambda: now)
    now = 1e9
    assert not any(never.due(step) for step in range(1, 100))
