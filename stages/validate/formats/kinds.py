"""Of what kind is a column's value? What tells one format from another."""

from collections.abc import Callable

IsKind = Callable[[object], bool]


def is_text(value: object) -> bool:
    return isinstance(value, str)


def is_messages(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(m, dict) and "role" in m for m in value)


def is_message(value: object) -> bool:
    return isinstance(value, dict) and ("role" in value or "from" in value)


def is_turns(value: object) -> bool:
    """Messages with ShareGPT's names."""
    return isinstance(value, list) and all(isinstance(m, dict) and "from" in m for m in value)


def is_text_or_messages(value: object) -> bool:
    return is_text(value) or is_messages(value)


def is_transcript(value: object) -> bool:
    return isinstance(value, str) and value.startswith("\n\nHuman:")


def has_messages(value: object) -> bool:
    return isinstance(value, dict) and is_messages(value.get("messages"))


def is_list_with(*keys: str) -> IsKind:
    """A list of objects that each have these keys."""

    def is_such_a_list(value: object) -> bool:
        return isinstance(value, list) and all(
            isinstance(item, dict) and all(key in item for key in keys) for item in value
        )

    return is_such_a_list
