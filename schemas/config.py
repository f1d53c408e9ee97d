"""Config classes: frozen, checked records made from the recipe's blocks, with readable errors."""

import difflib
import types
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import (
    Annotated,
    Any,
    TypeVar,
    Union,
    cast,
    dataclass_transform,
    get_args,
    get_origin,
)

import pydantic
from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic.fields import FieldInfo

from schemas.errors import ConfigError

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field,))
def config_class(cls: type[T]) -> type[T]:
    """Make a class a frozen, keyword-only record that checks its fields and refuses unknown keys.

    The docstring under each field is its documentation; the reference pages are made from it.
    """
    build = pydantic_dataclass(
        frozen=True,
        kw_only=True,
        config=ConfigDict(
            extra="forbid",
            use_attribute_docstrings=True,
            allow_inf_nan=False,
            protected_namespaces=(),
        ),
    )
    return cast("type[T]", build(cls))


def parse_config(cls: type[T], data: object, *, path: str) -> T:
    """Build a config record from parsed YAML.

    Args:
        cls: a config class.
        data: nested dicts, lists and scalars.
        path: dotted path of the block in the recipe, for messages; "" for the whole recipe.
    Raises:
        ConfigError: the data does not fit the class; the message has one line for each mistake,
            with its dotted path.
    """
    try:
        return TypeAdapter(cls).validate_python(data)
    except pydantic.ValidationError as error:
        lines = [_describe_mistake(cls, mistake, path) for mistake in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def dump_config(config: object) -> dict[str, Any]:
    """Convert a config record to nested dicts, lists and scalars, defaults included."""
    dumped: dict[str, Any] = TypeAdapter(type(config)).dump_python(config, mode="json")
    return dumped


def blocks_in(annotation: Any) -> list[type]:
    """List the config classes in a field's annotation, also inside unions, lists and tuples."""
    if get_origin(annotation) in (Union, types.UnionType, Annotated, list, tuple):
        blocks = [block for part in get_args(annotation) for block in blocks_in(part)]
        return list(dict.fromkeys(blocks))
    return [annotation] if isinstance(annotation, type) and is_dataclass(annotation) else []


def fields_of(cls: type) -> dict[str, FieldInfo]:
    """Return the fields of a config class by name."""
    found: dict[str, FieldInfo] = cls.__pydantic_fields__  # type: ignore[attr-defined]
    return found


def _describe_mistake(cls: type, mistake: Mapping[str, Any], path: str) -> str:
    keys, owner = _locate(cls, mistake["loc"])
    dotted = ".".join(filter(None, [path, *keys]))
    if mistake["type"] == "unexpected_keyword_argument":
        return f"{dotted}: no such key.{_suggest(owner, keys[-1])}"
    if mistake["type"] == "union_tag_invalid":
        kinds = str(mistake["ctx"]["expected_tags"]).replace("'", "")
        return f"{dotted}.kind: no such kind. Kinds: {kinds} (found {mistake['ctx']['tag']!r})."
    if mistake["type"] == "missing":
        return f"{dotted}: this key is required."
    message = str(mistake["msg"]).removeprefix("Value error, ")
    return f"{dotted}: {message} (found {mistake['input']!r})."


def _locate(cls: type, loc: tuple[object, ...]) -> tuple[list[str], type | None]:
    """Turn pydantic's path into the keys that the user wrote, and find the last key's block.

    In a union pydantic's path also contains the chosen member, which is not a key.
    """
    keys: list[str] = []
    candidates = [cls]
    owner: type | None = cls
    for place in loc:
        part = str(place)
        if isinstance(place, int):
            keys.append(part)
            continue
        if len(candidates) > 1:  # The part names a kind, or one block against a list of blocks.
            chosen = [c for c in candidates if fields_of(c)["kind"].default == part]
            candidates = chosen or candidates
            continue
        owner = candidates[0] if candidates else None
        known = fields_of(owner) if owner else {}
        candidates = blocks_in(known[part].annotation) if part in known else []
        keys.append(part)
    return keys, owner


def _suggest(owner: type | None, key: str) -> str:
    """List the keys of the block, with the most similar one first."""
    if owner is None:
        return ""
    known = list(fields_of(owner))
    close = difflib.get_close_matches(key, known, n=1)
    meant = f" Did you mean {close[0]!r}?" if close else ""
    return f"{meant} Known keys: {', '.join(known)}."
