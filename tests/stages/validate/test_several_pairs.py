"""Every row is accounted for when rows give several pairs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from stages.validate.findings import RowFault
from stages.validate.formats.pair_drafts import PairDraft
from stages.validate.formats.row_reader import RowReader
from tests.stages.validate.running import jsonl, validate, write

STRINGS = "prompt_completion_strings"


@pytest.fixture(autouse=True)
def reader_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a format whose rows have any number of answers, the best one first."""

    def read(_: RowReader, row: Mapping[str, Any]) -> list[PairDraft]:
        best, *others = row["answers"]
        if not others:
            raise RowFault("SCHEMA_MISMATCH", "answers", "only one")
        pairs = ({"prompt": row["prompt"], "chosen": best, "rejected": other} for other in others)
        return [draft for pair in pairs for draft in read_one(RowReader(format=STRINGS), pair)]

    read_one = RowReader.read
    monkeypatch.setattr(RowReader, "read", read)


def row(*answers: str, prompt: str = "Q") -> dict[str, Any]:
    return {"prompt": prompt, "answers": list(answers)}


def test_all_pairs_of_a_row_are_written_in_its_order(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", jsonl([row("A", "B", "C"), row("D", "E")]))
    outcome = validate(tmp_path / "out", file, format=STRINGS)
    found = [(p["source_row"], p["rejected"][0]["content"]) for p in outcome.pairs]
    assert found == [(0, "B"), (0, "C"), (1, "E")]
    assert (outcome.counts.num_in, outcome.counts.num_out) == (2, 3)
    assert outcome.counts.num_rows_kept == 2
    assert outcome.summary["findings"]["num_pairs"] == 3


def test_pairs_that_pass_say_that_others_of_their_row_did_not(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", jsonl([row("A", "B", " ", "A", "C"), row("D", "E")]))
    outcome = validate(tmp_path / "out", file, format=STRINGS)
    found = [(p["rejected"][0]["content"], p["warnings"]) for p in outcome.pairs]
    assert found == [("B", ["PAIR_DROPPED"]), ("C", ["PAIR_DROPPED"]), ("E", [])]
    assert outcome.rejected == []
    assert outcome.counts.reasons == {}
    assert outcome.counts.warnings == {"PAIR_DROPPED": 2}
    assert outcome.counts.more["num_pairs_dropped"] == 2


def test_a_row_of_which_no_pair_passes_is_rejected_once_by_its_first_pair(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", jsonl([row("A", "A", " "), row("A"), row("D", "E")]))
    outcome = validate(tmp_path / "out", file, format=STRINGS)
    assert [r["code"] for r in outcome.rejected] == ["CHOSEN_EQ_REJECTED", "SCHEMA_MISMATCH"]
    assert [r["codes"] for r in outcome.rejected] == [["CHOSEN_EQ_REJECTED"], ["SCHEMA_MISMATCH"]]
    assert (outcome.counts.num_in, outcome.counts.num_out) == (3, 1)
    assert outcome.counts.num_in == outcome.counts.num_rows_kept + outcome.counts.num_rejected
    # A rejected row keeps no pair, so none of its pairs counts as dropped.
    assert outcome.counts.more["num_pairs_dropped"] == 0


def test_equal_pairs_of_one_row_are_written_once_and_of_two_rows_twice(tmp_path: Path) -> None:
    rows = [row("A", "B", "B"), row("A", "B")]
    outcome = validate(tmp_path / "out", write(tmp_path / "a.jsonl", jsonl(rows)), format=STRINGS)
    assert [pair["source_row"] for pair in outcome.pairs] == [0, 1]
    assert outcome.pairs[0]["pair_id"] == outcome.pairs[1]["pair_id"]
    assert outcome.counts.more == {
        "num_eval": 0,
        "num_pairs_dropped": 0,
        "num_pairs_repeated": 1,
        "num_rows_kept": 2,
    }
