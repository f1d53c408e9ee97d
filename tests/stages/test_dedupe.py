"""What counts as the same pair, which one stays, and where every prompt lives afterwards."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from schemas.manifest import Counts
from schemas.rows import PAIR, REJECTED
from stages.dedupe import DedupeConfig, run
from stages.shards import StageDir
from tests.stages_rows import message, pair_row
from tests.stages_running import make_context, open_output, read_rows, stage_dir

Rows = list[dict[str, Any]]


def dedupe(folder: Path, shards: Sequence[Rows], **config: Any) -> StageDir:
    """Write rows as validate would, in these shards, and run the stage over them."""
    validated = stage_dir(folder, "validate")
    records = []
    for index, rows in enumerate(shards):
        with validated.write_shard(index, {"data": PAIR, "rejected": REJECTED}) as shard:
            shard.write_rows("data", rows)
            records.append(shard.commit(Counts(num_in=len(rows), num_out=len(rows))))
    out = stage_dir(folder, "dedupe")
    context = make_context(out, {"validate": open_output(validated, "validate", records)})
    run(DedupeConfig(**config), context)
    return out


def at(place: int, row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "source_row": place}


def rejected_codes(out: StageDir) -> dict[int, str]:
    return {row["source_row"]: row["code"] for row in read_rows(out, "rejected")}


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
def test_only_what_no_reader_sees_is_ignored(
    tmp_path: Path, one: str, other: str, is_same: bool
) -> None:
    """Also across prompts: the two prompt_ids differ, so their rows lie in different shards."""
    rows = [at(0, pair_row(one, "yes", "no")), at(1, pair_row(other, "yes", "no"))]
    out = dedupe(tmp_path, [rows[:1], rows[1:]], rows_per_shard=1)
    assert len(read_rows(out)) == (1 if is_same else 2)
    assert len(out.committed()) == 2


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


def test_rows_of_a_prompt_stand_together_and_order_of_arrival_does_not_matter(
    tmp_path: Path,
) -> None:
    """Whatever the order and the cut of the input, every file has the same bytes."""
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
