"""Generator of the reference pages: tables made from config classes, formats, rules and schemas.

`python -m docs.tables` renews the generated part of every page, between its two markers.
"""

import dataclasses
import html
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import typer
from pydantic.fields import FieldInfo

import run
from pipeline.stage_list import load_stages
from schemas import rows
from schemas.config import blocks_in, fields_of
from stages.dedupe import config as dedupe
from stages.encode import config as encode
from stages.score import config as score
from stages.train.losses import LOSSES, PairLoss
from stages.train.selection import COLUMNS as SELECTABLE
from stages.validate.codes import CODES
from stages.validate.formats import FORMATS
from stages.validate.overview import NOTABLE
from stages.validate.part_names import PARTS
from stages.validate.rules.rule import Thresholds

ROOT = Path(__file__).parents[1]


# Keys of a recipe


class Key(NamedTuple):
    path: str
    default: str
    doc: str


def list_keys() -> list[Key]:
    """List the keys of all stages, identity first, in the order of the config classes."""
    stages = load_stages()
    keys = [key for stage in stages for key in keys_of(stage.config, f"stages.{stage.name}")]
    for stage in stages:
        keys += keys_of(stage.execution, f"execution.{stage.name}")
    return keys


def keys_of(cls: type, path: str) -> Iterator[Key]:
    """List the keys of a config class and of the blocks in it, below a dotted path."""
    for name, field in fields_of(cls).items():
        dotted = f"{path}.{name}"
        yield Key(dotted, _show_default(field), _find_docstring(cls, name))
        blocks = blocks_in(field.annotation)
        if len(blocks) == 1:  # Losses are a union of many; they have a page of their own.
            yield from keys_of(blocks[0], dotted)


def _find_docstring(cls: type, name: str) -> str:
    for owner in cls.__mro__:
        field = getattr(owner, "__pydantic_fields__", {}).get(name)
        if field is not None and field.description:
            return " ".join(field.description.split())
    raise AssertionError(f"{cls.__name__}.{name} has no docstring")


def _show_default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True, validated_data={})
    if dataclasses.is_dataclass(default):
        kind = getattr(default, "kind", None)
        return f"`{kind}`" if kind else "see below"
    if default is None:
        return "absent"
    return f"`{str(default).lower()}`" if isinstance(default, bool) else f"`{default}`"


def make_key_tables() -> str:
    """Make one table a stage and block."""
    lines: list[str] = []
    sections: dict[str, list[Key]] = {}
    for key in list_keys():
        block, stage, _ = key.path.split(".", 2)
        sections.setdefault(f"{block}.{stage}", []).append(key)
    for section, keys in sections.items():
        cells = [
            (f"`{key.path.removeprefix(section + '.')}`", key.default, key.doc) for key in keys
        ]
        lines += [f"## {section}", "", *_write_table(("key", "default", "meaning"), cells), ""]
    return "\n".join(lines).rstrip()


# Formats


def make_format_tables() -> str:
    """Make a table of the formats, and one of the columns that complete the prompt of any."""
    parts = [
        (kind, ", ".join(f"`{name}`" for name in part.names), part.meaning)
        for kind, part in PARTS.items()
    ]
    return "\n".join(
        [
            *_write_table(("format", "recognised by", "what it is"), _list_formats()),
            "",
            "## Columns that belong to the prompt",
            "",
            "Beside every format and every column map, columns of these names are part of the "
            "pair, or their row is rejected. Empty ones do not matter.",
            "",
            *_write_table(("part", "names", "what becomes of it"), parts),
        ]
    )


def _list_formats() -> Iterator[tuple[str, ...]]:
    for format_ in FORMATS.values():
        columns = ", ".join(f"`{name}`" for name in format_.columns)
        if format_.without:
            columns += " (without " + ", ".join(f"`{name}`" for name in format_.without) + ")"
        docstring = inspect.getdoc(format_.convert)
        assert docstring is not None, f"{format_.name} has no docstring"
        yield f"`{format_.name}`", columns, " ".join(docstring.split("Raises:")[0].split())


# Codes of rejected rows and warnings

_PLACES = {
    "line": "validate: reading a line",
    "conversion": "validate: turning a row into pairs",
    "pair": "validate: a finished pair",
    "row": "validate: all pairs of a row",
}


_RULE_HEADER = ("code", "level", "can be set", "threshold", "meaning")


class Rule(NamedTuple):
    code: str
    place: str
    level: str
    """Its level by default."""
    has_level: bool
    """Whether stages.validate.rules can change the level."""
    threshold: str
    """Key and default of its threshold; empty where it has none."""
    sentence: str


