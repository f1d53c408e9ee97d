"""Successive halving (Jamieson and Talwalkar 2015, arXiv:1502.07943) in synchronous rungs."""

import math
from collections.abc import Mapping

RUNGS = (0.25, 0.5)
"""Fractions of its steps at which every run waits for the others, and the worse half stops. Of the
steps without halving, half are taken: 1/4 by all, 1/4 by a half, 1/2 by a quarter."""


def choose_survivors(values: Mapping[str, float]) -> set[str]:
    """Choose the better half of the runs, the larger half of an odd number.

    Args:
        values: by run, lower is better; ties go to the name that sorts first.
    """
    ranked = sorted(values, key=lambda run: (values[run], run))
    return set(ranked[: math.ceil(len(ranked) / 2)])
