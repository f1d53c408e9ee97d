"""Cutting a pair into the text of its prompt and the segments of its sides."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stages.encode.checks import SIDES
from stages.encode.segments import Segment, TurnEnds, split_side
from stages.encode.template import (
    ChatTemplate,
    Conversation,
    Row,
    RowRejected,
    Shape,
    inline_thought,
    list_shapes,
)

_STEPS = ("TEMPLATE_REFUSED", "TOOL_CALL_LOST", "TOK_PREFIX_MISMATCH")
"""Codes of a refused shape, in the order in which its rendering is checked."""


@dataclass(frozen=True, kw_only=True)
class SplitPair:
    """A pair as text: the prompt with its generation prompt, and what follows it on each side."""

    prompt: str
    sides: Mapping[str, Sequence[Segment]]
    warnings: Sequence[str] = ()
    """Codes of warnings."""

    def side_text(self, side: str) -> str:
        """Return the text of a side after the prompt."""
        return "".join(segment.text for segment in self.sides[side])


def split_raw(row: Row, ends: TurnEnds, *, is_rendered: bool) -> SplitPair:
    """Take the contents of a pair's messages as its text.

    Args:
        row: a row of the pairs table.
        ends: finds the end of a turn.
        is_rendered: whether the text holds the special tokens of a template; an answer then ends
            with the control tokens that end it, without white space after them.
    Raises:
        RowRejected: a message has tool calls, which raw text cannot say.
    """
    has_calls = False
    for field in ("prompt", *SIDES):
        for message in row[field]:
            has_calls |= bool(message["tool_calls"])
            if message["tool_calls"] and not message["content"]:
                raise RowRejected("TOOL_CALL_LOST", field, "contents alone are the text")
    join = _join_with_thoughts if is_rendered else _join_contents
    sides = {}
    for side in SIDES:
        text = join(row[side])
        end = ends.find_end(text) if is_rendered else None
        sides[side] = [Segment(text=text[:end], is_scored=True)]
    pair = SplitPair(prompt=join(row["prompt"]), sides=sides)
    warnings = _find_lost_thoughts(row, pair)
    if has_calls:
        warnings.append("TOOL_CALLS_NOT_RENDERED")
    if row["tools"] and not is_rendered:
        warnings.append("TOOLS_NOT_RENDERED")
    return replace(pair, warnings=warnings)


def _join_contents(messages: Sequence[Row]) -> str:
    return "".join(message["content"] or "" for message in messages)


def _join_with_thoughts(messages: Sequence[Row]) -> str:
    """Join contents, with the thoughts that were text in them before validate took them out."""
    return "".join(
        inline_thought(message["reasoning"], message["content"] or "")
        if message["reasoning"]
        else message["content"] or ""
        for message in messages
    )


def split_rendered(row: Row, template: ChatTemplate, ends: TurnEnds) -> SplitPair:
    """Render a pair in the first shape of messages that the template renders whole.

    Raises:
        RowRejected: there is none; carries what is wrong in the shape that came furthest.
    """
    messages = [message for field in ("prompt", *SIDES) for message in row[field]]
    has_calls = any(message["tool_calls"] for message in messages)
    refusals: list[RowRejected] = []
    for shape in list_shapes(has_calls=has_calls, reads_thoughts=template.reads_thoughts):
        try:
            return _split_in_shape(row, shape, template, ends)
        except RowRejected as error:
            refusals.append(error)
    furthest = max(refusals, key=lambda error: _STEPS.index(error.args[0]))
    code, field, detail = furthest.args
    if code == "TOK_PREFIX_MISMATCH":
        has_thought = any(message["reasoning"] for message in row.get(field, ()))
        detail += template.advise(has_thought=has_thought)
    raise RowRejected(code, field, detail) from furthest


def _split_in_shape(row: Row, shape: Shape, template: ChatTemplate, ends: TurnEnds) -> SplitPair:
    plain = replace(shape, has_empty_thought=False)
    prompt = Conversation(
        template=template,
        messages=tuple(template.shape_message(message, plain) for message in row["prompt"]),
        tools=row["tools"],
        field="prompt",
    )
    prompt_text = prompt.render(opens_answer=True)
    loses_calls = _loses_calls(prompt)
    sides = {}
    for side in SIDES:
        messages = [template.shape_message(message, shape) for message in row[side]]
        loses_calls |= _loses_calls(prompt.follow_with(messages, field=side))
        sides[side] = split_side(prompt, messages, prompt_text, ends, field=side)
    pair = SplitPair(prompt=prompt_text, sides=sides)
    warnings = _find_lost_thoughts(row, pair)
    if loses_calls:
        warnings.append("TOOL_CALLS_NOT_RENDERED")
    if row["tools"] and _is_same(replace(prompt, tools=None), prompt_text, opens_answer=True):
        warnings.append("TOOLS_NOT_RENDERED")
    return replace(pair, warnings=warnings)


def _find_lost_thoughts(row: Row, pair: SplitPair) -> list[str]:
    """Warn where an answer's thought is missing from its text."""
    for side in SIDES:
        text = pair.side_text(side)
        if any((message["reasoning"] or "").strip() not in text for message in row[side]):
            return ["REASONING_NOT_RENDERED"]
    return []


def _loses_calls(conversation: Conversation) -> bool:
    """Return whether the rendering would be the same if a tool call named another function.

    Raises:
        RowRejected: it would, and the call's message has nothing else.
    """
    if not any(message.get("tool_calls") for message in conversation.messages):
        return False
    text = conversation.render(opens_answer=False)
    loses_calls = False
    for changed, name, is_bare in _rename_each_call(conversation.messages):
        if _is_same(replace(conversation, messages=changed), text, opens_answer=False):
            if is_bare:
                detail = f"the call of {name!r} is not in the rendered conversation"
                raise RowRejected("TOOL_CALL_LOST", conversation.field, detail)
            loses_calls = True
    return loses_calls


def _rename_each_call(messages: Sequence[Row]) -> Iterator[tuple[tuple[Row, ...], str, bool]]:
    """List the conversations in which one call has another function's name, with the call's own
    name and whether its message has no text."""
    for at, message in enumerate(messages):
        calls = message.get("tool_calls") or []
        for number, call in enumerate(calls):
            function: dict[str, Any] = call.get("function", call)
            renamed = {**function, "name": f"{function['name']}_"}
            call = {**call, "function": renamed} if "function" in call else renamed
            changed = {**message, "tool_calls": [*calls[:number], call, *calls[number + 1 :]]}
            conversation = (*messages[:at], changed, *messages[at + 1 :])
            yield conversation, function["name"], not message.get("content")


def _is_same(conversation: Conversation, text: str, *, opens_answer: bool) -> bool:
    """Return whether a conversation is rendered as a text; a refused one is not."""
    with contextlib.suppress(RowRejected):
        return conversation.render(opens_answer=opens_answer) == text
    return False
