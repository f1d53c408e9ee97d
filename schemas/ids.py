"""What identifies a pair, a prompt and a sequence: their content, never their position."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from schemas.rows import MESSAGE

_ID_HEX_DIGITS = 32
"""128 bits: among 10^9 pairs the chance of one accidental collision is about 10^-21."""

Message = Mapping[str, Any]

_CanonicalMessage = msgspec.defstruct(
    "_CanonicalMessage",
    [(name, str | None, None) for name in sorted(field.name for field in MESSAGE)],
    omit_defaults=True,
    gc=False,
)
"""A message whose fields come in canonical order, without the absent ones."""

_encoder = msgspec.json.Encoder()


def canonical_json(value: object) -> bytes:
    """Encode nested dicts, lists and scalars so that equal content gives equal bytes.

    Keys are sorted, nothing is escaped that UTF-8 can hold, and there is no white space.

    Raises:
        TypeError: a value that has no stable identity (a set, an object, bytes, ...).
        ValueError: NaN or infinity.
    """
    text = json.dumps(
        value, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":")
    )
    return text.encode("utf-8")


def digest(value: object) -> str:
    """Give all 64 hex digits of the sha256 of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def identify_pair(
    prompt: Iterable[Message],
    chosen: Iterable[Message],
    rejected: Iterable[Message],
    tools: str | None = None,
) -> tuple[str, str]:
    """Give the pair_id and the prompt_id of a pair; its prompt is encoded and hashed once.

    Raises:
        ValueError: a text has half a surrogate pair.
        TypeError: a message has a field that the message struct has not.
    """
    end = b"," + _encoder.encode(tools) + b"]"
    of_prompt = hashlib.sha256(b"[" + _encode_messages(prompt))
    of_pair = of_prompt.copy()
    of_prompt.update(end)
    of_pair.update(b"," + _encode_messages(chosen) + b"," + _encode_messages(rejected) + end)
    return of_pair.hexdigest()[:_ID_HEX_DIGITS], of_prompt.hexdigest()[:_ID_HEX_DIGITS]


def pair_id(
    prompt: Iterable[Message],
    chosen: Iterable[Message],
    rejected: Iterable[Message],
    tools: str | None = None,
) -> str:
    """Identify a preference pair: 32 hex digits of the sha256 of its canonical JSON."""
    return identify_pair(prompt, chosen, rejected, tools)[0]


def prompt_id(prompt: Iterable[Message], tools: str | None = None) -> str:
    """Identify a prompt: 32 hex digits of the sha256 of its canonical JSON, tools included."""
    content = b"[" + _encode_messages(prompt) + b"," + _encoder.encode(tools) + b"]"
    return hashlib.sha256(content).hexdigest()[:_ID_HEX_DIGITS]


def sequence_id(
    prompt_ids: Sequence[int] | npt.NDArray[np.int32],
    completion_ids: Sequence[int] | npt.NDArray[np.int32],
) -> str:
    """Identify prompt ids + completion ids: 32 hex digits of a sha256.

    The hash is over the number of prompt ids (8 bytes, little endian), the prompt ids and the
    completion ids (4 bytes each, little endian), so moving the border between the two is another
    sequence.
    """
    prompt = np.asarray(prompt_ids, dtype="<i4")
    completion = np.asarray(completion_ids, dtype="<i4")
    content = len(prompt).to_bytes(8, "little") + prompt.tobytes() + completion.tobytes()
    return hashlib.sha256(content).hexdigest()[:_ID_HEX_DIGITS]


def _encode_messages(messages: Iterable[Message]) -> bytes:
    """Give the canonical JSON of messages; a fifth of the time that `canonical_json` takes.

    Absent fields are dropped, so that a message field added later leaves old ids as they are.
    """
    return _encoder.encode([_CanonicalMessage(**message) for message in messages])
