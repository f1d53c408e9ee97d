"""Every reason to reject or to doubt a row, as Markdown tables made from where they are declared.

`python -m docs.tables.rule_table docs/data-rules.md` renews the part of a file between its markers.
"""

import sys
from collections.abc import Iterator
from typing import NamedTuple

from docs.tables.page_parts import renew_file, renew_part
from schemas.config import fields_of
from stages import encode, score
from stages.dedupe import config as dedupe
from stages.validate.config import Thresholds
from stages.validate.findings import CODES
from stages.validate.overview import NOTABLE

_PART = "rule tables"
_PLACES = {
    "line": "validate, reading a line",
    "conversion": "validate, turning a row into pairs",
    "pair": "validate, a finished pair",
    "row": "validate, all pairs of a row",
}


class Entry(NamedTuple):
    code: str
    place: str
    level: str
    """What it leads to by default."""
    has_level: bool
    """Whether stages.validate.rules can change that."""
    threshold: str
    """Key and default of the number that it is held against; empty if there is none."""
    sentence: str


def list_entries() -> list[Entry]:
    """List all codes, in the order in which stages find them."""
    entries = [
        Entry(
            code,
            _PLACES[described.found],
            described.level,
            described.why_fixed is None,
            _show_threshold(described.threshold),
            described.sentence,
        )
        for code, described in CODES.items()
    ]
    later = (
        ("dedupe", "reject", dedupe.REASONS),
        ("dedupe", "warn", dedupe.WARNINGS),
        ("encode", "reject", encode.REASONS),
        ("encode", "warn", encode.WARNINGS),
        ("score", "reject", score.REASONS),
        ("score", "warn", score.WARNINGS),
    )
    for stage, level, sentences in later:
        entries += [
            Entry(code, stage, level, False, "", sentence) for code, sentence in sentences.items()
        ]
    return entries


def _show_threshold(name: str | None) -> str:
    return "" if name is None else f"`{name}: {fields_of(Thresholds)[name].default}`"


def make_tables() -> str:
    """Write one table a place where codes are found, and one of what is noted of all pairs."""
    lines: list[str] = []
    entries = list_entries()
    for place in dict.fromkeys(entry.place for entry in entries):
        lines += [f"### In {place}", ""]
        lines += _write_table([entry for entry in entries if entry.place == place])
        lines.append("")
    lines += [
        "### Of all pairs together",
        "",
        "| code | noted where | what to do |",
        "|---|---|---|",
    ]
    lines += [f"| `{one.code}` | {one.when} | {one.advice} |" for one in NOTABLE]
    return "\n".join(lines)


def _write_table(entries: list[Entry]) -> Iterator[str]:
    yield "| code | level | can be set | threshold | meaning |"
    yield "|---|---|---|---|---|"
    for entry in entries:
        can_be_set = "yes" if entry.has_level else "no"
        sentence = entry.sentence.replace("|", "\\|")
        yield f"| `{entry.code}` | {entry.level} | {can_be_set} | {entry.threshold} | {sentence} |"


def renew(text: str) -> str:
    """Put the present table into a Markdown text, between its markers."""
    return renew_part(text, _PART, make_tables())


if __name__ == "__main__":
    renew_file(sys.argv[1], _PART, make_tables())
