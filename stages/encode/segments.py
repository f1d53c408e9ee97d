"""Cutting a rendered answer into text that the model generates and text that it is given.

A conversation is rendered once, as a whole, because templates render a message otherwise when it is
the last. The borders of its turns are then found in that text.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from stages.encode.template import Conversation, Row, RowRejected


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A piece of a completion's text."""

    text: str
    is_scored: bool
    """Whether the model generates it; false for tool results and text of the template."""


class TurnEnds:
    """Finds where a turn ends: with the control tokens that the template writes after it.

    Generation stops there, so the model is never asked for anything after it, such as the line end
    of ChatML or a second token that closes the whole conversation.

    Args:
        control_tokens: the tokenizer's special tokens, as text.
    """

    def __init__(self, control_tokens: Iterable[str]) -> None:
        longest_first = sorted(control_tokens, key=len, reverse=True)
        one = "|".join(map(re.escape, longest_first)) or r"(?!)"
        self._control = re.compile(one)
        # The first control tokens of those that, with white space between them, end the text.
        self._run = re.compile(rf"((?:{one})+)(?:\s|{one})*\Z")

    def find_end(self, text: str) -> int | None:
        """Return where the last turn of a text ends; None if no control token ends it."""
        found = self._run.search(text)
        return found.end(1) if found else None

    def find_closing(self, text: str) -> tuple[int, str] | None:
        """Find the control tokens that end the last turn of a text.

        Returns:
            Where they begin, and the last of them; None if there is none.
        """
        found = self._run.search(text)
        return (found.start(1), self._control.findall(found.group(1))[-1]) if found else None

    def find_token_end(self, text: str, position: int) -> int:
        """Return where the control token around a position ends; the position if there is none."""
        spans = (found.span() for found in self._control.finditer(text))
        return next((end for start, end in spans if start <= position < end), position)


def split_side(
    prompt: Conversation, side: Sequence[Row], prompt_text: str, ends: TurnEnds, *, field: str
) -> list[Segment]:
    """Cut a rendered side, after the prompt, into segments.

    What the model generates begins where a generation prompt ends, and ends where the turn ends.
    The text after the last turn is left out.

    Args:
        prompt: the messages before the answer.
        side: the answer's messages; the first is the assistant's.
        prompt_text: the rendered prompt with its generation prompt.
        ends: finds the end of a turn.
        field: name of the side.
    Raises:
        RowRejected: the side does not begin with the prompt, or a border is not found.
    """

    def render(num_messages: int, *, opens_answer: bool) -> str:
        part = prompt.follow_with(side[:num_messages], field=field)
        return part.render(opens_answer=opens_answer)

    whole = render(len(side), opens_answer=False)
    if not whole.startswith(prompt_text):
        raise RowRejected("TOK_PREFIX_MISMATCH", field, _describe_mismatch(whole, prompt_text))
    steps = [at for at, message in enumerate(side) if message["role"] == "assistant"]
    segments: list[Segment] = []
    start = len(prompt_text)
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        if following is None:
            end = ends.find_end(whole[start:])
            stop = len(whole) if end is None else start + end
            segments.append(Segment(text=whole[start:stop], is_scored=True))
            break
        opened = render(following, opens_answer=True)
        border = _find_border(whole, opened, start, side[step + 1 : following])
        closed = render(step + 1, opens_answer=False)
        end = _find_turn_end(whole[:border], start, closed, side[step], ends)
        if border is None or end is None:
            raise RowRejected(
                "TOK_PREFIX_MISMATCH", field, f"the end of its message {step} cannot be found"
            )
        segments.append(Segment(text=whole[start:end], is_scored=True))
        segments.append(Segment(text=whole[end:border], is_scored=False))
        start = border
    return segments


def _find_border(whole: str, opened: str, start: int, between: Sequence[Row]) -> int | None:
    """Find where a later generation prompt ends in the whole rendering.

    Where an earlier message is rendered otherwise in the whole, the border is where the text ends
    in the same way as at generation, from the messages between the two turns on.
    """
    if whole.startswith(opened):
        return len(opened)
    best, length = None, 0
    for border in range(start + 1, len(whole) + 1):
        if whole[border - 1] == opened[-1]:
            same = _count_common_end(whole[start:border], opened)
            if same > length:
                best, length = border, same
    tail = opened[len(opened) - length :]
    return best if all(_is_in(message.get("content"), tail) for message in between) else None


def _find_turn_end(text: str, start: int, closed: str, message: Row, ends: TurnEnds) -> int | None:
    """Find where a turn ends: as the template ends it when it is the last one.

    Args:
        text: the whole rendering up to the next turn of the assistant.
        start: where the turn begins.
        closed: the rendering up to and with its message.
        message: its message.
        ends: finds the end of the last turn of a text.
    """
    if text.startswith(closed):
        end = ends.find_end(closed[start:])
        return len(closed) if end is None else start + end
    same = _count_common_start(closed, text)
    closing = ends.find_closing(closed[min(start, same) :])
    if closing is None:
        return same if same > start else None
    if (at := text.find(closing[1], start)) >= 0:
        return at + len(closing[1])
    if same >= min(start, same) + closing[0]:  # Nothing but the closing is another one here.
        return ends.find_token_end(text, same)
    return _find_closed_content(text, start, (message.get("content") or "").strip(), ends)


def _find_closed_content(text: str, start: int, content: str, ends: TurnEnds) -> int | None:
    """Find where a turn ends by its content with a control token behind it."""
    at = text.find(content, start) if content else -1
    while at >= 0:
        stop = at + len(content)
        if (end := ends.find_token_end(text, stop)) > stop:
            return end
        at = text.find(content, at + 1)
    return None


def _is_in(content: str | None, text: str) -> bool:
    """Return whether a message's content is in a text, as it is or as JSON."""
    stripped = (content or "").strip()
    return any(
        form in text
        for form in (
            stripped,
            json.dumps(stripped, ensure_ascii=False)[1:-1],
            json.dumps(stripped)[1:-1],
        )
    )


def _count_common_end(text: str, other: str) -> int:
    pairs = zip(reversed(text), reversed(other), strict=False)
    return next((count for count, (a, b) in enumerate(pairs) if a != b), min(len(text), len(other)))


def _count_common_start(text: str, other: str) -> int:
    pairs = zip(text, other, strict=False)
    return next((count for count, (a, b) in enumerate(pairs) if a != b), min(len(text), len(other)))


def _describe_mismatch(whole: str, prompt_text: str) -> str:
    same = _count_common_start(whole, prompt_text)
    return (
        "the template renders the prompt otherwise when an answer follows: "
        f"{prompt_text[same : same + 60]!r} becomes {whole[same : same + 60]!r}"
    )
