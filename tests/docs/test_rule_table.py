"""The page of rules is what the stages declare, and they declare what they raise."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

from docs.tables.rule_table import list_entries, renew
from schemas.config import fields_of
from stages.validate.config import Thresholds
from stages.validate.findings import CODES
from stages.validate.overview import NOTABLE

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "data-rules.md"
CODE = re.compile(r"[A-Z]+(_[A-Z]+)+")


def test_the_page_lists_every_code() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert renew(text) == text, "run `python -m docs.tables.rule_table docs/data-rules.md`"


def test_every_entry_has_a_sentence_and_stands_once_a_stage() -> None:
    entries = list_entries()
    assert len(entries) > 40
    assert all(entry.sentence.endswith(".") for entry in entries)
    names = [(entry.place.split(",")[0], entry.code) for entry in entries]
    assert len(names) == len(set(names))


def test_every_threshold_belongs_to_a_code_that_its_sentence_names() -> None:
    named = {described.threshold: code for code, described in CODES.items() if described.threshold}
    assert named.keys() == fields_of(Thresholds).keys()
    for name, field in fields_of(Thresholds).items():
        assert str(field.description).startswith(f"{named[name]}: ")


@pytest.mark.parametrize("stage", ["validate", "dedupe", "encode"])
def test_every_code_that_a_stage_names_is_declared_and_raised(stage: str) -> None:
    """In these stages only codes are text constants in capitals with an underscore.

    A code stands where it is declared and at least once where it is raised, as text or under its
    own name.
    """
    of_stage = ROOT / "stages" / stage
    files = [*of_stage.glob("**/*.py")] or [of_stage.with_suffix(".py")]
    nodes = [
        node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    ]
    constants = Counter(
        node.value
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    names = Counter(
        node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    )
    declared = {entry.code for entry in list_entries() if entry.place.startswith(stage)}
    of_all_pairs = {notable.code for notable in NOTABLE}
    assert {text for text in constants if CODE.fullmatch(text)} <= declared | of_all_pairs
    # A name of its own is read once where the sentence is declared.
    raised = {code for code in declared if constants[code] > 1 or names[code] > 1}
    assert declared == raised
