"""Every key of a recipe as a Markdown table, made from the config classes themselves.

`python -m docs.tables.config_table README.md` renews the part of a file between its two markers.
"""

import dataclasses
import sys
from collections.abc import Iterator
from typing import NamedTuple

from pydantic.fields import FieldInfo

from docs.tables.page_parts import renew_file, renew_part
from pipeline.stage_list import load_stages
from schemas.config import blocks_in, fields_of

_PART = "config table"


class Key(NamedTuple):
    path: str
    default: str
    doc: str


def list_keys() -> list[Key]:
    """List all keys of all stages, identity first, in the order of the config classes."""
    stages = load_stages()
    keys = [key for stage in stages for key in keys_of(stage.config, f"stages.{stage.name}")]
    for stage in stages:
        keys += keys_of(stage.execution, f"execution.{stage.name}")
    return keys


def keys_of(cls: type, path: str) -> Iterator[Key]:
    """List the keys of a config class, and those of the blocks in it, below a dotted path."""
    for name, field in fields_of(cls).items():
        dotted = f"{path}.{name}"
        yield Key(dotted, _show_default(field), _find_sentence(cls, name))
        blocks = blocks_in(field.annotation)
        if len(blocks) == 1:  # Those of several kinds have a page of their own: docs/losses.md.
            yield from keys_of(blocks[0], dotted)


def _find_sentence(cls: type, name: str) -> str:
    """Read a field's docstring where it stands: in the class or in the one it inherits from."""
    for owner in cls.__mro__:
        field = getattr(owner, "__pydantic_fields__", {}).get(name)
        if field is not None and field.description:
            return " ".join(field.description.split())
    raise AssertionError(f"{cls.__name__}.{name} has no sentence")


def _show_default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True, validated_data={})
    if dataclasses.is_dataclass(default):
        kind = getattr(default, "kind", None)
        return f"`{kind}`" if kind else "see below"
    return "absent" if default is None else f"`{default}`"


def make_table() -> str:
    lines = ["| key | default | meaning |", "|---|---|---|"]
    lines += [
        f"| `{key.path}` | {key.default} | {key.doc.replace('|', chr(92) + '|')} |"
        for key in list_keys()
    ]
    return "\n".join(lines)


def renew(text: str) -> str:
    """Put the present table into a Markdown text, between its markers."""
    return renew_part(text, _PART, make_table())


if __name__ == "__main__":
    renew_file(sys.argv[1], _PART, make_table())
