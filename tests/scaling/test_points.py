"""Lists of points, built and combined."""

import warnings

import numpy as np
import pytest

from llm_jax.errors import UserError
from llm_jax.scaling.points import chain, draw, grid, log_uniform, sobol, uniform, zip_


def test_grid_is_every_combination_the_last_key_fastest():
    assert grid({"a": (1, 2), "b": (3, 4)}) == [
        {"a": 1, "b": 3},
        {"a": 1, "b": 4},
        {"a": 2, "b": 3},
        {"a": 2, "b": 4},
    ]
    assert grid() == [{}] and grid({"a": ()}) == []


def test_zip_goes_step_by_step():
    assert zip_({"a": (1, 2), "b": (3, 4)}) == [{"a": 1, "b": 3}, {"a": 2, "b": 4}]
    with pytest.raises(UserError, match=r"one length, not a 2, b 3"):
        zip_({"a": (1, 2), "b": range(3)})


def test_chain_is_one_after_another():
    assert chain(grid({"a": (1, 2)}), [{"b": 3}], {"c": (4, 5)}) == [
        {"a": 1},
        {"a": 2},
        {"b": 3},
        {"c": 4},
        {"c": 5},
    ]


def test_lists_of_points_combine():
    shapes = zip_({"width": (1, 2), "depth": (3, 4)})
    assert grid(shapes, {"seed": (0, 1)}) == [
        {"width": 1, "depth": 3, "seed": 0},
        {"width": 1, "depth": 3, "seed": 1},
        {"width": 2, "depth": 4, "seed": 0},
        {"width": 2, "depth": 4, "seed": 1},
    ]
    assert zip_(shapes, [{"seed": 0}, {"seed": 1}])[1] == {"width": 2, "depth": 4, "seed": 1}
    assert shapes == [{"width": 1, "depth": 3}, {"width": 2, "depth": 4}]  # what was given stays


def test_what_cannot_be_meant():
    with pytest.raises(UserError, match="a is set by two"):
        grid({"a": (1, 2)}, [{"a": 3}])
    with pytest.raises(UserError, match=r"model.norm is 'rmsnorm', but takes a list"):
        grid({"model.norm": "rmsnorm"})


RANGES = {"optimizer.learning_rate": log_uniform(1e-4, 1e-2), "model.dropout": uniform(0, 0.3)}


def columns(points):
    """The shares that values had of their ranges, [points] each."""
    rates, dropouts = (np.array([point[key] for point in points]) for key in RANGES)
    return np.log(rates / 1e-4) / np.log(100), dropouts / 0.3


@pytest.mark.parametrize("sample", [sobol, draw])
def test_samples_are_what_they_were_and_more_are_the_same_and_more(sample):
    points = sample(RANGES, count=11)
    assert points == sample(RANGES, count=11, seed=0) and len(points) == 11
    assert sample(RANGES, count=5) == points[:5]
    assert sample(RANGES, count=11, seed=1) != points
    assert all(list(point) == list(RANGES) and type(point["model.dropout"]) is float for point in points)
    assert all(value == float(f"{value:.6g}") for point in points for value in point.values())
    assert len(grid(points, {"seed": (0, 1)})) == 22


def test_sobol_points_leave_nothing_out():
    """Of 16 one lies in every sixteenth of each range, and one in every cell of 4 x 4."""
    for seed in range(5):
        with warnings.catch_warnings(action="error"):
            sobol(RANGES, count=11)
            shares = np.stack(columns(sobol(RANGES, count=16, seed=seed)))
        for share in shares:
            assert sorted((share * 16).astype(int)) == list(range(16))
        assert len({*zip(*(shares * 4).astype(int).tolist(), strict=True)}) == 16


def test_draws_are_uniform_and_of_their_own():
    rates, dropouts = columns(draw(RANGES, count=4000))
    for share in (rates, dropouts):
        assert share.min() >= 0 and share.max() <= 1
        assert np.abs(np.sort(share) - np.linspace(0, 1, 4000)).max() < 0.03
    assert abs(np.corrcoef(rates, dropouts)[0, 1]) < 0.05


def test_ranges_that_are_none():
    for make, message in (
        (lambda: uniform(1, 1), "the first must be the smaller"),
        (lambda: log_uniform(0, 1), r"log_uniform\(0, 1\) is no range: it needs 0 < low"),
        (lambda: sobol(RANGES, count=0), "at least 1, not 0"),
        (lambda: draw(RANGES, count=-1), "at least 1, not -1"),
    ):
        with pytest.raises(UserError, match=message):
            make()
