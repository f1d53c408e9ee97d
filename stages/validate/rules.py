"""What must hold for a pair, and which doubts are noted?

A rule is one entry of RULES and one function that yields a finding for each place that breaks it.
"""

import math
import re
import unicodedata
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

from stages.validate.findings import CODES, Finding, Level
from stages.validate.formats import Draft
from stages.validate.messages import Message

MAX_MESSAGE_CHARS = 1_000_000
_VISIBLE = re.compile(r"[^\s\u00ad\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]")
_BIDI_OVERRIDE = re.compile(r"[\u202a-\u202e\u2066-\u2069]")
_FLOAT32_TINY, _FLOAT32_MAX = 1.2e-38, 3.4e38

Findings = Iterator[Finding]


class Rule(NamedTuple):
    code: str
    level: Level
    sentence: str
    check: Callable[[Draft, str], Findings]
    """Given a draft and the rule's own code, yields what breaks the rule."""


def check_pair(draft: Draft) -> tuple[list[Finding], list[Finding]]:
    """Hold all rules against a pair.

    Returns:
        What rejects it, and what is worth a warning (the conversion's own warnings first).
    """
    rejections: list[Finding] = []
    warnings = list(draft.warnings)
    for rule in RULES:
        findings = rejections if rule.level == "reject" else warnings
        findings.extend(rule.check(draft, rule.code))
    return rejections, warnings


def describe_code(code: str) -> str:
    """Give the sentence that says what a code means."""
    return SENTENCES[code]


def find_empty_prompt(draft: Draft, code: str) -> Findings:
    if not draft.prompt:
        yield Finding(code, "prompt", "no messages")
    elif draft.prompt[-1]["role"] == "user" and _is_blank(draft.prompt[-1]):
        yield Finding(code, "prompt", f"found {ascii(draft.prompt[-1]['content'])[:80]}")


def find_empty_chosen(draft: Draft, code: str) -> Findings:
    yield from _find_empty_answer(draft.chosen, "chosen", code)


def find_empty_rejected(draft: Draft, code: str) -> Findings:
    yield from _find_empty_answer(draft.rejected, "rejected", code)


def find_late_system(draft: Draft, code: str) -> Findings:
    for path, message in draft.located_messages:
        if message["role"] == "system" and path != "prompt.0":
            yield Finding(code, path, "a system message after the start")


def find_repeated_role(draft: Draft, code: str) -> Findings:
    """Two users or two assistants in a row; several tool results in a row are fine."""
    for side in ("chosen", "rejected"):
        located = [(p, m) for p, m in draft.located_messages if p.startswith(("prompt", side))]
        for (_, before), (path, message) in pairwise(located):
            if before["role"] == message["role"] in ("user", "assistant"):
                yield Finding(code, path, f"{message['role']} after {before['role']}")


def find_unanswerable_prompt(draft: Draft, code: str) -> Findings:
    if draft.prompt and draft.prompt[-1]["role"] not in ("user", "tool"):
        yield Finding(code, f"prompt.{len(draft.prompt) - 1}.role", draft.prompt[-1]["role"])


def find_wrong_first_role(draft: Draft, code: str) -> Findings:
    for side, messages in _sides(draft):
        if messages and messages[0]["role"] != "assistant":
            yield Finding(code, f"{side}.0.role", messages[0]["role"])


def find_wrong_last_role(draft: Draft, code: str) -> Findings:
    for side, messages in _sides(draft):
        if messages and messages[-1]["role"] != "assistant":
            yield Finding(code, f"{side}.{len(messages) - 1}.role", messages[-1]["role"])


def find_equal_answers(draft: Draft, code: str) -> Findings:
    if draft.chosen and _normalised(draft.chosen) == _normalised(draft.rejected):
        yield Finding(code, "rejected", ascii(draft.rejected[-1]["content"])[:200])


def find_long_message(draft: Draft, code: str) -> Findings:
    for path, text in draft.located_texts:
        if len(text) > MAX_MESSAGE_CHARS:
            yield Finding(code, path, f"{len(text):,} characters, at most {MAX_MESSAGE_CHARS:,}")


def find_nul(draft: Draft, code: str) -> Findings:
    for path, text in draft.located_texts:
        if "\0" in text:
            yield Finding(code, path, f"NUL at {text.index(chr(0))}")


def find_tie(draft: Draft, code: str) -> Findings:
    if draft.margin == 0:
        yield Finding(code, "score_chosen", _describe_scores(draft))


def find_contradiction(draft: Draft, code: str) -> Findings:
    if draft.margin is not None and draft.margin < 0:
        yield Finding(code, "score_chosen", _describe_scores(draft))


