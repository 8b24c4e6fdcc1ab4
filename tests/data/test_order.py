import numpy as np
import pytest

from llm_jax.data import order

COUNTS = [1, 2, 3, 7, 64, 65, 1000]
DRAWS = 20_000


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("seed, epoch", [(0, 0), (0, 1), (5, 0), (2**40, 12345)])
def test_permutation(count, seed, epoch):
    out = order.permute(seed, epoch, np.arange(count), count)
    assert out.dtype == np.int64
    assert sorted(out.tolist()) == list(range(count))


@pytest.mark.parametrize("count", COUNTS)
def test_any_element_on_its_own(count):
    together = order.permute(3, 1, np.arange(count), count)
    alone = [int(order.permute(3, 1, np.array([i]), count)[0]) for i in range(count)]
    assert together.tolist() == alone
    assert order.permute(3, 1, np.arange(count)[::-1], count).tolist() == alone[::-1]
    assert int(order.permute(3, 1, np.asarray(count - 1), count)) == alone[-1]


def test_epochs_and_seeds_have_their_own_orders():
    orders = {
        tuple(order.permute(seed, epoch, np.arange(100), 100)) for seed in range(10) for epoch in range(10)
    }
    assert len(orders) == 100
    # A permutation of hundreds has about one fixed point; neither another epoch nor the identity shows.
    first, second = (order.permute(0, epoch, np.arange(1000), 1000) for epoch in (0, 1))
    assert np.sum(first == second) < 8 and np.sum(first == np.arange(1000)) < 8


def test_every_place_is_equally_likely():
    """Chi-square over where each of 5 elements goes, 4000 keys: 16 degrees of freedom."""
    out = order.permute(1, *np.broadcast_arrays(np.arange(4000)[:, None], np.arange(5)), 5)
    counts = np.array([np.bincount(out[:, i], minlength=5) for i in range(5)])
    assert np.sum((counts - 800) ** 2 / 800) < 45


def test_shuffled_rows_go_epoch_after_epoch():
    draws = np.arange(7 * 30)
    rows = order.shuffled_rows(2, draws, 30)
    epochs = rows.reshape(7, 30)
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 7
    np.testing.assert_array_equal(order.shuffled_rows(2, draws[50:120], 30), rows[50:120])
    far = order.shuffled_rows(2, 10**15 + draws, 30)  # draws beyond 2**32 are as good as any
    assert far.min() == 0 and far.max() == 29


def test_uniform_draws():
    x = order.uniform(0, "mask", np.arange(DRAWS))
    assert x.min() >= 0 and x.max() < 1 and x.dtype == np.float64
    deviation = 4.5 / np.sqrt(DRAWS)
    assert abs(x.mean() - 1 / 2) < deviation * np.sqrt(1 / 12)
    assert abs(x.var() - 1 / 12) < deviation * np.sqrt(1 / 180)
    assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < deviation
    share = np.histogram(x, bins=20, range=(0, 1))[0] / DRAWS
    assert np.all(abs(share - 0.05) < deviation * np.sqrt(0.05 * 0.95))


def test_bits_have_no_duplicates_and_no_dead_bit():
    x = order.bits(0, "mask", np.arange(1000)[:, None], np.arange(100))
    assert x.shape == (1000, 100) and x.dtype == np.uint64
    assert len(np.unique(x)) == x.size
    ones = [np.mean(x >> np.uint64(bit) & np.uint64(1)) for bit in range(64)]
    assert np.all(abs(np.array(ones) - 0.5) < 4.5 * 0.5 / np.sqrt(x.size))


@pytest.mark.parametrize(
    "other",
    [
        lambda n: order.uniform(0, "fate", n),  # another purpose
        lambda n: order.uniform(1, "mask", n),  # another seed
        lambda n: order.uniform(0, "mask", n, 0),  # another number of counters
        lambda n: order.uniform(0, "mask", n + 2**32),
    ],
)
def test_streams_are_independent(other):
    n = np.arange(DRAWS)
    x, y = order.uniform(0, "mask", n), other(n)
    assert abs(np.corrcoef(x, y)[0, 1]) < 4.5 / np.sqrt(DRAWS)
    assert not set(x) & set(y)


def test_counters_are_not_interchangeable():
    assert order.bits(0, "mask", 1, 2) != order.bits(0, "mask", 2, 1)


def test_a_draw_depends_on_its_own_counters_alone():
    table = order.bits(7, "mask", np.arange(50)[:, None], np.arange(20))
    assert all(table[i, j] == order.bits(7, "mask", i, j) for i in (0, 31, 49) for j in (0, 7, 19))


def test_the_stream_never_changes():
    """Computed once by an implementation in Python integers. Runs resume by this: do not edit."""
    assert int(order.bits(0, "mask", 0)) == 0x74C3493955036562
    assert int(order.bits(1, "mask", 0, 1)) == 0x5B2FBB486761D033
    assert int(order.bits(2**63, "order", 5, 2**40)) == 0x402F9023BA1261C9
    assert float(order.uniform(0, "mask", 0)) == 0.45610482835492183
    assert order.permute(3, 2, np.arange(10), 10).tolist() == [8, 7, 5, 1, 9, 6, 3, 0, 4, 2]
    assert order.permute(9, 4, np.array([123456789]), 10**9).tolist() == [479212779]
