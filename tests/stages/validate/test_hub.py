"""A data set of the hub gives the rows of the split that the `datasets` library reads."""

import gzip
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.errors import ConfigError
from stages.validate import inputs
from stages.validate.hub import HubFile, HubPlace, assign_splits
from stages.validate.inputs import InputConfig, find_inputs, stem_of
from tests.stages.models.fabricated_hub import COMMIT, Hub
from tests.stages.validate.running import GOOD, jsonl, write

REPO = "someone/pairs"
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".csv")
CARD = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: train
    path: data/big-*
  - split: heldout
    path: [data/held.jsonl]
- config_name: other
  data_files: other/*.jsonl
---
# Pairs
"""


def good(number: int) -> dict[str, Any]:
    return GOOD | {"id": number}


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue().to_pybytes())


FILES = {
    "README.md": CARD.encode(),
    ".gitattributes": b"",
    "data/big-1.jsonl.gz": gzip.compress(jsonl([good(2)]), mtime=0),
    "data/big-0.parquet": parquet([good(0), good(1)]),
    "data/held.jsonl": jsonl([good(3)]),
    "other/more.jsonl": jsonl([good(4)]),
}
APART = ("data/big-0.parquet", "data/big-1.jsonl.gz")


def splits(
    *paths: str, card: dict[str, Any] | None = None, config: str | None = None
) -> dict[str, list[str]]:
    return assign_splits(
        paths, card=card or {}, config=config, name="hub:someone/pairs", data_suffixes=SUFFIXES
    )


class TestNames:
    def test_sharded_names_may_have_any_split(self) -> None:
        found = splits(
            "README.md",
            "data/train_prefs-00001-of-00002.parquet",
            "data/train_prefs-00000-of-00002-0123abc.parquet",
            "data/test_prefs-00000-of-00001.parquet",
            "train.jsonl",
        )
        assert found == {
            "test_prefs": ["data/test_prefs-00000-of-00001.parquet"],
            "train_prefs": [
                "data/train_prefs-00000-of-00002-0123abc.parquet",
                "data/train_prefs-00001-of-00002.parquet",
            ],
        }

    def test_words_of_folders_come_before_those_of_files(self) -> None:
        found = splits("train/test.jsonl", "x/my-dev/a.jsonl", "x/trainer/a.jsonl", "eval.jsonl")
        assert found == {"train": ["train/test.jsonl"], "validation": ["x/my-dev/a.jsonl"]}

    def test_words_of_files_stand_apart_from_other_letters(self) -> None:
        found = splits("pairs.train.jsonl.gz", "a/training_1.csv", "restrained.jsonl", "val-1.json")
        assert found == {
            "train": ["pairs.train.jsonl.gz", "a/training_1.csv"],
            "validation": ["val-1.json"],
        }

    def test_all_data_files_are_train_where_nothing_tells(self) -> None:
        found = splits("b.jsonl", "a.parquet", ".hidden.jsonl", "__pycache__/c.jsonl", "train.py")
        assert found == {"train": ["a.parquet", "b.jsonl"]}

    def test_data_set_without_data_names_the_hubs_parquet_copy(self) -> None:
        with pytest.raises(ConfigError, match="refs/convert/parquet"):
            splits("README.md", "pairs.py", "dataset_infos.json")


class TestCard:
    def test_globs_are_those_of_the_datasets_library(self) -> None:
        """`*` stops at a slash, `**` does not, and `./` is the repository."""
        paths = ["a/x.jsonl", "a/b/y.jsonl", "a/b/.z.jsonl", "a.jsonl"]
        for pattern, expected in {
            "a/*.jsonl": ["a/x.jsonl"],
            "a/**": ["a/b/y.jsonl", "a/x.jsonl"],
            "**/*.jsonl": ["a.jsonl", "a/b/y.jsonl", "a/x.jsonl"],
            "./a.jsonl": ["a.jsonl"],
            "a/b/.*": ["a/b/.z.jsonl"],
        }.items():
            card = {"configs": [{"config_name": "c", "data_files": pattern}]}
            assert splits(*paths, card=card) == {"train": expected}, pattern

    def test_default_config_is_the_marked_one_or_the_one_of_that_name_or_the_only(self) -> None:
        one = {"config_name": "one", "data_files": "1.jsonl"}
        two = {"config_name": "default", "data_files": "2.jsonl"}
        marked = {"config_name": "three", "data_files": "3.jsonl", "default": True}
        for configs, expected in (
            ([one], "1.jsonl"),
            ([one, two], "2.jsonl"),
            ([one, two, marked], "3.jsonl"),
        ):
            card = {"configs": configs}
            assert splits("1.jsonl", "2.jsonl", "3.jsonl", card=card) == {"train": [expected]}
        card = {"configs": [one, two]}
        assert splits("1.jsonl", "2.jsonl", card=card, config="one") == {"train": ["1.jsonl"]}

    def test_config_that_is_not_there_or_not_clear_is_refused_with_a_list(self) -> None:
        card = {"configs": [{"config_name": name, "data_files": "*"} for name in ("one", "two")]}
        with pytest.raises(ConfigError, match=r"several configs.* one, two"):
            splits("1.jsonl", card=card)
        with pytest.raises(ConfigError, match=r"no config three.* one, two"):
            splits("1.jsonl", card=card, config="three")
        with pytest.raises(ConfigError, match=r"no config three.* none"):
            splits("1.jsonl", config="three")

    def test_folder_of_a_config_bounds_patterns_and_names(self) -> None:
        paths = ["helpful/train.jsonl", "helpful/test.jsonl", "harmless/train.jsonl"]
        block = {"config_name": "helpful", "data_dir": "helpful"}
        assert splits(*paths, card={"configs": [block]}) == {
            "train": ["helpful/train.jsonl"],
            "test": ["helpful/test.jsonl"],
        }
        block |= {"data_files": "tr*"}
        assert splits(*paths, card={"configs": [block]}) == {"train": ["helpful/train.jsonl"]}

    @pytest.mark.parametrize(
        "configs",
        ["text", [1], [{"data_files": "x"}], [{"config_name": "c", "data_files": [{"path": "x"}]}]],
    )
    def test_card_that_cannot_be_read_is_refused(self, configs: object) -> None:
        with pytest.raises(ConfigError, match="card of hub:someone/pairs"):
            splits("x.jsonl", card={"configs": configs})


