"""Decode JSON strictly: refuse what parsers read differently.

Parsers disagree on NaN, duplicate keys, half surrogate pairs and deep nesting: some refuse, some
change the value, one crashes. Here each of these is refused with its own code; NaN in a row of data
is read, because Python writes it for missing cells.
"""

import json
import re
from collections.abc import Iterable
from typing import Any

import msgspec

from stages.validate.findings import RowFault

MAX_DEPTH = 64
_KEY = re.compile(rb'"\s*:')
_CONTAINERS = (dict, list)

_decoder = msgspec.json.Decoder()


def decode_strictly(content: bytes, *, may_have_nan: bool = False) -> Any:
    """Decode one JSON value; integers of any size stay exact.

    Args:
        content: the value's text in UTF-8.
        may_have_nan: accept NaN and Infinity as floats. They are not JSON, but Python's json writes
            them.
    Raises:
        RowFault: it is not JSON, or parsers would read it differently.
    """
    try:
        value = _decoder.decode(content)
    except RecursionError:
        raise RowFault("JSON_DEPTH", None, "nested too deeply to be read") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        value = _decode_leniently(content, error, may_have_nan=may_have_nan)
    # A colon follows every key, so equal numbers of both mean that no key was lost.
    if _count_keys(value) != len(_KEY.findall(content)):
        _refuse_duplicate_keys(content)
    return value


def describe_bad_byte(error: UnicodeDecodeError) -> str:
    """Describe the first byte that is not UTF-8 and its position."""
    return f"byte 0x{error.object[error.start]:02x} at {error.start} is not UTF-8"


def _count_keys(value: object) -> int:
    """Count the keys of all objects; refuse deep nesting."""
    num_keys = 0
    level = [value] if isinstance(value, _CONTAINERS) else []
    for _ in range(MAX_DEPTH):
        below: list[dict[str, Any] | list[Any]] = []
        for node in level:
            children: Iterable[Any] = node
            if isinstance(node, dict):
                num_keys += len(node)
                children = node.values()
            below += [child for child in children if isinstance(child, _CONTAINERS)]
        if not below:
            return num_keys
        level = below
    raise RowFault("JSON_DEPTH", None, f"nested more than {MAX_DEPTH} levels deep")


def _refuse_duplicate_keys(content: bytes) -> None:
    def check(pairs: list[tuple[str, Any]]) -> None:
        seen = set()
        for key, _ in pairs:
            if key in seen:
                raise RowFault("JSON_DUPLICATE_KEY", key[:100], "occurs twice in one object")
            seen.add(key)

    json.loads(content, object_pairs_hook=check)


class _NonFinite(Exception):
    pass


def _decode_leniently(content: bytes, error: Exception, *, may_have_nan: bool) -> Any:
    """Decode JSON with NaN, or explain with the more lenient parser why it was refused."""
    constants: list[str] = []

    def note(text: str) -> float:
        constants.append(text)
        return float(text)

    try:
        value = json.loads(content.decode(), parse_constant=note, parse_float=_refuse_infinite)
        json.dumps(value, ensure_ascii=False).encode()
    except _NonFinite as number:
        raise RowFault("JSON_NONFINITE", None, f"found {number}") from None
    except RecursionError:
        raise RowFault("JSON_DEPTH", None, "nested too deeply to be read") from None
    except UnicodeDecodeError as bad:
        raise RowFault("ENCODING_INVALID", None, describe_bad_byte(bad)) from None
    except UnicodeEncodeError as bad:
        detail = f"half a surrogate pair: {bad.object[bad.start]!a}"
        raise RowFault("ENCODING_INVALID", None, detail) from None
    except ValueError:
        raise RowFault("JSON_INVALID", None, str(error)) from None
    if not constants:
        raise RowFault("JSON_INVALID", None, str(error))
    if not may_have_nan:
        raise RowFault("JSON_NONFINITE", None, f"found {constants[0]}")
    return value


def _refuse_infinite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise _NonFinite(text[:50])
    return value
