"""Unpaired rows make pairs with rows of their prompt, wherever those stand, and none is lost."""

import json
import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.errors import DataError
from stages.validate import unpaired
from stages.validate.formats import FORMATS
from tests.stages.validate.running import GOOD, Outcome, jsonl, spoken, validate, write

Row = dict[str, Any]
QUESTION = {"role": "user", "content": "Tea?"}
TURN = {"from": "human", "value": "Tea?"}


def answer(text: str) -> Row:
    return {"role": "assistant", "content": text}


# One good answer, Yes, and one bad one, No, to one question.
LAYOUTS: dict[str, list[list[Row]]] = {
    "unpaired_completions": [
        [
            {"prompt": "Tea?", "completion": "Yes.", "label": True},
            {"prompt": "Tea?", "completion": "No.", "label": False},
        ],
        [
            {"prompt": [QUESTION], "completion": [answer("Yes.")], "label": 1},
            {"prompt": [QUESTION], "completion": [answer("No.")], "label": 0},
        ],
        [
            {"prompt": "Tea?", "completion": [QUESTION, answer("Yes.")], "label": "True"},
            {"prompt": "Tea?", "completion": [QUESTION, answer("No.")], "label": "0"},
        ],
    ],
    "unpaired_outputs": [
        [
            {"type": "binary_feedback", "prompt": [QUESTION], "output": [answer(t)], "label": good}
            for t, good in (("Yes.", 1), ("No.", 0))
        ]
    ],
    "unpaired_messages": [
        [
            {"messages": [QUESTION, answer(t)], "label": good}
            for t, good in (("Yes.", True), ("No.", False))
        ]
    ],
    "unpaired_tagged_messages": [
        [
            {"messages": [QUESTION, answer(t)], "kto_tag": good}
            for t, good in (("Yes.", True), ("No.", False))
        ]
    ],
    "unpaired_tagged_turns": [
        [
            {"conversations": [TURN, {"from": "gpt", "value": t}], "kto_tag": good}
            for t, good in (("Yes.", True), ("No.", False))
        ]
    ],
    "unpaired_tagged_alpaca": [
        [
            {"instruction": "Tea?", "input": "", "output": t, "kto_tag": good}
            for t, good in (("Yes.", True), ("No.", False))
        ]
    ],
}


def run(tmp_path: Path, rows: list[Any], **config: Any) -> Outcome:
    return validate(tmp_path / "out", write(tmp_path / "a.jsonl", jsonl(rows)), **config)


def row(prompt: str, completion: object, label: object, **more: object) -> Row:
    return {"prompt": prompt, "completion": completion, "label": label, **more}


def list_pairs(outcome: Outcome) -> list[tuple[str, str, str]]:
    return [
        (p["prompt"][-1]["content"], p["chosen"][-1]["content"], p["rejected"][-1]["content"])
        for p in outcome.pairs
    ]


def test_every_unpaired_layout_is_here() -> None:
    assert set(LAYOUTS) == {name for name, format_ in FORMATS.items() if format_.is_unpaired}


@pytest.mark.parametrize(
    ("name", "rows"), [(name, rows) for name, cases in LAYOUTS.items() for rows in cases]
)
def test_two_answers_of_a_layout_are_a_pair(name: str, rows: list[Row], tmp_path: Path) -> None:
    for at, order in enumerate((rows, rows[::-1])):
        outcome = run(tmp_path / str(at), order)
        assert list(outcome.summary["formats"].values()) == [name]
        (pair,) = outcome.pairs
        assert spoken(pair["prompt"]) == [("user", "Tea?")]
        assert spoken(pair["chosen"]) == [("assistant", "Yes.")]
        assert spoken(pair["rejected"]) == [("assistant", "No.")]
        assert pair["warnings"] == []
        assert outcome.rejected == []
        assert (outcome.counts.num_in, outcome.counts.num_rows_kept) == (2, 2)


