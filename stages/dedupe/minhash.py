"""Which rows are worth comparing: MinHash signatures, cut into bands.

Two sets agree in one value with the probability of their Jaccard similarity J, in a whole band of r
values with J^r, and in at least one of b bands with 1 - (1 - J^r)^b
(Broder 1997; Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, chapter 3).
"""

import numpy as np
import numpy.typing as npt

from stages.dedupe.hashing import I64, U32, U64, make_constants, mix

ALGORITHM = "minhash-affine32-1"
"""Changes with any constant below: signatures of two names must never be compared."""
ROWS_PER_BAND = 5
PAIR_BANDS = 25
"""Finds 0.99 of the pairs at J = 0.7, 0.9998 at 0.8."""
PROMPT_BANDS = 13
"""Finds 0.994 of the prompts at J = 0.8."""

_NUM_VALUES = PAIR_BANDS * ROWS_PER_BAND
_FACTORS = (make_constants(_NUM_VALUES, seed=4) >> np.uint64(32)).astype(np.uint32) | np.uint32(1)
_OFFSETS = (make_constants(_NUM_VALUES, seed=5) >> np.uint64(32)).astype(np.uint32)
_SETS_AT_ONCE = 128


def sign_sets(hashes: U32, bounds: I64) -> U32:
    """Compute the signatures of N sets.

    Args:
        hashes: the members of all sets, well mixed, one set behind the other.
        bounds: [N + 1]: set k is hashes[bounds[k]:bounds[k + 1]], never empty.
    Returns:
        [N, 125]: the least of every affine image of the set.
    """
    num_sets = len(bounds) - 1
    signatures = np.empty((_NUM_VALUES, num_sets), np.uint32)
    for first in range(0, num_sets, _SETS_AT_ONCE):
        end = min(first + _SETS_AT_ONCE, num_sets)
        members = hashes[bounds[first] : bounds[end]]
        starts = bounds[first:end] - bounds[first]
        images = np.empty_like(members)
        for number in range(_NUM_VALUES):
            np.multiply(members, _FACTORS[number], out=images)
            np.add(images, _OFFSETS[number], out=images)
            np.minimum.reduceat(images, starts, out=signatures[number, first:end])
    return signatures.T


def make_band_keys(signatures: U32, num_bands: int, *, salts: U64 | None = None) -> U64:
    """Hash the bands of each signature.

    Args:
        signatures: [N, 125].
        num_bands: bands to take, from the front.
        salts: [N]: sets of different salts never meet.
    Returns:
        [N, num_bands]: equal keys stand for equal bands in the same place.
    """
    bands = np.arange(1, num_bands + 1, dtype=np.uint64)
    keys: npt.NDArray[np.uint64] = np.broadcast_to(bands, (len(signatures), num_bands)).copy()
    if salts is not None:
        keys ^= salts[:, None]
    used = signatures[:, : num_bands * ROWS_PER_BAND].astype(np.uint64)
    for row in range(ROWS_PER_BAND):
        keys = mix(keys ^ used[:, row::ROWS_PER_BAND])
    return keys
