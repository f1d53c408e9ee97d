"""Inputs of a recipe: find the files that its patterns name, with their content digests."""

import functools
import glob
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from schemas.config import config_class, dump_config
from schemas.errors import ConfigError, DataError
from stages.store.caches import digest_file
from stages.store.filesystems import find_objects, is_glob, is_uri
from stages.store.local_paths import fetch_object
from stages.validate.formats import check_format_name
from stages.validate.formats.column_map import ColumnMap
from stages.validate.hub import HUB_PREFIX, HubPlace, find_hub_files

_DATA_SUFFIXES = (
    ".jsonl",
    ".ndjson",
    ".json",
    ".parquet",
    ".arrow",
    ".feather",
    ".ipc",
    ".csv",
    ".tsv",
)
_COMPRESSED_SUFFIXES = (".gz", ".zst", ".zstd")
_PART = re.compile(r"-\d{5}-of-\d{5}(-[0-9a-f]+)?$")


FormatName = Annotated[str, AfterValidator(check_format_name)]


@config_class
class InputConfig:
    """One input: its path, its layout, and how it is mixed with the others."""

    path: str
    """A file, a folder or a glob, as a path (relative ones start at the current directory) or a URI
    such as `s3://bucket/pairs/*.jsonl`. `hub:owner/name` is a data set of the Hugging Face hub,
    pinned to its current commit."""
    format: FormatName | None = None
    """Format of its rows; absent = that of stages.validate.format."""
    map: ColumnMap | None = None
    """Column map, for a table of any other layout."""
    source: str | None = Field(default=None, min_length=1)
    """Source of all its rows; null = the row's own source, or else the name of the file or of the
    hub's data set."""
    weight: float = Field(default=1.0, gt=0)
    """Factor that multiplies the weights of its rows."""
    max_rows: int | None = Field(default=None, ge=1)
    """Size of a random sample of rows, which does not depend on their order or files; rows that are
    equal are taken together or not at all. null = all rows."""
    seed: int = 0
    """Seed of the sample that `max_rows` draws."""
    split: str | None = None
    """Split to read from a data set of the hub (null = train), or from a folder with several splits
    that `datasets.save_to_disk` wrote."""
    revision: str | None = None
    """Branch, tag or commit of a data set of the hub; null = main."""
    config: str | None = None
    """Config to read from a data set of the hub; null = the default of its card."""

    @model_validator(mode="after")
    def _check(self) -> "InputConfig":
        if self.map is not None and self.format is not None:
            raise ValueError("name a format or a map, not both")
        return self


def _expand_path(value: object) -> object:
    """Turn a plain string into a block that has only a path."""
    return {"path": value} if isinstance(value, str) else value


Inputs = list[Annotated[InputConfig, BeforeValidator(_expand_path)]]


@dataclass(frozen=True, kw_only=True)
class SampledInput:
    """A sampled input; the sample is drawn over all its files."""

    index: int
    """Its position among the recipe's inputs, from 0."""
    max_rows: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """One file, as it was when the run was planned."""

    name: str
    """Its name as the pattern matched it, with `/`; stored in the rows."""
    path: str
    """A URI or an absolute path, because workers run in another directory. Empty for a file of the
    hub, whose path differs between machines."""
    num_bytes: int
    sha256: str
    format: str | None = None
    """As in InputConfig."""
    map: ColumnMap | None = None
    """As in InputConfig."""
    source: str | None = None
    """As in InputConfig."""
    weight: float = 1.0
    """As in InputConfig."""
    sampled: SampledInput | None = None
    """The sampled input that the file is a part of; None means that all its rows are taken."""
    hub: HubPlace | None = None
    """Its place on the hub, if it comes from there."""

    @property
    def local_path(self) -> str:
        """Its path on this machine; a file of the hub or an object is fetched first.

        Raises:
            ConfigError: it cannot be fetched from the hub.
            DataError: the object is missing or has changed.
        """
        if self.hub:
            return self.hub.fetch()
        return fetch_object(self.path, sha256=self.sha256) if is_uri(self.path) else self.path

    def identity(self) -> dict[str, Any]:
        """Return the settings that decide the rows; those with default values are left out."""
        identity: dict[str, Any] = {"name": self.name, "sha256": self.sha256}
        if self.format is not None:
            identity["format"] = self.format
        if self.map is not None:
            identity["map"] = dump_config(self.map)
        if self.source is not None:
            identity["source"] = self.source
        if self.weight != 1.0:
            identity["weight"] = self.weight
        if self.sampled is not None:
            identity["sampled"] = asdict(self.sampled)
        return identity

    def check_size(self) -> None:
        """Refuse a file that is missing, or whose size has changed since the run was planned.

        Raises:
            DataError: naming the file.
        """
        try:
            found = os.path.getsize(self.local_path)
        except OSError as error:
            raise DataError(
                f"{self.name} cannot be read as {self.path} ({error.strerror}). "
                "Every worker must reach the input files under the same path."
            ) from error
        if found != self.num_bytes:
            raise DataError(
                f"{self.name} has {found:,} bytes; it had {self.num_bytes:,} when the run was "
                "planned. Run again."
            )


