"""Every schedule at every step against plain Python."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from llm_jax.errors import UserError
from llm_jax.training.schedules import SCHEDULES

PEAK, STEPS, WARMUP = 0.3, 40, 5


def line(share, low):
    return low + (1 - low) * share


def restarts(t, first, growth, low):
    size = first
    while t >= size:
        t, size = t - size, size * growth
    return line((1 + math.cos(math.pi * t / size)) / 2, low)


def triangle(t, half, low, decay):
    """Smith's formula, with cycles counted from 1."""
    cycle = math.floor(1 + t / (2 * half))
    height = max(0.0, 1 - abs(t / half - 2 * cycle + 1))
    return line(height * decay ** (cycle - 1), low)


# (config, share of the peak t updates after the warm-up)
CASES = {
    "constant": (SCHEDULES["constant"](WARMUP), lambda t: 1.0),
    "cosine": (
        SCHEDULES["cosine"](WARMUP, end_ratio=0.1),
        lambda t: line((1 + math.cos(math.pi * t / 35)) / 2, 0.1),
    ),
    "linear": (SCHEDULES["linear"](WARMUP, end_ratio=0.2), lambda t: line(1 - t / 35, 0.2)),
    "step": (
        SCHEDULES["step"](WARMUP, boundaries=(0.4, 0.81), factor=0.5),
        lambda t: 1.0 if t < 14 else 0.5 if t < 29 else 0.25,
    ),
    "triangular": (
        SCHEDULES["triangular"](half_cycle=7, low_ratio=0.2),
        lambda t: triangle(t, 7, 0.2, 1.0),
    ),
    "triangular2": (
        SCHEDULES["triangular"](WARMUP, half_cycle=6, low_ratio=0.0, decay=0.5),
        lambda t: triangle(t, 6, 0.0, 0.5),
    ),
    "restarts": (SCHEDULES["restarts"](WARMUP, 5, 2, 0.1), lambda t: restarts(t, 5, 2, 0.1)),
    "even restarts": (SCHEDULES["restarts"](0, 7, 1), lambda t: restarts(t, 7, 1, 0.0)),
    "inverse_sqrt": (SCHEDULES["inverse_sqrt"](WARMUP), lambda t: math.sqrt(6 / (t + 6))),
    "wsd": (
        SCHEDULES["wsd"](WARMUP, decay_share=0.25),
        lambda t: 1.0 if t < 25 else 1 - math.sqrt((t - 25) / 10),
    ),
    "linear wsd": (
        SCHEDULES["wsd"](0, decay_share=0.5, decay="linear", end_ratio=0.1),
        lambda t: 1.0 if t < 20 else line(1 - (t - 20) / 20, 0.1),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_step(case):
    """Also after the end, where the last rate stays."""
    config, share = CASES[case]
    counts = np.arange(STEPS + 5)
    rates = jax.jit(jax.vmap(config.build(PEAK, STEPS)))(counts)
    warmup = config.warmup_steps
    for count, rate in zip(counts, rates, strict=True):
        t = min(int(count), STEPS) - warmup
        expected = PEAK * (share(t) if t >= 0 else (count + 1) / (warmup + 1))
        assert rate == pytest.approx(expected, rel=1e-5, abs=1e-6), count


def test_every_schedule_has_a_case():
    assert {type(config) for config, _ in CASES.values()} == set(SCHEDULES.values())


@pytest.mark.slow
def test_no_two_schedules_are_the_same():
    curves = {
        name: np.asarray(jax.vmap(schedule().build(1.0, 200))(np.arange(200))).round(4).tobytes()
        for name, schedule in SCHEDULES.items()
    }
    assert len(set(curves.values())) == len(SCHEDULES)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_warmup_must_end_within_the_run(name):
    with pytest.raises(UserError, match="warmup_steps=40 must be less than steps=40"):
        SCHEDULES[name](warmup_steps=40).build(1.0, 40)


@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [
        ("cosine", {"warmup_steps": -1}, "at least 0"),
        ("step", {"boundaries": (0.5, 1.0)}, "boundaries must lie between 0 and 1"),
        ("triangular", {"half_cycle": 0}, "half_cycle must be at least 1"),
        ("restarts", {"first_cycle": 0}, "first_cycle must be at least 1"),
        ("restarts", {"growth": 0}, "growth must be at least 1"),
        ("wsd", {"decay": "cosine"}, "decay is 'cosine'; choose one of linear, sqrt"),
        ("wsd", {"decay_share": 0.9}, "warmup_steps=5 and the last 36 steps"),
    ],
)
def test_what_does_not_fit_is_said(name, wrong, said):
    config = dataclasses.replace(SCHEDULES[name](warmup_steps=WARMUP), **wrong)
    with pytest.raises(UserError, match=said):
        config.check(STEPS)
