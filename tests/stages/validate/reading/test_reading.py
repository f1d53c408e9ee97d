"""Every byte of a file is accounted for, whatever its content and its cuts."""

import codecs
import gzip
import hashlib
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from schemas.errors import DataError, PipelineError, StageFailed
from stages.validate.reading import (
    JSONL,
    Container,
    count_lines,
    read_rows,
    sniff_container,
    split_file,
    whole_file,
)
from tests.stages.validate.running import GOOD, find_files, jsonl, validate, write

STRINGS = "prompt_completion_strings"


def good(number: int) -> dict[str, Any]:
    return GOOD | {"id": number}


def outcome_of_line(line: bytes, tmp_path: Path) -> dict[str, Any]:
    """Return the one rejected row of a file with a good row before and after a bad line."""
    file = write(tmp_path / "data.jsonl", jsonl([good(0), line, good(2)]))
    outcome = validate(tmp_path / "out", file)
    assert [pair["source_row"] for pair in outcome.pairs] == [0, 2]
    (rejected,) = outcome.rejected
    assert rejected["source_row"] == 1
    assert rejected["raw"] == line[: 64 << 10]
    assert rejected["raw_sha256"] == hashlib.sha256(line).hexdigest()
    return rejected


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b'{"prompt": "\xff"}', "ENCODING_INVALID"),
        (b"\xff\xfe\xfd", "ENCODING_INVALID"),
        (b'{"prompt": "\\ud800"}', "ENCODING_INVALID"),
        (b'{"prompt": "\\udc00\\ud800 x"}', "ENCODING_INVALID"),
        (b'{"prompt": "a\x01b"}', "JSON_INVALID"),
        (b'{"prompt": "a', "JSON_INVALID"),
        (b'{"prompt": "a"} {"prompt": "b"}', "JSON_INVALID"),
        (b'{"prompt": "a",}', "JSON_INVALID"),
        (b"{'prompt': 'a'}", "JSON_INVALID"),
        (b'{"id": ' + b"1" * 5000 + b"}", "JSON_INVALID"),
        (b"[1, 2]", "JSON_NOT_OBJECT"),
        (b'"text"', "JSON_NOT_OBJECT"),
        (b"null", "JSON_NOT_OBJECT"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "JSON_DEPTH"),
        (b'{"a":' + b"[" * 64 + b"]" * 64 + b"}", "JSON_DEPTH"),
        (b'{"chosen": "a", "chosen": "b"}', "JSON_DUPLICATE_KEY"),
        (b'{"chosen" : "a", "ch\\u006fsen": "b"}', "JSON_DUPLICATE_KEY"),
        (b'{"chosen": [{"role": "user", "role": "assistant"}]}', "JSON_DUPLICATE_KEY"),
        (b'{"score": 1e999}', "JSON_NONFINITE"),
    ],
)
def test_bad_line_is_rejected_and_its_neighbours_pass(
    line: bytes, code: str, tmp_path: Path
) -> None:
    assert outcome_of_line(line, tmp_path)["code"] == code


def test_nul_in_text_is_rejected_with_the_line_as_read(tmp_path: Path) -> None:
    line = json.dumps(GOOD | {"chosen": "4\0"}).encode()
    assert outcome_of_line(line, tmp_path)["code"] == "NUL_IN_TEXT"


def test_colons_inside_strings_are_no_duplicate_keys(tmp_path: Path) -> None:
    row = GOOD | {"chosen": 'Write {"chosen": 1, "chosen" : 2}'}
    file = write(tmp_path / "data.jsonl", jsonl([row]))
    (pair,) = validate(tmp_path / "out", file).pairs
    assert pair["chosen"][0]["content"] == row["chosen"]


def test_nesting_just_within_the_bound_passes(tmp_path: Path) -> None:
    deep: list[Any] = []
    for _ in range(62):
        deep = [deep]
    file = write(tmp_path / "data.jsonl", jsonl([GOOD | {"deep": deep}]))
    (pair,) = validate(tmp_path / "out", file).pairs
    assert json.loads(pair["extra"]) == {"deep": deep}


def test_too_long_line_is_kept_in_part_and_hashed_whole(tmp_path: Path) -> None:
    line = b'{"prompt": "' + b"x" * (17 << 20) + b'"}'
    assert outcome_of_line(line, tmp_path)["code"] == "LINE_TOO_LONG"


def test_too_long_line_is_not_held_in_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", b" " * (128 << 20) + b"\n" + jsonl([GOOD]))
    (file,) = find_files(path)
    tracemalloc.start()
    long, last = read_rows(whole_file(file, JSONL))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 << 20
    assert (long.number, long.raw) == (0, b" " * (64 << 10))
    assert (last.number, last.content) == (1, GOOD)


