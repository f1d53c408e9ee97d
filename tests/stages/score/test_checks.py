"""Choice of the sequences on which a worker checks its engine."""

import numpy as np

from stages.policy.groups import Group
from stages.score.checks import choose_sample, choose_siblings
from stages.scorers.pairs import SequenceGroup


def test_the_sample_is_the_shortest_and_the_longest() -> None:
    lengths = list(range(1, 81))
    groups = [
        SequenceGroup(
            group=Group(
                prompt_ids=np.array([1], np.int32), completions=(np.ones(length, np.int32),)
            ),
            sequence_ids=(str(length),),
        )
        for length in reversed(lengths)
    ]
    assert list(choose_sample(groups)) == [*map(str, range(1, 32)), "80"]
    assert len(choose_sample(groups[:20])) == 20


def test_siblings_are_short_with_long_prompts_or_prompts_of_whole_blocks() -> None:
    """Lengths are prompt and completion tokens. Prompts of whole blocks come first, where 256
    counts like 128 but is longer; then the shortest with a prompt of 128 tokens and a sibling."""
    shapes = {
        "a": (256, (3, 3)),
        "b": (128, (3, 3)),
        "c": (64, (2, 2)),
        "d": (130, (9, 9)),
        "e": (129, (30, 30)),
        "f": (129, (1,)),
        "g": (7, (1, 1)),
    }
    groups = [
        SequenceGroup(
            group=Group(
                prompt_ids=np.ones(num_prompt_tokens, np.int32),
                completions=tuple(np.ones(length, np.int32) for length in lengths),
            ),
            sequence_ids=tuple(f"{name}{number}" for number in range(len(lengths))),
        )
        for name, (num_prompt_tokens, lengths) in shapes.items()
    ]
    assert [len(group.prompt_ids) for group in choose_siblings(groups)] == [128, 256, 130]
    assert [len(group.prompt_ids) for group in choose_siblings(groups[2:])] == [64, 130, 129]
    assert len(choose_siblings(groups[-1:])) == 1
