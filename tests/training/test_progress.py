"""How long it will still take, and what is shown of it."""

import io

import pytest
from rich.console import Console

from llm_jax.training.progress import Pace, ProgressLine, clock


def test_steps_and_evaluations_to_come():
    pace = Pace(100, {"evaluation": 20, "samples": 0})
    assert pace.left(0) is None
    pace.dispatch(10, 5.0)
    assert pace.left(10) == pytest.approx(45.0)
    pace.pause("evaluation", 9.0)  # the first one compiled
    pace.pause("evaluation", 3.0)
    assert pace.left(10) == pytest.approx(45.0 + 5 * 3.0)
    assert pace.left(20) == pytest.approx(40.0 + 4 * 3.0)
    assert pace.left(90) == pytest.approx(5.0 + 3.0)
    pace.pause("samples", 2.0)
    assert pace.left(90) == pytest.approx(5.0 + 3.0 + 2.0)
    assert pace.left(100) == 0.0


def test_the_end_evaluates_whatever_the_cadence():
    pace = Pace(100, {"evaluation": 30})
    pace.dispatch(1, 0.0)
    pace.pause("evaluation", 1.0)
    assert [pace.left(step) for step in (0, 29, 30, 89, 90, 99, 100)] == [4, 4, 3, 2, 1, 1, 0]


def test_the_pace_follows_a_change():
    pace = Pace(1000, {})
    pace.dispatch(1, 1.0)
    for _ in range(60):
        pace.dispatch(1, 2.0)
    assert pace.left(0) == pytest.approx(2000, rel=0.01)


def test_clock():
    assert [clock(s) for s in (0, 59.6, 61, 3600, 90061)] == ["0:00", "1:00", "1:01", "1:00:00", "25:01:01"]


RATES = {"seconds": 2.0, "tokens_per_second": 12345.6, "mfu": 0.321}


@pytest.mark.parametrize("terminal", [True, False])
def test_what_is_shown(terminal):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120, highlight=False)
    line = ProgressLine(0, Pace(100, {"evaluation": 0}), console)
    line.update(10, 3.25, {}, 10)  # it compiled: there is no speed yet
    line._last = float("-inf")
    line.update(20, 2.5, RATES, 10)
    line.say("step 20: [validation] loss 2.0")
    line.close()
    shown = out.getvalue()
    for part in ("20/100", "loss 2.5000", "12,346 tokens/s", "MFU 32.1%", "ETA 0:16", "[validation]"):
        assert part in shown
    if not terminal:
        assert shown.splitlines()[0] == "step 10/100  loss 3.2500"


def test_a_log_is_not_flooded():
    out = io.StringIO()
    line = ProgressLine(0, Pace(100, {}), Console(file=out, force_terminal=False))
    for step in range(1, 101):
        line.update(step, 1.0, RATES, 1)
    line.close()
    assert len([x for x in out.getvalue().splitlines() if x]) == 1
