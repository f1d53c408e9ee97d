"""Read the messages of data sets: known roles, text content, tool calls as JSON text."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from schemas.ids import canonical_text
from stages.validate.findings import Finding, RowFault, is_missing
from stages.validate.part_names import find_kind, find_media, list_content
from stages.validate.strict_json import decode_strictly

Message = dict[str, Any]
"""A message: exactly the fields of the message struct in schemas/rows.py; absent ones are None."""


class Padded(dict[str, Any]):
    """An object from a columnar file: a key that it lacks is there too, with null."""


_CALLERS = ("function_call", "tool_call")
"""Roles of ShareGPT and ms-swift for a message that is tool calls: one, or a list, as JSON text."""
_CALL_TAGS = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_CALL_START = re.compile(r"\{\s*\"|\[\s*\{")
_MAX_CALL_STARTS = 100
"""Places in a text at which a call is looked for, to bound the time."""
_ROLE_ALIASES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "observation": "tool",
    "ipython": "tool",
    "function": "tool",
    "tool_response": "tool",
    **dict.fromkeys(_CALLERS, "assistant"),
}
_REASONING_NAMES = ("reasoning", "reasoning_content", "thinking")
_PART_FIELDS = {"reasoning": "reasoning", "thinking": "reasoning", "tool_call": "tool_calls"}
"""Fields of a message that parts of its content stand for, by the part's type."""
_TEXT_FIELDS = ("tool_call_id", "name")
_THINK, _END_THINK = "<think>", "</think>"
_IN_BOTH = "think>"


def new_message(role: str, content: str) -> Message:
    """Return a message of plain text."""
    return {
        "role": role,
        "content": content,
        "reasoning": None,
        "tool_calls": None,
        "tool_call_id": None,
        "name": None,
    }


def new_assistant(content: str, path: str) -> Message:
    """Return an assistant's message of plain text; text in think tags becomes its reasoning.

    Raises:
        RowFault: a think tag is not closed.
    """
    message = new_message("assistant", content)
    if _IN_BOTH in content and (_THINK in content or _END_THINK in content):
        message["reasoning"], message["content"] = _split_reasoning(content, path)
    return message


def read_conversation(raw: Sequence[object], path: str, warnings: list[Finding]) -> list[Message]:
    """Read a list of messages; calls that follow an assistant's message belong to its turn.

    Raises:
        RowFault: one of them is not a message, or has parts that cannot be kept.
    """
    messages: list[Message] = []
    for at, one in enumerate(raw):
        message = read_message(one, f"{path}.{at}", warnings)
        if _is_call(one) and messages and messages[-1]["role"] == "assistant":
            messages[-1] = _join_turn(messages[-1], message)
        else:
            messages.append(message)
    return messages


def _is_call(raw: object) -> bool:
    if not isinstance(raw, Mapping):
        return False
    role = raw.get("role") or raw.get("from")
    return isinstance(role, str) and role.strip().lower() in _CALLERS


def _join_turn(start: Message, call: Message) -> Message:
    """Join an assistant's message and the calls that follow it."""
    joined = dict(start)
    for name in ("content", "reasoning"):
        texts = [text for text in (start[name], call[name]) if text]
        joined[name] = "\n".join(texts) if texts else start[name]
    lists = [text for text in (start["tool_calls"], call["tool_calls"]) if text]
    if len(lists) == 2:  # JSON lists that are not empty.
        joined["tool_calls"] = f"{lists[0][:-1]},{lists[1][1:]}"
    else:
        joined["tool_calls"] = lists[0]
    joined["content"] = joined["content"] or None
    return joined


def are_same_but_content(one: Message, other: Message) -> bool:
    """Return whether two messages differ in content, and in the spelling of their JSON, at most."""
    calls = [message["tool_calls"] for message in (one, other)]
    if calls[0] != calls[1] and None not in calls:
        calls = [canonical_text(text) for text in calls]
    same = {"content": None, "tool_calls": None}
    return calls[0] == calls[1] and {**one, **same} == {**other, **same}


