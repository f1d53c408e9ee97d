"""Names under which data sets hold parts of a prompt other than its messages."""

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Literal, NamedTuple

from stages.validate.findings import MISSING_WORDS

PartKind = Literal["system", "history", "tools", "tools of a side", "media", "passages", "settings"]


class Part(NamedTuple):
    names: tuple[str, ...]
    """Names of columns, in lower case with `_` between words."""
    meaning: str
    """What becomes of such a column, for the documentation."""


PARTS: dict[PartKind, Part] = {
    "system": Part(
        (
            "system",
            "system_prompt",
            "system_message",
            "system_instruction",
            "custom_system_prompt",
            "sys_prompt",
        ),
        "The system message: text, a message, or a list of one of them.",
    ),
    "history": Part(
        ("history", "chat_history", "conversation_history"),
        "Earlier turns, before the prompt: messages, or pairs of a question and its answer.",
    ),
    "tools": Part(
        ("tools", "functions", "tool_definitions"),
        "The tools: a list of objects. `functions`, OpenAI's former name, are wrapped as tools.",
    ),
    "tools of a side": Part(
        ("chosen_tools", "rejected_tools"),
        "Must be the same as the tools, else the row is rejected with PROMPT_MISMATCH.",
    ),
    "media": Part(
        ("image", "img", "picture", "photo", "audio", "video", "media"),
        "Rejected with UNSUPPORTED_MODALITY. The names count in the plural, too, and with words "
        "around them as in `rejected_images`, `image_path` and `image_1`.",
    ),
    "passages": Part(
        (
            "context",
            "contexts",
            "document",
            "documents",
            "passage",
            "passages",
            "input",
            "instruction",
            "question",
            "query",
        ),
        "Rejected with PROMPT_COLUMN_UNREAD, unless the format reads it or the prompt quotes it.",
    ),
    "settings": Part(
        ("chat_template_kwargs",),
        "Variables of the chat template. Rejected with PROMPT_COLUMN_UNREAD if any is set: "
        "`encode.template_kwargs` sets them for all rows.",
    ),
}
_MEDIA_NAME = re.compile(
    r"(?:(?:chosen|rejected|prompt|question|input)_)?"
    rf"(?:{'|'.join(PARTS['media'].names)})s?"
    r"(?:_?(?:path|file|name|file_?name|url|uri|byte|base64|b64|data|list)s?)?(?:_?\d+)?"
)
_KINDS: dict[str, PartKind] = {name: kind for kind, part in PARTS.items() for name in part.names}
_EMPTY_TEXTS = {"", "[]", "{}", *MISSING_WORDS}
"""Texts that tables write for an absent value."""


@lru_cache(maxsize=4096)
def find_kind(name: str) -> PartKind | None:
    """Return which part of a prompt a column of this name holds; None if it holds none."""
    spelled = name.strip().lower().replace(" ", "_").replace("-", "_")
    return "media" if _MEDIA_NAME.fullmatch(spelled) else _KINDS.get(spelled)


def is_empty_text(value: object) -> bool:
    """Return whether a value is a text that tables write for an absent value."""
    return isinstance(value, str) and value.strip().lower() in _EMPTY_TEXTS


def list_content(value: object) -> Iterator[str]:
    """Yield the texts in a value, however it is nested; empty ones are left out."""
    if isinstance(value, str):
        if not is_empty_text(value):
            yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from list_content(item)


def find_media(value: object) -> str | None:
    """Return a sign that a column of media is not empty: a text, such as a path, or samples."""
    return "a list of numbers" if _holds_samples(value) else next(list_content(value), None)


def _holds_samples(value: object) -> bool:
    """Return whether a list of numbers, such as pixels, is somewhere in a value."""
    if isinstance(value, dict):
        return any(map(_holds_samples, value.values()))
    if not isinstance(value, list):
        return False
    return any(isinstance(item, int | float) or _holds_samples(item) for item in value)
