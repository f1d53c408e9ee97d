"""A store on S3: the commit protocol holds, failing requests are retried, secrets stay out."""

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from schemas.errors import ConfigError, DataError
from schemas.manifest import Counts, ShardRecord
from schemas.rows import PAIR, REJECTED
from stages.store import filesystems
from stages.store.filesystems import Folder, find_objects
from stages.store.local_paths import fetch_object, readable_path, writable_path
from stages.store.shards import StageDir, find_damage, list_files, open_stage_dir, read_file
from tests.object_store import ACCESS_KEY, SECRET_KEY, Fault, ObjectStore, flaky
from tests.stages.store.test_shards import finish
from tests.stages_rows import pair_row

ROOT = Path(__file__).parents[3]
ROLES = {"data": PAIR, "rejected": REJECTED}


def open_dir(object_store: ObjectStore, tmp_path: Path) -> StageDir:
    return open_stage_dir(Folder(object_store.uri(tmp_path)), "validate", "0123456789ab", 1)


def commit(out: StageDir, index: int, texts: list[str]) -> ShardRecord:
    with out.write_shard(index, ROLES) as shard:
        shard.write_rows("data", [pair_row(text, "yes", "no") for text in texts])
        return shard.commit(Counts(num_in=len(texts), num_out=len(texts)))


def test_a_stage_is_written_finished_and_verified(
    object_store: ObjectStore, tmp_path: Path
) -> None:
    """The files have the same bytes as on a local disk."""
    out = open_dir(object_store, tmp_path)
    local = open_stage_dir(Folder(str(tmp_path)), "validate", "0123456789ab", 1)
    assert not out.is_begun()
    assert out.manifest() is None
    records = [commit(out, 0, ["a", "b"]), commit(out, 1, ["c"])]
    assert [record.files for record in records] == [
        commit(local, 0, ["a", "b"]).files,
        commit(local, 1, ["c"]).files,
    ]
    out.folder.write_bytes("data/part-00000-aaaaaaaa.parquet", b"of a slower attempt")
    manifest = finish(out, records)
    assert out.manifest() == manifest
    assert list(find_damage(out.folder, list_files(manifest))) == []
    assert read_file(out.folder, records[1].files["data"]).num_rows == 1
    assert out.folder.list_folders() == ["_commits", "data", "rejected"]
    out.folder.write_bytes(records[0].files["data"].name, b"other bytes")
    [damage] = find_damage(out.folder, list_files(manifest))
    assert damage.name == records[0].files["data"].name


def test_only_one_of_many_writers_creates_a_name(object_store: ObjectStore, tmp_path: Path) -> None:
    folder = Folder(object_store.uri(tmp_path))
    with ThreadPoolExecutor(8) as pool:
        wrote = list(pool.map(lambda n: folder.create_file("record", b"%d" % n), range(24)))
    assert wrote.count(True) == 1
    assert folder.read_bytes("record") == b"%d" % wrote.index(True)


def test_a_server_without_conditional_put_keeps_what_is_there(
    object_store: ObjectStore, tmp_path: Path
) -> None:
    def behave(method: str, path: str, headers: Mapping[str, str]) -> Fault | None:
        return "no conditional PUT" if "If-None-Match" in headers else None

    object_store.behave = behave
    folder = Folder(object_store.uri(tmp_path))
    assert folder.create_file("record", b"first")
    assert not folder.create_file("record", b"second")
    assert folder.read_bytes("record") == b"first"
    assert object_store.num_faults == 2


def test_a_record_whose_answer_is_lost_stands(object_store: ObjectStore, tmp_path: Path) -> None:
    """The PUT succeeds but its answer is lost: the retry finds the record in place."""
    lost: list[str] = []

    def behave(method: str, path: str, headers: Mapping[str, str]) -> Fault | None:
        if "If-None-Match" in headers and not lost:
            lost.append(path)
            return "unanswered"
        return None

    object_store.behave = behave
    out = open_dir(object_store, tmp_path)
    record = commit(out, 0, ["a"])
    assert lost
    assert out.committed() == {0: record}


def test_a_flaky_server_is_outlasted(object_store: ObjectStore, tmp_path: Path) -> None:
    """A sixth of all requests is refused, throttled, delayed, cut off, or left unanswered."""
    out = open_dir(object_store, tmp_path)
    object_store.behave = flaky(0, 1 / 6)
    records = [commit(out, index, [f"{index}"] * 3) for index in range(2)]
    assert list(out.committed().values()) == records
    manifest = finish(out, records)
    assert list(find_damage(out.folder, list_files(manifest))) == []
    checkpoint = out.folder.child("checkpoint")
    content = os.urandom(12 << 20)  # A multipart upload.
    with writable_path(checkpoint) as path:
        (path / "weights").write_bytes(content)
    with readable_path(checkpoint, ["weights"]) as path:
        assert (path / "weights").read_bytes() == content
    assert object_store.num_faults > len(object_store.requests) / 12


