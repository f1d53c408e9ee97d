"""Tests of the generated reference pages: current, complete, and true to what the stages raise."""

import ast
import re
from collections import Counter

import pytest
import typer

import run
from docs.tables import (
    PAGES,
    ROOT,
    TABLES,
    list_keys,
    list_loss_keys,
    list_losses,
    list_rules,
    renew,
)
from schemas import rows
from schemas.config import fields_of
from stages.train.losses import LOSSES
from stages.validate.codes import CODES
from stages.validate.formats import FORMATS
from stages.validate.overview import NOTABLE
from stages.validate.rules import RULES
from stages.validate.rules.rule import Thresholds

CODE = re.compile(r"[A-Z]+(_[A-Z]+)+")


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_the_page_is_what_the_code_says(page: str) -> None:
    text = read(page)
    assert renew(text, PAGES[page]()) == text, "run `python -m docs.tables`"


def test_markers_that_are_missing_are_an_error() -> None:
    with pytest.raises(ValueError, match="markers"):
        renew("# A page", "content")


def test_every_key_has_a_sentence() -> None:
    keys = list_keys()
    assert len(keys) > 40
    for key in keys:
        assert key.doc.rstrip().endswith((".", ")")), key.path


def test_the_page_of_the_recipe_lists_every_key() -> None:
    text = read("docs/reference/recipe.md")
    assert len(re.findall(r"^\| `", text, re.MULTILINE)) >= len(list_keys())


def test_the_page_lists_every_format() -> None:
    text = read("docs/reference/formats.md")
    assert all(f"| `{name}` |" in text for name in FORMATS)


def test_every_loss_has_a_title_an_equation_and_a_paper() -> None:
    entries = list_losses()
    assert len({entry.kind for entry in entries}) == len(LOSSES)
    for entry in entries:
        assert entry.title.endswith("."), entry.kind
        assert not entry.equation.startswith(entry.title), entry.kind
        assert entry.papers, entry.kind


def test_every_kind_that_a_page_names_exists() -> None:
    kinds = {entry.kind for entry in list_losses()}
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    named = {kind for page in pages for kind in re.findall(r"kind: (\w+)", page.read_text())}
    assert "sigmoid" in named
    assert named <= kinds


def test_every_key_of_a_loss_has_a_sentence_with_its_kinds() -> None:
    for key, kinds in list_loss_keys():
        assert key.doc.endswith("."), key.path
        assert kinds


def test_every_schema_is_on_the_page_of_columns() -> None:
    schemas = [value for value in vars(rows).values() if isinstance(value, rows.RowSchema)]
    assert {schema.name for schema in schemas} == {schema.name for _, _, schema in TABLES}


def test_every_command_is_on_the_page_of_the_command_line() -> None:
    commands = typer.main.get_command(run.app).commands  # type: ignore[attr-defined]
    assert len(commands) > 5
    text = read("docs/reference/command-line.md")
    assert all(f"## {name}\n" in text for name in commands)


def test_every_code_has_a_sentence_and_is_listed_once_a_stage() -> None:
    rules = list_rules()
    assert len(rules) > 40
    assert all(rule.sentence.endswith(".") for rule in rules)
    names = [(rule.place.split(":")[0], rule.code) for rule in rules]
    assert len(names) == len(set(names))


def test_every_threshold_belongs_to_a_code_that_its_sentence_names() -> None:
    named = {described.threshold: code for code, described in CODES.items() if described.threshold}
    assert named.keys() == fields_of(Thresholds).keys()
    for name, field in fields_of(Thresholds).items():
        assert str(field.description).startswith(f"{named[name]}: ")


@pytest.mark.parametrize("stage", ["validate", "dedupe", "encode"])
def test_every_code_that_a_stage_names_is_declared_and_raised(stage: str) -> None:
    """In these stages only codes are text constants in capitals with an underscore.

    A code appears where it is declared and at least once where it is raised, as text or under its
    own name; the entry of a rule holds both its code and the function that raises it.
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
    declared = {rule.code for rule in list_rules() if rule.place.startswith(stage)}
    of_all_pairs = {notable.code for notable in NOTABLE}
    assert {text for text in constants if CODE.fullmatch(text)} <= declared | of_all_pairs
    # A code with a name of its own is read once where its sentence is declared.
    raised = {code for code in declared if constants[code] > 1 or names[code] > 1}
    if stage == "validate":
        raised |= RULES.keys()
    assert declared == raised


def test_every_page_that_the_code_names_exists() -> None:
    folders = ("schemas", "stages", "pipeline", "tests", "benchmarks", "deploy", "examples")
    files = [ROOT / "run.py", *(file for name in folders for file in (ROOT / name).rglob("*.py"))]
    named = {
        (page, file.relative_to(ROOT).as_posix())
        for file in files
        for page in re.findall(r"docs/[\w/-]+\.md", file.read_text(encoding="utf-8"))
    }
    assert len(named) > 5
    missing = sorted(f"{file}: {page}" for page, file in named if not (ROOT / page).exists())
    assert not missing
