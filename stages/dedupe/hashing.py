"""The fixed arithmetic behind all hashes here: the same numbers on every machine and version."""

from typing import Any

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
U32 = npt.NDArray[np.uint32]
I64 = npt.NDArray[np.int64]

_GOLDEN = 0x9E3779B97F4A7C15


def make_constants(count: int, *, seed: int) -> U64:
    """Give the first numbers of the splitmix64 sequence of a seed."""
    with np.errstate(over="ignore"):
        return mix(np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN))


def mix(values: U64) -> U64:
    """Spread every bit of each number over all bits: splitmix64's finaliser, a bijection."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values ^= values >> np.uint64(27)
        values *= np.uint64(0x94D049BB133111EB)
        values ^= values >> np.uint64(31)
    return values


def sort_unique(values: U64) -> U64:
    """Sort, and keep each number once; np.unique goes through a hash table, ten times slower."""
    values = np.sort(values)
    is_first = np.ones(len(values), np.bool_)
    is_first[1:] = values[1:] != values[:-1]
    return values[is_first]


def sum_segments(values: U64, bounds: I64) -> U64:
    """Sum values[bounds[k]:bounds[k + 1]] for every k, modulo 2^64; segments may be empty."""
    sums = np.zeros(len(values) + 1, np.uint64)
    np.cumsum(values, out=sums[1:])
    return sums[bounds[1:]] - sums[bounds[:-1]]


def take_segments(flat: npt.NDArray[Any], starts: I64, ends: I64) -> tuple[npt.NDArray[Any], I64]:
    """Put flat[start:end] of every segment behind one another.

    Returns:
        The members, and where each segment begins and the last one ends among them.
    """
    lengths = ends - starts
    bounds = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=bounds[1:])
    indices = np.arange(bounds[-1]) + np.repeat(starts - bounds[:-1], lengths)
    return flat[indices], bounds
