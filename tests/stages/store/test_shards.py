"""The commit protocol: whole shards or nothing, names made of content, records for readers."""

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.errors import DataError
from schemas.fingerprint import InputRef
from schemas.manifest import Counts, Manifest, ShardRecord
from schemas.rows import PAIR, REJECTED, TIMINGS
from stages.store import shards as shards_module
from stages.store.filesystems import Folder
from stages.store.shards import (
    StageDir,
    StageOutput,
    find_damage,
    list_files,
    open_stage_dir,
    read_file,
    write_long_table,
    write_table,
)
from tests.stages_rows import pair_row

ROLES = {"data": PAIR, "rejected": REJECTED}


def open_dir(tmp_path: Path, **more: object) -> StageDir:
    return open_stage_dir(Folder(str(tmp_path)), "validate", "0123456789ab", 1)


def commit(out: StageDir, index: int, texts: list[str]) -> ShardRecord:
    with out.write_shard(index, ROLES) as shard:
        shard.write_rows("data", [pair_row(text, "yes", "no") for text in texts])
        return shard.commit(Counts(num_in=len(texts), num_out=len(texts)))


def finish(out: StageDir, records: list[ShardRecord]) -> Manifest:
    manifest = Manifest(
        stage="validate",
        version=1,
        fingerprint="0123456789ab",
        attempt=1,
        inputs={"before": InputRef("x")},
        config={},
        settings={},
        shards=records,
        files=[],
        counts=Counts.total(record.counts for record in records),
        summary={},
        versions={},
        host="here",
        started_at="2026-01-01T00:00:00+00:00",
        seconds=1.0,
    )
    out.finish(manifest)
    return manifest


def test_a_committed_shard_is_read_back_with_schema_and_provenance(tmp_path: Path) -> None:
    out = open_dir(tmp_path)
    record = commit(out, 3, ["a", "b"])
    assert out.committed() == {3: record}
    table = read_file(out.folder, record.files["data"])
    assert table.schema.remove_metadata().equals(PAIR.arrow)
    assert [row[0]["content"] for row in table.column("prompt").to_pylist()] == ["a", "b"]
    footer = pq.read_metadata(out.folder.file(record.files["data"].name)).metadata
    assert footer[b"dpo.stage"] == b"validate"
    assert footer[b"dpo.fingerprint"] == b"0123456789ab"
    assert footer[b"dpo.schema"] == b"pairs/1"
    assert footer[b"dpo.shard"] == b"3"
    assert read_file(out.folder, record.files["rejected"]).num_rows == 0


def test_file_names_are_made_of_the_content(tmp_path: Path) -> None:
    out = open_dir(tmp_path)
    first, second = commit(out, 0, ["a"]), commit(out, 1, ["b"])
    for record in (first, second):
        file = record.files["data"]
        assert file.sha256 == out.folder.sha256(file.name)
        assert file.name == f"data/part-{record.index:05d}-{file.sha256[:8]}.parquet"


def test_equal_rows_give_equal_bytes(tmp_path: Path) -> None:
    records = [commit(open_dir(tmp_path / name), 0, ["a", "b"]) for name in ("x", "y")]
    assert records[0].files == records[1].files


def test_the_first_commit_stands(tmp_path: Path) -> None:
    """A slower attempt with other bytes gets the first record, and its file is deleted."""
    out = open_dir(tmp_path)
    first = commit(out, 0, ["a"])
    assert commit(out, 0, ["other"]) == first
    assert len(out.folder.list_files("data")) == 2
    finish(out, [first])
    assert [f"data/{name}" for name in out.folder.list_files("data")] == [first.files["data"].name]
    assert list(find_damage(out.folder, list_files(finish(out, [first])))) == []


def test_an_abandoned_shard_leaves_nothing(tmp_path: Path) -> None:
    out = open_dir(tmp_path)

    def fail_while_writing() -> None:
        with out.write_shard(0, ROLES) as shard:
            shard.write_rows("data", [pair_row("a", "yes", "no")])
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_while_writing()
    assert out.committed() == {}
    assert out.folder.list_files("_staging") == out.folder.list_files("data") == []


