"""Which values are frequent among any number of them, told in bounded memory?"""

from collections.abc import Iterable, Mapping

CAPACITY = 1000
"""Counters kept: no count is short by more than 1 in 1,001 of all values."""


class HeavyHitters:
    """The counters of Misra and Gries (1982), merged as by Agarwal et al. (2012).

    Of n values added, here and in whatever was merged in, each value's counter holds at most how
    often it was added, and at least that minus n / (capacity + 1). So whatever makes up a larger
    share than 1 / (capacity + 1) has a counter.

    Args:
        capacity: how many counters are kept.
        counts: counters to start from, at most `capacity`.
    """

    def __init__(
        self, *, capacity: int = CAPACITY, counts: Mapping[str, int] | None = None
    ) -> None:
        self._capacity = capacity
        self.counts = dict(counts or {})
        """By value: at most how often it was added."""

    def add(self, value: str) -> None:
        """Count a value."""
        counts = self.counts
        if value in counts:
            counts[value] += 1
        elif len(counts) < self._capacity:
            counts[value] = 1
        else:
            # One of every counted value is cancelled against this one: n shrinks with them.
            self.counts = {kept: count - 1 for kept, count in counts.items() if count > 1}

    @classmethod
    def merge(
        cls, parts: Iterable[Mapping[str, int]], *, capacity: int = CAPACITY
    ) -> "HeavyHitters":
        """Join the counters of several sketches of one capacity."""
        merged: dict[str, int] = {}
        for counts in parts:
            for value, count in counts.items():
                merged[value] = merged.get(value, 0) + count
            if len(merged) > capacity:
                # What the largest one without a place holds goes from all of them.
                excess = sorted(merged.values(), reverse=True)[capacity]
                merged = {value: n - excess for value, n in merged.items() if n > excess}
        return cls(capacity=capacity, counts=merged)
