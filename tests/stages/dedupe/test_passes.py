"""Equal bytes for any order, split and interruption; each pass can resume from the earlier ones."""

import random
import shutil
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.manifest import Counts
from stages.dedupe.config import CODES
from stages.dedupe.minhash import ALGORITHM
from stages.dedupe.partitions import Pass
from stages.dedupe.similarity import SKETCHES, read_sketches
from stages.store.shards import StageDir
from tests.stages.dedupe.running import (
    WORDS,
    Rows,
    at,
    content_of,
    dedupe,
    kept_places,
    run_into,
    say,
)
from tests.stages_rows import pair_row
from tests.stages_running import read_rows, stage_dir

PASSES = ("spread", "decide", "sign", "match", "verify", "group", "assign", "resolve")
NUM_ROWS = 66


def make_rows() -> Rows:
    """Return rows with every case that the stage looks for."""
    generator = random.Random(4)
    long = [say(40, 7), say(40, 8), say(40, 9)]
    texts_of_rest = [
        (long[0], long[1], long[2]),
        (long[0], long[1], long[2]),
        (long[0], f"{long[1]} 5", long[2]),
        *(("round", pair[0], pair[1]) for pair in ("ab", "bc", "ca")),
    ]
    rows = [at(60 + place, pair_row(*texts)) for place, texts in enumerate(texts_of_rest)]
    for place in range(60):
        base = place % 12
        texts = [say(length, 100 * base + length) for length in (20, 25, 30)]
        if place % 5 == 1:
            texts[1], texts[2] = texts[2], texts[1]
        if place % 3:
            words = texts[place % 2].split()
            words[generator.randrange(len(words))] = generator.choice([*WORDS, "7", "not"])
            texts[place % 2] = " ".join(words)
        row = pair_row(*texts, split="eval" if place % 7 == 0 else "train")
        rows.append(at(place, row, margin=generator.choice([None, 1.0, 2.0])))
    return rows


CONFIG: dict[str, Any] = {
    "rows_per_shard": 16,
    "max_pairs_per_prompt": 2,
    "conflict_policy": "larger_margin",
}


def test_the_rows_here_meet_every_code(tmp_path: Path) -> None:
    out = dedupe(tmp_path, [make_rows()], **CONFIG)
    counts = [record.counts for record in out.committed().values()]
    codes = {code for count in counts for code in [*count.reasons, *count.warnings]}
    assert codes == set(CODES) - {"EVAL_CONTAMINATED"}
    assert all(count.num_in == count.num_out + count.num_rejected for count in counts)
    assert len(read_rows(out)) + len(read_rows(out, "rejected")) == NUM_ROWS


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The files for all rows in one shard and in their order."""
    return content_of(dedupe(tmp_path_factory.mktemp("whole"), [make_rows()], **CONFIG))


@settings(max_examples=6, deadline=None)
@given(order=st.permutations(range(NUM_ROWS)), cuts=st.sets(st.integers(1, 59), max_size=4))
def test_order_and_cut_of_the_input_change_no_byte(
    whole: list[Any], order: list[int], cuts: set[int]
) -> None:
    rows = make_rows()
    shuffled = [rows[place] for place in order]
    borders = [0, *sorted(cuts), NUM_ROWS]
    shards = [shuffled[a:b] for a, b in pairwise(borders)]
    with tempfile.TemporaryDirectory() as folder:
        assert content_of(dedupe(Path(folder), shards, **CONFIG)) == whole


def test_the_layout_decides_nothing(tmp_path: Path) -> None:
    outs = [
        dedupe(tmp_path / str(size), [make_rows()], **{**CONFIG, "rows_per_shard": size})
        for size in (7, 1000)
    ]
    assert len(outs[0].committed()) == 10
    assert kept_places(outs[0]) == kept_places(outs[1])
    assert read_rows(outs[0], "rejected") == read_rows(outs[1], "rejected")


@pytest.mark.parametrize("lost", PASSES)
def test_a_pass_that_lost_shards_is_resumed(tmp_path: Path, lost: str) -> None:
    """Deleting the commits of one pass and of all later ones leaves the final bytes the same."""
    rows = make_rows()
    out = dedupe(tmp_path, [rows[:30], rows[30:]], **CONFIG)
    before = content_of(out)
    forget(out.work(lost), keep=1)
    for later in PASSES[PASSES.index(lost) + 1 :]:
        shutil.rmtree(out.work(later).folder.path)
    forget(out, keep=0)
    run_into(stage_dir(tmp_path, "dedupe"), tmp_path, [rows[:30], rows[30:]], **CONFIG)
    assert content_of(out) == before


def test_passes_that_are_done_are_not_done_again(tmp_path: Path) -> None:
    rows = make_rows()
    out = dedupe(tmp_path, [rows], **CONFIG)
    writers = {name: out.work(name).committed() for name in PASSES}
    forget(out, keep=0)
    run_into(stage_dir(tmp_path, "dedupe"), tmp_path, [rows], **CONFIG)
    assert {name: out.work(name).committed() for name in PASSES} == writers


@pytest.mark.parametrize("rows_per_group", [1, 5, 100])
def test_sketches_are_found_whatever_the_row_groups(tmp_path: Path, rows_per_group: int) -> None:
    """Sketch k holds k + 1 shingles of the prompt, and two of each answer."""
    out = stage_dir(tmp_path, "dedupe").work("sign")
    sketches = [[k + 1, 2, *[0] * 6, *range(k + 1), 1, 2, 3, 4] for k in range(23)]
    packed = [{"sketch": np.array(numbers, "<u4").tobytes()} for numbers in sketches]
    records = []
    for index in range(2):
        groups = {"sketches": rows_per_group}
        with out.write_shard(index, {"sketches": SKETCHES}, rows_per_group=groups) as shard:
            shard.write_rows("sketches", packed)
            records.append(shard.commit(Counts(num_in=23, num_out=23)))
    refs = np.array([0, 4, 5, 22, (1 << 32) + 3, (1 << 32) + 21], np.uint64)
    found = read_sketches(Pass(folder=out.folder, shards=records), refs)
    prompts, chosen, rejected = found.parts
    assert (prompts.ends - prompts.starts).tolist() == [1, 5, 6, 23, 4, 22]
    assert (chosen.ends - chosen.starts).tolist() == [2] * 6
    assert rejected.members[rejected.starts[1] : rejected.ends[1]].tolist() == [3, 4]


def forget(out: StageDir, *, keep: int) -> None:
    """Delete all commit records but the first `keep`."""
    commits = sorted((Path(out.folder.path) / "_commits").glob("*.json"))
    for commit in commits[keep:]:
        commit.unlink()


def test_the_algorithm_is_named(tmp_path: Path) -> None:
    result = run_into(stage_dir(tmp_path, "dedupe"), tmp_path, [make_rows()])
    assert result.summary["algorithm"] == ALGORITHM


def test_exact_comparison_alone_needs_three_passes(tmp_path: Path) -> None:
    out = dedupe(tmp_path, [make_rows()], near=None, leaks=None)
    assert out.folder.list_folders("_work") == ["decide", "spread"]
