"""System text, history and tools that a row holds in columns of their own.

A column that can change the prompt becomes a part of it or a finding, and never only `extra`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from schemas.ids import canonical_text
from stages.validate.findings import Finding, RowFault, is_missing
from stages.validate.formats.columns import Columns, PromptPart
from stages.validate.formats.nested import open_list, open_messages
from stages.validate.messages import Message, new_assistant, new_message, read_tools
from stages.validate.part_names import find_media, is_empty_text, list_content
from stages.validate.strict_json import decode_strictly

Stated = tuple[str, list[Message]]
"""A place of a row and the messages that it states."""


@dataclass(frozen=True, kw_only=True)
class PromptContext:
    """What a row states of its prompt beside the messages."""

    systems: Sequence[Stated] = ()
    history: Sequence[Message] = ()
    """Earlier turns, without a system message."""
    tools: str | None = None
    """JSON text."""
    quotable: Sequence[PromptPart] = ()
    """Passages that do not matter if the prompt quotes them."""

    def complete(self, prompt: list[Message]) -> list[Message]:
        """Return a prompt with its system message and history.

        A history with which the prompt begins is not repeated.

        Raises:
            RowFault: the prompt has another system message of its own.
        """
        if not self.systems and not self.history:
            return prompt
        own = _only_system(prompt[:1])
        talk, history = prompt[len(own) :], list(self.history)
        is_repeated = talk[: len(history)] == history
        system = _agree([*self.systems, ("prompt", own)])
        return [*system, *([] if is_repeated else history), *talk]

    def find_unread(self, columns: Columns, prompt: Sequence[Message]) -> None:
        """Add findings of passages that the prompt does not quote."""
        said = "\n".join(message["content"] or "" for message in prompt) if self.quotable else ""
        for part in self.quotable:
            content = list_content(part.value)
            if not all(text.strip() in said for text in content):
                _add_finding(columns, part)


def take_context(columns: Columns) -> PromptContext:
    """Take the columns that belong to the prompt, whatever the format of the row.

    One that cannot be understood stays, with a finding.

    Raises:
        RowFault: a column holds media, or two places contradict each other.
    """
    parts = columns.list_parts()
    if not parts:
        return PromptContext()
    _refuse_media(parts)
    histories = [_take_messages(columns, part) for part in parts if part.kind == "history"]
    history = _agree(histories)
    systems = [_take_messages(columns, part) for part in parts if part.kind == "system"]
    own = _only_system(history[:1])
    for part in parts:
        if part.kind == "settings" and _sets_anything(part.value):
            _add_finding(columns, part)
    return PromptContext(
        systems=[stated for stated in (*systems, ("history", own)) if stated[1]],
        history=history[len(own) :],
        tools=_take_tools(columns, parts),
        quotable=[part for part in parts if part.kind == "passages"],
    )


def _sets_anything(settings: Any) -> bool:
    if isinstance(settings, dict):
        return not all(map(is_missing, settings.values()))
    return bool(settings) and not is_empty_text(settings)


def _refuse_media(parts: Iterable[PromptPart]) -> None:
    for part in parts:
        if part.kind == "media" and (content := find_media(part.value)) is not None:
            detail = f"only text can be trained on; found {content[:80]!a}"
            raise RowFault("UNSUPPORTED_MODALITY", part.path, detail)


def _take_messages(columns: Columns, part: PromptPart) -> Stated:
    """Take a system text or a history; one that cannot be understood stays, with a finding."""
    messages: list[Message] | None
    if not part.value or is_empty_text(part.value):
        messages = []
    elif part.kind == "system":
        messages = _read_system(columns, part)
    else:
        messages = _read_history(columns, part)
    if messages is None:
        _add_finding(columns, part)
        return part.path, []
    columns.drop(part.path)
    return part.path, messages


def _read_system(columns: Columns, part: PromptPart) -> list[Message] | None:
    """Read text, a message, or a list of one of them; None if it is anything else."""
    value = _open_single(open_messages(part.value, part.path))
    if isinstance(value, str):
        message = new_message("system", value)
    elif _is_message(value):
        (message,) = columns.read_messages([value], part.path)
    else:
        return None
    if message["role"] != "system":
        return None
    return [message] if (message["content"] or "").strip() else []


def _open_single(value: Any) -> Any:
    """Return the only item of a list, also of one of text in JSON; anything else unchanged."""
    items = value
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            items = decode_strictly(value.encode())
        except RowFault:
            return value
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            return value
    return items[0] if isinstance(items, list) and len(items) == 1 else items


def _read_history(columns: Columns, part: PromptPart) -> list[Message] | None:
    """Read messages, or pairs of a question and its answer; None if it is anything else."""
    turns = open_list(part.value, part.path)
    if not isinstance(turns, list):
        return None
    if all(map(_is_message, turns)):
        return columns.read_messages(turns, part.path)
    messages = []
    for at, turn in enumerate(turns):
        is_pair = isinstance(turn, list) and len(turn) == 2
        if not is_pair or not all(isinstance(text, str) for text in turn):
            return None
        question, answer = turn
        messages.append(new_message("user", question))
        messages.append(new_assistant(answer, f"{part.path}.{at}.1"))
    return messages


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and ("role" in value or "from" in value)


def _only_system(messages: Sequence[Message]) -> list[Message]:
    return [message for message in messages if message["role"] == "system"]


def _agree(places: Iterable[Stated]) -> list[Message]:
    """Return what all places state that state anything.

    Raises:
        RowFault: two of them differ.
    """
    first: list[Message] = []
    for path, messages in places:
        if messages and first and messages != first:
            detail = f"{_excerpt(first)} against {_excerpt(messages)}"
            raise RowFault("PROMPT_CONFLICT", path, detail)
        first = first or messages
    return first


def _excerpt(messages: Sequence[Message]) -> str:
    return ascii((messages[0]["content"] or "")[:150])


def _take_tools(columns: Columns, parts: Iterable[PromptPart]) -> str | None:
    """Take the tools of all places, which must be the same.

    Raises:
        RowFault: two places differ, or the tools of one side.
    """
    tools: str | None = None
    of_sides: list[tuple[str, str | None]] = []
    for part in parts:
        if part.kind not in ("tools", "tools of a side"):
            continue
        found = _read_tools(part)
        columns.drop(part.path)
        if part.kind == "tools of a side":
            of_sides.append((part.path, found))
        elif found and tools and not _are_same(found, tools):
            raise RowFault("PROMPT_CONFLICT", part.path, "another place has other tools")
        else:
            tools = tools or found
    for path, found in of_sides:
        if not _are_same(found, tools):
            raise RowFault("PROMPT_MISMATCH", path, "the sides have different tools")
    return tools


def _read_tools(part: PromptPart) -> str | None:
    if is_empty_text(part.value):
        return None
    value = part.value if isinstance(part.value, str) else open_list(part.value, part.path)
    are_functions = part.path.rpartition(".")[2].strip().lower() == "functions"
    return read_tools(value, part.path, are_functions=are_functions)


def _are_same(one: str | None, other: str | None) -> bool:
    if one is None or other is None:
        return one is other
    return canonical_text(one) == canonical_text(other)


def _add_finding(columns: Columns, part: PromptPart) -> None:
    """Add the finding of a part that is not understood; its column becomes `extra`."""
    if part in columns.stated:
        columns.left.setdefault(part.path, part.value)
    content = next(list_content(part.value), part.value)
    advice = "read it with a column map"
    if part.kind == "settings":
        advice = "set stages.encode.template_kwargs for all rows"
    detail = f"found {ascii(content)[:80]}; {advice}, or leave the column out"
    columns.warnings.append(Finding("PROMPT_COLUMN_UNREAD", part.path, detail))