@pytest.mark.parametrize("point", ["_place", "create_file"])
def test_a_killed_writer_leaves_no_visible_shard(tmp_path: Path, point: str) -> None:
    """SIGKILL before the files are moved, and between that and publishing the record."""
    code = f"""
import os, signal, sys
from pathlib import Path
import stages.store.filesystems, stages.store.shards
from tests.stages.store.test_shards import commit, open_dir
def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
if "{point}" == "_place":
    stages.store.shards.ShardWriter._place = die
else:
    stages.store.filesystems.Folder.create_file = die
commit(open_dir(Path(sys.argv[1])), 0, ["a"])
"""
    root = str(Path(__file__).parents[3])
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env={**os.environ, "PYTHONPATH": root}
    )
    assert done.returncode == -9
    out = open_dir(tmp_path)
    assert out.committed() == {}
    record = commit(out, 0, ["a"])
    finish(out, [record])
    assert len(out.folder.list_files("data")) == len(out.folder.list_files("rejected")) == 1
    assert out.folder.list_folders("") == ["_commits", "data", "rejected"]


def test_a_writer_whose_stage_was_finished_by_another_run_takes_its_record(tmp_path: Path) -> None:
    out = open_dir(tmp_path)
    with out.write_shard(0, ROLES) as slow:
        slow.write_rows("data", [pair_row("a", "yes", "no")])
        fast = commit(out, 0, ["a"])
        finish(out, [fast])
        assert slow.commit(Counts(num_in=1, num_out=1)) == fast


def test_row_groups_are_bounded_by_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "_ROW_GROUP_BYTES", 10_000)
    out = open_dir(tmp_path)
    record = commit(out, 0, ["x" * 1000] * 50)
    metadata = pq.read_metadata(out.folder.file(record.files["data"].name))
    assert metadata.num_rows == 50
    assert metadata.num_row_groups >= 5


def test_a_flipped_bit_a_cut_and_a_missing_file_are_named_and_never_read(
    tmp_path: Path,
) -> None:
    out = open_dir(tmp_path)
    records = [commit(out, index, [str(index)]) for index in range(3)]
    manifest = finish(out, records)
    assert list(find_damage(out.folder, list_files(manifest))) == []
    flipped, cut, missing = (Path(out.folder.file(r.files["data"].name)) for r in records)
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    cut.write_bytes(cut.read_bytes()[:-1])
    missing.unlink()
    found = {
        damage.name: damage.sentence for damage in find_damage(out.folder, list_files(manifest))
    }
    assert len(found) == 3
    sentences = "\n".join(found.values())
    assert f"{flipped} has other content" in sentences
    assert f"{cut} has " in sentences
    assert f"{missing} is missing" in sentences
    for record in records:
        with pytest.raises(DataError, match=r"not what was committed|cannot be read"):
            read_file(out.folder, record.files["data"])


def test_finishing_removes_what_killed_writers_left(tmp_path: Path) -> None:
    out = open_dir(tmp_path)
    record = commit(out, 0, ["a"])
    for name in (f".manifest.json.{'0' * 32}", f"_commits/.part-00000.json.{'f' * 32}"):
        Path(out.folder.file(name)).write_bytes(b"{")
    finish(out, [record])
    assert [file.name for file in out.folder.walk()] == sorted(
        ["_commits/part-00000.json", "manifest.json", *(f.name for f in record.files.values())]
    )


def test_the_first_manifest_of_two_stands(tmp_path: Path) -> None:
    """Two runs may finish a stage at once; what other records say of the first stays true."""
    out = open_dir(tmp_path)
    first = finish(out, [commit(out, 0, ["a"])])
    out.finish(msgspec.structs.replace(first, host="another"))
    assert out.manifest() == first


def test_a_layout_that_differs_from_the_begun_one_is_refused(tmp_path: Path) -> None:
    out = open_dir(tmp_path)
    out.write_layout(["a", "b"])
    out.write_layout(["a", "b"])
    with pytest.raises(DataError, match="laid out otherwise"):
        out.write_layout(["a"])


