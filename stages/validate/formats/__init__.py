"""Formats of raw rows, and recognition of a file's format.

To add a format, write its conversion in one of the modules here and its entry in that module's
FORMATS.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from schemas.errors import ConfigError
from stages.validate.formats import labelled, pairs, ranked, unpaired

AUTO = "auto"
"""The format name that asks for recognition."""
_MAIN_SHARE = 0.5
"""The format of a file must fit more than this share of the sampled rows ..."""
_NOISE_SHARE = 0.1
"""... and no other format more than this one."""
_MAX_NEAREST = 5
"""Formats whose columns a message lists."""

FORMATS = {
    format_.name: format_
    for format_ in (*pairs.FORMATS, *labelled.FORMATS, *ranked.FORMATS, *unpaired.FORMATS)
}


def check_format_name(name: str) -> str:
    """Refuse an unknown format.

    Raises:
        ValueError: naming the known ones.
    """
    if name != AUTO and name not in FORMATS:
        raise ValueError(f"no such format; known are {AUTO}, {', '.join(FORMATS)}")
    return name


def recognise_format(rows: Iterable[Mapping[str, Any]], *, file: str) -> str:
    """Recognise the format of a file from a sample of its rows.

    It is the format that fits more than half of them, if no other fits more than a tenth. A row
    that fits none counts for the formats that it would fit if its empty cells were filled.

    Args:
        rows: the readable rows of the sample, at least one.
        file: the file's name, for messages.
    Raises:
        ConfigError: no format fits, or several do; the message lists them with their shares.
    """
    num_rows = 0
    fitting: Counter[str] = Counter()
    gapped: Counter[str] = Counter()
    columns: Counter[str] = Counter()
    first: Mapping[str, Any] = {}
    for row in rows:
        first = first or row
        num_rows += 1
        columns.update(row.keys())
        names = [name for name, format_ in FORMATS.items() if format_.matches(row)]
        fitting.update(names)
        if not names:
            gapped.update(n for n, format_ in FORMATS.items() if format_.matches_but_for_gaps(row))
    assert num_rows > 0
    candidates = [name for name, count in fitting.items() if count > _NOISE_SHARE * num_rows]
    if len(candidates) == 1:
        (name,) = candidates
        if fitting[name] + gapped[name] > _MAIN_SHARE * num_rows:
            return name
    raise ConfigError(_describe_formats(file, num_rows, fitting, columns, first))


def _describe_formats(
    file: str,
    num_rows: int,
    fitting: Counter[str],
    columns: Counter[str],
    first: Mapping[str, Any],
) -> str:
    ranked_formats = fitting.most_common()
    shares = ", ".join(f"{name} {count / num_rows:.0%}" for name, count in ranked_formats)
    found = ", ".join(ascii(name).strip("'")[:40] for name, _ in columns.most_common(12))
    name = ranked_formats[0][0] if ranked_formats else "NAME"
    return (
        f"{file}: FORMAT_AMBIGUOUS: no single format fits its first {num_rows:,} rows.\n"
        f"Formats that fit some of them: {shares or 'none'}. Columns found: {found}.\n"
        f"{_describe_nearest(first)}"
        f"Known formats: {', '.join(FORMATS)}; docs/reference/formats.md has their columns.\n"
        "Name one in the recipe, and rows that don't fit it are rejected:\n"
        f"stages: {{validate: {{inputs: [{{path: {file}, format: {name}}}]}}}}\n"
        "Or say where a table of another shape has what a pair needs:\n"
        f"stages: {{validate: {{inputs: [{{path: {file}, map: {{prompt: COLUMN, chosen: COLUMN, "
        "rejected: COLUMN}}]}}"
    )


def _describe_nearest(row: Mapping[str, Any]) -> str:
    """Describe the formats that share most columns with a row, and what they want of it."""
    misfits = {name: format_.list_misfits(row) for name, format_ in FORMATS.items()}
    shared = {
        name: sum(column in row for column in format_.columns) for name, format_ in FORMATS.items()
    }
    nearest = sorted(
        (name for name in FORMATS if misfits[name] and shared[name]),
        key=lambda name: (len(misfits[name]), -shared[name]),
    )[:_MAX_NEAREST]
    if not nearest:
        return ""
    lines = "\n".join(
        f"  {name} ({', '.join(FORMATS[name].columns)}): {', '.join(misfits[name])}"
        for name in nearest
    )
    return f"The nearest formats, and how the first row differs from them:\n{lines}\n"
