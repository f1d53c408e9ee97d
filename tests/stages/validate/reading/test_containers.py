"""Every container is recognised and read, and all its rows are accounted for."""

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from pyarrow import orc

from schemas.errors import ConfigError, DataError, PipelineError
from stages.validate.findings import Finding
from stages.validate.inputs import find_inputs
from stages.validate.reading import (
    Container,
    RawRow,
    read_rows,
    sniff_container,
    split_file,
    text_files,
    whole_file,
)
from stages.validate.reading import json_arrays as reading_arrays
from tests.stages.validate.running import GOOD, Outcome, find_files, jsonl, validate, write

STRINGS = "prompt_completion_strings"
ROWS = [GOOD | {"id": at} for at in range(7)]
TABLE = pa.Table.from_pylist(ROWS)


def ids(outcome: Outcome) -> list[tuple[str, int]]:
    return [(pair["source_id"], pair["source_row"]) for pair in outcome.pairs]


ALL_IDS = [(str(at), at) for at in range(7)]


def rows_of(path: Path) -> list[RawRow]:
    (file,) = find_files(path)
    return list(read_rows(whole_file(file, sniff_container(file))))


# --- JSON arrays --------------------------------------------------------------------------------


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("start", ["", "\ufeff", "\r\n \t"])
def test_array_in_a_file_of_any_name_is_read(
    indent: int | None, start: str, tmp_path: Path
) -> None:
    content = (start + json.dumps(ROWS, indent=indent) + "\n").encode()
    packed = {"a.jsonl": content, "b.txt": gzip.compress(content), "c": zstandard.compress(content)}
    for name, written in packed.items():
        outcome = validate(tmp_path / f"{name}.out", write(tmp_path / name, written))
        assert ids(outcome) == ALL_IDS


