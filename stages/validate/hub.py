"""Find the files of a Hugging Face hub data set that an input names, pinned to a commit.

Files are assigned to splits as the `datasets` library does: by the `configs` of the data set's
card, or else by their names.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import yaml
from fsspec.utils import glob_translate
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.repocard import metadata_load

from schemas.errors import ConfigError
from stages.models.sources import explained_hub_errors
from stages.store.caches import digest_file

HUB_PREFIX = "hub:"
DEFAULT_SPLIT = "train"

_NAME = re.compile(r"hub:([\w.-]+/[\w.-]+)", re.ASCII)
_CARD = "README.md"
_NEVER_DATA = frozenset(
    {_CARD, "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json"}
)
_SHARDED = re.compile(r"data/(?P<split>\w+(\.\w+)*)-\d{5}-of-\d{5}[^/]*\.[^/]*")
_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_FOLDER_PATTERNS = (
    "**/{word}/**",
    "**/{word}[-._ 0-9]*/**",
    "**/*[-._ 0-9]{word}/**",
    "**/*[-._ 0-9]{word}[-._ 0-9]*/**",
)
_FILE_PATTERNS = ("**/{word}[-._ 0-9]*", "**/*[-._ 0-9]{word}[-._ 0-9]*")


@dataclass(frozen=True, kw_only=True)
class HubPlace:
    """A file on the hub, pinned to a commit."""

    repo: str
    commit: str
    path: str
    """Path in the repository."""

    def fetch(self) -> str:
        """Download the file to this machine's cache unless it is there, and return its path.

        Raises:
            ConfigError: it is not there and cannot be fetched.
        """
        with explained_hub_errors(f"{HUB_PREFIX}{self.repo}@{self.commit} ({self.path})"):
            return hf_hub_download(self.repo, self.path, repo_type="dataset", revision=self.commit)


class HubFile(NamedTuple):
    """A file that an input names, with the digest and size of its content."""

    place: HubPlace
    num_bytes: int
    sha256: str


def find_hub_files(
    name: str,
    *,
    revision: str | None,
    config: str | None,
    split: str | None,
    data_suffixes: Sequence[str],
) -> list[HubFile]:
    """Find the files of one split of a data set, in order, as its repository is now.

    Only the card is downloaded, and small files that are stored in git itself, to hash them.

    Args:
        name: `hub:owner/name`.
        revision: a branch, tag or commit; None means main.
        config: a config of the data set's card; None means its default.
        split: None means train.
        data_suffixes: endings of the names of data files; used only if the card lists no files.
    Raises:
        ConfigError: there is no such data set, config or split, or the hub cannot be reached.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ConfigError(
            f"stages.validate.inputs: {name} is not a Hugging Face hub data set. "
            "Wanted is hub:owner/name; set `revision`, `config` and `split` beside it."
        )
    repo = match[1]
    with explained_hub_errors(f"{name}@{revision or 'main'}"):
        info = HfApi().dataset_info(repo, revision=revision, files_metadata=True)
    assert info.sha is not None
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    card = _read_card(HubPlace(repo=repo, commit=info.sha, path=_CARD)) if _CARD in siblings else {}
    splits = assign_splits(
        list(siblings), card=card, config=config, name=name, data_suffixes=data_suffixes
    )
    wanted = split or DEFAULT_SPLIT
    if wanted not in splits:
        raise ConfigError(
            f"stages.validate.inputs: {name} has no split {wanted}. It has: "
            f"{', '.join(splits) or 'none'}. Set `split` in the input's block to one of them."
        )
    return [
        _pin(HubPlace(repo=repo, commit=info.sha, path=path), siblings[path])
        for path in splits[wanted]
    ]


def assign_splits(
    paths: Sequence[str],
    *,
    card: Mapping[str, Any],
    config: str | None,
    name: str,
    data_suffixes: Sequence[str],
) -> dict[str, list[str]]:
    """Assign the files of a repository to splits.

    Args:
        paths: of all files in the repository.
        card: the metadata of the data set's card.
        config, name, data_suffixes: as in `find_hub_files`.
    Raises:
        ConfigError: the card has no such config, or cannot be used.
    """
    chosen = _choose_config(card, config, name)
    folder = str(chosen.get("data_dir") or "").strip("/")
    paths = sorted(path for path in paths if not folder or path.startswith(f"{folder}/"))
    if "data_files" in chosen:
        patterns = _read_data_files(chosen["data_files"], name)
        if folder:
            patterns = {
                split: [f"{folder}/{pattern}" for pattern in globs]
                for split, globs in patterns.items()
            }
        splits = {split: _match(globs, paths) for split, globs in patterns.items()}
        return {split: found for split, found in splits.items() if found}
    inside = {path[len(folder) + 1 if folder else 0 :]: path for path in paths}
    data = [path for path in inside if _is_data(path, data_suffixes)]
    if not data:
        raise ConfigError(
            f"stages.validate.inputs: {name} has no file that ends in {', '.join(data_suffixes)}. "
            "If a script makes its rows, set `revision: refs/convert/parquet` in the input's "
            "block: the hub keeps a Parquet copy of most data sets there."
        )
    return {split: [inside[path] for path in found] for split, found in _guess_splits(data).items()}