class TestHub:
    @pytest.fixture
    def hub(self) -> Iterator[Hub]:
        hub = Hub(kind="datasets", repo=REPO, files=dict(FILES), lfs=APART)
        with hub.serve():
            yield hub

    def find(self, hub: Hub, home: Path, **settings: str) -> Any:
        """Return the files of an input as dicts, or the error's text."""
        code = (
            "import sys, msgspec\nfrom schemas.errors import ConfigError\n"
            "from stages.validate.inputs import *\n"
            f"wanted = InputConfig(path='hub:{REPO}', **{settings!r})\n"
            "try:\n    files = find_inputs([wanted]).files\n"
            "except ConfigError as error:\n    sys.exit(f'ConfigError: {error}')\n"
            "sys.stdout.write(msgspec.json.encode(files).decode())"
        )
        text = hub.run(code, home)
        return json.loads(text) if text.startswith("[") else text

    def test_files_of_a_split_are_pinned_without_reading_them(
        self, hub: Hub, tmp_path: Path
    ) -> None:
        first, second = self.find(hub, tmp_path / "hf")
        assert [first["name"], second["name"]] == [
            f"hub:{REPO}/data/big-0.parquet",
            f"hub:{REPO}/data/big-1.jsonl.gz",
        ]
        for file, name in ((first, APART[0]), (second, APART[1])):
            assert file["sha256"] == hashlib.sha256(FILES[name]).hexdigest()
            assert file["num_bytes"] == len(FILES[name])
            assert file["hub"] == {"repo": REPO, "commit": COMMIT, "path": name}
        assert not {"big-0.parquet", "big-1.jsonl.gz"} & set(hub.downloads)

    def test_file_in_git_is_hashed_by_its_content(self, hub: Hub, tmp_path: Path) -> None:
        for settings, name in (
            ({"split": "heldout"}, "data/held.jsonl"),
            ({"config": "other"}, "other/more.jsonl"),
        ):
            (file,) = self.find(hub, tmp_path / "hf", **settings)
            assert file["sha256"] == hashlib.sha256(FILES[name]).hexdigest()

    def test_revision_is_what_is_asked_for(self, hub: Hub, tmp_path: Path) -> None:
        assert len(self.find(hub, tmp_path / "hf", revision=COMMIT)) == 2
        assert "could not be read from the Hugging Face hub" in self.find(
            hub, tmp_path / "hf", revision="absent"
        )

    def test_split_that_is_not_there_is_refused_with_a_list(self, hub: Hub, tmp_path: Path) -> None:
        error = self.find(hub, tmp_path / "hf", split="test")
        assert "has no split test. It has: train, heldout" in error

    def test_rows_are_read_and_say_where_they_are_from(self, hub: Hub, tmp_path: Path) -> None:
        code = (
            "import sys, json, pathlib\nfrom tests.stages.validate.running import validate\n"
            f"outcome = validate(pathlib.Path({str(tmp_path / 'out')!r}), 'hub:{REPO}')\n"
            "print(json.dumps(outcome.pairs))"
        )
        pairs = json.loads(hub.run(code, tmp_path / "hf"))
        parts = [f"hub:{REPO}/data/big-0.parquet"] * 2 + [f"hub:{REPO}/data/big-1.jsonl.gz"]
        assert [pair["source_file"] for pair in pairs] == parts
        assert [pair["source_id"] for pair in pairs] == ["0", "1", "2"]
        assert {pair["source"] for pair in pairs} == {REPO}


@pytest.mark.parametrize("path", ["hub:pairs", "hub:a/b/c", "hub:a/b@main", "hub:"])
def test_name_that_is_none_of_the_hubs_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match="hub:owner/name"):
        find_inputs([InputConfig(path=path)])


def test_settings_of_the_hub_are_refused_for_local_files(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.jsonl", jsonl([GOOD])))
    for wanted in (InputConfig(path=path, revision="main"), InputConfig(path=path, config="c")):
        with pytest.raises(ConfigError, match="only for a data set of the hub"):
            find_inputs([wanted])


def test_file_of_the_hub_at_two_commits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of both would have the same file name and number."""

    def find(name: str, *, revision: str | None, **_: object) -> list[HubFile]:
        place = HubPlace(repo=REPO, commit=revision or COMMIT, path="a.jsonl")
        return [HubFile(place, 1, "0" * 64)]

    monkeypatch.setattr(inputs, "find_hub_files", find)
    now = InputConfig(path=f"hub:{REPO}")
    before = InputConfig(path=f"hub:{REPO}", revision=COMMIT[::-1])
    assert len(find_inputs([now, now]).files) == 1
    with pytest.raises(ConfigError, match=r"a\.jsonl belongs to both"):
        find_inputs([now, before])


def test_source_of_a_hubs_file_is_the_data_set() -> None:
    assert stem_of("hub:someone/pairs/data/train-00000-of-00001.parquet") == "someone/pairs"
