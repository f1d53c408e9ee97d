"""Split two whole conversations into their common prompt and two answers."""

import re

from stages.validate.findings import Finding, RowFault
from stages.validate.formats.pair_drafts import Sides
from stages.validate.messages import Message, are_same_but_content, new_assistant, new_message

_TURN = re.compile(r"\n\n(Human|Assistant):")
_LAST_TURN = "\n\nAssistant:"


def split_shared_prompt(
    chosen: list[Message], rejected: list[Message], warnings: list[Finding]
) -> Sides:
    """Split two whole conversations into their common prompt and two answers.

    The prompt is the longest common beginning after which an assistant speaks on both sides. Texts
    may differ in outer white space, and tool calls in the order of keys; then the chosen side's are
    used, with a warning.

    Raises:
        RowFault: an answer would contain a user's message, because the sides answer different
            questions.
    """
    if not chosen or not rejected:
        return Sides(prompt=(chosen or rejected)[:-1], chosen=chosen[-1:], rejected=rejected[-1:])
    length = _common_length(chosen, rejected)
    sides = Sides(prompt=chosen[:length], chosen=chosen[length:], rejected=rejected[length:])
    are_answers = chosen[-1]["role"] == "assistant" == rejected[-1]["role"]
    answers = [*sides.chosen, *sides.rejected]
    if are_answers and any(message["role"] in ("user", "system") for message in answers):
        differing = (at for at, (c, r) in enumerate(zip(chosen, rejected, strict=False)) if c != r)
        at = next(differing, min(len(chosen), len(rejected)))
        detail = f"{_excerpt(chosen, at)} against {_excerpt(rejected, at)}"
        raise RowFault("PROMPT_MISMATCH", f"chosen.{at}", detail)
    for at in range(length):
        if chosen[at] != rejected[at]:
            warnings.append(Finding("PROMPT_MISMATCH_WS", f"rejected.{at}.content"))
            break
    return sides


def _excerpt(messages: list[Message], at: int) -> str:
    return ascii(messages[at]["content"])[:150] if at < len(messages) else "no message"


def _common_length(chosen: list[Message], rejected: list[Message]) -> int:
    length, most = 0, min(len(chosen), len(rejected)) - 1
    while length < most and _are_alike(chosen[length], rejected[length]):
        length += 1
    while length > 0 and not chosen[length]["role"] == "assistant" == rejected[length]["role"]:
        length -= 1
    return length


def _are_alike(one: Message, other: Message) -> bool:
    if one == other:
        return True
    texts = [(message["content"] or "").strip() for message in (one, other)]
    return texts[0] == texts[1] and are_same_but_content(one, other)


def read_transcripts(chosen: str, rejected: str, warnings: list[Finding]) -> Sides:
    """Split two conversations written as text, with turns marked by Human: and Assistant:.

    If both texts are equal up to their last turn, as most are, that part is read only once; the
    result is the same.
    """
    start = chosen.rfind(_LAST_TURN)
    end = start + len(_LAST_TURN)
    if start > 0 and rejected.startswith(chosen[:end]):
        better, worse = chosen[end:], rejected[end:]
        prompt = read_transcript(chosen[:start], "chosen")
        is_over = _TURN.search(better) is None and _TURN.search(worse) is None
        if is_over and prompt[-1]["role"] == "user":
            return Sides(
                prompt=prompt,
                chosen=[new_assistant(better.strip(), "chosen")],
                rejected=[new_assistant(worse.strip(), "rejected")],
            )
    conversations = read_transcript(chosen, "chosen"), read_transcript(rejected, "rejected")
    return split_shared_prompt(*conversations, warnings)


def read_transcript(text: str, path: str) -> list[Message]:
    """Read a conversation written as text, with turns marked by Human: and Assistant: (HH-RLHF)."""
    start, *parts = _TURN.split(text)
    if start.strip() or not parts:
        detail = f"wanted \\n\\nHuman: at the start, found {ascii(text)[:80]}"
        raise RowFault("SCHEMA_MISMATCH", path, detail)
    return [
        new_message("user", said.strip())
        if speaker == "Human"
        else new_assistant(said.strip(), path)
        for speaker, said in zip(parts[::2], parts[1::2], strict=True)
    ]
