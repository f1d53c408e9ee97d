"""The JSON records of the store: shards, layouts, manifests, runs."""

import hashlib
from collections.abc import Iterable
from typing import Any, TypeVar

import msgspec

from schemas.fingerprint import InputRef


class FileRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One file of a stage, as written."""

    name: str
    """Path below the stage's directory."""
    num_bytes: int
    sha256: str
    num_rows: int | None = None
    """Rows in a Parquet file; null for other files."""


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """What happened to the rows that a shard (or a stage) read."""

    num_in: int = 0
    """Rows read."""
    num_out: int = 0
    """Rows written to data/."""
    reasons: dict[str, int] = {}
    """Rows written to rejected/, by their first code."""
    warnings: dict[str, int] = {}
    """Rows kept with a warning, by code."""
    more: dict[str, int] = {}
    """The stage's own counts, such as num_sequences_scored or num_tokens."""

    @property
    def num_rejected(self) -> int:
        return sum(self.reasons.values())

    @property
    def num_rows_kept(self) -> int:
        """Rows that were not rejected: one row out each, but for validate, which counts them."""
        return self.more.get("num_rows_kept", self.num_out)

    @classmethod
    def total(cls, parts: Iterable["Counts"]) -> "Counts":
        parts = list(parts)
        return cls(
            num_in=sum(part.num_in for part in parts),
            num_out=sum(part.num_out for part in parts),
            reasons=_sum_by_key(part.reasons for part in parts),
            warnings=_sum_by_key(part.warnings for part in parts),
            more=_sum_by_key(part.more for part in parts),
        )


class ShardRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The commit record of a shard: its presence means that the shard is done."""

    index: int
    files: dict[str, FileRecord]
    """By role: "data" and "rejected", or what a pass inside a stage names."""
    counts: Counts
    seconds: float
    """Wall time of the attempt that committed; provenance, never hashed."""
    writer: str
    """Host and process that committed; provenance, never hashed."""
    prompt_range: tuple[str, str] | None = None
    """score: the lowest and the highest prompt_id in data; None where there are no rows."""


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """How a stage is cut into shards; written before the first of them."""

    shards: list[str]
    """What each shard holds, in words."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Written last; its presence means that the stage is complete."""

    stage: str
    version: int
    fingerprint: str
    attempt: int
    inputs: dict[str, InputRef]
    config: dict[str, Any]
    """The resolved identity config, as hashed."""
    settings: dict[str, Any]
    """The stage's block of the recipe, with defaults and moving names as the user wrote them."""
    shards: list[ShardRecord]
    files: list[FileRecord]
    """What the stage wrote besides shards."""
    counts: Counts
    summary: dict[str, Any]
    """Findings worth a look: rates, gates, first and last loss. Not hashed."""
    versions: dict[str, str]
    """Python and packages; provenance."""
    host: str
    started_at: str
    """UTC, ISO 8601."""
    seconds: float


R = TypeVar("R", bound=msgspec.Struct)


def encode_record(record: msgspec.Struct, *, is_indented: bool = True) -> bytes:
    """Give a record of the store as JSON, with a checksum of all the rest of it in front."""
    content = msgspec.json.decode(msgspec.json.encode(record))
    sealed = msgspec.json.encode({"checksum": _checksum(content), **content})
    return msgspec.json.format(sealed, indent=1) if is_indented else sealed


def decode_record(content: bytes, kind: type[R]) -> R:
    """Read a record of the store.

    Raises:
        msgspec.DecodeError: it is none of this kind, or not as it was written.
    """
    try:
        fields = msgspec.json.decode(content, type=dict[str, Any])
    except UnicodeDecodeError as error:
        raise msgspec.DecodeError(str(error)) from error
    checksum = fields.pop("checksum", None)
    if checksum != _checksum(fields):
        raise msgspec.DecodeError("it is not what its checksum was made of: it was changed")
    return msgspec.convert(fields, kind)


def _checksum(fields: dict[str, Any]) -> str:
    return hashlib.sha256(msgspec.json.encode(fields)).hexdigest()


class RunRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Which stage outputs a named run used."""

    name: str
    recipe: str
    """Path of the recipe, as given."""
    stages: dict[str, InputRef]
    """Complete stages, in order."""
    begun: dict[str, InputRef] = {}
    """Stages that it still had to finish when this was written: nobody else deletes them."""


def _sum_by_key(parts: Iterable[dict[str, int]]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for part in parts:
        for key, value in part.items():
            totals[key] = totals.get(key, 0) + value
    return dict(sorted(totals.items()))