@dataclass(frozen=True, kw_only=True)
class InputFiles:
    """The input files in source order, fixed to their content."""

    files: tuple[InputFile, ...]

    def identity(self) -> list[dict[str, Any]]:
        """Return what is hashed: the names, digests and settings that decide the rows."""
        return [file.identity() for file in self.files]


@functools.lru_cache
def stem_of(name: str) -> str:
    """Return the source of a file's rows: its stem, or the hub's name of its data set.

    The stem is the name without directories, data suffixes and part number (-00000-of-00003).
    """
    if name.startswith(HUB_PREFIX):
        return "/".join(name.removeprefix(HUB_PREFIX).split("/", 2)[:2])
    stem = name.rsplit("/", 1)[-1]
    for suffixes in (_COMPRESSED_SUFFIXES, _DATA_SUFFIXES):
        for suffix in suffixes:
            stem = stem.removesuffix(suffix) or stem
    return _PART.sub("", stem) or stem


def find_inputs(inputs: Sequence[InputConfig]) -> InputFiles:
    """Find the files that patterns match, in order, each once.

    A pattern is a file, a folder (all data files below it, hidden ones left out) or a glob with
    `*`, `?`, `[...]` and `**`; relative ones start at the current directory. Matches of one pattern
    are sorted by name.

    A folder that `datasets.save_to_disk` wrote means the Arrow files that it lists;
    `hub:owner/name` means the files of one split.

    Args:
        inputs: the inputs of the recipe.
    Raises:
        ConfigError: a pattern matches no file, or two inputs read one file differently.
        DataError: a file cannot be read.
    """
    found: dict[str, tuple[InputConfig, InputFile]] = {}
    for index, wanted in enumerate(inputs):
        is_hub = wanted.path.startswith(HUB_PREFIX)
        for file in _find_on_hub(wanted, index) if is_hub else _find_locally(wanted, index):
            key = file.path or file.name
            first, known = found.setdefault(key, (wanted, file))
            if first is not wanted and not _are_read_alike(known, file):
                raise ConfigError(
                    f"stages.validate.inputs: {file.name} belongs to both {first.path} and "
                    f"{wanted.path}, which differ in format, map, source, weight, sample or "
                    "revision. Let only one of them match it."
                )
    return InputFiles(files=tuple(file for _, file in found.values()))


def _are_read_alike(one: InputFile, other: InputFile) -> bool:
    """Return whether a file that two inputs match gives the same rows under either."""
    settings = [
        (each.format, each.map, each.source, each.weight, each.hub) for each in (one, other)
    ]
    return settings[0] == settings[1] and one.sampled is None and other.sampled is None


def _find_on_hub(wanted: InputConfig, index: int) -> Iterator[InputFile]:
    files = find_hub_files(
        wanted.path,
        revision=wanted.revision,
        config=wanted.config,
        split=wanted.split,
        data_suffixes=[
            data + compressed
            for data in _DATA_SUFFIXES
            for compressed in ("", *_COMPRESSED_SUFFIXES)
        ],
    )
    for place, num_bytes, sha256 in files:
        yield InputFile(
            name=f"{HUB_PREFIX}{place.repo}/{place.path}",
            path="",
            num_bytes=num_bytes,
            sha256=sha256,
            hub=place,
            **_settings(wanted, index),
        )


