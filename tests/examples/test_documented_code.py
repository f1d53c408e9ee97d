"""Runs the Python of README and docs, and parses their recipes."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.recipe import load_recipe
from pipeline.runs import Run

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def find_blocks(page: Path, language: str) -> list[str]:
    pattern = rf"^```{language}\n(.*?)^```"
    return re.findall(pattern, page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def find_pages(language: str) -> list[Any]:
    return [
        pytest.param(page, id=page.relative_to(ROOT).as_posix())
        for page in PAGES
        if find_blocks(page, language)
    ]


def list_recipes(block: str) -> list[dict[str, Any]]:
    """Complete a block to a recipe; a block of losses gives one recipe a loss."""
    if not block.startswith("loss:"):
        content = yaml.safe_load(block)
        assert content.keys() & {"stages", "execution"}
        return [content]
    losses = re.split(r"^(?=loss:)", block, flags=re.MULTILINE)[1:]
    return [{"stages": {"train": yaml.safe_load(loss)}} for loss in losses]


@pytest.mark.parametrize("page", find_pages("python"))
def test_the_python_of_a_page_runs(
    page: Path, recipe: Path, finished: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one namespace a page; the run and its model are those of the tiny model."""
    monkeypatch.chdir(recipe.parent)
    model = finished.outputs["train"].folder.uri
    namespace: dict[str, Any] = {}
    for block in find_blocks(page, "python"):
        code = block.replace('"quickstart"', '"feedback"')
        code = re.sub(r"\./store/train/[0-9a-f]{12}", model, code)
        exec(compile(code, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", find_pages("yaml"))
def test_the_recipes_of_a_page_are_accepted(page: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    for content in [one for block in find_blocks(page, "yaml") for one in list_recipes(block)]:
        stages = content.setdefault("stages", {})
        stages["validate"] = {"inputs": ["pairs.jsonl"], **stages.get("validate", {})}
        path.write_text(yaml.safe_dump({"store": "./store", **content}))
        load_recipe(str(path))
