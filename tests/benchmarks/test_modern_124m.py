"""What is said of the preset at 124M by its sweep's table."""

import pytest

from benchmarks.modern_124m import compare


def rows(point, losses, tokens, speed):
    return [
        {"overrides": point | {"seed": seed}, "loss": loss, "tokens": tokens, "device": {"kind": "H200"}}
        | {"time": {"tokens_per_second": speed}}
        for seed, loss in enumerate(losses)
    ]


BASELINE, PRESET = {"optimizer.learning_rate": 1e-3}, {"optimizer.learning_rate": 7e-3}


@pytest.mark.parametrize(
    ("loss", "speed", "best", "wrong"),
    [
        (3.0, 90.0, 1e-3, []),
        (5.0, 90.0, 1e-3, ["is above the baseline's"]),
        (3.0, 60.0, 1e-3, ["took 0.83 of the baseline's time"]),
        (3.0, 90.0, 6e-4, ["the best rate is 0.0006"]),
    ],
)
def test_what_does_not_hold_is_named(loss, speed, best, wrong):
    tuned = [
        {"overrides": {"optimizer.learning_rate": rate}, "loss": 4.0 if rate == best else 4.5}
        for rate in (6e-4, 1e-3)
    ]
    sweep = rows(BASELINE, [4.0, 4.1, 3.9], 1000, 100.0) + rows(PRESET, [loss] * 3, 500, speed)
    found, said = compare(tuned, sweep)
    assert found["baseline"]["loss"] == 4.0 and found["baseline"]["seconds"] == 10.0
    assert found["wall_ratio"] == pytest.approx(500 / speed / 10, abs=0.02)
    assert len(said) == len(wrong) and all(part in why for part, why in zip(wrong, said, strict=True))
