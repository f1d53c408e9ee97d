"""The README's table of keys is what the config classes say."""

from pathlib import Path

from docs.tables.config_table import list_keys, renew

README = Path(__file__).parents[2] / "README.md"


def test_the_readme_lists_every_key() -> None:
    text = README.read_text(encoding="utf-8")
    assert renew(text) == text, "run `python -m docs.tables.config_table README.md`"


def test_every_key_has_a_sentence() -> None:
    keys = list_keys()
    assert len(keys) > 40
    for key in keys:
        assert key.doc.rstrip().endswith((".", ")")), key.path