def read_message(raw: object, path: str, warnings: list[Finding]) -> Message:
    """Read one message as a data set holds it.

    Args:
        raw: a mapping with `role` and `content`, or with `from` and `value`.
        path: dotted path of the message, for findings.
        warnings: warnings are appended here.
    Raises:
        RowFault: it is not a message, or has parts that cannot be kept.
    """
    if is_missing(raw):
        raise RowFault("FIELD_NULL", path, "a message is null")
    if not isinstance(raw, Mapping):
        raise RowFault("TYPE_WRONG", path, f"a message is {_excerpt(raw)}")
    left = {name: value for name, value in raw.items() if not is_missing(value)}
    _take_former_calls(left)
    if "from" in left and "role" not in left:  # ShareGPT's names.
        left["role"] = left.pop("from")
        if "value" in left:
            left.setdefault("content", left.pop("value"))
    _take_parts(left, path)
    is_call = _is_call(left)
    if is_call:
        left["content"], left["tool_calls"] = _split_calls(left.pop("content", None))
    message = new_message(_read_role(left.pop("role", None), f"{path}.role"), "")
    message["tool_calls"] = _read_tool_calls(left.pop("tool_calls", None), f"{path}.tool_calls")
    message["content"] = _read_content(left.pop("content", None), f"{path}.content")
    if message["content"] is None and message["tool_calls"] is None:
        raise RowFault("FIELD_NULL", f"{path}.content", "neither text nor tool calls")
    _take_reasoning(message, left, path)
    if is_call and not message["content"]:
        message["content"] = None
    for name in _TEXT_FIELDS:
        if name in left:
            message[name] = _read_text(left.pop(name), f"{path}.{name}")
    if left:
        warnings += find_parts(left, path)
        warnings.append(Finding("MESSAGE_FIELD_IGNORED", path, ", ".join(sorted(left))))
    return message


def _take_parts(left: dict[str, Any], path: str) -> None:
    """Move parts that hold reasoning or a tool call (LLaMA-Factory v1) to fields of their own."""
    parts = left.get("content")
    if not isinstance(parts, list):
        return
    others: list[object] = []
    moved: dict[str, list[object]] = {name: [] for name in set(_PART_FIELDS.values())}
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        name = _PART_FIELDS.get(kind) if isinstance(kind, str) else None
        if name is None or name in left:
            others.append(part)
        else:
            moved[name].append(part.get("value", part.get(kind)))
    if len(others) < len(parts):
        left["content"] = others or None
    if moved["tool_calls"]:
        left["tool_calls"] = moved["tool_calls"]
    if moved["reasoning"]:
        texts = [_read_text(text, f"{path}.content") for text in moved["reasoning"]]
        left["reasoning"] = "".join(texts)


def _split_calls(content: object) -> tuple[str | None, object]:
    """Split a message of calls into the text before them, if any, and the calls."""
    if not isinstance(content, str):
        return None, content if isinstance(content, list) else [content]
    if tagged := _CALL_TAGS.findall(content):
        return _CALL_TAGS.sub("", content).strip() or None, tagged
    for start in _find_call_starts(content):
        calls = content[start:].strip()
        if _are_calls(calls):
            return content[:start].strip() or None, calls if calls[0] == "[" else [calls]
    calls = content.strip()
    return None, calls if calls.startswith("[") else [content]


def _find_call_starts(text: str) -> Iterator[int]:
    for found, _ in zip(_CALL_START.finditer(text), range(_MAX_CALL_STARTS), strict=False):
        yield found.start()


def _are_calls(text: str) -> bool:
    """Return whether a text is JSON of a call or a list of them, each with arguments."""
    try:
        calls = decode_strictly(text.encode())
    except RowFault:
        return False
    calls = calls if isinstance(calls, list) else [calls]
    return all(isinstance(c, dict) and ("function" in c or "arguments" in c) for c in calls)


