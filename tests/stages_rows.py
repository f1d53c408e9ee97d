"""Builds rows of the pairs table, for tests."""

from collections.abc import Mapping, Sequence
from typing import Any

from schemas.ids import pair_id, prompt_id

_MESSAGE_FIELDS = ("role", "content", "reasoning", "tool_calls", "tool_call_id", "name")


def message(role: str, content: str | None, **more: str) -> dict[str, Any]:
    given = {"role": role, "content": content, **more}
    return {field: given.get(field) for field in _MESSAGE_FIELDS}


def pair_row(
    prompt: str | Sequence[Mapping[str, Any]],
    chosen: str | Sequence[Mapping[str, Any]],
    rejected: str | Sequence[Mapping[str, Any]],
    **more: Any,
) -> dict[str, Any]:
    """Build a full row of the pairs table; a text becomes one message."""
    asked = [message("user", prompt)] if isinstance(prompt, str) else list(prompt)
    good = [message("assistant", chosen)] if isinstance(chosen, str) else list(chosen)
    bad = [message("assistant", rejected)] if isinstance(rejected, str) else list(rejected)
    tools = more.get("tools")
    return {
        "pair_id": pair_id(asked, good, bad, tools),
        "prompt_id": prompt_id(asked, tools),
        "prompt": asked,
        "chosen": good,
        "rejected": bad,
        "tools": None,
        "score_chosen": None,
        "score_rejected": None,
        "margin": None,
        "weight": 1.0,
        "source": "made",
        "source_file": "made.jsonl",
        "source_row": 0,
        "source_id": None,
        "split": "train",
        "warnings": [],
        "extra": None,
        **more,
    }
