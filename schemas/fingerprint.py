"""Fingerprints: twelve hex digits of a hash of everything that an output depends on."""

from collections.abc import Mapping
from typing import Any

import msgspec

from schemas.ids import digest

_FINGERPRINT_HEX_DIGITS = 12


class InputRef(msgspec.Struct, frozen=True):
    """The output of a stage, as another stage's input."""

    fingerprint: str
    attempt: int = 1
    """1, or the number of the `--again` that made it."""

    @property
    def folder(self) -> str:
        """Name of its directory."""
        return attempt_folder(self.fingerprint, self.attempt)


def attempt_folder(fingerprint: str, attempt: int) -> str:
    """Return the directory name of an attempt: the fingerprint, and `.2`, `.3`, … if repeated."""
    return fingerprint if attempt == 1 else f"{fingerprint}.{attempt}"


def stage_fingerprint(
    stage: str, version: int, identity: Mapping[str, Any], inputs: Mapping[str, InputRef]
) -> str:
    """Hash everything that decides which rows or weights a correct stage writes.

    Args:
        stage: name of the stage.
        version: of the stage, raised when equal config would give other rows.
        identity: the resolved identity config, with content digests in place of moving names.
        inputs: the stage outputs that it reads, by stage name.
    Returns:
        12 hex digits, equal in every process, platform and Python version.
    """
    return digest(
        {
            "stage": stage,
            "version": version,
            "config": identity,
            "inputs": {name: [ref.fingerprint, ref.attempt] for name, ref in inputs.items()},
        }
    )[:_FINGERPRINT_HEX_DIGITS]


class ReferenceIdentity(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Everything that a stored log-prob depends on, except its tokens (see sequence_id)."""

    weights: str
    """Digest of the weight files' contents."""
    config: str
    """Digest of the model's config."""
    dtype: str
    """float32, bfloat16 or float16; `auto` has been resolved."""
    engine: str
    """vllm, transformers, or `imported:` with the digest of the imported table: imported values are
    mixed neither with computed ones nor with another table's."""
    scorers: int
    """Version of the scorers, raised when they would compute other values than before."""
    max_length: int | None
    """Longest sequence that the engine was opened for, in tokens, if position scaling depends on it
    (dynamic or longrope); else None, because then no value depends on it."""
    adapter: str | None = None
    """Digest of the adapter merged into the model and of how it is merged. Left out of the hash if
    None, so that values computed before adapters were supported stay valid."""

    @property
    def fingerprint(self) -> str:
        """12 hex digits over all fields."""
        return digest(msgspec.to_builtins(self))[:_FINGERPRINT_HEX_DIGITS]
