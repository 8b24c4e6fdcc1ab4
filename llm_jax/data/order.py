"""Data order as arithmetic: keyed random draws and a keyed permutation, any element on its own.

All are functions of integers alone, the same on any machine and numpy version, so that batch ``s`` can
be computed without batches ``0 .. s-1`` and resuming is one integer.
"""

from __future__ import annotations

import zlib

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
ROUNDS = 6  # four suffice for a pseudo-random permutation (Luby and Rackoff 1988); two to spare


def bits(seed: int, purpose: str, *counters: np.ndarray | int) -> np.ndarray:
    """uint64 draws, one for each element of the broadcast counters.

    The SplitMix64 finaliser (Steele, Lea and Flood 2014) applied once a counter; purposes are
    independent streams.
    """
    with np.errstate(over="ignore"):
        state = _mix(np.asarray(seed, np.uint64) * GOLDEN + np.uint64(zlib.crc32(purpose.encode())))
        for counter in counters:
            state = _mix((state ^ np.asarray(counter).astype(np.uint64)) + GOLDEN)
    return state


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniform(seed: int, purpose: str, *counters: np.ndarray | int) -> np.ndarray:
    """float64 draws in [0, 1)."""
    return (bits(seed, purpose, *counters) >> np.uint64(11)) * 2.0**-53


def shuffled_rows(seed: int, draws: np.ndarray, count: int, purpose: str = "order") -> np.ndarray:
    """int64 row of each global draw: epoch after epoch over ``count`` rows, each in an order of its own."""
    draws = np.asarray(draws, np.int64)
    return permute(seed, draws // count, draws % count, count, purpose)


def permute(
    seed: int, epoch: np.ndarray | int, index: np.ndarray, count: int, purpose: str = "order"
) -> np.ndarray:
    """Element ``index`` of the permutation of range(count) keyed by (seed, purpose, epoch).

    A Feistel network on the next even power of two; what falls outside walks on until it falls inside
    (cycle walking, Black and Rogaway 2002), at most 4 tries on average.
    """
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    out = np.asarray(index).astype(np.uint64)
    epoch = np.broadcast_to(epoch, out.shape)
    outside = np.ones(out.shape, bool)
    while outside.any():
        left, right = out[outside] >> half, out[outside] & low
        for i in range(ROUNDS):
            left, right = right, left ^ (bits(seed, purpose, epoch[outside], i, right) & low)
        out[outside] = (left << half) | right
        outside = out >= count
    return out.astype(np.int64)