def list_rules() -> list[Rule]:
    """List all codes in the order in which the stages find them."""
    rules = [
        Rule(
            code,
            _PLACES[described.found],
            described.level,
            described.why_fixed is None,
            _show_threshold(described.threshold),
            described.meaning,
        )
        for code, described in CODES.items()
    ]
    later = (
        ("dedupe", "reject", dedupe.REASONS),
        ("dedupe", "warn", dedupe.WARNINGS),
        ("encode", "reject", encode.REASONS),
        ("encode", "warn", encode.WARNINGS),
        ("score", "reject", score.REASONS),
        ("score", "warn", score.WARNINGS),
    )
    for stage, level, sentences in later:
        rules += [
            Rule(code, stage, level, False, "", sentence) for code, sentence in sentences.items()
        ]
    return rules


def _show_threshold(name: str | None) -> str:
    return "" if name is None else f"`{name}: {fields_of(Thresholds)[name].default}`"


def make_rule_tables() -> str:
    """Make one table a place where codes are found, and one of findings over all pairs."""
    lines: list[str] = []
    rules = list_rules()
    for place in dict.fromkeys(rule.place for rule in rules):
        cells = [
            (
                f"`{rule.code}`",
                rule.level,
                "yes" if rule.has_level else "no",
                rule.threshold,
                rule.sentence,
            )
            for rule in rules
            if rule.place == place
        ]
        lines += [f"## {place}", "", *_write_table(_RULE_HEADER, cells), ""]
    notable = [(f"`{one.code}`", one.when, one.advice) for one in NOTABLE]
    lines += ["## All pairs together", ""]
    lines += _write_table(("code", "noted when", "what to do"), notable)
    return "\n".join(lines)


# Losses

_PAPER = re.compile(r"arXiv:(\d{4}\.\d{5})")


class LossEntry(NamedTuple):
    kind: str
    title: str
    equation: str
    needs_reference: bool
    couples_pairs: bool
    papers: list[str]
    """Numbers on arXiv."""


class LossKey(NamedTuple):
    key: Key
    kinds: list[str]
    """The losses that have the key with this default and meaning."""


def list_losses() -> list[LossEntry]:
    return [_describe_loss(loss) for loss in LOSSES]


def _describe_loss(loss: type[PairLoss]) -> LossEntry:
    assert loss.__doc__
    title, equation, *_ = (" ".join(part.split()) for part in loss.__doc__.split("\n\n"))
    return LossEntry(
        kind=fields_of(loss)["kind"].default,
        title=title,
        equation=equation,
        needs_reference=loss.needs_reference,
        couples_pairs=loss.couples_pairs,
        papers=_PAPER.findall(loss.__doc__),
    )


def list_loss_keys() -> list[LossKey]:
    """List the keys of all losses; a key that several losses share is listed once."""
    shared: dict[Key, list[str]] = {}
    for loss in LOSSES:
        for key in keys_of(loss, ""):
            if key.path != ".kind":
                shared.setdefault(key, []).append(fields_of(loss)["kind"].default)
    return [LossKey(key, kinds) for key, kinds in shared.items()]


def make_loss_tables() -> str:
    losses = [
        (
            f"`{entry.kind}`",
            entry.title,
            entry.equation,
            "needed" if entry.needs_reference else "no",
            "yes" if entry.couples_pairs else "no",
            ", ".join(f"[{number}](https://arxiv.org/abs/{number})" for number in entry.papers),
        )
        for entry in list_losses()
    ]
    keys = [
        (f"`{key.path.lstrip('.')}`", key.default, key.doc, _show_kinds(kinds))
        for key, kinds in list_loss_keys()
    ]
    header = ("kind", "what it is", "loss of a pair", "reference", "couples the batch", "paper")
    return "\n".join(
        [
            *_write_table(header, losses),
            "",
            *_write_table(("key", "default", "meaning", "kinds"), keys),
        ]
    )


def _show_kinds(kinds: list[str]) -> str:
    if kinds == [entry.kind for entry in list_losses() if entry.needs_reference]:
        return "all that need the reference"
    return "all" if len(kinds) == len(LOSSES) else ", ".join(kinds)


# Columns

TABLES: tuple[tuple[str, str, rows.RowSchema], ...] = (
    ("Pairs", "`validate/…/data/` and `dedupe/…/data/`", rows.PAIR),
    ("Rejected rows", "`rejected/` of every stage", rows.REJECTED),
    ("Encoded pairs", "`encode/…/data/`", rows.ENCODED),
    ("Reference log-probabilities", "`score/…/data/`", rows.SCORE),
    ("Training metrics", "`train/…/metrics.parquet`", rows.METRICS),
    ("Held-out metrics", "`train/…/eval_metrics.parquet`", rows.EVAL_METRICS),
    ("Training pairs", "`train/…/dynamics.parquet`", rows.DYNAMICS),
    ("Held-out pairs in training", "`train/…/eval_dynamics.parquet`", rows.EVAL_DYNAMICS),
    ("Timings", "`train/…/timings.parquet`", rows.TIMINGS),
    ("Held-out pairs", "`evaluate/…/data/`", rows.EVALUATION),
    ("Generations", "`evaluate/…/generations.parquet`", rows.GENERATION),
    ("Exported log-probabilities", "the folder that `export-logps` writes", rows.EXPORTED),
)
"""Heading, place in the store, schema."""


