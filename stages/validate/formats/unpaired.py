"""Formats whose rows hold one answer and a label that says whether it is good (KTO's data)."""

from stages.validate.findings import Finding
from stages.validate.formats.columns import Columns, read_flag
from stages.validate.formats.format import (
    Format,
    is_cell,
    is_messages,
    is_text,
    is_text_or_message,
    is_text_or_messages,
)
from stages.validate.formats.pair_drafts import Unpaired
from stages.validate.formats.pairs import take_alpaca_prompt, take_swift_messages
from stages.validate.messages import Message


def convert_completion(columns: Columns) -> Unpaired:
    """TRL's unpaired rows: a prompt, a completion, and a label; each is text or messages."""
    return _convert_answer(columns, answer="completion")


def convert_output(columns: Columns) -> Unpaired:
    """HALOs' binary feedback: a prompt, an output, and a label; each is text or messages."""
    return _convert_answer(columns, answer="output")


def _convert_answer(columns: Columns, *, answer: str) -> Unpaired:
    """Convert a prompt and an answer, which may be a whole conversation that repeats the prompt."""
    is_good = _take_flag(columns, "label")
    messages = columns.take_answer_or_messages(answer)
    prompt = columns.take_question_or_messages("prompt")
    if any(message["role"] == "user" for message in messages):
        conversation, messages = _split_answer(messages)
        if _said_last(prompt) not in [_said_last(conversation), _said_last(conversation[:1])]:
            detail = ascii(_said_last(prompt))[:200]
            columns.warnings.append(Finding("PROMPT_FIELD_DISAGREES", "prompt", detail))
        prompt = conversation
    return Unpaired(prompt=prompt, answer=messages, is_good=is_good)


def convert_labelled_messages(columns: Columns) -> Unpaired:
    """ms-swift's KTO rows: a conversation that ends with the answer, and a label."""
    return _convert_conversation(take_swift_messages(columns), _take_flag(columns, "label"))


def convert_tagged_messages(columns: Columns) -> Unpaired:
    """LLaMA-Factory's KTO rows: messages that end with the answer, and `kto_tag`."""
    return _convert_conversation(columns.take_messages("messages"), _take_flag(columns, "kto_tag"))


def convert_tagged_turns(columns: Columns) -> Unpaired:
    """LLaMA-Factory's KTO rows with ShareGPT's names."""
    turns = columns.take_messages("conversations")
    return _convert_conversation(turns, _take_flag(columns, "kto_tag"))


def _convert_conversation(messages: list[Message], is_good: bool) -> Unpaired:
    prompt, answer = _split_answer(messages)
    return Unpaired(prompt=prompt, answer=answer, is_good=is_good)


def convert_tagged_alpaca(columns: Columns) -> Unpaired:
    """LLaMA-Factory's KTO rows in the alpaca layout: the answer is `output`, and `kto_tag`."""
    is_good = _take_flag(columns, "kto_tag")
    return Unpaired(
        prompt=take_alpaca_prompt(columns), answer=columns.take_answer("output"), is_good=is_good
    )


def _take_flag(columns: Columns, name: str) -> bool:
    return read_flag(columns.take_label(name), name)


def _split_answer(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    """Split a conversation after its last user's message."""
    start = len(messages)
    while start > 0 and messages[start - 1]["role"] != "user":
        start -= 1
    return messages[:start], messages[start:]


def _said_last(messages: list[Message]) -> str:
    return (messages[-1]["content"] or "").strip() if messages else ""


_PAIRED = ("chosen", "rejected", "rejected_response", "rejected_messages")

FORMATS: tuple[Format, ...] = (
    Format(
        name="unpaired_completions",
        columns={
            "prompt": is_text_or_messages,
            "completion": lambda value: is_text_or_message(value) or is_messages(value),
            "label": is_cell,
        },
        without=_PAIRED,
        convert=convert_completion,
        is_unpaired=True,
    ),
    Format(
        name="unpaired_outputs",
        columns={
            "prompt": is_text_or_messages,
            "output": lambda value: is_text_or_message(value) or is_messages(value),
            "label": is_cell,
        },
        without=(*_PAIRED, "completion"),
        convert=convert_output,
        is_unpaired=True,
    ),
    Format(
        name="unpaired_messages",
        columns={"messages": is_messages, "label": is_cell},
        without=(*_PAIRED, "prompt", "kto_tag"),
        convert=convert_labelled_messages,
        is_unpaired=True,
    ),
    Format(
        name="unpaired_tagged_messages",
        columns={"messages": is_messages, "kto_tag": is_cell},
        without=_PAIRED,
        convert=convert_tagged_messages,
        is_unpaired=True,
    ),
    Format(
        name="unpaired_tagged_turns",
        columns={"conversations": is_messages, "kto_tag": is_cell},
        without=_PAIRED,
        convert=convert_tagged_turns,
        is_unpaired=True,
    ),
    Format(
        name="unpaired_tagged_alpaca",
        columns={"instruction": is_text, "output": is_text, "kto_tag": is_cell},
        without=_PAIRED,
        convert=convert_tagged_alpaca,
        is_unpaired=True,
    ),
)
