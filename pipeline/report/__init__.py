"""Writes a self-contained HTML report about one run, or comparing several."""

import os
from collections.abc import Sequence
from pathlib import Path

import jinja2

from pipeline.report.charts import NUM_RUN_COLOURS, css_variables
from pipeline.report.compare_page import describe_comparison
from pipeline.report.run_page import describe_run
from pipeline.report.text import count, duration, interval, percent, plural
from pipeline.runs import Run
from schemas.errors import ConfigError
from stages.store.filesystems import Folder

__all__ = ["write_report"]

_TEMPLATES = Path(__file__).parent / "templates"


def write_report(runs: Sequence[Run], store: Folder, *, output: str | None = None) -> str:
    """Write a page about one run, or one that compares several.

    The page loads nothing from other files, and the same runs give the same bytes. The page names
    the stages that are not complete.

    Args:
        runs: one to six, as many as the charts have colours for.
        store: the page is written to `runs/<name>.html` in it, for several runs to
            `runs/compare-<name>-<name>.html`.
        output: path or URI of the page, instead of the store.
    Returns:
        Path or URI of the page.
    Raises:
        ConfigError: no runs, or more than six.
    """
    if not 1 <= len(runs) <= NUM_RUN_COLOURS:
        raise ConfigError(
            f"A report compares up to {NUM_RUN_COLOURS} runs; {len(runs)} were given."
        )
    page = _render(runs).encode()
    if output is not None:
        directory, name = os.path.split(output)
        Folder(directory or ".").write_bytes(name, page)
        return output
    folder = store.child("runs")
    names = [run.name for run in runs]
    name = f"{names[0]}.html" if len(names) == 1 else f"compare-{'-'.join(names)}.html"
    folder.create()
    folder.write_bytes(name, page)
    return folder.locate(name)


def _render(runs: Sequence[Run]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        count=count, interval=interval, percent=percent, duration=duration, plural=plural
    )
    shared = {
        "light_colours": css_variables(is_dark=False),
        "dark_colours": css_variables(is_dark=True),
    }
    if len(runs) == 1:
        return environment.get_template("run.html.j2").render(page=describe_run(runs[0]), **shared)
    page = describe_comparison(runs)
    return environment.get_template("compare.html.j2").render(page=page, **shared)
