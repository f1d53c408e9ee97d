"""View of a pair with the facts that several rules need, computed once."""

import unicodedata
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

from stages.validate.formats.pair_drafts import PairDraft
from stages.validate.messages import Message

_TEXT_FIELDS = ("content", "reasoning", "tool_calls", "tool_call_id", "name")


class Roles(NamedTuple):
    """Roles of the messages, in order: few sequences exist, so results are cached by them."""

    prompt: tuple[str, ...]
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]


class PairView:
    """A draft with cheap facts by which rules skip most pairs."""

    def __init__(self, draft: PairDraft) -> None:
        self.draft = draft
        prompt, chosen, rejected = draft.prompt, draft.chosen, draft.rejected
        self.roles = Roles(_list_roles(prompt), _list_roles(chosen), _list_roles(rejected))
        self.is_plain = True
        """Whether all messages have only a role and content."""
        self.texts = [draft.source or "", draft.source_id or ""]
        """All texts of the pair, with source and source_id, for screens."""
        for message in (*prompt, *chosen, *rejected):
            self.texts.append(message["content"] or "")
            if not (
                message["reasoning"]
                is message["tool_calls"]
                is message["tool_call_id"]
                is message["name"]
                is None
            ):
                self.is_plain = False
                self.texts += [message[name] or "" for name in _TEXT_FIELDS[1:]]
        self.chosen_text = normalise_answer(chosen)
        """The answer's text as it is compared: NFC, no outer white space."""
        self.rejected_text = normalise_answer(rejected)

    def sides(self) -> tuple[tuple[str, list[Message]], ...]:
        return ("chosen", self.draft.chosen), ("rejected", self.draft.rejected)

    def located_messages(self) -> Iterator[tuple[str, Message]]:
        """Yield all messages with their dotted paths."""
        for side, messages in (("prompt", self.draft.prompt), *self.sides()):
            for at, message in enumerate(messages):
                yield f"{side}.{at}", message

    def located_texts(self) -> Iterator[tuple[str, str]]:
        """Yield all texts that a model may see, and source and source_id, with their paths."""
        for path, message in self.located_messages():
            for name in _TEXT_FIELDS:
                if message[name] is not None:
                    yield f"{path}.{name}", message[name]
        for name, text in (("source", self.draft.source), ("source_id", self.draft.source_id)):
            if text is not None:
                yield name, text

    @cached_property
    def text(self) -> str:
        """All texts as one."""
        return "\n".join(self.texts)

    @cached_property
    def data(self) -> bytes:
        """All texts in UTF-8."""
        return self.text.encode()

    @cached_property
    def chosen_words(self) -> list[str]:
        return _split_words(self.draft.chosen)

    @cached_property
    def rejected_words(self) -> list[str]:
        return _split_words(self.draft.rejected)


def _list_roles(messages: list[Message]) -> tuple[str, ...]:
    return tuple([message["role"] for message in messages])


def normalise_answer(messages: list[Message]) -> str:
    """Return the text of an answer without outer white space, in NFC."""
    if len(messages) == 1:
        text: str = messages[0]["content"] or ""
        return (text if text.isascii() else unicodedata.normalize("NFC", text)).strip()
    return "\n\n".join(normalise_answer([message]) for message in messages)


def _split_words(messages: list[Message]) -> list[str]:
    return [word for message in messages for word in (message["content"] or "").split()]
