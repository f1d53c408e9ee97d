"""Every layout of rows that validate knows, as a Markdown table made from the formats themselves.

`python -m docs.tables.format_table docs/formats.md` renews the part of a file between its two
markers.
"""

import inspect
import sys

from docs.tables.page_parts import renew_file, renew_part
from stages.validate.formats import FORMATS

_PART = "format table"


def make_table() -> str:
    lines = ["| format | told by the columns | what it is |", "|---|---|---|"]
    for format_ in FORMATS.values():
        columns = ", ".join(f"`{name}`" for name in format_.columns)
        if format_.without:
            columns += " (without " + ", ".join(f"`{name}`" for name in format_.without) + ")"
        docstring = inspect.getdoc(format_.convert)
        assert docstring is not None, f"{format_.name} says nothing about itself"
        said = " ".join(docstring.split("Raises:")[0].split())
        lines.append(f"| `{format_.name}` | {columns} | {said.replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def renew(text: str) -> str:
    """Put the present table into a Markdown text, between its markers."""
    return renew_part(text, _PART, make_table())


if __name__ == "__main__":
    renew_file(sys.argv[1], _PART, make_table())
