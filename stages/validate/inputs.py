"""Which files do the recipe's patterns mean, and what do they hold?"""

import functools
import glob
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from schemas.config import config_class, dump_config
from schemas.errors import ConfigError, DataError
from stages.digests import digest_file
from stages.validate.formats import ColumnMap, check_format_name

_DATA_SUFFIXES = (
    ".jsonl",
    ".ndjson",
    ".json",
    ".parquet",
    ".arrow",
    ".feather",
    ".csv",
    ".tsv",
)
_COMPRESSED_SUFFIXES = (".gz", ".zst", ".zstd")


FormatName = Annotated[str, AfterValidator(check_format_name)]


@config_class
class InputConfig:
    """One input of several: where it is, and how it is mixed with the others."""

    path: str
    """A file, a folder or a glob; relative ones start at the current directory."""
    format: FormatName | None = None
    """How its rows are laid out; absent = what stages.validate.format says."""
    map: ColumnMap | None = None
    """Where its rows hold what a pair needs, for tables of any other layout."""
    source: str | None = Field(default=None, min_length=1)
    """Names the source of all its rows; null = what the row says, or else the file's name."""
    weight: float = Field(default=1.0, gt=0)
    """Multiplies the weights of its rows."""
    max_rows: int | None = Field(default=None, ge=1)
    """Take a random sample of at most so many rows, the same however they are ordered and cut;
    rows that are equal are taken together or not at all. null = all rows."""
    seed: int = 0
    """Another number takes another sample; it means something only with `max_rows`."""
    split: str | None = None
    """Which split to read of a folder that `datasets.save_to_disk` wrote with several."""

    @model_validator(mode="after")
    def _check(self) -> "InputConfig":
        if self.map is not None and self.format is not None:
            raise ValueError("name a format or a map, not both")
        return self


def _expand_path(value: object) -> object:
    """Take a plain string for the block that names only a path."""
    return {"path": value} if isinstance(value, str) else value


Inputs = list[Annotated[InputConfig, BeforeValidator(_expand_path)]]


@dataclass(frozen=True, kw_only=True)
class SampledInput:
    """An input of which a sample is taken, over all its files."""

    index: int
    """Which of the recipe's inputs it is, from 0."""
    max_rows: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """One file, as it was when the run was planned."""

    name: str
    """As the pattern matched it, with `/`; it is written to the rows."""
    path: str
    """Absolute, because workers run in another directory."""
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

    def identity(self) -> dict[str, Any]:
        """Give what decides the rows; what is left at its default is left out."""
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
        """Refuse a file that is gone or has another size than when the run was planned.

        Raises:
            DataError: naming the file.
        """
        try:
            found = os.path.getsize(self.path)
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
        """Give names, digests and settings: they decide what the rows say."""
        return [file.identity() for file in self.files]


@functools.lru_cache
def stem_of(name: str) -> str:
    """Give a file's name without directories and data suffixes: the source of its rows."""
    stem = name.rsplit("/", 1)[-1]
    for suffixes in (_COMPRESSED_SUFFIXES, _DATA_SUFFIXES):
        for suffix in suffixes:
            stem = stem.removesuffix(suffix) or stem
    return stem


def find_inputs(inputs: Sequence[InputConfig]) -> InputFiles:
    """Find the files that patterns match, in order, each once.

    A pattern is a file, a folder (all data files below it, hidden ones left out) or a glob with
    `*`, `?`, `[...]` and `**`; relative ones start at the current directory. Matches of one pattern
    are sorted by name.

    A folder that `datasets.save_to_disk` wrote stands for the Arrow files that it lists.

    Args:
        inputs: as the recipe gives them.
    Raises:
        ConfigError: a pattern matches no file, or two inputs want a file differently.
        DataError: a file cannot be read.
    """
    found: dict[str, tuple[InputConfig, InputFile]] = {}
    for index, wanted in enumerate(inputs):
        for match in _match(wanted):
            path = os.path.abspath(match)
            if path not in found:
                found[path] = wanted, _pin(match, path, wanted, index)
            elif not _treats_alike(found[path][0], wanted):
                raise ConfigError(
                    f"stages.validate.inputs: {match} belongs to both {found[path][0].path} and "
                    f"{wanted.path}, which differ in format, map, source, weight or sample. "
                    "Let only one of them match it."
                )
    return InputFiles(files=tuple(file for _, file in found.values()))


def _treats_alike(one: InputConfig, other: InputConfig) -> bool:
    """Say whether a file that both inputs match gives the same rows under either."""
    if one is other:
        return True
    settings = [(each.format, each.map, each.source, each.weight) for each in (one, other)]
    return settings[0] == settings[1] and one.max_rows is None and other.max_rows is None


def _match(wanted: InputConfig) -> list[str]:
    pattern = wanted.path
    expanded = os.path.expanduser(pattern)
    saved = _match_saved(wanted, expanded)
    if saved:
        return saved
    if wanted.split is not None:
        raise ConfigError(
            f"stages.validate.inputs: {pattern}: `split` picks from a folder that "
            "datasets.save_to_disk wrote with several splits, and this is none. Leave it out."
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


def _match_saved(wanted: InputConfig, folder: str) -> list[str]:
    """List the files of a folder that `datasets.save_to_disk` wrote; of any other none."""
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
            plain = name
            for suffix in _COMPRESSED_SUFFIXES:
                plain = plain.removesuffix(suffix)
            if plain.endswith(_DATA_SUFFIXES) and not name.startswith("."):
                yield os.path.join(parent, name)


def _pin(match: str, path: str, wanted: InputConfig, index: int) -> InputFile:
    sampled = None
    if wanted.max_rows is not None:
        sampled = SampledInput(index=index, max_rows=wanted.max_rows, seed=wanted.seed)
    try:
        return InputFile(
            name=Path(match).as_posix(),
            path=path,
            num_bytes=os.path.getsize(path),
            sha256=digest_file(path),
            format=wanted.format,
            map=wanted.map,
            source=wanted.source,
            weight=wanted.weight,
            sampled=sampled,
        )
    except OSError as error:
        raise DataError(f"{match} cannot be read ({error.strerror}).") from error
