"""Where the time went, from records with known clocks."""

import pytest

from llm_jax.report.goodput import goodput
from llm_jax.training.metrics import MetricsWriter


def write(directory, resumed, events):
    """events: (kind, step, time); a train record's dispatch ends at its ``at``."""
    writer = MetricsWriter(directory)
    writer.write("start", resumed, {}, {"process": events[0][0], "at": events[0][1]})
    for kind, step, time in events[1:]:
        values = {"of": kind} if kind in ("evaluation", "checkpoint") else {}
        writer.write("pause" if values else kind, step, values, time)
    writer.close()


def test_one_attempt_after_another(tmp_path):
    """10 s a dispatch; the first attempt is killed after step 30, of which step 20 was saved."""
    first = [
        (100.0, 107.0),
        ("train", 10, {"at": 142.0, "data_wait": 1.0}),  # 24 s of compiling
        ("train", 20, {"at": 153.0, "data_wait": 1.0}),
        ("evaluation", 20, {"seconds": 4.0, "at": 157.0}),
        ("checkpoint", 20, {"seconds": 0.5, "at": 157.5}),
        ("train", 30, {"at": 168.0, "data_wait": 0.5}),
    ]
    second = [
        (200.0, 203.0),
        ("train", 30, {"at": 220.0, "data_wait": 0.0}),
        ("train", 40, {"at": 230.0, "data_wait": 0.0}),
        ("checkpoint", 40, {"seconds": 0.5, "at": 230.5}),
        ("end", 40, {"at": 232.0}),
    ]
    write(tmp_path, 0, first)
    write(tmp_path, 20, second)
    spent = goodput(tmp_path)
    assert spent == pytest.approx(
        {
            "step": 40.0,
            "start": 10.0,
            "compile": 24.0 + 7.0,
            "data wait": 2.5,
            "evaluation": 4.0,
            "samples": 0.0,
            "checkpoint": 0.5 + 0.5 + 1.5,
            "lost steps": 10.0,
            "restart": 32.0,
        }
    )
    assert sum(spent.values()) == pytest.approx(232.0 - 100.0)


def test_an_attempt_that_did_no_step(tmp_path):
    write(tmp_path, 0, [(10.0, 12.0)])
    write(tmp_path, 0, [(20.0, 21.0), ("train", 5, {"at": 25.0})])
    spent = goodput(tmp_path)
    assert spent["start"] == 3.0 and spent["restart"] == 8.0 and spent["step"] == 4.0