def test_white_space_between_rows_and_at_the_ends_is_no_row(tmp_path: Path) -> None:
    """Covers a byte order mark, CRLF, blank lines, no final newline, and separators that JSON
    allows."""
    odd = GOOD | {"chosen": "4\u2028\u0085\u2029"}
    lines = [codecs.BOM_UTF8 + jsonl([GOOD]).rstrip(), b"", b"  \t", jsonl([odd]).strip()]
    lines[3] = json.dumps(odd, ensure_ascii=False).encode()
    file = write(tmp_path / "data.jsonl", b"\r\n".join(lines))
    outcome = validate(tmp_path / "out", file)
    assert outcome.rejected == []
    assert [pair["source_row"] for pair in outcome.pairs] == [0, 3]
    assert outcome.pairs[1]["chosen"][0]["content"] == odd["chosen"]


def test_cut_last_line_says_that_the_file_may_be_truncated(tmp_path: Path) -> None:
    content = jsonl([good(0), good(1)])[:-20]
    outcome = validate(tmp_path / "out", write(tmp_path / "data.jsonl", content))
    (rejected,) = outcome.rejected
    assert rejected["code"] == "JSON_INVALID"
    assert "may be truncated" in rejected["detail"]
    assert len(outcome.pairs) == 1


def test_big_numbers_are_kept_exactly(tmp_path: Path) -> None:
    row = GOOD | {"id": 10**29 + 7, "seed": 2**53 + 1}
    (pair,) = validate(tmp_path / "out", write(tmp_path / "a.jsonl", jsonl([row]))).pairs
    assert pair["source_id"] == str(10**29 + 7)
    assert pair["extra"] == f'{{"seed":{2**53 + 1}}}'


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is empty"),
        (b"\n  \r\n\n", "no rows"),
        (codecs.BOM_UTF8, "no rows"),
        (b"[ ]\n", "no rows"),
        (b"prompt,chosen,rejected\n", "no rows"),
        (gzip.compress(b"", mtime=0), "no rows"),
        (jsonl([GOOD]).decode().encode("utf-16"), "UTF-16"),
        (jsonl([GOOD]).decode().encode("utf-16-be"), "UTF-16"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
        (
            b"[1,\n2]\n",
            "none of its first 2 rows can be read as json array: line 1: JSON_NOT_OBJECT",
        ),
        (
            gzip.compress(jsonl([good(at) for at in range(999)]), mtime=0)[:-9],
            "truncated or damaged",
        ),
        (zstandard.compress(jsonl([GOOD]))[:-3], "truncated or damaged"),
        (gzip.compress(b"PAR1", mtime=0), "Parquet inside"),
        (b"PAR1", "truncated or damaged"),
    ],
)
def test_unusable_file_is_named_and_nothing_is_committed(
    content: bytes, match: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "data.jsonl", content)
    with pytest.raises(DataError, match=match) as caught:
        validate(tmp_path / "out", file)
    assert "data.jsonl" in str(caught.value)
    assert list(tmp_path.glob("out/**/_commits/*")) == []


def test_file_cut_after_the_sampled_rows_is_named_by_the_worker(tmp_path: Path) -> None:
    content = gzip.compress(jsonl([good(at) | {"padding": "x" * 4000} for at in range(2000)]))
    file = write(tmp_path / "data.jsonl.gz", content[:-100])
    with pytest.raises(StageFailed, match=r"data\.jsonl\.gz is truncated or damaged"):
        validate(tmp_path / "out", file)
    assert list(tmp_path.glob("out/**/_commits/*")) == []


@pytest.mark.parametrize("name", ["data.parquet", "data.jsonl.gz", "data.txt"])
def test_content_decides_not_the_name(name: str, tmp_path: Path) -> None:
    rows = [good(0), good(1)]
    text = jsonl(rows)
    parquet = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), parquet)
    contents = {
        "plain": text,
        "gzip": gzip.compress(text),
        "members": gzip.compress(text[:30]) + gzip.compress(b"") + gzip.compress(text[30:]),
        "zstd": zstandard.compress(text),
        "frames": zstandard.compress(text[:30]) + zstandard.compress(text[30:]),
        "parquet": parquet.getvalue().to_pybytes(),
    }
    for kind, content in contents.items():
        outcome = validate(tmp_path / kind, write(tmp_path / kind / name, content))
        assert [pair["source_id"] for pair in outcome.pairs] == ["0", "1"], kind
        assert [pair["source_row"] for pair in outcome.pairs] == [0, 1], kind


