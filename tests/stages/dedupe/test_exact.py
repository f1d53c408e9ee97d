"""Exact duplicates, label conflicts, cycles, caps, and the layout of prompts over shards."""

import random
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tests.stages.dedupe.running import (
    Rows,
    at,
    dedupe,
    kept_places,
    numbered,
    rejected_codes,
    warnings_of,
)
from tests.stages_rows import message, pair_row
from tests.stages_running import read_rows


def test_copies_go_and_the_kept_one_is_named(tmp_path: Path) -> None:
    rows = [at(0, pair_row("q", "a", "b")), at(1, pair_row("q", "a", "b"))]
    out = dedupe(tmp_path, [rows])
    [kept], [dropped] = read_rows(out), read_rows(out, "rejected")
    assert kept == rows[0]
    assert (dropped["code"], dropped["source_row"], dropped["similarity"]) == ("DUP_EXACT", 1, 1.0)
    assert dropped["kept_pair_id"] == kept["pair_id"]


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("a\nb", "a\r\nb  \n", True),
        ("cafe\u0301", "café", True),
        ("x != y", "x == y", False),
        ("C++", "c++", False),
        ("    indented", "indented", False),
        ("a  b", "a b", False),
    ],
)
def test_only_invisible_differences_are_ignored(
    tmp_path: Path, one: str, other: str, is_same: bool
) -> None:
    """The prompt_ids of the two rows differ, so the rows are in different shards."""
    rows = [at(0, pair_row(one, "yes", "no")), at(1, pair_row(other, "yes", "no"))]
    out = dedupe(tmp_path, [rows[:1], rows[1:]], rows_per_shard=1, near=None)
    assert len(read_rows(out)) == (1 if is_same else 2)
    assert len(out.committed()) == 2


@pytest.mark.parametrize("near", [None, {}])
def test_order_of_keys_and_white_space_of_json_are_ignored(
    tmp_path: Path, near: dict[str, Any] | None
) -> None:
    def row(calls: str, tools: str) -> dict[str, Any]:
        return pair_row("q", [message("assistant", None, tool_calls=calls)], "no", tools=tools)

    spelled = [
        row('[{"name":"f","arguments":{"b":1,"a":null}}]', '[{"name":"f","strict":true}]'),
        row('[{"arguments": {"a": null, "b": 1}, "name": "f"}]', '[{"strict": true, "name": "f"}]'),
        row('[{"name":"f","arguments":{"b":1.0,"a":null}}]', '[{"name":"f","strict":true}]'),
        row('[{"name":"f","arguments":{"b":1}}]', '[{"name":"f","strict":true}]'),
    ]
    rows = [at(number, pair) for number, pair in enumerate(spelled)]
    dropped = read_rows(dedupe(tmp_path, [rows], near=near), "rejected")
    exact = [row["source_row"] for row in dropped if row["code"] == "DUP_EXACT"]
    assert exact == [1]


@pytest.mark.parametrize("near", [None, {}])
def test_prompts_that_differ_in_system_or_tools_alone_are_no_conflict(
    tmp_path: Path, near: dict[str, Any] | None
) -> None:
    """Long answers, so that their similarity is far above the threshold."""
    question = message("user", " ".join(f"word{k}" for k in range(50)))
    pirate = [message("system", "Speak like a pirate."), question]
    plain = [message("system", "Speak plainly."), question]
    answers = ["yes " + question["content"], "no " + question["content"]]
    rows = [
        at(0, pair_row(pirate, *answers)),
        at(1, pair_row(plain, *answers[::-1])),
        at(2, pair_row([question], *answers)),
        at(3, pair_row([question], *answers[::-1], tools='[{"name":"f"}]')),
    ]
    assert len(read_rows(dedupe(tmp_path, [rows], near=near))) == 4


def test_both_sides_of_a_label_conflict_go(tmp_path: Path) -> None:
    rows = [
        at(0, pair_row("q", "a", "b")),
        at(1, pair_row("q", "b", "a ")),
        at(2, pair_row("q", "a", "b")),
        at(3, pair_row("q", "a", "c")),
    ]
    out = dedupe(tmp_path, [rows])
    assert rejected_codes(out) == dict.fromkeys([0, 1, 2], "LABEL_CONFLICT")
    assert [row["source_row"] for row in read_rows(out)] == [3]
    assert {row["kept_pair_id"] for row in read_rows(out, "rejected")} == {None}