@pytest.fixture
def _three_attempts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Limit clients to three attempts during one test."""
    monkeypatch.setattr(filesystems, "_MAX_ATTEMPTS", 3)
    for opened in (filesystems._open_bucket, filesystems._s3_client):
        opened.cache_clear()
    yield
    for opened in (filesystems._open_bucket, filesystems._s3_client):
        opened.cache_clear()


@pytest.mark.usefixtures("_three_attempts")
def test_a_server_that_never_recovers_is_given_up(
    object_store: ObjectStore, tmp_path: Path
) -> None:
    """Each request is tried three times; the error names the object."""
    folder = Folder(object_store.uri(tmp_path))
    object_store.behave = lambda method, path, headers: "busy"
    for call in (
        lambda: folder.write_bytes("name", b""),
        lambda: folder.create_file("name", b""),
        lambda: folder.read_bytes("name"),
    ):
        object_store.requests.clear()
        with pytest.raises(OSError, match="name"):
            call()
        assert len(object_store.requests) == 3


def test_a_killed_upload_leaves_nothing_visible(object_store: ObjectStore, tmp_path: Path) -> None:
    """The writer is killed during a multipart upload; the next attempt commits as usual."""
    out = open_dir(object_store, tmp_path)
    code = f"""
import os, signal
from stages.store.filesystems import Folder
folder = Folder({out.folder.uri!r})
folder.child("data").create()
stream = folder.filesystem.open_output_stream(folder.file("data/half.parquet"))
stream.write(os.urandom(20 << 20))
print("written", flush=True)
signal.pause()
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert any(method == "POST" for method, _ in object_store.requests)
    assert out.folder.list_files("data") == []
    record = commit(out, 0, ["a"])
    assert out.folder.list_files("data") == [record.files["data"].name.removeprefix("data/")]


@pytest.mark.parametrize(
    "uri",
    [
        f"s3://{ACCESS_KEY}:{SECRET_KEY}@bucket/store",
        f"s3://bucket/store?secret_key={SECRET_KEY}",
        f"hdfs://user:{SECRET_KEY}@host/store",
    ],
)
def test_a_uri_with_a_secret_is_refused_and_the_secret_not_repeated(uri: str) -> None:
    with pytest.raises(ConfigError, match="environment") as raised:
        Folder(uri).exists("name")
    assert SECRET_KEY not in str(raised.value)
    assert ACCESS_KEY not in str(raised.value)


def test_what_travels_to_workers_holds_no_credentials(
    object_store: ObjectStore, tmp_path: Path
) -> None:
    out = open_dir(object_store, tmp_path)
    record = commit(out, 0, ["a"])
    for thing in (out, record, out.folder.filesystem):
        content = pickle.dumps(thing)
        assert SECRET_KEY.encode() not in content
        assert ACCESS_KEY.encode() not in content
    copied = pickle.loads(pickle.dumps(out.folder))
    assert copied.exists(record.files["data"].name)


def test_all_folders_of_a_bucket_share_one_connection_pool(
    object_store: ObjectStore, tmp_path: Path
) -> None:
    one, other = (Folder(object_store.uri(tmp_path)).child(name) for name in "ab")
    assert one.filesystem is other.filesystem


def test_objects_are_found_by_name_by_folder_and_by_glob(
    object_store: ObjectStore, tmp_path: Path
) -> None:
    folder = Folder(object_store.uri(tmp_path))
    names = ("b.jsonl", "a.jsonl", "deep/c.parquet", ".hidden.jsonl", ".deep/d.jsonl")
    for name in names:
        folder.write_bytes(name, b"content")
    base = folder.uri

    def found(pattern: str) -> list[str]:
        return [uri.removeprefix(base) for uri in find_objects(base + pattern)]

    assert found("/a.jsonl") == ["/a.jsonl"]
    assert found("") == found("/") == ["/a.jsonl", "/b.jsonl", "/deep/c.parquet"]
    assert found("/?.jsonl") == ["/a.jsonl", "/b.jsonl"]
    assert found("/**/*.parquet") == ["/deep/c.parquet"]
    assert found("/[b-c].jsonl") == ["/b.jsonl"]
    assert found("/none.jsonl") == found("/none/*.jsonl") == []


def test_an_object_is_fetched_once_and_a_changed_one_is_noticed(
    object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("stages.store.local_paths._CACHED_FROM_AGE_NS", -1)
    folder = Folder(object_store.uri(tmp_path))
    folder.write_bytes("a.jsonl", b"first")
    uri = f"{folder.uri}/a.jsonl"
    copies = []
    for _ in range(2):
        fetch_object.cache_clear()  # As in another process on this machine.
        copies.append(fetch_object(uri))
    assert copies[0] == copies[1]
    assert Path(copies[0]).read_bytes() == b"first"
    assert sum(method == "GET" and "a.jsonl" in path for method, path in object_store.requests) == 1
    folder.write_bytes("a.jsonl", b"second")
    sha256 = "a7937b64b8caa58f03721bb6bacf5c78cb235febe0e70b1b84cd99541461a08e"  # of b"first"
    fetch_object.cache_clear()
    with pytest.raises(DataError, match=r"a\.jsonl has changed since the run was planned"):
        fetch_object(uri, sha256=sha256)
    folder.delete_file("a.jsonl")
    with pytest.raises(DataError, match="does not exist"):
        fetch_object(uri, sha256=sha256)


def test_a_finished_stage_is_read_through_its_manifests_names(
    object_store: ObjectStore, tmp_path: Path
) -> None:
    """pyarrow reads the files that the records name and finds all rows."""
    out = open_dir(object_store, tmp_path)
    records = [commit(out, 0, ["a", "b"]), commit(out, 1, ["c"])]
    finish(out, records)
    names = [record.files["data"].name for record in records]
    tables = [
        pq.read_table(out.folder.file(name), filesystem=out.folder.filesystem) for name in names
    ]
    assert [table.num_rows for table in tables] == [2, 1]
