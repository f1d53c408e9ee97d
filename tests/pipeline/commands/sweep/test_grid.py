"""The values that `sweep --set` lists, and their combinations."""

import pytest

from pipeline.commands.sweep.grid import list_combinations
from schemas.errors import ConfigError


def test_every_combination_is_a_list_of_overrides_for_run() -> None:
    found = list_combinations(["stages.train.loss.beta=0.1,0.3", "a.b=7", "c=[x,y],'z,w'"])
    assert [combination.overrides for combination in found] == [
        ("stages.train.loss.beta=0.1", "a.b=7", "c=[x,y]"),
        ("stages.train.loss.beta=0.1", "a.b=7", "c='z,w'"),
        ("stages.train.loss.beta=0.3", "a.b=7", "c=[x,y]"),
        ("stages.train.loss.beta=0.3", "a.b=7", "c='z,w'"),
    ]
    assert found[1].label == "beta=0.1, c='z,w'"


def test_blocks_are_values_and_equal_words_keep_their_path() -> None:
    [first, second] = list_combinations(["a.loss={kind: ipo, beta: 1},{kind: hinge}", "b.loss=1"])
    assert first.settings == {"loss": "{kind: ipo, beta: 1}"}
    assert second.overrides == ("a.loss={kind: hinge}", "b.loss=1")
    four = list_combinations(["a.seed=1,2", "b.seed=3,4"])
    assert four[3].settings == {"a.seed": "2", "b.seed": "4"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "A sweep needs a key with several values"),
        (["a=1"], "A sweep needs a key with several values"),
        (["a="], "--set a=: a value is missing"),
        (["a=1,"], "--set a=1,: a value is missing"),
        (["a=1,,2"], "the values are not YAML"),
        (["a=1],[2"], "the values are not YAML"),
        (["a"], "--set a: write it as --set stages.train.loss.beta=0.05,0.1,0.3"),
        (["a=1,2", "a=3"], "a is set twice"),
    ],
)
def test_a_mistake_is_named(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        list_combinations(options)
    assert message in str(caught.value)
