"""Patterns find their files once and in order, and files are hashed by content."""

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from schemas.config import parse_config
from schemas.errors import ConfigError, DataError
from stages.store.filesystems import Folder
from stages.validate.config import ValidateConfig
from stages.validate.inputs import InputConfig, InputFiles, find_inputs, stem_of
from tests.object_store import ObjectStore
from tests.stages.validate.running import write


def find(*patterns: str) -> InputFiles:
    return find_inputs([InputConfig(path=pattern) for pattern in patterns])


def test_files_folders_and_globs_are_found_once_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl.gz", "deep/c.parquet", "deep/README.md", ".hidden/d.jsonl"):
        write(tmp_path / name, name.encode())
    found = find(f"{tmp_path}/b.*", str(tmp_path), f"{tmp_path}/**/*.jsonl")
    names = [os.path.relpath(file.path, tmp_path) for file in found.files]
    assert names == ["b.jsonl", "a.jsonl.gz", "deep/c.parquet"]


def test_relative_names_stay_as_the_pattern_gave_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same recipe in another checkout gives the same rows and the same fingerprint."""
    write(tmp_path / "data" / "a.jsonl", b"x")
    monkeypatch.chdir(tmp_path)
    found = find("data/*.jsonl", str(tmp_path / "data"))
    assert found.identity() == [
        {"name": "data/a.jsonl", "sha256": hashlib.sha256(b"x").hexdigest()}
    ]
    assert found.files[0].path == str(tmp_path / "data" / "a.jsonl")


def test_identity_follows_the_content_and_not_the_time(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", b"x")
    before = find(str(file)).identity()
    os.utime(file, ns=(1, 1))
    assert find(str(file)).identity() == before
    write(file, b"y")
    assert find(str(file)).identity() != before


def test_file_whose_name_looks_like_a_glob_is_found(tmp_path: Path) -> None:
    file = write(tmp_path / "data[1].jsonl", b"x")
    assert [found.name for found in find(str(file)).files] == [file.as_posix()]


@pytest.mark.parametrize("pattern", ["*.jsonl", "absent.jsonl", "folder"])
def test_pattern_without_a_match_is_named(pattern: str, tmp_path: Path) -> None:
    write(tmp_path / "folder" / "README.md", b"x")
    full = str(tmp_path / pattern)
    with pytest.raises(ConfigError) as caught:
        find(full)
    assert full in str(caught.value)


@pytest.mark.parametrize("pattern", ["*.jsonl", "absent.jsonl", "folder"])
def test_pattern_without_a_matching_object_is_named(
    object_store: ObjectStore, pattern: str, tmp_path: Path
) -> None:
    base = object_store.uri(tmp_path)
    Folder(base).write_bytes("folder/README.md", b"x")
    with pytest.raises(ConfigError) as caught:
        find(f"{base}/{pattern}")
    assert f"{base}/{pattern}" in str(caught.value)


def test_data_files_of_a_folder_of_objects_are_read(
    object_store: ObjectStore, tmp_path: Path
) -> None:
    """Objects are identified by content, as local files are; their names are their URIs."""
    base = object_store.uri(tmp_path)
    for name, content in (("b.jsonl.gz", b"x"), ("deep/a.csv", b"y"), ("notes.txt", b"z")):
        Folder(base).write_bytes(name, content)
    files = find(base).files
    assert [file.name for file in files] == [f"{base}/b.jsonl.gz", f"{base}/deep/a.csv"]
    assert [file.sha256 for file in files] == [hashlib.sha256(c).hexdigest() for c in (b"x", b"y")]
    assert [Path(file.local_path).read_bytes() for file in files] == [b"x", b"y"]


def test_symbolic_link_to_itself_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    with pytest.raises(ConfigError, match=r"loop\.jsonl"):
        find(str(tmp_path / "loop.jsonl"))


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("data/hh.v2.jsonl.gz", "hh.v2"),
        ("train.parquet", "train"),
        ("notes.txt", "notes.txt"),
        (".jsonl", ".jsonl"),
        ("data/pairs-00001-of-00003.parquet", "pairs"),
        ("pairs-00001-of-00003-0a1b2c.jsonl.gz", "pairs"),
        ("-00001-of-00003.jsonl", "-00001-of-00003"),
    ],
)
def test_source_is_the_name_without_data_suffixes_and_numbers_of_parts(
    name: str, stem: str
) -> None:
    assert stem_of(name) == stem


def test_file_that_changed_since_the_plan_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b"x")
    (file,) = find(str(path)).files
    file.check_size()
    write(path, b"xy")
    with pytest.raises(DataError, match="it had 1 when"):
        file.check_size()
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        file.check_size()


def test_identity_holds_what_decides_the_rows_and_nothing_at_its_default(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.jsonl", b"x"))

    def identity(**block: Any) -> list[dict[str, Any]]:
        return find_inputs([InputConfig(path=path, **block)]).identity()

    recipes = [{"inputs": [path]}, {"inputs": [{"path": path}]}]
    configs = [parse_config(ValidateConfig, recipe, path="") for recipe in recipes]
    assert configs[0] == configs[1]
    assert identity() == identity(seed=3) == find_inputs(configs[0].inputs).identity()
    blocks: list[dict[str, Any]] = [
        {"source": "s"},
        {"weight": 2},
        {"max_rows": 1},
        {"max_rows": 2},
        {"max_rows": 1, "seed": 1},
    ]
    identities = [str(identity(**block)) for block in [{}, *blocks]]
    assert len(set(identities)) == len(identities)


def test_file_of_two_inputs_that_differ_is_refused_naming_both(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.jsonl", b"x"))
    inputs = [InputConfig(path=path), InputConfig(path=str(tmp_path), weight=2)]
    with pytest.raises(ConfigError, match="belongs to both") as caught:
        find_inputs(inputs)
    assert f"both {path} and {tmp_path}," in str(caught.value)
