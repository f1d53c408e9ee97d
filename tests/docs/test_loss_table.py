"""The page of losses is what the classes say."""

import re
from pathlib import Path

from docs.tables.loss_table import list_loss_keys, list_losses, renew
from stages.train.losses import LOSSES

PAGE = Path(__file__).parents[2] / "docs" / "losses.md"


def test_the_page_lists_every_loss() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert renew(text) == text, "run `python -m docs.tables.loss_table docs/losses.md`"


def test_every_loss_says_what_it_is_by_equation_and_paper() -> None:
    entries = list_losses()
    assert len({entry.kind for entry in entries}) == len(LOSSES)
    for entry in entries:
        assert entry.title.endswith("."), entry.kind
        assert not entry.equation.startswith(entry.title), entry.kind
        assert entry.papers, entry.kind


def test_every_kind_that_the_page_tells_of_exists() -> None:
    text = PAGE.read_text(encoding="utf-8")
    kinds = {entry.kind for entry in list_losses()}
    assert set(re.findall(r"kind: (\w+)", text)) <= kinds


def test_every_key_of_a_loss_has_a_sentence_with_its_kinds() -> None:
    for key, kinds in list_loss_keys():
        assert key.doc.endswith("."), key.path
        assert kinds