@pytest.mark.parametrize("ending", [b"", b"\n", b"\n\n"])
def test_byte_ranges_of_any_size_give_the_rows_and_numbers_of_the_whole(
    ending: bytes, tmp_path: Path
) -> None:
    """Compared with Python's own splitting of the whole file, for ranges down to one byte."""
    lines = [b'{"id": %d}' % at if at % 3 else b"" for at in range(12)]
    content = b"\n".join(lines) + ending
    expected = [(at, {"id": at}) for at in range(12) if at % 3]
    (file,) = find_files(write(tmp_path / "a.jsonl", content))
    for split_bytes in range(1, len(content) + 2):
        splits = split_file(file, JSONL, split_bytes=split_bytes)
        rows = [(row.number, row.content) for split in splits for row in read_rows(split)]
        assert [row[1] for row in rows] == [content for _, content in expected], split_bytes
        first_row, numbers = 0, []
        for split in splits:
            numbers += [first_row + row.number for row in read_rows(split)]
            first_row += count_lines(split)
        assert numbers == [at for at, _ in expected], split_bytes


def test_row_groups_are_gathered_and_numbered(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([good(at) for at in range(10)])
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, row_group_size=3)
    (file,) = find_files(path)
    container = sniff_container(file)
    assert container == Container(kind="parquet")
    for split_bytes, num_splits in ((1, 4), (1 << 30, 1)):
        splits = split_file(file, container, split_bytes=split_bytes)
        assert len(splits) == num_splits
        rows = [row for split in splits for row in read_rows(split)]
        assert [
            (row.number, row.content["id"]) for row in rows if isinstance(row.content, dict)
        ] == [(at, at) for at in range(10)]


def test_parquet_types_of_all_kinds_become_text_numbers_and_lists(tmp_path: Path) -> None:
    messages = pa.array([[{"role": "user", "content": "Q"}]])
    large = pa.large_list(pa.struct([("role", pa.large_string()), ("content", pa.large_string())]))
    table = pa.table(
        {
            "prompt": messages.cast(large),
            "chosen": pa.array([[{"role": "assistant", "content": "A"}]]),
            "rejected": pa.array([[{"role": "assistant", "content": "B"}]]),
            "source": pa.array(["mine"]).dictionary_encode(),
            "id": pa.array([2**63 + 1], pa.uint64()),
            "score_chosen": pa.array([pa.scalar("8.5").cast(pa.decimal128(3, 1)).as_py()]),
            "weight": pa.array([0.5], pa.float16()),
            "blob": pa.array([b"caf\xc3\xa9"]),
            "view": pa.array(["v"], pa.string_view()),
            "day": pa.array([0], pa.date32()),
            "map": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
            "fixed": pa.array([[1, 2]], pa.list_(pa.int64(), 2)),
            "nothing": pa.nulls(1),
        }
    )
    path = tmp_path / "a.parquet"
    pq.write_table(table, path)
    (pair,) = validate(tmp_path / "out", path).pairs
    assert pair["prompt"][0]["content"] == "Q"
    assert (pair["source"], pair["source_id"]) == ("mine", str(2**63 + 1))
    assert (pair["score_chosen"], pair["weight"]) == (8.5, 0.5)
    assert json.loads(pair["extra"]) == {
        "blob": "café",
        "view": "v",
        "day": "1970-01-01",
        "map": {"k": 1},
        "fixed": [1, 2],
    }


def test_parquet_text_that_is_not_utf8_is_rejected_alone(tmp_path: Path) -> None:
    """Arrow writes any bytes into a text column unchecked."""
    bad = pa.array([b"4", b"\xff", b"6"]).view(pa.string())
    table = pa.table({"prompt": ["Q"] * 3, "chosen": bad, "rejected": ["5"] * 3})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path)
    outcome = validate(tmp_path / "out", path)
    assert [pair["chosen"][0]["content"] for pair in outcome.pairs] == ["4", "6"]
    (rejected,) = outcome.rejected
    assert (rejected["code"], rejected["field"]) == ("ENCODING_INVALID", "chosen")
    assert b"\\xff" in rejected["raw"]


@pytest.mark.parametrize("damage", ["cut", "footer", "pages"])
def test_damaged_parquet_is_named(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([good(at) for at in range(100)]), path)
    content = path.read_bytes()
    damaged = {
        "cut": content[:-1],
        "footer": content[:-40] + b"\xff" * 20 + content[-20:],
        "pages": content[:4] + b"\xff" * 200 + content[204:],
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(PipelineError, match=r"a\.parquet is truncated or damaged"):
        validate(tmp_path / "out", path)
