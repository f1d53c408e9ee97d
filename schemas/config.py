"""How a block of the recipe becomes a frozen, checked record, and how its mistakes are reported."""

import difflib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, cast, dataclass_transform

import pydantic
from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass as pydantic_dataclass

from schemas.errors import ConfigError

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field,))
def config_class(cls: type[T]) -> type[T]:
    """Make a frozen, keyword-only record; its fields are checked and unknown keys are refused.

    The sentence under each field is its documentation: the README's table is made from it.
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
    """Build `cls` from what YAML gave.

    Args:
        cls: a config class.
        data: nested dicts, lists and scalars.
        path: dotted path of this block in the recipe, for messages ("" at the top).
    Raises:
        ConfigError: every mistake, one a line, each with its dotted path.
    """
    try:
        return TypeAdapter(cls).validate_python(data)
    except pydantic.ValidationError as error:
        lines = [_describe_mistake(cls, mistake, path) for mistake in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def dump_config(config: object) -> dict[str, Any]:
    """Give a config record as nested dicts, lists and scalars, defaults included."""
    dumped: dict[str, Any] = TypeAdapter(type(config)).dump_python(config, mode="json")
    return dumped


def _describe_mistake(cls: type, mistake: Mapping[str, Any], path: str) -> str:
    dotted = ".".join([part for part in (path, *map(str, mistake["loc"])) if part])
    if mistake["type"] == "unexpected_keyword_argument":
        return f"{dotted}: no such key.{_suggest(cls, mistake['loc'])}"
    if mistake["type"] == "missing":
        return f"{dotted}: this key is required."
    message = str(mistake["msg"]).removeprefix("Value error, ")
    return f"{dotted}: {message} (found {mistake['input']!r})."


def _suggest(cls: type, loc: tuple[object, ...]) -> str:
    """Name the keys that the block does have, the likeliest first."""
    owner: object = cls
    for part in loc[:-1]:
        owner = _field_type(owner, str(part))
    if not (isinstance(owner, type) and is_dataclass(owner)):
        return ""
    known = [field.name for field in fields(owner)]
    close = difflib.get_close_matches(str(loc[-1]), known, n=1)
    meant = f" Did you mean {close[0]!r}?" if close else ""
    return f"{meant} Known keys: {', '.join(known)}."


def _field_type(owner: object, name: str) -> object:
    if not (isinstance(owner, type) and is_dataclass(owner)):
        return None
    return next((field.type for field in fields(owner) if field.name == name), None)
