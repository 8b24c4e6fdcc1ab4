"""Lists of points, built and combined."""

import pytest

from llm_jax.errors import UserError
from llm_jax.scaling.points import chain, grid, zip_


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