def test_brackets_quotes_and_escapes_inside_strings_end_no_element(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tested with every chunk size, so that each byte is the last of a chunk once."""
    rows = [
        {"a": 'x"]},{["', "b": [["[", {}], "\\"], "c": "\\\\"},
        {"\\u005d": "\u2028é\\", "d": {"e": [1, 2, {"f": None}]}},
        {},
    ]
    path = write(tmp_path / "a.json", json.dumps(rows, ensure_ascii=False).encode())
    for num_bytes in (*range(1, 40), 1 << 20):
        monkeypatch.setattr(reading_arrays, "BUFFER_BYTES", num_bytes)
        assert [row.content for row in rows_of(path)] == rows


@pytest.mark.parametrize(
    ("element", "code"),
    [
        (b'{"a": }', "JSON_INVALID"),
        (b"", "JSON_INVALID"),
        (b'{"a": 1} {"b": 2}', "JSON_INVALID"),
        (b"[1, [2]]", "JSON_NOT_OBJECT"),
        (b'{"a": "\xff"}', "ENCODING_INVALID"),
        (b'{"a": 1, "a": 2}', "JSON_DUPLICATE_KEY"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "JSON_DEPTH"),
        (b'{"a": "' + b"x" * (17 << 20) + b'"}', "LINE_TOO_LONG"),
    ],
)
def test_damaged_element_is_rejected_alone(element: bytes, code: str, tmp_path: Path) -> None:
    good = json.dumps(GOOD).encode()
    path = write(tmp_path / "a.json", b"[" + good + b", " + element + b" ," + good + b"]")
    outcome = validate(tmp_path / "out", path)
    assert [pair["source_row"] for pair in outcome.pairs] == [0, 2]
    (rejected,) = outcome.rejected
    assert (rejected["code"], rejected["source_row"]) == (code, 1)
    assert rejected["raw"] == element[: 64 << 10]
    if code != "LINE_TOO_LONG":
        assert rejected["raw_sha256"] == hashlib.sha256(element).hexdigest()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b'[{"a": 1}, {"b"', "does not end"),
        (b'[{"a": 1}, {"b: 2}, {"c": 3}]', "in or after its row 1"),
        (b'[{"a": [1}, {"b": 2}]', "brackets don't match in row 0"),
        (b'[{}, {"a": [1}, {"b": 2]}]', "brackets don't match in row 1"),
        (b'[{"a": 1}}, {"b": 2}]', "brackets don't match in row 0"),
        (b'[{"a": 1}]\n[{"a": 2}]', "something follows"),
    ],
)
def test_array_that_cannot_be_followed_is_named(content: bytes, match: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", content)
    with pytest.raises(DataError, match=match) as caught:
        list(read_rows(whole_file(find_files(path)[0], Container(kind="json array"))))
    assert "a.json" in str(caught.value)


@pytest.mark.parametrize(
    "first", [b"[1, 2]", b"[]", b'["a", ["b"]]', b"[1, 2", b'[{"a": 1}}', b'[{"a": NaN}]', b"[1] 2"]
)
def test_first_line_that_is_an_array_or_nearly_one_leaves_jsonl(
    first: bytes, tmp_path: Path
) -> None:
    outcome = validate(tmp_path / "out", write(tmp_path / "a.jsonl", jsonl([first, *ROWS[1:]])))
    assert ids(outcome) == ALL_IDS[1:]
    (rejected,) = outcome.rejected
    assert (rejected["source_row"], rejected["raw"]) == (0, first)


@pytest.mark.parametrize("first", [b"null", b"{}", b'"a, b]"', b"[[1], {}]", b'{"a":\n{"b": 1}}'])
def test_first_element_of_any_kind_leaves_an_array(first: bytes, tmp_path: Path) -> None:
    elements = b",\n".join([first, *(json.dumps(row).encode() for row in ROWS[1:])])
    for start in (b"[", b"[\n"):
        rows = rows_of(write(tmp_path / "a.json", start + elements + b"\n]"))
        assert [row.number for row in rows] == list(range(7))
        assert [row.content for row in rows][1:] == ROWS[1:]


def test_array_line_among_lines_is_jsonl(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", jsonl([[{"a": 1}], GOOD, [{"b": 1}]]))
    outcome = validate(tmp_path / "out", path)
    assert [(row["code"], row["source_row"]) for row in outcome.rejected] == [
        ("JSON_NOT_OBJECT", 0),
        ("JSON_NOT_OBJECT", 2),
    ]
    assert len(outcome.pairs) == 1


# --- CSV and TSV --------------------------------------------------------------------------------


@pytest.mark.parametrize(("mark", "name"), [(",", "csv"), ("\t", "tsv"), (";", "semicolons")])
def test_delimited_text_is_told_by_its_header(mark: str, name: str, tmp_path: Path) -> None:
    lines = ["prompt,chosen,rejected", '"Q, ""1""\n\nor 2",=A(),5', "", "Q2,b;\t,c"]
    text = "\r\n".join(lines).replace(",", mark) + "\r\n"
    path = write(tmp_path / "a.jsonl", text.encode())
    container = sniff_container(find_files(path)[0])
    assert (container.delimiter, name in str(container)) == (mark, True)
    if mark == ",":
        outcome = validate(tmp_path / "out", path)
        assert [pair["prompt"][0]["content"] for pair in outcome.pairs] == ['Q, "1"\n\nor 2', "Q2"]
        assert outcome.pairs[0]["chosen"][0]["content"] == "=A()"
        assert [pair["source_row"] for pair in outcome.pairs] == [0, 2]


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"a,b", "CSV_RAGGED"),
        (b"a,b,c,d", "CSV_RAGGED"),
        (b'a,"b"x,c', "CSV_INVALID"),
        (b"a,\xff,c", "ENCODING_INVALID"),
    ],
)
def test_bad_row_of_csv_is_rejected_alone(line: bytes, code: str, tmp_path: Path) -> None:
    content = b"prompt,chosen,rejected\nQ,1,2\n" + line + b"\nQ,3,4\n"
    outcome = validate(tmp_path / "out", write(tmp_path / "a.csv", content))
    assert [pair["source_row"] for pair in outcome.pairs] == [0, 2]
    (rejected,) = outcome.rejected
    assert (rejected["code"], rejected["source_row"], rejected["raw"]) == (code, 1, line)


def test_damaged_first_line_of_jsonl_is_no_header(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b"exported by me, 2024\n\n" + jsonl([GOOD, GOOD]))
    outcome = validate(tmp_path / "out", path)
    assert [pair["source_row"] for pair in outcome.pairs] == [2, 3]
    assert [(row["code"], row["source_row"]) for row in outcome.rejected] == [("JSON_INVALID", 0)]


def test_csv_of_json_texts_stays_csv(tmp_path: Path) -> None:
    """The texts are quoted as Python's own writer does it."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerows([["chosen", "rejected", "prompt"], ['{"a": 1}', '{"b": 2}', "Q"]])
    outcome = validate(tmp_path / "out", write(tmp_path / "a.csv", text.getvalue().encode()))
    (pair,) = outcome.pairs
    assert pair["chosen"][0]["content"] == '{"a": 1}'


def test_quote_that_is_never_closed_is_bounded_and_named(tmp_path: Path) -> None:
    content = b'prompt,chosen,rejected\nQ,1,2\nQ,"' + b"x\n" * (9 << 20)
    with pytest.raises(PipelineError, match=r"a\.csv: row 1 does not end"):
        validate(tmp_path / "out", write(tmp_path / "a.csv", content))


# --- Arrow --------------------------------------------------------------------------------------


def write_arrow(path: Path, table: pa.Table, *, is_stream: bool, batch_rows: int = 3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = pa.ipc.new_stream if is_stream else pa.ipc.new_file
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=batch_rows)
    return path


@pytest.mark.parametrize("is_stream", [False, True])
def test_arrow_is_read_as_parquet_is(is_stream: bool, tmp_path: Path) -> None:
    path = write_arrow(tmp_path / "a.jsonl", TABLE, is_stream=is_stream)
    for split_bytes, num_shards in ((1, 1 if is_stream else 3), (1 << 20, 1)):
        outcome = validate(tmp_path / f"{split_bytes}", path, split_bytes=split_bytes)
        assert ids(outcome) == ALL_IDS
        assert len(outcome.shards) == num_shards
    assert ids(validate(tmp_path / "first", path, max_pairs=4)) == ALL_IDS[:4]


@pytest.mark.parametrize("is_stream", [False, True])
def test_arrow_text_that_is_not_utf8_is_rejected_alone(is_stream: bool, tmp_path: Path) -> None:
    bad = pa.array([b"4", b"\xff", b"6"]).view(pa.string())
    table = pa.table({"prompt": ["Q"] * 3, "chosen": bad, "rejected": ["5"] * 3})
    path = write_arrow(tmp_path / "a.arrow", table, is_stream=is_stream)
    outcome = validate(tmp_path / "out", path)
    assert [pair["source_row"] for pair in outcome.pairs] == [0, 2]
    assert outcome.rejected[0]["code"] == "ENCODING_INVALID"


def test_text_that_is_not_utf8_is_found_in_fixed_lists_and_dictionaries(tmp_path: Path) -> None:
    bad = pa.array([b"\xff", b"ok"]).view(pa.string())
    columns = {
        "fixed": pa.FixedSizeListArray.from_arrays(bad, 1),
        "dictionary": pa.DictionaryArray.from_arrays(pa.array([0, 1]), bad),
    }
    for name, column in columns.items():
        path = write_arrow(tmp_path / name, pa.table({"c": column}), is_stream=True)
        first, second = rows_of(path)
        assert isinstance(first.content, Finding)
        assert first.content.code == "ENCODING_INVALID"
        assert second.content == {"c": "ok" if name == "dictionary" else ["ok"]}


@pytest.mark.parametrize("is_stream", [False, True])
def test_cut_arrow_is_named(is_stream: bool, tmp_path: Path) -> None:
    path = write_arrow(tmp_path / "a.arrow", TABLE, is_stream=is_stream)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(PipelineError, match=r"a\.arrow is truncated or damaged"):
        validate(tmp_path / "out", path)


def test_arrow_stream_cut_between_batches_is_named(tmp_path: Path) -> None:
    """Arrow itself reads it without an error, with part of the rows missing."""
    path = write_arrow(tmp_path / "a.arrow", TABLE, is_stream=True)
    path.write_bytes(path.read_bytes()[:-8])
    assert pa.ipc.open_stream(path.read_bytes()).read_all().num_rows == 7
    with pytest.raises(PipelineError, match=r"a\.arrow is truncated or damaged"):
        validate(tmp_path / "out", path)


def test_arrow_offsets_that_point_outside_are_damage_and_no_crash(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["Q", "R"], "chosen": ["4", "6"], "rejected": ["5", "5"]})
    path = write_arrow(tmp_path / "a.arrow", table, is_stream=True)
    content = path.read_bytes()
    offsets = struct.pack("<3i", 0, 1, 2)
    assert content.count(offsets) == 3
    path.write_bytes(content.replace(offsets, struct.pack("<3i", 0, 1 << 30, 2)))
    with pytest.raises(PipelineError, match=r"a\.arrow is truncated or damaged"):
        validate(tmp_path / "out", path)


