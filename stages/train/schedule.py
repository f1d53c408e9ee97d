"""How large is the learning rate at each step?"""

import math
from typing import Literal

LrSchedule = Literal["constant", "linear", "cosine"]


def learning_rate_at(
    step: int, *, peak: float, schedule: LrSchedule, warmup_steps: int, num_steps: int
) -> float:
    """Give the learning rate of one optimizer step.

    It rises linearly to the peak, reached at step `warmup_steps`; the step after that still has the
    peak, and from there it decays towards 0, which would be reached at step num_steps + 1. So every
    step learns something, the first and the last included.

    Args:
        step: from 1 to num_steps.
        peak: the largest rate.
        schedule: how it falls after the warm-up.
        warmup_steps: 0 starts at the peak.
        num_steps: of the whole training.
    """
    if step <= warmup_steps:
        return peak * step / warmup_steps
    if schedule == "constant":
        return peak
    done = (step - 1 - warmup_steps) / (num_steps - warmup_steps)
    if schedule == "linear":
        return peak * (1 - done)
    return peak * (1 + math.cos(math.pi * done)) / 2
