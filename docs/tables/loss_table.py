"""Every loss and its keys, as Markdown tables made from the classes.

`python -m docs.tables.loss_table docs/losses.md` renews the part of a file between its markers.
"""

import re
import sys
from collections.abc import Iterator
from typing import NamedTuple

from docs.tables.config_table import Key, keys_of
from docs.tables.page_parts import renew_file, renew_part
from schemas.config import fields_of
from stages.train.losses import LOSSES, PairLoss

_PART = "loss tables"
_PAPER = re.compile(r"arXiv:(\d{4}\.\d{5})")


class Entry(NamedTuple):
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
    """Those that have the key with this default and this meaning."""


def list_losses() -> list[Entry]:
    """List all losses as their classes describe them."""
    return [_describe(loss) for loss in LOSSES]


def _describe(loss: type[PairLoss]) -> Entry:
    assert loss.__doc__
    title, equation, *_ = (" ".join(part.split()) for part in loss.__doc__.split("\n\n"))
    return Entry(
        kind=fields_of(loss)["kind"].default,
        title=title,
        equation=equation,
        needs_reference=loss.needs_reference,
        couples_pairs=loss.couples_pairs,
        papers=_PAPER.findall(loss.__doc__),
    )


def list_loss_keys() -> list[LossKey]:
    """List the keys of all losses; those that several share stand once."""
    shared: dict[Key, list[str]] = {}
    for loss in LOSSES:
        for key in keys_of(loss, ""):
            if key.path != ".kind":
                shared.setdefault(key, []).append(fields_of(loss)["kind"].default)
    return [LossKey(key, kinds) for key, kinds in shared.items()]


def make_tables() -> str:
    return "\n".join([*_list_rows(), "", *_list_key_rows()])


def _list_rows() -> Iterator[str]:
    yield "| kind | what it is | a pair's loss | reference | the batch's pairs together | paper |"
    yield "|---|---|---|---|---|---|"
    for entry in list_losses():
        papers = ", ".join(f"[{number}](https://arxiv.org/abs/{number})" for number in entry.papers)
        yield (
            f"| `{entry.kind}` | {entry.title} | {entry.equation.replace('|', chr(92) + '|')} | "
            f"{'needed' if entry.needs_reference else 'no'} | "
            f"{'yes' if entry.couples_pairs else 'no'} | {papers} |"
        )


def _list_key_rows() -> Iterator[str]:
    yield "| key | default | meaning | kinds |"
    yield "|---|---|---|---|"
    for key, kinds in list_loss_keys():
        yield f"| `{key.path.lstrip('.')}` | {key.default} | {key.doc} | {_show_kinds(kinds)} |"


def _show_kinds(kinds: list[str]) -> str:
    compared = [entry.kind for entry in list_losses() if entry.needs_reference]
    if kinds == compared:
        return "all that need the reference"
    return "all" if len(kinds) == len(LOSSES) else ", ".join(kinds)


def renew(text: str) -> str:
    """Put the present tables into a Markdown text, between its markers."""
    return renew_part(text, _PART, make_tables())


if __name__ == "__main__":
    renew_file(sys.argv[1], _PART, make_tables())
