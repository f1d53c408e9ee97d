"""Tests that the links between README, CONTRIBUTING and the pages lead somewhere.

`make docs` checks the site's own links; these are also followed on the code's host.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]


def find_links(text: str) -> list[str]:
    """Find the targets of links and images that are no URLs, outside of code blocks."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]


def find_anchors(text: str) -> set[str]:
    """Make the anchors of headings as mkdocs and code hosts do."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", h.lower()).strip()) for h in headings}


def find_broken(file: Path) -> list[str]:
    broken = []
    for link in find_links(file.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = (file.parent / path).resolve() if path else file
        if not target.exists() or (
            anchor and anchor not in find_anchors(target.read_text(encoding="utf-8"))
        ):
            broken.append(link)
    return broken


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(file: Path) -> None:
    assert find_broken(file) == []


def test_a_broken_link_and_a_broken_anchor_are_found(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("## The table\n")
    page = tmp_path / "a.md"
    page.write_text("[x](b.md#the-table) [x](b.md#no) [x](c.md) [x](https://a.example/)\n")
    assert find_broken(page) == ["b.md#no", "c.md"]


def test_the_readme_is_read_in_three_minutes() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_every_page_of_the_docs_is_in_the_navigation() -> None:
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [file.relative_to(ROOT / "docs").as_posix() for file in (ROOT / "docs").rglob("*.md")]
    assert len(pages) > 15
    assert [page for page in pages if f"- {page}\n" not in config] == []