def test_tools_are_part_of_the_prompt(tmp_path: Path) -> None:
    rows = [at(0, pair_row("q", "a", "b")), at(1, pair_row("q", "b", "a", tools='[{"name":"f"}]'))]
    assert len(read_rows(dedupe(tmp_path, [rows]))) == 2


def test_survivor_by_source_then_margin_then_place(tmp_path: Path) -> None:
    def survivor(name: str, rows: Rows, **config: Any) -> int:
        [kept] = read_rows(dedupe(tmp_path / name, [rows], **config))
        return int(kept["source_row"])

    pair = pair_row("q", "a", "b")
    small = {**pair, "source": "web", "margin": 1.0, "source_row": 0}
    large = {**pair, "source": "web", "margin": -3.0, "source_row": 1}
    human = {**pair, "source": "human", "margin": None, "source_row": 2}
    assert survivor("margin", [small, large, human]) == 1
    assert survivor("source", [small, large, human], source_priority=["human"]) == 2
    assert survivor("place", [at(5, pair), at(3, pair), at(4, pair)]) == 3


def test_a_prompt_is_in_one_shard_and_order_of_arrival_does_not_matter(
    tmp_path: Path,
) -> None:
    """Every file has the same bytes for any order and split of the input."""
    generator = random.Random(0)
    rows = [
        at(place, pair_row(f"question {place % 20}", f"good {place % 33}", f"bad {place % 7}"))
        for place in range(120)
    ]
    shuffled = generator.sample(rows, len(rows))
    cuts = {"one": [rows], "three": [shuffled[:50], shuffled[50:60], shuffled[60:]]}
    outs = {name: dedupe(tmp_path / name, cut, rows_per_shard=30) for name, cut in cuts.items()}
    files = {
        name: [record.files for _, record in sorted(out.committed().items())]
        for name, out in outs.items()
    }
    assert files["one"] == files["three"]
    assert len(files["one"]) == 4
    shards_of_prompt: dict[str, set[int]] = {}
    for index in range(4):
        found = [row["prompt_id"] for row in read_rows(outs["one"], only=index)]
        assert found == sorted(found)
        for prompt in found:
            shards_of_prompt.setdefault(prompt, set()).add(index)
    assert all(len(shards) == 1 for shards in shards_of_prompt.values())
    assert len(read_rows(outs["one"])) + len(read_rows(outs["one"], "rejected")) == len(rows)


def test_no_rows_give_empty_files_that_polars_reads(tmp_path: Path) -> None:
    out = dedupe(tmp_path, [[]])
    assert pl.read_parquet(f"{out.folder.path}/data/*.parquet").height == 0
    assert pl.read_parquet(f"{out.folder.path}/rejected/*.parquet").height == 0


def test_multi_turn_prompts_are_compared_message_by_message(tmp_path: Path) -> None:
    together = [message("user", "a\nb")]
    apart = [message("user", "a"), message("assistant", "x"), message("user", "b")]
    rows = [at(0, pair_row(together, "y", "n")), at(1, pair_row(apart, "y", "n"))]
    assert len(read_rows(dedupe(tmp_path, [rows]))) == 2


@pytest.mark.parametrize(
    ("policy", "kept"),
    [("drop_all", []), ("majority", [0]), ("larger_margin", [2])],
)
def test_conflict_policies(tmp_path: Path, policy: str, kept: list[int]) -> None:
    """a > b occurs twice, with margins 1 and none; b > a occurs once, with margin 2."""
    rows = [
        at(0, pair_row("q", "a", "b"), margin=1.0),
        at(1, pair_row("q", "a", "b")),
        at(2, pair_row("q", "b", "a"), margin=2.0),
    ]
    out = dedupe(tmp_path, [rows], conflict_policy=policy)
    assert kept_places(out) == kept
    rejected = {row["source_row"]: row for row in read_rows(out, "rejected")}
    codes = {place: row["code"] for place, row in rejected.items()}
    expected = {
        "drop_all": dict.fromkeys([0, 1, 2], "LABEL_CONFLICT"),
        "majority": {1: "DUP_EXACT", 2: "LABEL_CONFLICT"},
        "larger_margin": {0: "LABEL_CONFLICT", 1: "LABEL_CONFLICT"},
    }
    assert codes == expected[policy]
    winner = rows[kept[0]]["pair_id"] if kept else None
    assert {row["kept_pair_id"] for row in rejected.values()} == {winner}


