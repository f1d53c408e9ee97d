"""Lists and messages that a column holds in another shape: JSON text, or an object of lists.

Tables without nested types, such as CSV, hold them as text; `datasets` turns a list of objects into
an object of lists. An answer that happens to be JSON of another shape is text.
"""

import json
import re
from typing import Any

from stages.validate.findings import RowFault
from stages.validate.messages import is_known_role
from stages.validate.strict_json import decode_strictly

_MAY_NEST = re.compile(r"\s*(?:array\(\s*)?[\[{]")
_MESSAGE_START = re.compile(r"\s*(?:array\(\s*)?(?:\[\s*)?\{\s*['\"]")
_ROLE = re.compile(r"['\"](?:role|from)['\"]\s*:\s*(?:array\(\s*)?\[?\s*['\"](\w+)['\"]")
_CONTENT = re.compile(r"['\"](?:content|value|tool_calls)['\"]\s*:")


def open_messages(value: object, path: str) -> object:
    """Return the list of messages, or the one message, that a value stands for.

    Any other value is returned unchanged.

    Raises:
        RowFault: it is the source text of messages, and not JSON.
    """
    if isinstance(value, str):
        if not _MAY_NEST.match(value):
            return value
        if _is_damaged_source(value):
            raise _not_json(path, value)
        opened = _merge_lists(_decode(value))
        return opened if _is_message(opened) or _are_messages(opened) else value
    return _merge_lists(value)


def holds_messages(value: object) -> bool:
    """Return whether a value stands for a list of messages."""
    if isinstance(value, str):
        if not _MAY_NEST.match(value):
            return False
        return _are_messages(_merge_lists(_decode(value))) or (
            _is_damaged_source(value) and not value.lstrip().startswith("{")
        )
    value = _merge_lists(value)
    return isinstance(value, list) and all(_has_role(message) for message in value)


def holds_message(value: object) -> bool:
    """Return whether a value stands for one message."""
    if isinstance(value, str):
        if not _MAY_NEST.match(value):
            return False
        return _is_message(_merge_lists(_decode(value))) or (
            _is_damaged_source(value) and value.lstrip().startswith("{")
        )
    return _has_role(value) and not isinstance(_merge_lists(value), list)


def open_list(value: object, path: str) -> object:
    """Return the list that a value stands for; any other value unchanged.

    Raises:
        RowFault: it is the source text of a list, and not JSON.
    """
    if isinstance(value, str) and _MAY_NEST.match(value):
        opened = _decode(value)
        if opened is value:
            raise _not_json(path, value)
        return _merge_lists(opened)
    return _merge_lists(value)


def holds_items(value: object, keys: tuple[str, ...]) -> bool:
    """Return whether a value stands for a list of objects that each have some keys."""
    if isinstance(value, str):
        if not _MAY_NEST.match(value):
            return False
        opened = _decode(value)
        if opened is value:
            return all(f"'{key}':" in value or f'"{key}":' in value for key in keys)
        value = opened
    value = _merge_lists(value)
    return isinstance(value, list) and all(
        isinstance(item, dict) and all(key in item for key in keys) for item in value
    )


def holds_list(value: object) -> bool:
    """Return whether a value stands for a list."""
    if isinstance(value, str):
        return value.lstrip().startswith("[")
    return isinstance(value, list)


def open_object(value: object) -> object:
    """Return the object that a value is, or is the JSON text of; any other value unchanged."""
    opened = _decode(value) if isinstance(value, str) else value
    return opened if isinstance(opened, dict) else value


def _decode(text: str) -> Any:
    """Decode JSON; text that is not JSON is returned unchanged."""
    try:
        return decode_strictly(text.encode(), may_have_nan=True)
    except RowFault:
        return text


def _merge_lists(value: object) -> object:
    """Turn an object of equally long lists into a list of objects, padded ones if it is padded."""
    if not isinstance(value, dict) or not value:
        return value
    columns = list(value.values())
    if not all(isinstance(c, list) and len(c) == len(columns[0]) for c in columns):
        return value
    kind = type(value)
    return [kind(zip(value, items, strict=True)) for items in zip(*columns, strict=True)]


def _has_role(value: object) -> bool:
    return isinstance(value, dict) and ("role" in value or "from" in value)


def _is_message(value: object) -> bool:
    """Return whether decoded JSON is a message of a role that is known."""
    return (
        isinstance(value, dict)
        and is_known_role(value.get("role", value.get("from")))
        and any(name in value for name in ("content", "value", "tool_calls"))
    )


def _are_messages(value: object) -> bool:
    return (
        isinstance(value, list)
        and all(_has_role(message) for message in value)
        and any(_is_message(message) for message in value)
    )


def _is_damaged_source(text: str) -> bool:
    """Return whether a text is the source of messages, in no JSON that can be read."""
    if not _MESSAGE_START.match(text) or _CONTENT.search(text) is None:
        return False
    if not any(is_known_role(role) for role in _ROLE.findall(text)):
        return False
    source = text.strip()
    try:
        _, end = json.JSONDecoder().raw_decode(source)
    except (ValueError, RecursionError):
        return True
    # JSON with more text behind it is text about messages.
    return end == len(source) and _decode(text) is text


def _not_json(path: str, text: str) -> RowFault:
    return RowFault("NESTED_NOT_JSON", path, f"found {ascii(text)[:200]}")
