"""What a stage's output depends on, as twelve hex digits."""

from collections.abc import Mapping
from typing import Any

import msgspec

from schemas.ids import digest

_FINGERPRINT_HEX_DIGITS = 12


class InputRef(msgspec.Struct, frozen=True):
    """A stage output that another stage reads."""

    fingerprint: str
    attempt: int = 1
    """1, or the number of the `--again` that made it."""

    @property
    def folder(self) -> str:
        return attempt_folder(self.fingerprint, self.attempt)


def attempt_folder(fingerprint: str, attempt: int) -> str:
    """Name the directory of one attempt: the fingerprint, then `.2`, `.3`, … for repetitions."""
    return fingerprint if attempt == 1 else f"{fingerprint}.{attempt}"


def stage_fingerprint(
    stage: str, version: int, identity: Mapping[str, Any], inputs: Mapping[str, InputRef]
) -> str:
    """Hash everything that decides which rows or weights a correct stage writes.

    Args:
        stage: its name.
        version: its number, raised when equal config would give other rows.
        identity: resolved identity config; moving names replaced by content digests.
        inputs: the stage outputs it reads, by stage name.
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
    """What a stored log-probability depends on, besides its tokens: those are the sequence_id."""

    weights: str
    """Digest of the weight files' contents."""
    config: str
    """Digest of the model's config.json."""
    dtype: str
    """Resolved: float32, bfloat16 or float16."""
    engine: str
    """vllm, transformers, or `imported:` and the digest of the table that the values came in: such
    values are joined neither with computed ones nor with another table's."""
    scorers: int
    """Version of this program's scorers, raised when they would give other values than before."""
    max_length: int | None
    """Tokens that the engine was opened for, where the scaling of positions depends on it (rope of
    kind dynamic or longrope); else None, for then no value does."""
    adapter: str | None = None
    """Digest of the adapter that is merged into the model, and of how. Left out of the hash where
    there is none, so that values computed before adapters were known stay valid."""

    @property
    def fingerprint(self) -> str:
        """12 hex digits."""
        return digest(msgspec.to_builtins(self))[:_FINGERPRINT_HEX_DIGITS]