def find_nonfinite_score(draft: Draft, code: str) -> Findings:
    scores = {
        "score_chosen": draft.score_chosen,
        "score_rejected": draft.score_rejected,
        "margin": draft.margin,
    }
    for field, score in scores.items():
        if score is not None and not math.isfinite(score):
            yield Finding(code, field, str(score))


def find_bad_weight(draft: Draft, code: str) -> Findings:
    if not _FLOAT32_TINY <= draft.weight <= _FLOAT32_MAX:
        yield Finding(code, "weight", str(draft.weight))


def find_bidi_override(draft: Draft, code: str) -> Findings:
    for path, text in draft.located_texts:
        if not text.isascii() and (found := _BIDI_OVERRIDE.search(text)):
            yield Finding(code, path, f"U+{ord(found[0]):04X} at {found.start()}")


def find_replacement_char(draft: Draft, code: str) -> Findings:
    for path, text in draft.located_texts:
        if "\ufffd" in text:
            yield Finding(code, path, f"U+FFFD at {text.index(chr(0xFFFD))}")


RULES = (
    Rule("PROMPT_EMPTY", "reject", "The prompt has no visible text.", find_empty_prompt),
    Rule("CHOSEN_EMPTY", "reject", "The chosen answer has no visible text.", find_empty_chosen),
    Rule("REJECTED_EMPTY", "reject", "The other answer has no visible text.", find_empty_rejected),
    Rule(
        "SYSTEM_NOT_FIRST",
        "reject",
        "A system message stands elsewhere than at the start.",
        find_late_system,
    ),
    Rule(
        "PROMPT_LAST_ROLE",
        "reject",
        "The prompt does not end with a user's message or a tool's result.",
        find_unanswerable_prompt,
    ),
    Rule(
        "COMPLETION_FIRST_ROLE",
        "reject",
        "An answer does not begin with the assistant.",
        find_wrong_first_role,
    ),
    Rule(
        "FINAL_NOT_ASSISTANT",
        "reject",
        "An answer does not end with the assistant.",
        find_wrong_last_role,
    ),
    Rule("ROLE_ORDER", "reject", "A user or assistant speaks twice in a row.", find_repeated_role),
    Rule(
        "CHOSEN_EQ_REJECTED",
        "reject",
        "Both answers are the same, but for outer white space and Unicode composition.",
        find_equal_answers,
    ),
    Rule(
        "FIELD_TOO_LONG",
        "reject",
        "A message has more than a million characters.",
        find_long_message,
    ),
    Rule("CONTROL_CHARS", "reject", "A text contains NUL.", find_nul),
    Rule("SCORE_NONFINITE", "reject", "A score is NaN or infinite.", find_nonfinite_score),
    Rule(
        "SCORE_CONTRADICTS_LABEL",
        "reject",
        "The chosen answer has the lower score.",
        find_contradiction,
    ),
    Rule("TIE", "reject", "Both answers have the same score.", find_tie),
    Rule(
        "WEIGHT_INVALID",
        "reject",
        "The weight is not a number above 0 that a 32-bit float can hold.",
        find_bad_weight,
    ),
    Rule(
        "BIDI_OVERRIDE",
        "warn",
        "A text has characters that turn the direction of writing.",
        find_bidi_override,
    ),
    Rule(
        "REPLACEMENT_CHAR",
        "warn",
        "A text has U+FFFD, which stands for what could not be decoded.",
        find_replacement_char,
    ),
)
"""In the order in which a row's reasons are listed; the first is its code."""

SENTENCES = {
    **{code: described.sentence for code, described in CODES.items()},
    **{rule.code: rule.sentence for rule in RULES},
}


def _find_empty_answer(messages: list[Message], side: str, code: str) -> Findings:
    if not messages:
        yield Finding(code, side, "no messages")
    elif messages[-1]["tool_calls"] is None and _is_blank(messages[-1]):
        yield Finding(code, side, f"found {ascii(messages[-1]['content'])[:80]}")


def _describe_scores(draft: Draft) -> str:
    return f"chosen {draft.score_chosen}, rejected {draft.score_rejected}, margin {draft.margin}"


def _is_blank(message: Message) -> bool:
    return _VISIBLE.search(message["content"] or "") is None


def _sides(draft: Draft) -> tuple[tuple[str, list[Message]], ...]:
    return ("chosen", draft.chosen), ("rejected", draft.rejected)


def _normalised(messages: list[Message]) -> list[Message]:
    return [
        {**message, "content": unicodedata.normalize("NFC", message["content"] or "").strip()}
        for message in messages
    ]
