"""The tests that docs/explanation/security.md names exist, and the audit reports what it did."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def test_every_test_that_the_page_names_exists() -> None:
    page = (ROOT / "docs" / "explanation" / "security.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)
    assert len(named) > 20
    for path, name in named:
        assert re.search(rf"^ *def {name}\(", (ROOT / path).read_text(), re.MULTILINE), (path, name)


@pytest.fixture
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_audit_that_asked_nobody_says_so(audit: ModuleType) -> None:
    skipped = {"name": "ray", "skip_reason": "Dependency not found on PyPI"}
    lines, is_vulnerable = audit.judge({"dependencies": [skipped, skipped]})
    assert lines[0] == "Audited 0 of 2 packages."
    assert "NOT AUDITED" in lines[1]
    assert not is_vulnerable


def test_a_known_vulnerability_is_named_and_fails(audit: ModuleType) -> None:
    clean = {"name": "rich", "version": "1", "vulns": []}
    known = {"id": "CVE-1", "fix_versions": ["2"]}
    bad = {"name": "ray", "version": "1", "vulns": [known]}
    lines, is_vulnerable = audit.judge({"dependencies": [clean, bad]})
    assert lines == ["Audited 2 of 2 packages.", "ray 1: CVE-1, fixed in 2"]
    assert is_vulnerable