def _guess_splits(paths: Sequence[str]) -> dict[str, list[str]]:
    """Guess splits from file names; the first pattern that matches any file is used for all."""
    sharded: dict[str, list[str]] = {}
    for path in paths:
        if match := _SHARDED.fullmatch(path):
            sharded.setdefault(match["split"], []).append(path)
    if sharded:
        return sharded
    for templates in (_FOLDER_PATTERNS, _FILE_PATTERNS):
        guessed = {
            split: _match([t.format(word=word) for word in words for t in templates], paths)
            for split, words in _KEYWORDS.items()
        }
        if any(guessed.values()):
            return {split: found for split, found in guessed.items() if found}
    return {DEFAULT_SPLIT: list(paths)}


def _match(patterns: Sequence[str], paths: Sequence[str]) -> list[str]:
    """Return the paths that patterns match, in the patterns' order, each once."""
    found: dict[str, None] = {}
    for pattern in patterns:
        expression = re.compile(glob_translate(pattern.removeprefix("./")))
        found |= dict.fromkeys(
            path
            for path in paths
            if expression.match(path)
            and PurePosixPath(path).name not in _NEVER_DATA - {PurePosixPath(pattern).name}
            and _count_hidden(path) == _count_hidden(pattern.removeprefix("./"))
        )
    return list(found)


def _count_hidden(path: str) -> tuple[int, int]:
    """Count the parts that a pattern matches only if it spells them out: `.git`, `__pycache__/`."""
    parts = PurePosixPath(path).parts
    return (
        sum(part.startswith(".") for part in parts),
        sum(part.startswith("__") for part in parts[:-1]),
    )


def _is_data(path: str, suffixes: Sequence[str]) -> bool:
    name = PurePosixPath(path).name
    return (
        name.endswith(tuple(suffixes)) and name not in _NEVER_DATA and _count_hidden(path) == (0, 0)
    )


def _choose_config(card: Mapping[str, Any], wanted: str | None, name: str) -> Mapping[str, Any]:
    """Return the wanted config of a card; empty if none is wanted and the card has none."""
    configs = card.get("configs") or []
    if not isinstance(configs, list) or not all(
        isinstance(each, dict) and "config_name" in each for each in configs
    ):
        raise ConfigError(
            f"stages.validate.inputs: the card of {name} has `configs` that cannot be read. "
            "Download the files that you want, and name them instead."
        )
    by_name: dict[str, Mapping[str, Any]] = {str(each["config_name"]): each for each in configs}
    if wanted is None:
        if not by_name:
            return {}
        marked = [each for each, content in by_name.items() if content.get("default") is True]
        names = marked or [each for each in by_name if each == "default"] or list(by_name)
        if len(names) == 1:
            return by_name[names[0]]
    if wanted in by_name:
        return by_name[wanted]
    problem = "several configs" if wanted is None else f"no config {wanted}"
    raise ConfigError(
        f"stages.validate.inputs: {name} has {problem}. Its card lists: "
        f"{', '.join(by_name) or 'none'}. Set `config` in the input's block accordingly."
    )


def _read_data_files(data_files: object, name: str) -> dict[str, list[str]]:
    """Read a card's `data_files`: patterns, or blocks of a split and its patterns."""
    entries = data_files if isinstance(data_files, list) else [data_files]
    patterns: dict[str, list[str]] = {}
    for entry in entries:
        block = entry if isinstance(entry, dict) else {"split": DEFAULT_SPLIT, "path": entry}
        globs = block.get("path")
        globs = globs if isinstance(globs, list) else [globs]
        if "split" not in block or not all(isinstance(glob, str) for glob in globs):
            raise ConfigError(
                f"stages.validate.inputs: the card of {name} has `data_files` that cannot be read: "
                f"{str(entry)[:200]}. Download the files that you want, and name them instead."
            )
        patterns.setdefault(str(block["split"]), []).extend(globs)
    return patterns


def _read_card(place: HubPlace) -> Mapping[str, Any]:
    try:
        return metadata_load(place.fetch()) or {}
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            f"stages.validate.inputs: the card of hub:{place.repo} cannot be read: {error}. "
            "Download the files that you want, and name them instead."
        ) from error


def _pin(place: HubPlace, sibling: RepoSibling) -> HubFile:
    if sibling.lfs is not None:
        return HubFile(place, sibling.lfs.size, sibling.lfs.sha256)
    # For a small file the hub lists only a git hash, not a sha256.
    assert sibling.size is not None
    return HubFile(place, sibling.size, digest_file(place.fetch()))