# --- folders of datasets.save_to_disk -----------------------------------------------------------


def save_to_disk(folder: Path, table: pa.Table) -> None:
    """Write what `Dataset.save_to_disk` of datasets 5.2 writes: two shards, named in state.json."""
    names = [f"data-{at:05d}-of-00002.arrow" for at in range(2)]
    write_arrow(folder / names[0], table.slice(0, 4), is_stream=True)
    write_arrow(folder / names[1], table.slice(4), is_stream=True)
    write_arrow(folder / "cache-0123456789abcdef.arrow", table, is_stream=True)
    write(folder / "dataset_info.json", b"{}")
    state = {"_data_files": [{"filename": name} for name in names], "_split": None}
    write(folder / "state.json", json.dumps(state).encode())


def test_saved_data_set_is_the_files_that_its_state_names(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "saved", TABLE)
    outcome = validate(tmp_path / "out", tmp_path / "saved")
    assert [pair["source_id"] for pair in outcome.pairs] == [str(at) for at in range(7)]


def test_split_picks_from_a_saved_dictionary(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    write(folder / "dataset_dict.json", json.dumps({"splits": ["train", "test"]}).encode())
    save_to_disk(folder / "train", TABLE)
    save_to_disk(folder / "test", TABLE.slice(0, 5))
    outcome = validate(tmp_path / "out", {"path": str(folder), "split": "test"})
    assert len(outcome.pairs) == 5
    for block in ({}, {"split": "dev"}):
        with pytest.raises(ConfigError, match="holds the splits train, test"):
            validate(tmp_path / "no", {"path": str(folder), **block})
    with pytest.raises(ConfigError, match="Leave it out"):
        validate(tmp_path / "no", {"path": str(folder / "train"), "split": "train"})


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_file_that_grows_without_bounds_is_stopped(
    pack: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "MAX_RATIO_BYTES", 2 << 20)
    path = write(tmp_path / "a.jsonl.gz", pack(jsonl([GOOD]) + b" " * (64 << 20)))
    with pytest.raises(PipelineError, match=r"a\.jsonl\.gz has .* when decompressed"):
        validate(tmp_path / "out", path)
    monkeypatch.setattr(text_files, "MAX_RATIO_BYTES", 128 << 20)
    assert len(validate(tmp_path / "more", path).pairs) == 1


def test_folder_of_mixed_containers_is_read_file_by_file(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    write(folder / "a.jsonl", jsonl(ROWS[:1]))
    write(folder / "b.json", json.dumps(ROWS[1:2]).encode())
    write_arrow(folder / "c.arrow", TABLE.slice(2, 1), is_stream=True)
    write_arrow(folder / "d.feather", TABLE.slice(3, 1), is_stream=False)
    pq.write_table(TABLE.slice(4, 1), folder / "e.parquet")
    write(folder / "f.csv", b"prompt,chosen,rejected,id\nQ,a,b,5\n")
    write(folder / "g.tsv", b"prompt\tchosen\trejected\tid\nQ\ta\tb\t6\n")
    outcome = validate(tmp_path / "out", folder)
    assert [pair["source_id"] for pair in outcome.pairs] == [str(at) for at in range(7)]
    assert [pair["source"] for pair in outcome.pairs] == list("abcdefg")


# --- rejected rows, read again ------------------------------------------------------------------


def test_rejected_rows_are_read_again_under_their_own_names(tmp_path: Path) -> None:
    long = GOOD | {"chosen": "x" * (70 << 10), "rejected": None}
    rows = [GOOD, GOOD | {"chosen": "4\0"}, b"{", GOOD | {"chosen": "5"}, long]
    path = write(tmp_path / "mine.jsonl", jsonl(rows))
    first = validate(tmp_path / "first", path)
    assert len(first.rejected) == 4
    again = validate(tmp_path / "again", f"{first.out.folder.uri}/rejected")
    assert again.pairs == []
    reasons = {row["source_row"]: row["code"] for row in again.rejected}
    assert reasons == {1: "NUL_IN_TEXT", 2: "JSON_INVALID", 3: "CHOSEN_EQ_REJECTED", 4: "RAW_CUT"}
    assert {row["source_file"] for row in again.rejected} == {path.as_posix()}
    kept = [(row["raw"], row["raw_sha256"]) for row in first.rejected]
    assert [(row["raw"], row["raw_sha256"]) for row in again.rejected] == kept
    cut = next(row for row in again.rejected if row["code"] == "RAW_CUT")
    assert f"{path.as_posix()} row 4" in cut["detail"]


def test_rejected_row_that_passes_later_keeps_its_source(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", jsonl([GOOD, GOOD | {"id": 1}]))
    talk = {"format": "messages"}  # A wrong format: the rows are strings.
    first = validate(tmp_path / "first", path, **talk)
    assert len(first.rejected) == 2
    again = validate(tmp_path / "again", f"{first.out.folder.uri}/rejected")
    plain = validate(tmp_path / "plain", path)
    assert again.pairs == plain.pairs


def test_rejected_rows_of_csv_are_read_again_by_their_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b"prompt,chosen,rejected\nQ,4,4\nQ,4\n")
    first = validate(tmp_path / "first", path)
    assert first.rejected[0]["raw"] == b'{"prompt":"Q","chosen":"4","rejected":"4"}'
    again = validate(tmp_path / "again", f"{first.out.folder.uri}/rejected")
    assert [row["code"] for row in again.rejected] == ["CHOSEN_EQ_REJECTED", "JSON_INVALID"]


def test_rejected_columns_are_read_again_where_json_can_hold_them(tmp_path: Path) -> None:
    bad = pa.array([b"\xff", b"4"]).view(pa.string())
    score = pa.array([1.0, float("nan")])
    columns = {"prompt": ["Q"] * 2, "chosen": bad, "rejected": ["4"] * 2, "note": score}
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns), path)
    first = validate(tmp_path / "first", path)
    assert [row["code"] for row in first.rejected] == ["ENCODING_INVALID", "CHOSEN_EQ_REJECTED"]
    again = validate(tmp_path / "again", f"{first.out.folder.uri}/rejected", format=STRINGS)
    assert [row["code"] for row in again.rejected] == ["JSON_INVALID", "CHOSEN_EQ_REJECTED"]


