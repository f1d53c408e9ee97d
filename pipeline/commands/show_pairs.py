"""Prints pairs of score or evaluate: shortened text beside tokens, log-probs and rewards."""

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.pairs import scan_pairs
from pipeline.report.text import one_line, show_messages
from schemas.fingerprint import InputRef
from schemas.manifest import Manifest
from stages.store.filesystems import Folder
from stages.store.shards import StageOutput, read_manifest

_TEXT_CHARACTERS = 240
_VALUES = {
    "tokens": ("num_chosen_tokens", "num_rejected_tokens", None),
    "reference log-prob": ("ref_chosen_logp", "ref_rejected_logp", "ref_margin"),
    "policy log-prob": ("policy_chosen_logp", "policy_rejected_logp", "policy_margin"),
    "reward": ("reward_chosen", "reward_rejected", "reward_margin"),
}
"""By heading: the columns of the chosen answer, the rejected answer and their difference."""


def show_pairs(folder: Folder, manifest: Manifest, *, num_pairs: int) -> list[RenderableType]:
    """Show the first pairs of score or evaluate, with their text from upstream stages.

    Returns:
        Empty for other stages, or if dedupe's output, which has the text, was deleted.
    """
    outputs = _open_upstream(StageOutput(folder=folder, manifest=manifest))
    own = {"score": "ref_margin", "evaluate": "policy_margin"}.get(manifest.stage)
    if own is None or "dedupe" not in outputs:
        return []
    pairs = scan_pairs(outputs).filter(pl.col(own).is_not_null()).head(num_pairs).collect()
    parts: list[RenderableType] = []
    for number, row in enumerate(pairs.to_dicts(), 1):
        parts += [_show_texts(number, row), _show_values(row)]
    return parts


def _open_upstream(output: StageOutput) -> dict[str, StageOutput]:
    """Open a stage and all its inputs, transitively, except deleted ones."""
    store = Folder(output.folder.uri.rsplit("/", 2)[0])
    outputs = {output.manifest.stage: output}
    waiting: list[tuple[str, InputRef]] = list(output.manifest.inputs.items())
    while waiting:
        stage, ref = waiting.pop()
        folder = store.child(stage).child(ref.folder)
        if stage not in outputs and (manifest := read_manifest(folder)) is not None:
            outputs[stage] = StageOutput(folder=folder, manifest=manifest)
            waiting += manifest.inputs.items()
    return outputs


def _show_texts(number: int, row: Mapping[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(f"\npair {number}", no_wrap=True)
    table.add_column("", overflow="fold")
    for name in ("pair_id", "source", "split"):
        table.add_row(name, Text(one_line(row[name])))
    table.add_row("prompt", _show_prompt(row))
    for side in ("chosen", "rejected"):
        table.add_row(side, Text(_shorten(row[side])))
    for name in ("correct", "displaced"):
        if row.get(name) is not None:
            table.add_row(name, "yes" if row[name] else "no")
    return table


def _show_prompt(row: Mapping[str, Any]) -> Text:
    """Show the last user message and the length of the whole prompt."""
    messages = row["prompt"]
    from_user = [message for message in messages if message["role"] == "user"]
    facts = []
    if len(messages) > 1:
        facts.append(f"{len(messages)} messages")
    if "num_prompt_tokens" in row:
        facts.append(f"{row['num_prompt_tokens']:,} tokens")
    shown = Text(_shorten((from_user or messages)[-1:]))
    if facts:
        shown.append(f" ({', '.join(facts)})", style="dim")
    return shown


def _show_values(row: Mapping[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    columns = [names for names in _VALUES.values() if row.get(names[0]) is not None]
    for heading, names in _VALUES.items():
        if names in columns:
            table.add_column(heading, justify="right")
    for place, label in enumerate(("chosen", "rejected", "difference")):
        table.add_row(label, *(_write(row, names[place]) for names in columns))
    return table


def _write(row: Mapping[str, Any], name: str | None) -> str:
    if name is None:
        return ""
    value = row[name]
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def _shorten(messages: Sequence[Mapping[str, Any]]) -> str:
    """Shorten messages to one line, with roles if there are several."""
    shown = show_messages(messages, max_characters=_TEXT_CHARACTERS)
    has_roles = len(shown) > 1
    return one_line(
        " ".join(f"{m.role}: {m.content}" if has_roles else m.content for m in shown),
        max_characters=2 * _TEXT_CHARACTERS,
    )