def make_column_tables() -> str:
    lines: list[str] = []
    for heading, place, schema in TABLES:
        cells = [
            (f"`{c.name}`", _show_type(c.type), "yes" if c.nullable else "no", c.doc)
            for c in schema.columns
        ]
        lines += [f"## {heading}", "", f"In {place}; schema `{schema.label}`.", ""]
        lines += [*_write_table(("column", "type", "null", "meaning"), cells), ""]
    lines += ["## `where` and `weight`", "", "Columns that `stages.train` may name there.", ""]
    named = [(f"`{name}`", column.stage, column.doc) for name, column in SELECTABLE.items()]
    lines += _write_table(("column", "of", "meaning"), named)
    return "\n".join(lines).rstrip()


def _show_type(type_: pa.DataType) -> str:
    if type_ == rows.MESSAGE:
        return "message"
    if pa.types.is_list(type_):
        return f"list of {_show_type(type_.value_type)}"
    return str(type_)


# The command line


def make_command_tables() -> str:
    group: Any = typer.main.get_command(run.app)
    lines: list[str] = []
    for name, command in group.commands.items():
        usage = " ".join(_show_usage(command.params))
        cells = [_describe_parameter(parameter) for parameter in command.params]
        lines += [f"## {name}", "", _plain(command.help or ""), ""]
        lines += [f"    python run.py {name} {usage}", ""]
        lines += [*_write_table(("parameter", "default", "meaning"), cells), ""]
    return "\n".join(lines).rstrip()


def _show_usage(parameters: Iterable[Any]) -> Iterator[str]:
    """Show the arguments and the options that must be given."""
    for parameter in parameters:
        if parameter.param_type_name == "argument":
            name = _name_argument(parameter) + ("..." if parameter.nargs < 0 else "")
            yield name if parameter.required else f"[{name}]"
        elif parameter.required:
            yield f"{parameter.opts[0]} {parameter.name.upper()}"


def _name_argument(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name).upper()


def _describe_parameter(parameter: Any) -> tuple[str, str, str]:
    if parameter.param_type_name == "argument":
        name = f"`{_name_argument(parameter)}`"
    else:
        name = ", ".join(f"`{option}`" for option in parameter.opts)
    meaning = _plain(getattr(parameter, "help", None) or "")
    if parameter.envvar:
        meaning += f" Environment: `{parameter.envvar}`."
    default = parameter.default
    is_shown = isinstance(default, str | int | float) and not isinstance(default, bool)
    return name, "required" if parameter.required else f"`{default}`" if is_shown else "", meaning


def _plain(text: str) -> str:
    return " ".join(text.split())


# Pages


def _write_table(header: Sequence[str], cells: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield "|" + "---|" * len(header)
    for row in cells:
        yield f"| {' | '.join(_escape(cell) for cell in row)} |"


def _escape(cell: str) -> str:
    """Escape what Markdown or HTML would read in a cell.

    Code between backticks stays, unless it has a bar: no escape of it works in every renderer.
    """
    parts = []
    for n, part in enumerate(cell.split("`")):
        if n % 2 == 0:
            parts.append(part.replace("<", "&lt;").replace("*", "\\*").replace("|", "&#124;"))
        elif "|" in part:
            parts.append(f"<code>{html.escape(part).replace('|', '&#124;')}</code>")
        else:
            parts.append(f"`{part}`")
    return "".join(parts)


PAGES: dict[str, Callable[[], str]] = {
    "docs/reference/recipe.md": make_key_tables,
    "docs/reference/formats.md": make_format_tables,
    "docs/reference/rules.md": make_rule_tables,
    "docs/reference/losses.md": make_loss_tables,
    "docs/reference/columns.md": make_column_tables,
    "docs/reference/command-line.md": make_command_tables,
}
"""The generated part of every page, by the page's path."""

BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"


def renew(text: str, content: str) -> str:
    """Replace the part of a page between its markers.

    Raises:
        ValueError: a marker is missing.
    """
    before, _, rest = text.partition(BEGIN)
    _, found_end, after = rest.partition(END)
    if not found_end:
        raise ValueError("the markers of the generated part are missing")
    return f"{before}{BEGIN}\n{content}\n{END}{after}"


def main() -> None:
    for page, make in PAGES.items():
        path = ROOT / page
        path.write_text(renew(path.read_text(encoding="utf-8"), make()), encoding="utf-8")


if __name__ == "__main__":
    main()