def test_a_damaged_manifest_is_an_error_and_not_an_incomplete_stage(tmp_path: Path) -> None:
    out = open_dir(tmp_path)
    finish(out, [commit(out, 0, ["a"])])
    path = Path(out.folder.file("manifest.json"))
    content = path.read_bytes()
    for damaged in (content[:40], content.replace(b'"here"', b'"there"'), b"{}"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"manifest\.json cannot be read"):
            out.manifest()
    path.write_bytes(content)
    assert out.manifest() is not None


def test_a_damaged_record_is_named_and_not_overwritten(tmp_path: Path) -> None:
    out = open_dir(tmp_path)
    out.write_layout(["a"])
    commit(out, 0, ["a"])
    for name in ("_commits/part-00000.json", "_layout.json"):
        out.folder.write_bytes(name, b'{"ind')
    with pytest.raises(DataError, match=r"_commits/part-00000\.json cannot be read"):
        commit(out, 0, ["a"])
    with pytest.raises(DataError, match=r"_layout\.json cannot be read"):
        out.write_layout(["a"])


def test_any_changed_byte_of_a_commit_record_is_noticed(tmp_path: Path) -> None:
    """Even a changed byte that leaves a valid record, such as one in a count or a host name."""
    out = open_dir(tmp_path)
    commit(out, 0, ["a"])
    name = "_commits/part-00000.json"
    content = out.folder.read_bytes(name)
    for place in range(0, len(content), 7):
        changed = bytearray(content)
        changed[place] ^= 1
        out.folder.write_bytes(name, bytes(changed))
        with pytest.raises(DataError, match="cannot be read"):
            out.committed()


def test_small_tables_are_written_whole(tmp_path: Path) -> None:
    out = open_dir(tmp_path)
    row = {column.name: 1 for column in TIMINGS.columns}
    table = pa.Table.from_pylist([row, row], schema=TIMINGS.arrow)
    out.folder.create()
    record = write_table(out, "timings.parquet", table, TIMINGS)
    assert record.num_rows == 2
    assert read_file(out.folder, record).to_pylist() == table.to_pylist()


def test_a_store_on_an_fsspec_filesystem(tmp_path: Path) -> None:
    """The protocol holds without link() and rename(), on fsspec's memory filesystem."""
    store = Folder("memory://store-of-test-shards")
    out = open_stage_dir(store, "validate", "0123456789ab", 1)
    record = commit(out, 0, ["a", "b"])
    assert commit(out, 0, ["other"]) == record
    manifest = finish(out, [record])
    assert out.manifest() == manifest
    assert list(find_damage(out.folder, list_files(manifest))) == []
    output = StageOutput(folder=out.folder, manifest=manifest)
    assert output.read(record, columns=["source_row"]).num_rows == 2


def test_manifests_survive_json(tmp_path: Path) -> None:
    out = open_dir(tmp_path)
    manifest = finish(out, [commit(out, 0, ["a"])])
    assert out.manifest() == manifest
    assert msgspec.json.decode(msgspec.json.encode(manifest), type=Manifest) == manifest


def test_bytes_of_a_long_table_depend_on_its_rows_alone(tmp_path: Path) -> None:
    """Ten rows in groups of four, given as one table and in three pieces."""
    out = open_dir(tmp_path)
    out.folder.create()
    rows = pa.table({name: range(10) for name in TIMINGS.arrow.names}).cast(TIMINGS.arrow)
    records = [
        write_long_table(out, "timings.parquet", pieces, TIMINGS, rows_per_group=4)
        for pieces in ([rows], [rows[:1], rows[1:7], rows[7:]], [rows[:0], rows])
    ]
    assert records[0] == records[1] == records[2]
    file = pq.ParquetFile(out.folder.file("timings.parquet"))
    assert [file.metadata.row_group(n).num_rows for n in range(3)] == [4, 4, 2]
    assert read_file(out.folder, records[0]).equals(rows)
    assert out.folder.list_files() == ["timings.parquet"]
    empty = write_long_table(out, "timings.parquet", [], TIMINGS, rows_per_group=4)
    assert read_file(out.folder, empty).num_rows == 0
