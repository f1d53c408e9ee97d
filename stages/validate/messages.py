"""Read the messages of data sets: known roles, text content, tool calls as JSON text."""

from collections.abc import Mapping
from typing import Any

from schemas.ids import canonical_json
from stages.validate.findings import Finding, RowFault
from stages.validate.strict_json import decode_strictly

Message = dict[str, Any]
"""A message: exactly the fields of the message struct in schemas/rows.py; absent ones are None."""

_CALLER = "function_call"
"""ShareGPT's role for a message that is one tool call, as JSON text."""
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
    _CALLER: "assistant",
}
_REASONING_NAMES = ("reasoning", "reasoning_content", "thinking")
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


def read_message(raw: object, path: str, warnings: list[Finding]) -> Message:
    """Read one message as a data set holds it.

    Args:
        raw: a mapping with `role` and `content`, or with `from` and `value`.
        path: dotted path of the message, for findings.
        warnings: warnings are appended here.
    Raises:
        RowFault: it is not a message, or has parts that cannot be kept.
    """
    if raw is None:
        raise RowFault("FIELD_NULL", path, "a message is null")
    if not isinstance(raw, Mapping):
        raise RowFault("TYPE_WRONG", path, f"a message is {_excerpt(raw)}")
    left = {name: value for name, value in raw.items() if value is not None}
    if "from" in left and "role" not in left:  # ShareGPT's names.
        left["role"] = left.pop("from")
        if "value" in left:
            left.setdefault("content", left.pop("value"))
    is_call = isinstance(left.get("role"), str) and left["role"].strip().lower() == _CALLER
    if is_call:
        left["tool_calls"] = [left.pop("content", None)]
    message = new_message(_read_role(left.pop("role", None), f"{path}.role"), "")
    message["tool_calls"] = _read_tool_calls(left.pop("tool_calls", None), f"{path}.tool_calls")
    message["content"] = _read_content(left.pop("content", None), f"{path}.content")
    if message["content"] is None and message["tool_calls"] is None:
        raise RowFault("FIELD_NULL", f"{path}.content", "neither text nor tool calls")
    _take_reasoning(message, left, path)
    for name in _TEXT_FIELDS:
        if name in left:
            message[name] = _read_text(left.pop(name), f"{path}.{name}")
    if left:
        warnings.append(Finding("MESSAGE_FIELD_IGNORED", path, ", ".join(sorted(left))))
    return message


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


def read_tools(raw: object, path: str) -> str | None:
    """Read tool definitions (a list, or one as JSON text) into canonical JSON text.

    Raises:
        RowFault: they are not a list of objects.
    """
    tools = _parse_json(raw, path) if isinstance(raw, str) and raw.strip() else raw
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowFault("TOOLS_INVALID_JSON", path, f"not a list of objects: {_excerpt(tools)}")
    return _write_json(tools, path)


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
    kind = raw.get("type", "text")
    if kind != "text":
        raise RowFault("UNSUPPORTED_MODALITY", path, f"a part of type {_excerpt(kind)}")
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
    call = {name: value for name, value in raw.items() if value is not None}
    function = call
    if isinstance(call.get("function"), dict):
        function = call["function"] = dict(call["function"])
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
    try:
        return canonical_json(value).decode()
    except ValueError as error:  # NaN, which Parquet can hold and JSON cannot.
        raise RowFault("TOOLS_INVALID_JSON", path, str(error)) from None


def _read_text(raw: object, path: str) -> str:
    if raw is None:
        raise RowFault("FIELD_NULL", path, "text is null")
    if not isinstance(raw, str):
        raise RowFault("TYPE_WRONG", path, f"text wanted, found {_excerpt(raw)}")
    return raw


def _excerpt(value: object) -> str:
    """Show a value in a finding: short, and without control characters."""
    return ascii(value)[:80]