def _take_former_calls(left: dict[str, Any]) -> None:
    """Move calls to `tool_calls` from the names of OpenAI's former API and of OLMo's messages."""
    if left.get("tool_calls"):
        return
    if call := left.pop("function_call", None):
        left["tool_calls"] = _wrap_functions([call])
    elif calls := left.pop("function_calls", None):
        left["tool_calls"] = calls


def find_parts(fields: Mapping[str, Any], path: str) -> list[Finding]:
    """Find fields of a message that belong to the prompt and that pairs keep for a whole row only.

    Raises:
        RowFault: a field holds media.
    """
    findings = []
    for name, value in fields.items():
        kind = find_kind(name)
        if kind == "media" and (sign := find_media(value)) is not None:
            raise RowFault("UNSUPPORTED_MODALITY", f"{path}.{name}", _excerpt(sign))
        content = next(list_content(value), None)
        if kind not in (None, "media") and content is not None:
            detail = f"a message has {_excerpt(content)}; move it to a column of the row"
            findings.append(Finding("PROMPT_COLUMN_UNREAD", f"{path}.{name}", detail))
    return findings


def _take_reasoning(message: Message, left: dict[str, Any], path: str) -> None:
    """Move an assistant's reasoning out of a field of its own or out of think tags in the text."""
    for name in _REASONING_NAMES:
        if name in left:
            message["reasoning"] = _read_text(left.pop(name), f"{path}.{name}") or None
            break
    content = message["content"]
    if message["role"] != "assistant" or content is None or message["reasoning"] is not None:
        return
    if _THINK in content or _END_THINK in content:
        message["reasoning"], message["content"] = _split_reasoning(content, f"{path}.content")


def _split_reasoning(content: str, path: str) -> tuple[str | None, str]:
    """Split `<think>reasoning</think>answer` at the tags, without the line breaks around them.

    Tags that are not at the start are text.

    Raises:
        RowFault: one of the two tags is missing.
    """
    if _THINK not in content or _END_THINK not in content:
        found, missing = (_THINK, _END_THINK) if _THINK in content else (_END_THINK, _THINK)
        raise RowFault("REASONING_UNCLOSED", path, f"{found} without {missing}")
    start = content.lstrip()
    if not start.startswith(_THINK):
        return None, content
    reasoning, _, answer = start.removeprefix(_THINK).partition(_END_THINK)
    return reasoning.strip("\n") or None, answer.lstrip("\n")


def read_tools(raw: object, path: str, *, are_functions: bool = False) -> str | None:
    """Read tool definitions as JSON text that keeps the data's order of keys.

    Args:
        raw: a list of objects, or of objects as JSON text; the list may be JSON text, too.
        path: dotted path of the tools, for findings.
        are_functions: whether they are OpenAI's former functions, which a tool now wraps.
    Raises:
        RowFault: they are not a list of objects.
    """
    tools = _parse_json(raw, path) if isinstance(raw, str) and raw.strip() else raw
    if not tools:
        return None
    if isinstance(tools, list):
        tools = [_parse_json(tool, path) if isinstance(tool, str) else tool for tool in tools]
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowFault("TOOLS_INVALID_JSON", path, f"not a list of objects: {_excerpt(tools)}")
    return _write_json(_wrap_functions(tools) if are_functions else tools, path)


def _wrap_functions(functions: list[Any]) -> list[Any]:
    """Turn OpenAI's former functions, or calls of them, into tools or tool calls."""
    return [
        {"type": "function", "function": function}
        if isinstance(function, dict) and "function" not in function
        else function
        for function in functions
    ]


def is_known_role(raw: object) -> bool:
    return isinstance(raw, str) and raw.strip().lower() in _ROLE_ALIASES