def pack_zip(content: bytes) -> bytes:
    """Return an archive that holds its file as it is, line by line."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a.jsonl", content)
    return packed.getvalue()


def pack_tar(content: bytes) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        member = tarfile.TarInfo("a.jsonl")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def dump_orc(_: bytes) -> bytes:
    packed = pa.BufferOutputStream()
    orc.write_table(pa.table({"prompt": ["Q"]}), packed)
    return packed.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("pack", "match"),
    [
        (pack_zip, "is a ZIP archive"),
        (pack_tar, "is a tar archive"),
        (bz2.compress, "is compressed with bzip2"),
        (lzma.compress, "is compressed with xz"),
        (pickle.dumps, "is a Python pickle"),
        (dump_orc, "is an ORC file"),
    ],
)
def test_file_of_another_kind_is_named(pack: Any, match: str, tmp_path: Path) -> None:
    """An archive that compresses nothing would otherwise give most of its rows."""
    for name, content in (("a", pack(jsonl(ROWS))), ("b", gzip.compress(pack(jsonl(ROWS))))):
        with pytest.raises(DataError, match=f"{name} {match}"):
            validate(tmp_path / "out", write(tmp_path / name, content))


def test_rows_that_another_stage_rejected_are_refused(tmp_path: Path) -> None:
    footer = {"dpo.schema": "rejected/1", "dpo.stage": "dedupe"}
    pq.write_table(TABLE.replace_schema_metadata(footer), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="the stage dedupe rejected"):
        sniff_container(find_files(tmp_path / "a.parquet")[0])


# --- inputs as blocks ---------------------------------------------------------------------------


def test_block_names_the_source_and_weighs_the_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", jsonl([GOOD | {"source": "s", "weight": 0.5}, GOOD]))
    outcome = validate(tmp_path / "out", {"path": str(path), "source": "mine", "weight": 3})
    assert [(pair["source"], pair["weight"]) for pair in outcome.pairs] == [
        ("mine", 1.5),
        ("mine", 3.0),
    ]


def sample(tmp_path: Path, name: str, *paths: Path, **config: Any) -> Outcome:
    block = {"path": str(paths[0].parent / "*.jsonl"), "max_rows": 20, **config.pop("block", {})}
    return validate(tmp_path / name, block, **config)


def test_sample_is_the_same_however_rows_are_ordered_and_cut(tmp_path: Path) -> None:
    rows = [GOOD | {"id": at} for at in range(100)]
    one = write(tmp_path / "one" / "a.jsonl", jsonl(rows))
    two = write(tmp_path / "two" / "a.jsonl", jsonl(rows[60:]))
    write(tmp_path / "two" / "b.jsonl", jsonl(rows[59::-1]))
    first = sample(tmp_path, "first", one)
    taken = {pair["source_id"] for pair in first.pairs}
    assert len(taken) == first.counts.num_in == 20
    assert first.summary["rows_before_sampling"] == {one.as_posix(): 100}
    cut = sample(tmp_path, "cut", one, split_bytes=500)
    assert len(cut.shards) > 1
    assert cut.pairs == first.pairs
    assert {pair["source_id"] for pair in sample(tmp_path, "moved", two).pairs} == taken
    other = sample(tmp_path, "other", one, block={"seed": 1})
    assert {pair["source_id"] for pair in other.pairs} != taken
    more = sample(tmp_path, "more", one, block={"max_rows": 50})
    assert taken < {pair["source_id"] for pair in more.pairs}
    assert len(sample(tmp_path, "all", one, block={"max_rows": 100}).pairs) == 100


def test_equal_rows_are_sampled_together(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", jsonl([GOOD] * 5))
    assert len(sample(tmp_path, "five", path, block={"max_rows": 5}).pairs) == 5
    assert sample(tmp_path, "four", path, block={"max_rows": 4}).pairs == []


def test_sample_and_first_rows_exclude_each_other(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", jsonl(ROWS))
    with pytest.raises(ConfigError, match="Set only one"):
        sample(tmp_path, "out", path, max_pairs=3)


def test_container_names_are_exact(tmp_path: Path) -> None:
    """They are part of the store's layout."""
    csv = b"a,b\n1,2\n"
    names = {
        jsonl(ROWS): "jsonl",
        gzip.compress(jsonl(ROWS)): "gzip",
        b"[{}]": "json array",
        gzip.compress(b"[{}]"): "json array in gzip",
        csv: "csv",
        zstandard.compress(csv.replace(b",", b"\t")): "tsv in zstd",
        csv.replace(b",", b";"): "csv with semicolons",
    }
    for content, name in names.items():
        (file,) = find_files(write(tmp_path / "a", content))
        container = sniff_container(file)
        assert str(container) == name
        assert len(split_file(file, container, split_bytes=1 << 20)) == 1
    assert find_inputs([]).files == ()


@pytest.mark.parametrize("second", [b"5", b"\xff", b"{", b"text", b"[1]"])
def test_a_brace_alone_begins_an_object_only_before_a_key(tmp_path: Path, second: bytes) -> None:
    """Otherwise it is a damaged line of JSONL, and the other rows are read."""
    path = write(tmp_path / "a.jsonl", b"\n".join([b"{", second, *[jsonl([GOOD]).strip()] * 3]))
    outcome = validate(tmp_path / "out", path)
    assert [row["source_row"] for row in outcome.rejected] == [0, 1]
    assert outcome.rejected[0]["code"] == "JSON_INVALID"
    assert [row["source_row"] for row in outcome.pairs] == [2, 3, 4]
