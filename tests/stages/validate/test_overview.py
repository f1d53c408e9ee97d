"""Statistics of all pairs are right for any number of pairs and shards."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stages.validate.overview import HeavyHitters, ShardOverview
from stages.validate.rules.pair_view import PairView
from tests.stages.validate.running import convert_row, jsonl, validate, write

STRINGS = "prompt_completion_strings"


def found_in(tmp_path: Path, rows: list[dict[str, Any]], **config: Any) -> dict[str, Any]:
    file = write(tmp_path / "a.jsonl", jsonl(rows))
    outcome = validate(tmp_path / "out", file, format=STRINGS, **config)
    found: dict[str, Any] = outcome.summary["findings"]
    return found


def row(number: int, **more: object) -> dict[str, Any]:
    return {"prompt": f"Q{number}", "chosen": f"good {number}", "rejected": "bad", **more}


def codes(found: dict[str, Any]) -> list[str]:
    return [notable["code"] for notable in found["notable"]]


@pytest.mark.parametrize("split_bytes", [100, 1 << 20])
def test_numbers_are_those_counted_by_hand(split_bytes: int, tmp_path: Path) -> None:
    """Five pairs, chosen 4 + 2 + 4 + 4 + 12 = 26 characters, rejected 2 + 4 + 4 + 4 + 28 = 42."""
    rows = [
        {"prompt": "Q", "chosen": "same", "rejected": "no", "source": "a"},
        {"prompt": "Q", "chosen": "ok", "rejected": "nope", "source": "a"},
        {"prompt": "Q", "chosen": " same\n", "rejected": "then", "source": "b"},
        {"prompt": "R", "chosen": "same", "rejected": "else", "source": "a"},
        {
            "prompt": "Q",
            "chosen": "Here you go.",
            "rejected": "I cannot assist you in this.",
            "source": "a",
        },
        {"prompt": "Q", "chosen": " ", "rejected": "rejected, so not counted", "source": "c"},
    ]
    assert found_in(tmp_path, rows, split_bytes=split_bytes) == {
        "num_pairs": 5,
        "chosen_longer": 0.2,
        "rejected_longer": 0.4,
        "mean_chosen_chars": 5.2,
        "mean_rejected_chars": 8.4,
        "only_chosen_declines": 0.0,
        "only_rejected_declines": 0.2,
        "near_identical": 0.0,
        "sources": [
            {"text": "a", "num_pairs": 4, "share": 0.8},
            {"text": "b", "num_pairs": 1, "share": 0.2},
        ],
        "repeated_chosen": [{"text": "same", "num_pairs": 3, "share": 0.6}],
        "notable": [
            {
                "code": "ONE_SIDED_REFUSALS",
                "found": "only the chosen answer in 0.0%, only the rejected in 20.0%",
                "when": "in more than 10 % of the pairs only one side declines or speaks as an AI "
                "model, and four of five of these are on one side",
                "advice": "Training will mostly teach to refuse, or not to. Compare refusals "
                "before and after training on harmless questions.",
            }
        ],
    }


def test_no_pair_is_nothing_notable(tmp_path: Path) -> None:
    found = found_in(tmp_path, [row(0, chosen=" ")])
    assert found["num_pairs"] == 0
    assert (found["chosen_longer"], found["sources"], found["notable"]) == (0.0, [], [])


@pytest.mark.parametrize(
    ("num_longer", "num_pairs", "is_noted"), [(71, 100, True), (70, 100, False), (99, 99, False)]
)
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_length_bias_is_noted_above_its_share(
    num_longer: int, num_pairs: int, is_noted: bool, side: str, tmp_path: Path
) -> None:
    lengths = ["long" if at < num_longer else "s" for at in range(num_pairs)]
    other = "rejected" if side == "chosen" else "chosen"
    rows = [
        row(at, **{side: f"{at:03} {word}", other: f"{at:03} ab"})
        for at, word in enumerate(lengths)
    ]
    assert codes(found_in(tmp_path, rows)) == ["LENGTH_BIAS"] * is_noted


@pytest.mark.parametrize(("num_large", "is_noted"), [(9, True), (8, False), (10, False)])
def test_source_skew_is_noted_where_one_of_several_has_most(
    num_large: int, is_noted: bool, tmp_path: Path
) -> None:
    rows = [row(at, source="large" if at < num_large else "small") for at in range(10)]
    assert codes(found_in(tmp_path, rows)) == ["SOURCE_SKEW"] * is_noted


@pytest.mark.parametrize(
    ("num_same", "num_pairs", "is_noted"), [(10, 99, True), (9, 99, False), (10, 1000, False)]
)
def test_an_answer_chosen_everywhere_is_noted(
    num_same: int, num_pairs: int, is_noted: bool, tmp_path: Path
) -> None:
    rows = [
        row(
            at, chosen=f"{'same' if at < num_same else at}\x1b[31m", rejected=f"{at} longer than it"
        )
        for at in range(num_pairs)
    ]
    found = found_in(tmp_path, rows)
    assert ("CHOSEN_REPEATED" in codes(found)) is is_noted
    (repeated,) = found["repeated_chosen"]
    assert repeated["num_pairs"] == num_same
    assert repeated["text"] == "same\\x1b[31m"


def test_nearly_equal_answers_are_noted_as_a_share(tmp_path: Path) -> None:
    near = {"chosen": "a b c d e", "rejected": "e d c b a"}
    assert codes(found_in(tmp_path / "1", [row(0, **near), *map(row, range(1, 19))])) == [
        "NEARLY_EQUAL_ANSWERS"
    ]
    found = found_in(tmp_path / "2", [row(0, **near), *map(row, range(1, 20))])
    assert (found["near_identical"], codes(found)) == (0.05, [])


@pytest.mark.parametrize("level", ["off", "reject"])
def test_nearly_equal_answers_are_no_share_where_they_are_not_warned_of(
    level: str, tmp_path: Path
) -> None:
    found = found_in(tmp_path, [row(0)], rules={"CHOSEN_NEAR_REJECTED": level})
    assert found["near_identical"] is None


def test_what_is_held_has_a_bound_and_long_answers_are_told_apart() -> None:
    overview = ShardOverview()
    for at in range(3000):
        texts = {"prompt": "Q", "chosen": f"{at} {'x' * 5000} {at % 2}", "rejected": "B"}
        overview.add(PairView(convert_row(texts, STRINGS)), f"source {at}")
    rows = overview.rows()
    assert sum(row["kind"] == "chosen" for row in rows) <= 1000
    assert sum(row["kind"] == "source" for row in rows) <= 1000
    assert max(len(row["text"]) for row in rows if row["kind"] != "sum") <= 120

    both = ShardOverview()
    for ending in "aab":
        texts = {"prompt": "Q", "chosen": "x" * 5000 + ending, "rejected": "B"}
        both.add(PairView(convert_row(texts, STRINGS)), "s")
    assert [row["count"] for row in both.rows() if row["kind"] == "chosen"] == [2, 1]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    shards=st.lists(st.lists(st.sampled_from("abcdefghij"), max_size=40), max_size=5),
    capacity=st.integers(1, 6),
)
@example(shards=[["a", "a", "a"], ["b"]], capacity=1)
def test_no_counter_is_too_high_and_none_is_short_by_more_than_its_share(
    shards: list[list[str]], capacity: int
) -> None:
    """The paper's bound, n / (capacity + 1), holds over all shards in any order."""
    sketches = []
    for values in shards:
        sketch = HeavyHitters(capacity=capacity)
        for value in values:
            sketch.add(value)
        sketches.append(sketch.counts)
    merged = HeavyHitters.merge(sketches, capacity=capacity).counts
    truth = Counter(value for values in shards for value in values)
    assert len(merged) <= capacity
    for value, count in truth.items():
        assert count - truth.total() / (capacity + 1) <= merged.get(value, 0) <= count
    assert set(merged) <= set(truth)


def test_a_frequent_value_is_found_among_many_rare_ones() -> None:
    """2 % of 50,000 values, the others once. Its count may be too low by 50,000 / 1,001 = 49."""
    values = ["frequent"] * 1000 + [f"rare {at}" for at in range(49_000)]
    random.Random(0).shuffle(values)
    sketch = HeavyHitters()
    for value in values:
        sketch.add(value)
    assert 951 <= sketch.counts["frequent"] <= 1000