def _read_role(raw: object, path: str) -> str:
    if not isinstance(raw, str):
        raise RowFault("ROLE_UNKNOWN", path, f"found {_excerpt(raw)}")
    role = _ROLE_ALIASES.get(raw.strip().lower())
    if role is None:
        known = ", ".join(sorted(_ROLE_ALIASES))
        raise RowFault("ROLE_UNKNOWN", path, f"found {_excerpt(raw)}; known are {known}")
    return role


def _read_content(raw: object, path: str) -> str | None:
    if not isinstance(raw, list):
        return None if raw is None else _read_text(raw, path)
    return "".join(_read_part(part, f"{path}.{at}") for at, part in enumerate(raw))


def _read_part(raw: object, path: str) -> str:
    """Read one part of a message's content; only text can be kept."""
    if isinstance(raw, str):
        return raw
    if not isinstance(raw, dict):
        raise RowFault("TYPE_WRONG", path, f"a part of the content is {_excerpt(raw)}")
    kind = raw.get("type") or "text"
    if kind != "text":
        raise RowFault("UNSUPPORTED_MODALITY", path, f"a part of type {_excerpt(kind)}")
    find_parts(raw, path)
    name = "value" if "value" in raw and "text" not in raw else "text"
    return _read_text(raw.get(name), f"{path}.{name}")


def _read_tool_calls(raw: object, path: str) -> str | None:
    calls = _parse_json(raw, path) if isinstance(raw, str) and raw.strip() else raw
    if not calls:
        return None
    if not isinstance(calls, list):
        raise RowFault("TOOLS_INVALID_JSON", path, f"not a list: {_excerpt(calls)}")
    parsed = [_read_tool_call(call, f"{path}.{at}") for at, call in enumerate(calls)]
    return _write_json(parsed, path)


def _read_tool_call(raw: object, path: str) -> dict[str, Any]:
    """Read a tool call; if it or its arguments are JSON text, they are decoded."""
    if isinstance(raw, str):
        raw = _parse_json(raw, path)
    if not isinstance(raw, dict):
        raise RowFault("TOOLS_INVALID_JSON", path, f"not an object: {_excerpt(raw)}")
    call = function = drop_padding(raw)
    if isinstance(call.get("function"), dict):
        function = call["function"]
    if not isinstance(function.get("name"), str):
        raise RowFault("TOOLS_INVALID_JSON", path, "the call names no function")
    if isinstance(function.get("arguments"), str):
        function["arguments"] = _parse_json(function["arguments"], f"{path}.arguments")
    return call


def _parse_json(text: str, path: str) -> Any:
    try:
        return decode_strictly(text.encode())
    except RowFault as fault:
        detail = f"{fault.finding.code}, {fault.finding.detail}: {_excerpt(text)}"
        raise RowFault("TOOLS_INVALID_JSON", path, detail) from None


def _write_json(value: object, path: str) -> str:
    """Write JSON with keys in their order, which chat templates print."""
    try:
        return json.dumps(
            drop_padding(value), ensure_ascii=False, allow_nan=False, separators=(",", ":")
        )
    except ValueError as error:  # NaN, which files hold and JSON cannot.
        raise RowFault("TOOLS_INVALID_JSON", path, str(error)) from None


def drop_padding(value: Any) -> Any:
    """Copy a value without the nulls with which columnar files pad their objects."""
    if isinstance(value, dict):
        is_padded = isinstance(value, Padded)
        return {
            name: drop_padding(item)
            for name, item in value.items()
            if item is not None or not is_padded
        }
    return [drop_padding(item) for item in value] if isinstance(value, list) else value


def _read_text(raw: object, path: str) -> str:
    if raw is None:
        raise RowFault("FIELD_NULL", path, "text is null")
    if not isinstance(raw, str):
        raise RowFault("TYPE_WRONG", path, f"text wanted, found {_excerpt(raw)}")
    return raw


def _excerpt(value: object) -> str:
    """Show a value in a finding: short, and without control characters."""
    return ascii(value)[:80]
