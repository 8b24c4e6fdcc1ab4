import numpy as np
import pytest

from llm_jax.scaling.laws import solver


def rosenbrock(rows, which):
    """(1 - x)^2 + 100 (y - x^2)^2 + which: a curved valley, at another height for each problem."""
    x, y = rows.T
    off = y - x**2
    gradient = np.stack([-2 * (1 - x) - 400 * x * off, 200 * off], -1)
    hessian = np.stack([2 - 400 * (off - 2 * x**2), -400 * x, -400 * x, np.full_like(x, 200)], -1)
    metric = np.stack([2 + 800 * x**2, -400 * x, -400 * x, np.full_like(x, 200)], -1)
    return (1 - x) ** 2 + 100 * off**2 + which, gradient, hessian.reshape(-1, 2, 2), metric.reshape(-1, 2, 2)


@pytest.fixture
def starts():
    return np.random.default_rng(0).uniform(-3, 3, (40, 2))


def test_finds_the_bottom_of_a_curved_valley_from_anywhere(starts):
    rows, values = solver.minimise(rosenbrock, starts, size=1)
    np.testing.assert_allclose(rows, 1.0, atol=1e-5)
    np.testing.assert_allclose(values, np.arange(40), atol=1e-9)


def test_rows_do_not_depend_on_others_nor_on_blocks(starts, monkeypatch):
    together, _ = solver.minimise(rosenbrock, starts, size=1)
    alone = [
        solver.minimise(lambda x, _, i=i: rosenbrock(x, np.array([i])), starts[[i]], 1)[0] for i in (0, 7)
    ]
    np.testing.assert_array_equal(together[[0, 7]], np.concatenate(alone))
    monkeypatch.setattr(solver, "BLOCK", 3)
    np.testing.assert_array_equal(solver.minimise(rosenbrock, starts, size=1)[0], together)


def test_what_nothing_depends_on_stays():
    def flat(rows, which):
        value, gradient, hessian, metric = rosenbrock(rows[:, :2], which)
        wide = np.zeros((2, len(rows), 3, 3))
        wide[:, :, :2, :2] = hessian, metric
        return value, np.pad(gradient, ((0, 0), (0, 1))), *wide

    rows, _ = solver.minimise(flat, np.array([[0.0, 0.0, 5.0]]), size=1)
    np.testing.assert_allclose(rows, [[1.0, 1.0, 5.0]], atol=1e-5)