def _find_locally(wanted: InputConfig, index: int) -> Iterator[InputFile]:
    if wanted.revision is not None or wanted.config is not None:
        raise ConfigError(
            f"stages.validate.inputs: {wanted.path}: `revision` and `config` mean something only "
            "for a data set of the hub (hub:owner/name). Leave them out."
        )
    for match in _match_objects(wanted) if is_uri(wanted.path) else _match(wanted):
        try:
            local = fetch_object(match) if is_uri(match) else os.path.abspath(match)
            yield InputFile(
                name=match if is_uri(match) else Path(match).as_posix(),
                path=match if is_uri(match) else local,
                num_bytes=os.path.getsize(local),
                sha256=digest_file(local),
                **_settings(wanted, index),
            )
        except OSError as error:
            raise DataError(f"{match} cannot be read ({error.strerror}).") from error


def _settings(wanted: InputConfig, index: int) -> dict[str, Any]:
    """Return the settings of an input that decide how its files are read."""
    sampled = None
    if wanted.max_rows is not None:
        sampled = SampledInput(index=index, max_rows=wanted.max_rows, seed=wanted.seed)
    return {
        "format": wanted.format,
        "map": wanted.map,
        "source": wanted.source,
        "weight": wanted.weight,
        "sampled": sampled,
    }


def _match(wanted: InputConfig) -> list[str]:
    pattern = wanted.path
    expanded = os.path.expanduser(pattern)
    saved = _match_saved(wanted, expanded)
    if saved:
        return saved
    if wanted.split is not None:
        raise ConfigError(
            f"stages.validate.inputs: {pattern}: `split` picks from a folder that "
            "datasets.save_to_disk wrote with several splits, or from a data set of the hub, and "
            "this is neither. Leave it out."
        )
    if os.path.isfile(expanded):
        return [expanded]
    if os.path.isdir(expanded):
        matches = sorted(_list_folder(expanded))
        ends = ", ".join(_DATA_SUFFIXES)
        unreadable = f"no file that ends in {ends} (plain, .gz or .zst) is in it"
    else:
        matches = sorted(m for m in glob.glob(expanded, recursive=True) if os.path.isfile(m))
        unreadable = "no local file matches it"
    if not matches:
        raise ConfigError(
            f"stages.validate.inputs: {pattern}: {unreadable}. "
            f"Relative patterns start at {os.getcwd()}."
        )
    return matches


def _match_objects(wanted: InputConfig) -> list[str]:
    if wanted.split is not None:
        raise ConfigError(
            f"stages.validate.inputs: {wanted.path}: `split` does not apply to objects. "
            "Leave it out, and name the split's files."
        )
    found = find_objects(wanted.path)
    if is_glob(wanted.path) or found == [wanted.path]:
        matches, unreadable = found, "no object matches it"
    else:
        matches = [uri for uri in found if _has_data_suffix(uri)]
        ends = ", ".join(_DATA_SUFFIXES)
        unreadable = f"no object that ends in {ends} (plain, .gz or .zst) is below it"
    if not matches:
        raise ConfigError(f"stages.validate.inputs: {wanted.path}: {unreadable}.")
    return matches


def _match_saved(wanted: InputConfig, folder: str) -> list[str]:
    """List the files of a folder that `datasets.save_to_disk` wrote, or none of another."""
    several = os.path.join(folder, "dataset_dict.json")
    if os.path.isfile(several):
        splits = _read_saved(several, "splits")
        if wanted.split not in splits:
            raise ConfigError(
                f"stages.validate.inputs: {wanted.path} holds the splits {', '.join(splits)}; "
                f"wanted is {wanted.split}. Set `split` in the input's block to one of them."
            )
        folder = os.path.join(folder, str(wanted.split))
    elif wanted.split is not None:
        return []
    state = os.path.join(folder, "state.json")
    if not os.path.isfile(state):
        return []
    return [os.path.join(folder, file["filename"]) for file in _read_saved(state, "_data_files")]


def _read_saved(path: str, key: str) -> list[Any]:
    try:
        found: list[Any] = json.loads(Path(path).read_bytes())[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not what datasets.save_to_disk writes: {key} cannot be read "
            f"({type(error).__name__}: {error}). Write the folder again."
        ) from error
    return found


def _list_folder(folder: str) -> Iterator[str]:
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if _has_data_suffix(name) and not name.startswith("."):
                yield os.path.join(parent, name)


def _has_data_suffix(name: str) -> bool:
    for suffix in _COMPRESSED_SUFFIXES:
        name = name.removesuffix(suffix)
    return name.endswith(_DATA_SUFFIXES)
