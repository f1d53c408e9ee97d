"""Choice of the sequences on which a worker checks its engine."""

from collections.abc import Iterable

import numpy as np
import pytest

from stages.policy.groups import Group
from stages.score.checks import choose_neighbours, choose_sample, choose_siblings, find_errors
from stages.scorers.pairs import Fault, SequenceGroup
from stages.scorers.protocol import FloatArray


def made_groups(lengths: Iterable[int]) -> list[SequenceGroup]:
    """Prompts of one token, each with one completion of these tokens."""
    return [
        SequenceGroup(
            group=Group(
                prompt_ids=np.array([1], np.int32), completions=(np.ones(length, np.int32),)
            ),
            sequence_ids=(str(length),),
        )
        for length in lengths
    ]


def test_the_sample_is_the_shortest_and_the_longest() -> None:
    groups = made_groups(range(80, 0, -1))

    def choose(some: list[SequenceGroup]) -> list[int]:
        return [int(name) for name in choose_sample(some, max_tokens=10**6, longest=10**6)]

    assert choose(groups) == [*range(1, 32), 80]
    assert choose(groups[:20]) == list(range(61, 81))


@pytest.mark.parametrize(
    ("max_tokens", "longest", "wanted"),
    [
        (10**6, 50, [*range(2, 33), 50]),
        (20, 10**6, [2, 3, 4, 10]),
        (9, 10**6, [2, 3, 4]),
        (1, 10**6, [2]),
        (0, 10**6, []),
    ],
)
def test_the_sample_is_cut_to_what_a_minute_affords(
    max_tokens: int, longest: int, wanted: list[int]
) -> None:
    """Half of the tokens are for the longest that fits. With 20, a sequence of 10 leaves 10 for 2,
    3 and 4; with 1, the shortest is chosen all the same."""
    groups = made_groups(range(1, 81))
    sample = choose_sample(groups, max_tokens=max_tokens, longest=longest)
    assert [group.num_tokens for group in sample.values()] == wanted


def test_neighbours_are_the_longest_and_three_short_ones() -> None:
    sample = choose_sample(made_groups(range(1, 81)), max_tokens=10**6, longest=10**6)
    assert list(choose_neighbours(sample)) == ["1", "2", "3", "80"]
    assert list(choose_neighbours({"1": sample["1"]})) == ["1"]


def test_sequences_that_are_off_are_found_with_the_worst_first() -> None:
    expected = {name: np.array([-1.0, -2.0], np.float32) for name in "abcd"}
    found: dict[str, FloatArray | Fault] = {
        "a": np.array([-1.0, -2.0005], np.float32),
        "b": np.array([-1.25, -2.0], np.float32),
        "c": np.array([-1.0, -2.5], np.float32),
        "d": Fault(kind="LENGTH", detail=""),
    }
    assert find_errors(expected, found, tolerance=1e-3) == {"c": 0.5, "b": 0.25}
    found["a"] = np.array([np.nan, -2.0], np.float32)
    assert set(find_errors(expected, found, tolerance=1e-3)) == {*"abc"}


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