def test_every_row_is_in_a_pair_or_rejected_wherever_its_opposite_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 rows of 40 prompts in three files of many parts, against pairs counted by hand.

    A prompt with g good and b bad answers gives max(g, b) pairs, or none if g or b is 0.
    """
    drawn = random.Random(7)
    rows = [row(f"Q{drawn.randrange(40)}", f"A{at}", drawn.random() < 0.6) for at in range(200)]
    files = [write(tmp_path / f"{at}.jsonl", jsonl(rows[at::3])) for at in range(3)]
    counted: dict[str, Counter[bool]] = defaultdict(Counter)
    for one in rows:
        counted[one["prompt"]][one["label"]] += 1
    labels = {one["completion"]: one["label"] for one in rows}
    prompts = {one["completion"]: one["prompt"] for one in rows}
    whole = validate(tmp_path / "whole", *files)
    monkeypatch.setattr(unpaired, "_RUN_BYTES", 200)
    cut = validate(tmp_path / "cut", *files, split_bytes=500)
    for out in (whole, cut):
        pairs = list_pairs(out)
        assert all(labels[good] and not labels[bad] for _, good, bad in pairs)
        assert all(prompts[good] == prompts[bad] == prompt for prompt, good, bad in pairs)
        num_pairs = Counter(prompt for prompt, _, _ in pairs)
        for prompt, kinds in counted.items():
            both = kinds[True] and kinds[False]
            assert num_pairs[prompt] == (max(kinds.values()) if both else 0)
        used = {text for _, good, bad in pairs for text in (good, bad)}
        lost = [json.loads(rejected["raw"])["completion"] for rejected in out.rejected]
        assert sorted([*used, *lost]) == sorted(labels)
        assert {rejected["code"] for rejected in out.rejected} == {"UNPAIRED_NO_OPPOSITE"}
        assert out.counts.num_in == out.counts.num_rows_kept + out.counts.num_rejected == 200
        assert out.counts.num_out >= out.counts.num_rows_kept - out.counts.num_rows_joined
    assert sorted(list_pairs(whole)) == sorted(list_pairs(cut))
    assert len(cut.shards) > len(whole.shards) == 1


@pytest.mark.parametrize("is_good", [True, False])
def test_the_shorter_list_is_used_again_from_its_start(is_good: bool, tmp_path: Path) -> None:
    """Five answers of one kind and two of the other, in source order."""
    rows = [row("Q", f"L{at}", is_good) for at in range(5)]
    rows += [row("Q", f"S{at}", not is_good) for at in range(2)]
    outcome = run(tmp_path, rows)
    pairs = [{good, bad} for _, good, bad in list_pairs(outcome)]
    expected = [{"L0", "S0"}, {"L1", "S1"}, {"L2", "S0"}, {"L3", "S1"}, {"L4", "S0"}]
    assert pairs == expected


def test_faulty_rows_are_rejected_with_their_own_codes(tmp_path: Path) -> None:
    rows = [
        row("Tea?", "Yes.", True),
        b"{",
        row("Tea?", "No.", "maybe"),
        row("Tea?", "No.", None),
        row("Tea?", None, False),
        row("Tea?", " ", False),
        row("Coffee?", "Yes.", True),
        row("Milk?", "Yes.", True),
        row("Milk?", "Yes. ", False),
        GOOD,
    ]
    outcome = run(tmp_path, rows, format="unpaired_completions")
    codes = {rejected["source_row"]: rejected["code"] for rejected in outcome.rejected}
    assert codes == {
        0: "REJECTED_EMPTY",
        1: "JSON_INVALID",
        2: "LABEL_INVALID",
        3: "LABEL_MISSING",
        4: "FIELD_NULL",
        5: "REJECTED_EMPTY",
        6: "UNPAIRED_NO_OPPOSITE",
        7: "CHOSEN_EQ_REJECTED",
        8: "CHOSEN_EQ_REJECTED",
        9: "SCHEMA_MISMATCH",
    }
    kept = {rejected["source_row"]: rejected["raw"] for rejected in outcome.rejected}
    assert kept[1] == b"{"
    assert json.loads(kept[6]) == rows[6]


def test_a_row_with_one_good_pair_is_kept_and_its_pair_says_so(tmp_path: Path) -> None:
    """The good answer pairs with the first bad answer and, again, with the empty one."""
    outcome = run(tmp_path, [row("Q", "A", 1), row("Q", "B", 0), row("Q", " ", 0)])
    assert list_pairs(outcome) == [("Q", "A", "B")]
    assert outcome.pairs[0]["warnings"] == ["PAIR_DROPPED"]
    assert [(r["source_row"], r["code"]) for r in outcome.rejected] == [(2, "REJECTED_EMPTY")]
    assert outcome.counts.more["num_pairs_dropped"] == 1


def test_a_good_row_is_not_lost_by_the_fault_of_its_partner(tmp_path: Path) -> None:
    rows = [row("Q", "A", 1), row("Q", "B", 1), row("Q", " ", 0), row("Q", "D", 0)]
    outcome = run(tmp_path, rows)
    assert sorted(list_pairs(outcome)) == [("Q", "A", "D"), ("Q", "B", "D")]
    assert [(r["source_row"], r["code"]) for r in outcome.rejected] == [(2, "REJECTED_EMPTY")]


def test_prompts_that_differ_in_system_or_tools_are_not_mixed(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    rows = [
        {"messages": [QUESTION, answer("Yes.")], "label": 1, "tools": tools},
        {"messages": [QUESTION, answer("No.")], "label": 0},
    ]
    outcome = run(tmp_path, rows)
    assert [rejected["code"] for rejected in outcome.rejected] == ["UNPAIRED_NO_OPPOSITE"] * 2


def test_a_pair_keeps_where_both_answers_came_from(tmp_path: Path) -> None:
    good = write(tmp_path / "good.jsonl", jsonl([row("Q", "A", 1, id="g", lang="en", weight=3)]))
    bad = write(tmp_path / "bad.jsonl", jsonl([row("Q", "B", 0, id="b", user=7)]))
    blocks: list[Row] = [{"path": str(good), "weight": 2.0, "source": "mine"}, {"path": str(bad)}]
    (pair,) = validate(tmp_path / "out", *blocks).pairs
    assert (pair["source"], pair["source_id"]) == ("mine", "g")
    assert (pair["source_file"], pair["source_row"]) == (good.as_posix(), 0)
    assert pair["weight"] == (3 * 2.0 + 1) / 2
    assert json.loads(pair["extra"]) == {
        "chosen": {"lang": "en"},
        "rejected": {"user": 7},
        "rejected_from": {"source_file": bad.as_posix(), "source_row": 0, "source_id": "b"},
    }


def test_parquet_and_other_layouts_stand_beside_each_other(tmp_path: Path) -> None:
    rows = [row("Q", "A", True), row("Q", "B", False)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    plain = write(tmp_path / "b.jsonl", jsonl([GOOD]))
    outcome = validate(tmp_path / "out", tmp_path / "a.parquet", plain)
    assert sorted(list_pairs(outcome)) == [("Q", "A", "B"), ("What is 2 + 2?", "4", "5")]
    assert sorted(outcome.summary["formats"].values()) == [
        "prompt_completion_strings",
        "unpaired_completions",
    ]


def test_data_without_opposites_fails_and_says_that_it_is_unpaired(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"UNPAIRED_NO_OPPOSITE: 2 rows. The row is unpaired"):
        run(tmp_path, [row("Q", "A", 1), row("R", "B", 0)], max_reject_fraction=0.1)
