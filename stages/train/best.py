"""Which step was the best, and is it time to stop? Answered from the log alone.

So a resumed training, which goes on from its checkpoint's log, answers as an uninterrupted one.
"""

from collections.abc import Sequence

from stages.train.config import BestSettings
from stages.train.log import Evaluated, Line


def find_best(lines: Sequence[Line], settings: BestSettings | None) -> Evaluated | None:
    """Give the evaluation with the best metric, the first among equals.

    That of the start is none of them: there is nothing to export that was not there before.

    Returns:
        None where the best is not wanted, or nothing was evaluated after a step yet.
    """
    if settings is None:
        return None
    sign = 1 if settings.metric == "loss" else -1
    evaluations = _list_evaluations(lines)
    return min(evaluations, key=lambda line: sign * line.metrics[settings.metric], default=None)


def has_lost_patience(lines: Sequence[Line], settings: BestSettings | None) -> bool:
    """Whether there were so many evaluations without a new best that training should stop."""
    best = find_best(lines, settings)
    if settings is None or best is None or settings.patience == 0:
        return False
    num_since_best = sum(line.step > best.step for line in _list_evaluations(lines))
    return num_since_best >= settings.patience


def _list_evaluations(lines: Sequence[Line]) -> list[Evaluated]:
    return [line for line in lines if isinstance(line, Evaluated) and line.step > 0]
