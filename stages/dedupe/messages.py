"""Message columns as flat lists of texts, and digests of what they say.

Converting nested messages to Python row by row is slow; here each field of all messages becomes one
flat list.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import pyarrow as pa

from schemas.ids import canonical_text
from schemas.normalise import normalise_text
from schemas.rows import MESSAGE

_NORMALISED = ("content", "reasoning")
_JSON = ("tool_calls", "tools")
_DIGEST_HEX_DIGITS = 32
_BATCH_ROWS = 256
_BATCH_BYTES = 4 << 20


@dataclass(frozen=True)
class Messages:
    """One column of messages; row k holds messages bounds[k] to bounds[k + 1]."""

    bounds: list[int]
    fields: dict[str, list[str | None]]
    """The fields that have a value in some message, and always role."""

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> "Messages":
        array = column.combine_chunks()
        if isinstance(array, pa.ChunkedArray):
            array = pa.concat_arrays([*array.chunks, pa.array([], array.type)])
        offsets = array.offsets.to_numpy()
        structs = array.flatten()
        names = [field.name for field in MESSAGE]
        columns = zip(names, structs.flatten(), strict=True)
        fields = {
            name: values.to_pylist()
            for name, values in columns
            if values.null_count < len(values) or name == "role"
        }
        return cls((offsets - offsets[0]).tolist(), fields)

    @property
    def num_rows(self) -> int:
        return len(self.bounds) - 1

    def texts(self) -> list[str]:
        """Return the text of each message: reasoning, content and tool calls."""
        spoken = [
            self.fields[f] for f in ("reasoning", "content", "tool_calls") if f in self.fields
        ]
        if len(spoken) == 1:
            return [text or "" for text in spoken[0]]
        if not spoken:
            return [""] * len(self.fields["role"])
        return ["\n".join(filter(None, parts)) for parts in zip(*spoken, strict=True)]

    def canonical_texts(self) -> list[str]:
        """Return each message as one string; strings are equal exactly where the messages are."""
        columns = [
            ["" if value is None else spell_field(name, value) for value in values]
            for name, values in self.fields.items()
        ]
        return ["".join(parts) for parts in zip(*columns, strict=True)]


def spell_field(name: str, value: str) -> str:
    """Prefix a field with its name and length, so that concatenated fields stay unambiguous."""
    text = value
    if name in _NORMALISED:
        text = normalise_text(value)
    elif name in _JSON:
        text = canonical_text(value)
    return f"{name}{len(text)}:{text}"


def cut_batches(rows: pa.Table) -> Iterator[pa.Table]:
    """Cut rows of the pairs table into batches bounded by rows and bytes."""
    for first in range(0, rows.num_rows, _BATCH_ROWS):
        yield from _halve(rows.slice(first, _BATCH_ROWS))


def _halve(batch: pa.Table) -> Iterator[pa.Table]:
    if batch.num_rows == 1 or batch.nbytes <= _BATCH_BYTES:
        yield batch
        return
    half = batch.num_rows // 2
    yield from _halve(batch.slice(0, half))
    yield from _halve(batch.slice(half))


def digest_texts(texts: Iterable[str]) -> str:
    """Return 32 hex digits that identify a sequence of texts, each prefixed with its length."""
    content = "|".join(texts).encode()
    return hashlib.sha256(content).hexdigest()[:_DIGEST_HEX_DIGITS]


def part_texts(rows: pa.Table) -> Iterator[str]:
    """Yield each row's three texts: prompt without system messages, chosen, rejected."""
    columns = [list(_side_texts(rows[name])) for name in ("prompt", "chosen", "rejected")]
    for texts in zip(*columns, strict=True):
        yield from texts


def _side_texts(column: pa.ChunkedArray) -> Iterator[str]:
    messages = Messages.of(column)
    texts = messages.texts()
    roles = messages.fields["role"]
    has_system = "system" in roles
    for first, end in pairwise(messages.bounds):
        if end == first + 1 and not has_system:
            yield texts[first]
        else:
            yield "\n".join(texts[k] for k in range(first, end) if roles[k] != "system")