@pytest.mark.parametrize(
    ("policy", "margins"),
    [
        ("majority", (5.0, 1.0)),
        ("larger_margin", (2.0, 2.0)),
        ("larger_margin", (2.0, None)),
        ("larger_margin", (None, None)),
    ],
)
def test_a_conflict_that_the_policy_cannot_settle_loses_all_rows(
    tmp_path: Path, policy: str, margins: tuple[float | None, float | None]
) -> None:
    rows = [
        at(0, pair_row("q", "a", "b"), margin=margins[0]),
        at(1, pair_row("q", "b", "a"), margin=margins[1]),
    ]
    assert kept_places(dedupe(tmp_path, [rows], conflict_policy=policy)) == []


def test_rows_of_a_preference_cycle_stay_with_a_warning(tmp_path: Path) -> None:
    """a > b > c > d > a is a cycle; a > e leads out of it, and f > a into it. The other prompt's
    pairs would close a > e > a only if prompts were confused."""
    answers = ["ab", "bc", "cd", "da", "ae", "fa"]
    rows = numbered(*[("q", pair[0], pair[1]) for pair in answers], ("other", "e", "a"))
    out = dedupe(tmp_path, [rows[:3], rows[3:]])
    assert kept_places(out) == list(range(7))
    assert warnings_of(out) == {place: ["PREFERENCE_CYCLE"] for place in range(4)}
    assert sum(r.counts.warnings["PREFERENCE_CYCLE"] for r in out.committed().values()) == 4


def test_a_cycle_is_one_of_answers_that_read_the_same(tmp_path: Path) -> None:
    rows = numbered(("q", "a", "b"), ("q ", "b\n", "c"), ("q", "c ", "a"))
    assert set(warnings_of(dedupe(tmp_path, [rows], rows_per_shard=1))) == {0, 1, 2}


def test_a_line_of_preferences_is_no_cycle(tmp_path: Path) -> None:
    rows = numbered(("q", "a", "b"), ("q", "b", "c"), ("q", "a", "c"))
    assert warnings_of(dedupe(tmp_path, [rows])) == {}


def test_a_preference_between_two_cycles_lies_on_none(tmp_path: Path) -> None:
    pairs = ["ab", "bc", "ca", "cd", "de", "ef", "fd"]
    rows = numbered(*[("q", pair[0], pair[1]) for pair in pairs])
    assert set(warnings_of(dedupe(tmp_path, [rows]))) == {0, 1, 2, 4, 5, 6}


def test_two_cycles_that_touch_are_both_found(tmp_path: Path) -> None:
    """a > b > c > a and a > d > e > a share one answer; g > h > i is connected to c."""
    pairs = ["ab", "bc", "ca", "ad", "de", "ea", "cg", "gh", "hi"]
    rows = numbered(*[("q", pair[0], pair[1]) for pair in pairs])
    assert set(warnings_of(dedupe(tmp_path, [rows]))) == set(range(6))


def test_a_prompt_keeps_its_best_pairs(tmp_path: Path) -> None:
    margins = [1.0, 5.0, None, 3.0]
    rows = [
        at(place, pair_row("q", f"good {place}", f"bad {place}"), margin=margin)
        for place, margin in enumerate(margins)
    ]
    others = [at(9, pair_row("other", "a", "b"))]
    out = dedupe(tmp_path, [rows, others], max_pairs_per_prompt=2, near=None)
    assert kept_places(out) == [1, 3, 9]
    assert rejected_codes(out) == {0: "PROMPT_CAP", 2: "PROMPT_CAP"}


def test_equal_pairs_of_one_input_row_are_told_apart(tmp_path: Path) -> None:
    rows = [at(4, pair_row("q", "a", "b"))] * 3
    out = dedupe(tmp_path, [rows])
    assert len(read_rows(out)) == 1
    assert len(read_rows(out, "rejected")) == 2


@pytest.mark.parametrize("content", [None, ""])
def test_answers_that_call_tools_are_compared_by_their_calls(
    tmp_path: Path, content: str | None
) -> None:
    def call(name: str) -> list[dict[str, Any]]:
        return [message("assistant", content, tool_calls=f'[{{"name":"{name}"}}]')]

    rows = [
        at(0, pair_row("q", call("look"), call("wait"))),
        at(1, pair_row("q", call("read"), call("wait"))),
        at(2, pair_row("q", call("look"), call("wait"))),
    ]
    assert rejected_codes(dedupe(tmp_path, [rows])) == {2: "DUP_EXACT"}
