"""Properties of validate and dedupe that hold for any rows."""

import gzip
import json
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from schemas.errors import PipelineError
from stages.store.shards import StageDir
from tests.stages.dedupe.running import dedupe, rejected_codes
from tests.stages.validate.running import Row, jsonl, validate, write
from tests.stages_running import read_rows, stage_dir

TEXTS = st.sampled_from(
    ["", " ", "a", "b", "a ", "Tea?", "Yes, please.", "no", "\0", "\u202e", "é"]
)
ROWS = st.lists(
    st.fixed_dictionaries(
        {"prompt": TEXTS, "chosen": TEXTS | st.none() | st.integers(), "rejected": TEXTS},
        optional={
            "margin": st.sampled_from([-1, 0, 0.5, 2, "x"]),
            "weight": st.sampled_from([0, 1, 2.5]),
            "lang": st.text(max_size=3),
        },
    ).map(lambda row: json.dumps(row).encode())
    | st.sampled_from([b"{", b"5", b'{"a": 1}', b"", b"\xff", b'{"prompt":"a","prompt":"b"}']),
    min_size=1,
    max_size=12,
)
ONE_BY_ONE = settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow])
FORMAT = "prompt_completion_strings"


def run(folder: Path, files: list[list[bytes]], **config: Any) -> tuple[list[Row], list[Row]]:
    """Write files of lines, validate them, and return the kept and the rejected rows."""
    paths = [
        write(folder / f"{at}.jsonl", b"\n".join(lines) + b"\n") for at, lines in enumerate(files)
    ]
    outcome = validate(folder / "out", *paths, format=FORMAT, **config)
    assert outcome.counts.num_in == outcome.counts.num_rows_kept + outcome.counts.num_rejected
    return outcome.pairs, outcome.rejected


def without_place(rows: list[Row]) -> Counter[str]:
    """Count rows by all their columns except those of their origin."""
    return Counter(
        json.dumps({k: v for k, v in row.items() if not k.startswith("source")}, default=repr)
        for row in rows
    )


@given(lines=ROWS)
@ONE_BY_ONE
def test_every_row_is_kept_or_rejected_once(lines: list[bytes]) -> None:
    expected = [at for at, line in enumerate(lines) if line.strip()]
    if not expected:
        return
    with TemporaryDirectory() as folder:
        kept, rejected = run(Path(folder), [lines])
    assert sorted(row["source_row"] for row in [*kept, *rejected]) == expected


@given(lines=ROWS, data=st.data())
@ONE_BY_ONE
def test_order_and_files_change_only_where_rows_came_from(
    lines: list[bytes], data: st.DataObject
) -> None:
    lines = [line for line in lines if line.strip()]
    if len(lines) < 2:
        return
    shuffled = data.draw(st.permutations(lines))
    cut = data.draw(st.integers(1, len(lines) - 1))
    with TemporaryDirectory() as one, TemporaryDirectory() as two:
        before = run(Path(one), [lines], eval_fraction=0.5)
        after = run(Path(two), [shuffled[:cut], shuffled[cut:]], eval_fraction=0.5, split_bytes=7)
    assert [without_place(rows) for rows in before] == [without_place(rows) for rows in after]


@given(lines=ROWS)
@ONE_BY_ONE
def test_swapping_the_sides_swaps_the_labels_and_nothing_else(lines: list[bytes]) -> None:
    """The rows have no scores, which would contradict the swapped label."""
    rows = [json.loads(line) for line in lines if line.startswith(b'{"prompt": ')]
    rows = [{k: v for k, v in row.items() if k != "margin"} for row in rows]
    if not rows:
        return
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    with TemporaryDirectory() as one, TemporaryDirectory() as two:
        kept, rejected = run(Path(one), [[json.dumps(row).encode() for row in rows]])
        other, also_rejected = run(Path(two), [[json.dumps(row).encode() for row in swapped]])
    ids = ("pair_id", "chosen", "rejected", "source_file")
    assert [{k: v for k, v in row.items() if k not in ids} for row in kept] == [
        {k: v for k, v in row.items() if k not in ids} for row in other
    ]
    assert [(row["chosen"], row["rejected"]) for row in kept] == [
        (row["rejected"], row["chosen"]) for row in other
    ]
    assert [row["source_row"] for row in rejected] == [row["source_row"] for row in also_rejected]


@given(lines=ROWS, data=st.data())
@ONE_BY_ONE
def test_dedupe_accounts_for_every_pair_whatever_the_order(
    lines: list[bytes], data: st.DataObject
) -> None:
    with TemporaryDirectory() as folder:
        if not any(line.strip() for line in lines):
            return
        kept, _ = run(Path(folder), [lines])
        shuffled = data.draw(st.permutations(kept))
        cut = data.draw(st.integers(0, len(kept)))
        one = dedupe(Path(folder) / "one", [kept])
        two = dedupe(Path(folder) / "two", [shuffled[:cut], shuffled[cut:]])
        for out in (one, two):
            staying, going = read_rows(out), rejected_codes(out)
            assert sorted([row["source_row"] for row in staying] + list(going)) == sorted(
                row["source_row"] for row in kept
            )
        assert content_of(one) == content_of(two)


def content_of(out: StageDir) -> list[Any]:
    return [record.files for _, record in sorted(out.committed().items())]


def test_running_again_writes_nothing(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", jsonl([{"prompt": "Q", "chosen": "a", "rejected": "b"}] * 3))
    validate(tmp_path / "out", file)
    folder = Path(stage_dir(tmp_path / "out", "validate").folder.path)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    validate(tmp_path / "out", file)
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert before
    assert after == before


def _pack(content: bytes, container: str, folder: Path) -> bytes:
    if container == "gzip":
        return gzip.compress(content)
    if container == "parquet":
        path = folder / "whole.parquet"
        pq.write_table(pa.table({"prompt": [content.hex()], "chosen": ["a"]}), path)
        return path.read_bytes()
    return content


@given(
    content=st.binary(max_size=80),
    start=st.sampled_from([b"", b"{", b'[{"', b"PAR1", b"ARROW1", b"\x1f\x8b", b"a,b\n"]),
    container=st.sampled_from(["plain", "gzip", "parquet"]),
    damage=st.tuples(st.integers(0, 400), st.binary(max_size=4)),
    name=st.sampled_from(["a.jsonl", "a.csv", "a.parquet", "a.arrow"]),
)
@ONE_BY_ONE
def test_any_bytes_give_rows_or_one_clear_error(
    content: bytes, start: bytes, container: str, damage: tuple[int, bytes], name: str
) -> None:
    with TemporaryDirectory() as folder:
        packed = _pack(start + content, container, Path(folder))
        place, added = damage
        packed = packed[:place] + added + packed[place + len(added) :]
        file = write(Path(folder) / name, packed)
        try:
            outcome = validate(Path(folder) / "out", file, format=FORMAT)
        except PipelineError as error:
            outcome, said = None, str(error)
        if outcome is None:
            assert name in said
            return
        assert outcome.counts.num_in == outcome.counts.num_rows_kept + outcome.counts.num_rejected
        assert outcome.counts.num_in > 0
