"""JSON records of the store: files, shards, layouts, manifests, runs."""

import hashlib
from collections.abc import Iterable
from typing import Any, TypeVar

import msgspec

from schemas.fingerprint import InputRef


class FileRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Name, size and content of one file of a stage."""

    name: str
    """Path below the stage's directory."""
    num_bytes: int
    sha256: str
    """64 hex digits over the content."""
    num_rows: int | None = None
    """Rows in a Parquet file; null for other files."""


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """Numbers of rows that a shard or a stage read, wrote and rejected."""

    num_in: int = 0
    """Rows read."""
    num_out: int = 0
    """Rows written to data/."""
    reasons: dict[str, int] = {}
    """Rows written to rejected/, by their first code."""
    warnings: dict[str, int] = {}
    """Rows kept with a warning, by code."""
    more: dict[str, int] = {}
    """Counts specific to the stage, such as num_sequences_scored or num_tokens."""

    @property
    def num_rejected(self) -> int:
        """Rows written to rejected/."""
        return sum(self.reasons.values())

    @property
    def num_rows_kept(self) -> int:
        """Rows not rejected: num_out, except in validate, where a row may give several pairs."""
        return self.more.get("num_rows_kept", self.num_out)

    @property
    def num_rows_joined(self) -> int:
        """Rows kept without a pair of their own, because validate paired them with other rows."""
        return self.more.get("num_rows_joined", 0)

    @classmethod
    def total(cls, parts: Iterable["Counts"]) -> "Counts":
        """Add up the counts of several shards."""
        parts = list(parts)
        return cls(
            num_in=sum(part.num_in for part in parts),
            num_out=sum(part.num_out for part in parts),
            reasons=_sum_by_key(part.reasons for part in parts),
            warnings=_sum_by_key(part.warnings for part in parts),
            more=_sum_by_key(part.more for part in parts),
        )


class ShardRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Commit record of a shard; its presence means that the shard is finished."""

    index: int
    files: dict[str, FileRecord]
    """By role: "data" and "rejected", or the roles of a pass inside a stage."""
    counts: Counts
    seconds: float
    """Wall time of the attempt that committed. Provenance, never hashed."""
    writer: str
    """Host and process id of the attempt that committed. Provenance, never hashed."""
    prompt_range: tuple[str, str] | None = None
    """score: lowest and highest prompt_id of the data file; None if it has no rows."""


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """Division of a stage into shards, recorded before the first shard is written."""

    shards: list[str]
    """Description of each shard."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Record of a whole stage, written last; its presence means that the stage is complete."""

    stage: str
    version: int
    fingerprint: str
    attempt: int
    inputs: dict[str, InputRef]
    """The stage outputs that it read, by stage name."""
    config: dict[str, Any]
    """The resolved identity config that was hashed."""
    settings: dict[str, Any]
    """The stage's block of the recipe, with defaults, and moving names as the user wrote them."""
    shards: list[ShardRecord]
    files: list[FileRecord]
    """Files that the stage wrote besides its shards."""
    counts: Counts
    summary: dict[str, Any]
    """Findings for the report, such as rates, gates, first and last loss. Not hashed."""
    versions: dict[str, str]
    """Versions of Python and packages, by name. Provenance."""
    host: str
    started_at: str
    """UTC, ISO 8601."""
    seconds: float
    """Wall time of the run that finished the stage."""


R = TypeVar("R", bound=msgspec.Struct)


def encode_record(record: msgspec.Struct, *, is_indented: bool = True) -> bytes:
    """Encode a record of the store as JSON that starts with a checksum of all other fields."""
    content = msgspec.json.decode(msgspec.json.encode(record))
    sealed = msgspec.json.encode({"checksum": _checksum(content), **content})
    return msgspec.json.format(sealed, indent=1) if is_indented else sealed


def decode_record(content: bytes, kind: type[R]) -> R:
    """Read a record of the store.

    Raises:
        msgspec.DecodeError: the content is not a record of this kind, or was changed.
    """
    try:
        fields = msgspec.json.decode(content, type=dict[str, Any])
    except UnicodeDecodeError as error:
        raise msgspec.DecodeError(str(error)) from error
    checksum = fields.pop("checksum", None)
    if checksum != _checksum(fields):
        raise msgspec.DecodeError("its content was changed: it does not match its checksum")
    return msgspec.convert(fields, kind)


def _checksum(fields: dict[str, Any]) -> str:
    return hashlib.sha256(msgspec.json.encode(fields)).hexdigest()


class RunRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The stage outputs of a named run."""

    name: str
    recipe: str
    """Path of the recipe as the user gave it."""
    stages: dict[str, InputRef]
    """Complete stages, in pipeline order."""
    begun: dict[str, InputRef] = {}
    """Stages that the run had yet to finish when this was written; `prune` keeps them."""


def _sum_by_key(parts: Iterable[dict[str, int]]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for part in parts:
        for key, value in part.items():
            totals[key] = totals.get(key, 0) + value
    return dict(sorted(totals.items()))
