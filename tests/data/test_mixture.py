"""Draw g to (source, row): in the shares asked for, from anywhere, within the epochs allowed."""

from collections import Counter
from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from llm_jax.data import loader, mixture, order
from llm_jax.data.batch import Rows
from llm_jax.data.mixture import BLOCK, Mixture
from llm_jax.data.packing import Packed
from llm_jax.errors import UserError
from llm_jax.mesh import MeshConfig, make_layout
from llm_jax.objectives.mlm import MLM
from llm_jax.text.words import Vocabulary

WEIGHTS = [[1], [1, 1], [3, 1], [1, 1, 1], [5, 3, 2], [1000, 1], [1, 2, 3, 4, 5, 6], [7, 7, 7, 1000, 1]]
SEED = 3


def slow_turns(weights, caps=None):
    """(source, how many of it came before) of draw 0, 1, ...: every draw to the source whose next one is due
    first. Where that one has had its cap, it leaves, and the others begin a count of their own."""
    caps = caps or [None] * len(weights)
    used, counts, active = [0] * len(weights), [0] * len(weights), list(range(len(weights)))
    while active:
        whole = sum(weights[i] for i in active)
        i = min(active, key=lambda i: ((2 * counts[i] + 1) * whole // (2 * weights[i]), i))
        if used[i] == caps[i]:
            active = [j for j in active if used[j] != caps[j]]
            counts = [0] * len(weights)
            continue
        yield i, used[i]
        counts[i] += 1
        used[i] += 1


def first(iterator, count):
    return [item for item, _ in zip(iterator, range(count), strict=False)]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_seats_are_what_giving_them_one_by_one_gives(weights):
    parts = np.array(weights, np.int64)
    given = np.zeros_like(parts)
    for total, (source, seat) in enumerate(first(slow_turns(weights), 2500)):
        assert mixture.seats(parts, total).tolist() == given.tolist()
        assert mixture.draw_of(parts, source, seat) == total
        given[source] += 1


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("total", [1, 10, 999, 10**6 + 7, 3 * 10**11])
def test_shares_are_right_to_a_few_rows_at_any_time(weights, total):
    parts = Mixture(*fake(weights)).stages[0].parts
    got = mixture.seats(parts, total)
    assert got.sum() == total and got.min() >= 0
    exact = [total * int(w) / int(parts.sum()) for w in parts]
    assert np.all(abs(got - exact) <= 1 + len(weights) / 2)
    np.testing.assert_allclose(parts / parts.sum(), np.array(weights) / sum(weights), atol=3e-7)


def fake(weights, sizes=None, epochs=None):
    """Arguments of a mixture; row r of source i holds 1000 i + r."""

    def rows(i, size):
        class Cut:
            def __len__(self):
                return size

            def draw(self, seed, draws, purpose):
                return self.read(order.shuffled_rows(seed, draws, size, purpose))

            def read(self, rows):
                tokens = np.repeat(1000 * i + rows[:, None], 5, axis=1)
                return Rows(tokens.astype(np.int32), np.ones_like(tokens), np.zeros_like(tokens))

        return Cut()

    sizes = sizes or [50 + 7 * i for i in range(len(weights))]
    names = [f"s{i}" for i in range(len(weights))]
    cuts = [rows(i, size) for i, size in enumerate(sizes)]
    return names, cuts, weights, epochs or [0] * len(weights)


def located(mix, start, stop, seed=SEED):
    source, row = mix.locate(seed, np.arange(start, stop))
    return list(zip(source.tolist(), row.tolist(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_block_has_its_counts_and_all_that_came_before(weights):
    """Blocks are the slow order, permuted; the rows of a source are its own epochs."""
    names, rows, *_ = fake(weights)
    mix = Mixture(*fake(weights))
    parts = mix.stages[0].parts.tolist()
    slow = first(slow_turns(parts), 4 * BLOCK)
    for block in range(4):
        turns = slow[block * BLOCK : (block + 1) * BLOCK]
        wanted = []
        for source, turn in turns:
            row = order.shuffled_rows(SEED, np.array([turn]), len(rows[source]), f"order.{names[source]}")
            wanted.append((source, int(row[0])))
        got = located(mix, block * BLOCK, (block + 1) * BLOCK)
        assert sorted(got) == sorted(wanted)
        assert len(weights) == 1 or got != wanted


def test_any_draw_on_its_own_and_in_any_order():
    mix = Mixture(*fake([5, 3, 2], epochs=[1, 0, 4]))
    whole = located(mix, 0, 2000)
    assert located(mix, 700, 1300) == whole[700:1300]
    draws = np.random.default_rng(0).integers(0, 2000, 300)
    source, row = Mixture(*fake([5, 3, 2], epochs=[1, 0, 4])).locate(SEED, draws)
    assert [whole[g] for g in draws] == list(zip(source.tolist(), row.tolist(), strict=True))
    alone = mix.locate(SEED, np.array([1234]))
    assert (int(alone[0][0]), int(alone[1][0])) == whole[1234]


def test_every_epoch_of_a_source_has_each_row_once():
    sizes = [30, 64]
    mix = Mixture(*fake([1, 2], sizes))
    seen = located(mix, 0, 3 * BLOCK)
    for source, size in enumerate(sizes):
        rows = [row for s, row in seen if s == source]
        counts = Counter(rows)
        assert set(counts) == set(range(size)) and max(counts.values()) - min(counts.values()) <= 1


def test_seeds_names_and_sources_have_orders_of_their_own():
    """Of which rows come first: two orders share about half of them."""
    names, *rest = fake([1, 1], [BLOCK, BLOCK])

    def early(names, source, seed=SEED):
        return {row for s, row in located(Mixture(names, *rest), 0, BLOCK, seed) if s == source}

    base = early(names, 0)
    others = [early(names, 1), early(names, 0, seed=4), early(["renamed", "s1"], 0)]
    assert len(base) == BLOCK // 2 and early(["s0", "renamed"], 0) == base
    assert all(BLOCK // 8 < len(base & other) < BLOCK * 3 // 8 for other in others)


def test_a_sources_order_does_not_depend_on_the_others():
    alone = fake([1], [40])
    for weights in ([1, 1], [1, 9], [1, 3, 5]):
        mix = Mixture(*fake(weights, [40, 100, 60][: len(weights)]))
        rows = Counter(row for source, row in located(mix, 0, 4 * BLOCK) if source == 0)
        own = order.shuffled_rows(SEED, np.arange(sum(rows.values())), 40, f"order.{alone[0][0]}")
        assert rows == Counter(own.tolist())


def test_no_pattern_of_the_order_meets_one_of_the_batch():
    """Every other row, as one of two hosts has them, holds both sources, and no batch has but one."""
    mix = Mixture(*fake([1, 1]))
    source = np.array([source for source, _ in located(mix, 0, 20 * BLOCK)])
    assert 0.45 < source[::2].mean() < 0.55
    assert np.all(source.reshape(-1, BLOCK).sum(axis=1) == BLOCK // 2)
    transitions = np.mean(source[1:] != source[:-1])
    assert 0.45 < transitions < 0.55  # 1 where they take turns


CAPPED = [
    ([1, 1], [40, 90], [1, 1]),
    ([1, 3], [400, 90], [2, 1]),
    ([5, 3, 2], [100, 100, 100], [1, 2, 3]),
    ([1, 1, 1, 1], [64, 64, 64, 64], [1, 1, 1, 1]),
    ([1000, 1], [1500, 3], [1, 1]),
    ([2, 1], [1, 1], [1, 1]),
]


@pytest.mark.parametrize("weights, sizes, epochs", CAPPED)
def test_epochs_are_used_to_the_last_row_and_not_beyond(weights, sizes, epochs):
    mix = Mixture(*fake(weights, sizes, epochs))
    limit = sum(size * n for size, n in zip(sizes, epochs, strict=True))
    assert mix.limit == limit and len(mix.stages) <= len(weights)
    counts = Counter(located(mix, 0, limit))
    wanted = {(i, r): n for i, (size, n) in enumerate(zip(sizes, epochs, strict=True)) for r in range(size)}
    assert counts == wanted
    with pytest.raises(UserError, match=rf"row {limit:,} of .* allow {limit:,} \(s0 {epochs[0]} x"):
        mix.locate(SEED, np.array([limit]))


@pytest.mark.parametrize("weights, sizes, epochs", [*CAPPED, ([1, 2, 4], [50, 50, 50], [0, 3, 1])])
def test_when_a_source_is_used_up_the_others_share_on_by_weight(weights, sizes, epochs):
    """Stage by stage what giving one by one gives; a cap changes nothing before it is reached."""
    mix = Mixture(*fake(weights, sizes, epochs))
    parts = Mixture(*fake(weights, sizes)).stages[0].parts.tolist()
    caps = [size * n or None for size, n in zip(sizes, epochs, strict=True)]
    slow = [source for source, _ in first(slow_turns(parts, caps), 3000)]
    got = [source for source, _ in located(mix, 0, len(slow))]
    for stage in mix.stages:
        stop = len(slow) if stage.stop is None else stage.stop
        for begin in range(stage.first, stop, BLOCK):
            end = min(begin + BLOCK, stop)
            assert sorted(got[begin:end]) == sorted(slow[begin:end])
    free = Mixture(*fake(weights, sizes))
    before = mix.stages[0].stop // BLOCK * BLOCK
    assert located(mix, 0, before) == located(free, 0, before)


def test_without_a_cap_there_is_no_limit():
    mix = Mixture(*fake([1, 1], [10, 10], [5, 0]))
    assert mix.limit is None
    assert {source for source, _ in located(mix, 10**11, 10**11 + 600)} == {1}


def test_rows_are_those_of_their_sources():
    mix = Mixture(*fake([3, 1]))
    draws = np.arange(300, 400)
    rows = mix.draw(SEED, draws)
    source, row = mix.locate(SEED, draws)
    np.testing.assert_array_equal(rows.tokens[:, 0], 1000 * source + row)
    assert rows.tokens.dtype == np.int32 and rows.tokens.shape == (100, 5)


def test_the_stream_never_changes():
    """Runs resume by this: do not edit."""
    got = located(Mixture(*fake([5, 3, 2], epochs=[1, 0, 4])), 96, 104)  # the first stage ends at 100
    assert got == [(0, 44), (1, 34), (0, 28), (0, 40), (1, 8), (1, 17), (2, 53), (2, 51)]


def real(i, rows, length):
    rng = np.random.default_rng(i)
    stream = rng.integers(5, 100, rows * length - 2).astype(np.int32)
    ends = np.array([*np.unique(rng.integers(1, len(stream), 20)), len(stream)])
    return Packed(SimpleNamespace(tokens=len(stream), ends=ends, read=lambda a, b: stream[a:b]), length)


@pytest.mark.slow
@pytest.mark.parametrize("devices, shape", [(1, (2, 1, 8)), (8, (1, 2, 8)), (4, (1, 1, 4)), (2, (2, 4, 2))])
def test_the_same_batches_on_any_mesh_and_in_any_grouping(devices, shape):
    vocabulary = Vocabulary(100, np.ones(100, bool), np.ones(100, bool))
    mix = Mixture(["a", "b"], [real(0, 30, 8), real(1, 17, 8)], [1.0, 0.5], [3, 0])
    to_batch = partial(MLM(mask_rate=0.4).to_batch, seed=SEED, vocabulary=vocabulary)

    def batches(devices, shape):
        sharding = make_layout(MeshConfig(), jax.devices()[:devices]).named(None, None, "batch")
        train = loader.TrainBatches(mix, to_batch, SEED, shape, sharding)
        out = train.iterate(0, 512 // int(np.prod(shape)))
        host = [jax.tree.map(lambda x: np.asarray(x).reshape(-1, x.shape[-1]), batch) for batch in out]
        return jax.tree.map(lambda *parts: np.concatenate(parts), *host)

    jax.tree.map(np.testing.assert_array_equal, batches(devices, shape), batches(1, (1, 1, 8)))
