"""Report pages in headless Chromium, at desktop and phone width: no overflow, no console errors."""

import html
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.report import write_report
from stages.store.filesystems import Folder
from tests.pipeline.report.made_store import MadeRun

pytestmark = pytest.mark.browser

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    # On a busy machine a screenshot may otherwise be taken before all tiles are painted.
    "--run-all-compositor-stages-before-draw",
    "--enable-logging=stderr",
)
_SIZES = [(1280, 900), (390, 844), (360, 740)]

# Chromium windows are at least 500 pixels wide, so narrow pages are loaded in a frame, unchanged.
# The script belongs to the outer page: the inner page's policy against scripts stays in force.
_FRAME = """<!doctype html><html><body style="margin: 0">
<iframe width="{width}" height="{height}" style="border: 0" srcdoc="{page}"></iframe>
<script>
addEventListener("load", () => {{
  const inner = document.querySelector("iframe").contentDocument;
  for (const details of inner.querySelectorAll("details")) details.open = {opens};
  const width = inner.documentElement.clientWidth;
  const box = (element) => element.getBoundingClientRect();
  const scrolls = (element) => element.closest(".scroll, pre");
  const found = {{
    width,
    scrollWidth: inner.documentElement.scrollWidth,
    title: inner.title,
    wide: [...inner.body.querySelectorAll("*")]
      .filter((e) => !scrolls(e) && (box(e).right > width + 1 || box(e).left < -1))
      .map((e) => e.outerHTML.slice(0, 120)),
    plots: [...inner.querySelectorAll("svg.plot")].map((e) => box(e).width),
    cut: [...inner.querySelectorAll("svg.plot text")]
      .filter((e) => box(e).left < box(e.closest("svg")).left - 4
                  || box(e).right > box(e.closest("svg")).right + 4)
      .map((e) => e.textContent),
    small: [...inner.querySelectorAll("svg.plot text")]
      .filter((e) => box(e).height < 10).map((e) => e.textContent),
  }};
  document.documentElement.dataset.found = JSON.stringify(found);
}});
</script></body></html>"""


@pytest.fixture(scope="module")
def browser() -> str:
    found = next((path for name in _NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(_NAMES)} is installed")
    return found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    store = Folder(str(tmp_path_factory.mktemp("store")))
    first = MadeRun(store=store, name="quickstart-1f0c2a9be01d").write()
    second = MadeRun(store=store, name="quickstart-77ab2a9be0aa", beta=0.2).write()
    part = MadeRun(store=store, name="part").write(until="dedupe")
    return {
        "one run": Path(write_report([first], store)),
        "two runs": Path(write_report([first, second], store)),
        "half a run": Path(write_report([part], store)),
    }


def start(browser: str, folder: Path, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    profile = folder / "profile"
    command = [browser, *_FLAGS, f"--user-data-dir={profile}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    shutil.rmtree(profile)
    return done


def measure(
    browser: str, folder: Path, page: str, size: tuple[int, int], *, opens: bool
) -> tuple[dict[str, Any], list[str]]:
    """Load a page in a frame of this size; return the measurements and the console messages."""
    frame = folder / "frame.html"
    content = _FRAME.format(
        width=size[0], height=size[1], page=html.escape(page), opens=str(opens).lower()
    )
    frame.write_text(content, encoding="utf-8")
    done = start(browser, folder, ["--window-size=1400,1000", "--dump-dom", frame.as_uri()])
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    assert found, done.stdout[:500] + done.stderr[-2000:]
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(found.group(1))), complaints


@pytest.mark.parametrize("size", _SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("name", ["one run", "two runs", "half a run"])
def test_nothing_overflows(
    browser: str, pages: dict[str, Path], tmp_path: Path, name: str, size: tuple[int, int]
) -> None:
    """With all details opened, including hostile texts, long words and tables."""
    page = pages[name].read_text(encoding="utf-8")
    found, complaints = measure(browser, tmp_path, page, size, opens=True)
    assert complaints == []
    assert found["width"] == size[0]
    assert found["wide"] == []
    assert found["scrollWidth"] <= size[0]
    assert found["cut"] == []
    assert found["small"] == []
    assert "owned" not in found["title"]
    assert all(200 < width <= 560 for width in found["plots"])
    assert len(found["plots"]) == {"one run": 14, "two runs": 5, "half a run": 0}[name]


def test_measuring_sees_an_overflow_and_a_complaint(browser: str, tmp_path: Path) -> None:
    """The measurements detect a page that is too wide or tries to run a script."""
    policy = "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'\">"
    page = f"<!doctype html><head>{policy}</head><body><script>document.title='owned'</script>"
    wide = "<table><td>" + "verylongword" * 60 + "</td></table></body>"
    found, complaints = measure(browser, tmp_path, page + wide, (390, 844), opens=True)
    assert found["scrollWidth"] > 390
    assert found["wide"]
    assert "owned" not in found["title"]
    assert any("Content Security Policy" in line for line in complaints)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_screenshot_shows_ink_and_colours_on_paper(
    browser: str, pages: dict[str, Path], tmp_path: Path, scheme: str
) -> None:
    picture = tmp_path / "page.png"
    preference = f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"
    shot = [f"--screenshot={picture}", "--window-size=1280,900", preference]
    start(browser, tmp_path, [*shot, pages["one run"].as_uri()])
    with Image.open(picture) as image:
        assert image.size == (1280, 900)
        counted = image.convert("RGB").getcolors(maxcolors=1 << 24)
    assert counted is not None
    amounts = {colour: amount for amount, colour in counted if isinstance(colour, tuple)}
    paper = max(amounts, key=lambda colour: amounts[colour])
    assert paper == ((254, 253, 251) if scheme == "light" else (21, 25, 28))
    bars = (11, 98, 164) if scheme == "light" else (98, 177, 234)
    assert amounts[bars] > 5000
