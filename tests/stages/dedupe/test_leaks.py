"""Training pairs whose prompt is too close to a held-out one."""

from pathlib import Path
from typing import Any

import pytest

from tests.stages.dedupe.running import (
    at,
    dedupe,
    kept_places,
    rejected_codes,
    replace_word,
    say,
)
from tests.stages_rows import message, pair_row
from tests.stages_running import read_rows

PROMPT = say(60, 1)


def answered(prompt: Any, seed: int, split: str = "train") -> dict[str, Any]:
    return pair_row(prompt, say(20, seed), say(20, seed + 100), split=split)


def numbered(*rows: dict[str, Any]) -> list[dict[str, Any]]:
    return [at(place, row) for place, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("prompt", "is_leak"),
    [
        (PROMPT, True),
        (f"{PROMPT} \r\n", True),
        (PROMPT.upper(), True),
        (replace_word(replace_word(PROMPT, 20), 40), True),
        (f"{PROMPT} {say(20, 2)}", False),
        (say(60, 3), False),
    ],
    ids=["equal", "white space", "capitals", "two words", "a third longer", "another"],
)
def test_training_pairs_of_held_out_prompts_are_rejected(
    tmp_path: Path, prompt: str, is_leak: bool
) -> None:
    """Two of 60 words changed: 52 / 64 = 0.81; twenty more words: 58 / 78 = 0.74."""
    rows = numbered(answered(PROMPT, 10, "eval"), answered(prompt, 11), answered(prompt, 12))
    out = dedupe(tmp_path, [rows[:1], rows[1:]], rows_per_shard=1)
    assert kept_places(out) == ([0] if is_leak else [0, 1, 2])
    rejected = read_rows(out, "rejected")
    assert {row["code"] for row in rejected} == ({"SPLIT_LEAK"} if is_leak else set())
    assert {row["kept_pair_id"] for row in rejected} <= {rows[0]["pair_id"]}


def test_leaks_stay_where_they_are_not_sought(tmp_path: Path) -> None:
    rows = numbered(answered(PROMPT, 10, "eval"), answered(PROMPT, 11))
    assert kept_places(dedupe(tmp_path, [rows], leaks=None)) == [0, 1]


def test_the_held_out_copy_of_a_pair_stays(tmp_path: Path) -> None:
    """Also where only the answers make the training pair similar, and it has the larger margin."""
    short = say(6, 2)
    rows = numbered(
        {**answered(PROMPT, 10), "margin": 9.0},
        answered(PROMPT, 10, "eval"),
        pair_row(short, say(60, 4), say(60, 5), split="train", margin=9.0),
        pair_row(replace_word(short, 3), say(60, 4), say(60, 5), split="eval"),
    )
    out = dedupe(tmp_path, [rows])
    assert kept_places(out) == [1, 3]
    assert rejected_codes(out) == {0: "SPLIT_LEAK", 2: "DUP_NEAR"}


def test_a_system_message_hides_no_leak_and_makes_none(tmp_path: Path) -> None:
    def asked(system: str, prompt: str) -> list[dict[str, Any]]:
        return [message("system", system), message("user", prompt)]

    rows = numbered(
        answered(asked(say(500, 5), PROMPT), 10, "eval"),
        answered(asked("be kind", PROMPT), 11),
        answered(PROMPT, 12),
        answered(asked(say(500, 5), say(20, 6)), 13),
    )
    out = dedupe(tmp_path, [rows])
    assert rejected_codes(out) == {1: "SPLIT_LEAK", 2: "SPLIT_LEAK"}


def test_the_beginning_of_a_held_out_conversation_leaks_when_it_is_most_of_it(
    tmp_path: Path,
) -> None:
    def talk(num_turns: int) -> list[dict[str, Any]]:
        roles = ("user", "assistant")
        return [message(roles[k % 2], say(30, 20 + k)) for k in range(num_turns)]

    rows = numbered(answered(talk(13), 10, "eval"), answered(talk(11), 11), answered(talk(3), 12))
    assert rejected_codes(dedupe(tmp_path, [rows])) == {1: "SPLIT_LEAK"}


def test_similar_prompts_within_a_split_are_no_leak(tmp_path: Path) -> None:
    rows = numbered(
        answered(PROMPT, 10),
        answered(replace_word(PROMPT, 3), 11),
        answered(say(60, 8), 12, "eval"),
        answered(replace_word(say(60, 8), 3), 13, "eval"),
    )
    assert kept_places(dedupe(tmp_path, [rows])) == [0, 1, 2, 3]


@pytest.mark.parametrize("is_swapped", [False, True])
def test_a_leaking_pair_rejects_no_near_duplicate(tmp_path: Path, is_swapped: bool) -> None:
    """Row 1 leaks; row 2 resembles it, but its prompt is too far from the held-out one."""
    answers = [say(80, 4), say(80, 5)]
    near = replace_word(replace_word(PROMPT, 20), 40)
    far = replace_word(replace_word(near, 5), 30)
    rows = numbered(
        answered(PROMPT, 10, "eval"),
        {**pair_row(near, answers[0], answers[1]), "margin": 9.0},
        pair_row(far, answers[is_swapped], answers[not is_swapped]),
    )
    assert rejected_codes(dedupe(tmp_path, [rows])) == {1: "SPLIT_LEAK"}
