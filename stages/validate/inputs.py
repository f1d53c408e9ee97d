"""Which files do the recipe's patterns mean, and what do they hold?"""

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, model_validator

from schemas.config import config_class, dump_config
from schemas.errors import ConfigError, DataError
from stages.digests import digest_file
from stages.validate.formats import ColumnMap, check_format_name

_DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
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
class InputFile:
    """One file, as it was when the run was planned."""

    name: str
    """As the pattern matched it, with `/`; it is written to the rows."""
    path: str
    """Absolute, because workers run in another directory."""
    num_bytes: int
    sha256: str
    config: InputConfig
    """The recipe's block that it was found by."""

    @property
    def stem(self) -> str:
        """The file's name without directories and data suffixes: the source of its rows."""
        stem = self.name.rsplit("/", 1)[-1]
        for suffixes in (_COMPRESSED_SUFFIXES, _DATA_SUFFIXES):
            for suffix in suffixes:
                stem = stem.removesuffix(suffix) or stem
        return stem

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

    def identity(self) -> list[dict[str, str]]:
        """Give names and digests: both decide what the rows say."""
        return [
            {"name": file.name, "sha256": file.sha256, **_say_settings(file.config)}
            for file in self.files
        ]


def _say_settings(config: InputConfig) -> dict[str, Any]:
    """Give what a recipe says about an input besides its path, which the names stand for."""
    given = dump_config(config)
    return {name: value for name, value in given.items() if name != "path" and value is not None}


def find_inputs(inputs: Sequence[InputConfig]) -> InputFiles:
    """Find the files that patterns match, in order, each once.

    A pattern is a file, a folder (all data files below it, hidden ones left out) or a glob with
    `*`, `?`, `[...]` and `**`; relative ones start at the current directory. Matches of one pattern
    are sorted by name.

    Args:
        inputs: as the recipe gives them.
    Raises:
        ConfigError: a pattern matches no file.
        DataError: a file cannot be read.
    """
    found: dict[str, InputFile] = {}
    for wanted in inputs:
        for match in _match(wanted.path):
            path = os.path.abspath(match)
            if path not in found:
                found[path] = _pin(match, path, wanted)
    return InputFiles(files=tuple(found.values()))


def _match(pattern: str) -> list[str]:
    expanded = os.path.expanduser(pattern)
    if os.path.isfile(expanded):
        return [expanded]
    if os.path.isdir(expanded):
        matches = sorted(_list_folder(expanded))
        wanted = f"no file that ends in {', '.join(_DATA_SUFFIXES)} (plain, .gz or .zst) is in it"
    else:
        matches = sorted(m for m in glob.glob(expanded, recursive=True) if os.path.isfile(m))
        wanted = "no local file matches it"
    if not matches:
        raise ConfigError(
            f"stages.validate.inputs: {pattern}: {wanted}. "
            f"Relative patterns start at {os.getcwd()}."
        )
    return matches


def _list_folder(folder: str) -> Iterator[str]:
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            plain = name
            for suffix in _COMPRESSED_SUFFIXES:
                plain = plain.removesuffix(suffix)
            if plain.endswith(_DATA_SUFFIXES) and not name.startswith("."):
                yield os.path.join(parent, name)


def _pin(match: str, path: str, config: InputConfig) -> InputFile:
    try:
        return InputFile(
            name=Path(match).as_posix(),
            path=path,
            num_bytes=os.path.getsize(path),
            sha256=digest_file(path),
            config=config,
        )
    except OSError as error:
        raise DataError(f"{match} cannot be read ({error.strerror}).") from error
