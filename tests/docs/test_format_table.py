"""The page of formats is what the stage knows."""

from pathlib import Path

from docs.tables.format_table import renew
from stages.validate.formats import FORMATS

PAGE = Path(__file__).parents[2] / "docs" / "formats.md"


def test_the_page_lists_every_format() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert renew(text) == text, "run `python -m docs.tables.format_table docs/formats.md`"
    assert all(f"| `{name}` |" in text for name in FORMATS)
