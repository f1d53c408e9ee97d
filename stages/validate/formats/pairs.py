"""Formats whose rows say which answer was chosen and which was rejected."""

from typing import Any

from stages.validate.findings import Finding, RowFault
from stages.validate.formats.columns import Columns
from stages.validate.formats.conversations import read_transcripts, split_shared_prompt
from stages.validate.formats.format import (
    Format,
    has_messages,
    is_answers,
    is_list_of_answers,
    is_message_or_messages,
    is_messages,
    is_text,
    is_text_or_message,
    is_text_or_messages,
    is_transcript,
    is_two_texts,
)
from stages.validate.formats.pair_drafts import Sides
from stages.validate.messages import Message, new_message


def convert_strings(columns: Columns) -> Sides:
    """Three texts: a user's message, and an assistant's message a side; no character is changed.

    A leading space, which matters if text is continued without a template, is kept.
    """
    return Sides(
        prompt=columns.take_question("prompt"),
        chosen=columns.take_answer("chosen"),
        rejected=columns.take_answer("rejected"),
    )


def convert_messages(columns: Columns) -> Sides:
    """Three message lists: prompt, chosen and rejected answer."""
    return Sides(
        prompt=columns.take_messages("prompt"),
        chosen=columns.take_messages("chosen"),
        rejected=columns.take_messages("rejected"),
    )


def convert_messages_and_texts(columns: Columns) -> Sides:
    """A list of messages as the prompt, and two answers as text."""
    return Sides(
        prompt=columns.take_messages("prompt"),
        chosen=columns.take_answer("chosen"),
        rejected=columns.take_answer("rejected"),
    )


def convert_rejected_list(columns: Columns) -> list[Sides]:
    """One chosen answer and a list of rejected ones, as text or messages; each gives a pair."""
    prompt = columns.take_question_or_messages("prompt")
    chosen = columns.take_answer_or_messages("chosen")
    answers = [
        columns.read_answer(answer, f"rejected.{at}")
        for at, answer in enumerate(columns.take_list("rejected"))
    ]
    # A row without a rejected answer breaks the rule on empty answers.
    return [Sides(prompt=prompt, chosen=chosen, rejected=answer) for answer in answers or [[]]]


def convert_implicit_prompt(columns: Columns) -> Sides:
    """Each side is a whole conversation; the prompt is their common beginning."""
    return split_shared_prompt(
        columns.take_messages("chosen"), columns.take_messages("rejected"), columns.warnings
    )


def convert_transcripts(columns: Columns) -> Sides:
    """HH-RLHF: each side is a conversation as text, its turns marked by Human: and Assistant:."""
    return read_transcripts(
        columns.take_text("chosen"), columns.take_text("rejected"), columns.warnings
    )


def convert_ultrafeedback(columns: Columns) -> Sides:
    """Each side is a whole conversation, and the prompt column repeats its question.

    Also Tulu 3's and OLMo 2's mixes and axolotl's `ultra`. Of several turns, some data sets repeat
    the first question, some the last. If the sides hold only answers, the prompt column is the
    question.
    """
    prompt = columns.take_text("prompt")
    raw_chosen = columns.left.get("chosen")
    sides = convert_implicit_prompt(columns)
    if columns.left.get("messages") == raw_chosen:
        columns.take("messages")  # A copy of the chosen side, for supervised fine-tuning.
    if not sides.prompt:
        question = [new_message("user", prompt)]
        return Sides(prompt=question, chosen=sides.chosen, rejected=sides.rejected)
    questions = [m["content"] or "" for m in sides.prompt if m["role"] == "user"]
    if prompt.strip() not in [text.strip() for text in questions[:1] + questions[-1:]]:
        columns.warnings.append(Finding("PROMPT_FIELD_DISAGREES", "prompt", ascii(prompt)[:200]))
    return sides


def convert_openai(columns: Columns) -> Sides:
    """OpenAI's preference fine-tuning, Together's, Fireworks': messages and tools, two outputs."""
    return _convert_openai(columns, chosen="preferred_output", rejected="non_preferred_output")


def convert_openai_completions(columns: Columns) -> Sides:
    """OpenAI's preference fine-tuning, under older column names."""
    return _convert_openai(
        columns, chosen="preferred_completion", rejected="non_preferred_completion"
    )


def _convert_openai(columns: Columns, *, chosen: str, rejected: str) -> Sides:
    inner = columns.take_object("input")
    sides = Sides(
        prompt=columns.read_messages(inner.pop("messages", None), "input.messages"),
        chosen=columns.take_messages(chosen),
        rejected=columns.take_messages(rejected),
    )
    if inner:
        columns.left["input"] = inner
    return sides


def convert_preferred(columns: Columns) -> Sides:
    """The answers are called preferred and dispreferred; each of the three is text or messages."""
    return Sides(
        prompt=columns.take_question_or_messages("prompt"),
        chosen=columns.take_answer_or_messages("preferred"),
        rejected=columns.take_answer_or_messages("dispreferred"),
    )


def convert_question(columns: Columns) -> Sides:
    """Intel's Orca pairs: a question with an optional system text, and two answers, as text."""
    return Sides(
        prompt=columns.take_question("question"),
        chosen=columns.take_answer("chosen"),
        rejected=columns.take_answer("rejected"),
    )


def convert_stack_exchange(columns: Columns) -> Sides:
    """Pairs of answers from Stack Exchange: response_j is better than response_k."""
    return Sides(
        prompt=columns.take_question("question"),
        chosen=columns.take_answer("response_j"),
        rejected=columns.take_answer("response_k"),
    )


def convert_distilabel(columns: Columns) -> Sides:
    """Argilla's distilabel Orca pairs: the question is `input`, and `status` may mark a tie.

    In rows with the status `swapped`, chosen and rejected have already been exchanged.
    """
    if columns.left.get("status") == "tie":
        raise RowFault("TIE", "status", "tie")
    return Sides(
        prompt=columns.take_question("input"),
        chosen=columns.take_answer("chosen"),
        rejected=columns.take_answer("rejected"),
    )


def convert_argilla(columns: Columns) -> Sides:
    """Argilla's UltraFeedback and mixes, and axolotl's `argilla`: an instruction, two responses."""
    return Sides(
        prompt=columns.take_question("instruction"),
        chosen=columns.take_answer("chosen_response"),
        rejected=columns.take_answer("rejected_response"),
    )


def convert_swift_response(columns: Columns) -> Sides | list[Sides]:
    """ms-swift: a conversation that ends with the chosen answer, and one or more rejected answers.

    A rejected answer is text, a message, or messages; a list of answers gives a pair each.
    """
    messages = take_swift_messages(columns)
    name = "rejected_response"
    value = columns.require(name)
    if not isinstance(value, list) or not value or is_messages(value):
        return _reject_answer(columns, messages, value, name)
    return [
        _reject_answer(columns, messages, answer, f"{name}.{at}") for at, answer in enumerate(value)
    ]


def take_swift_messages(columns: Columns) -> list[Message]:
    """Take ms-swift's `messages`.

    Raises:
        RowFault: `objects` has parts of pictures, whose places in the text stay unfilled.
    """
    objects = columns.left.get("objects")
    if isinstance(objects, dict) and any(objects.values()):
        raise RowFault("UNSUPPORTED_MODALITY", "objects", f"found {ascii(objects)[:80]}")
    return columns.take_messages("messages")


def _reject_answer(columns: Columns, messages: list[Message], value: Any, path: str) -> Sides:
    """Pair the end of a conversation with a rejected answer.

    Text and a single message take the place of the last message. Several messages, such as calls
    and their results, take the place of all that follows the last user's message.
    """
    if value is None:
        raise RowFault("FIELD_NULL", path, "null")
    rejected = columns.read_answer(value, path)
    if rejected and rejected[0]["role"] in ("system", "user"):
        return split_shared_prompt(messages, rejected, columns.warnings)
    start = len(messages) - 1
    if len(rejected) > 1:
        users = [at for at, message in enumerate(messages) if message["role"] == "user"]
        start = users[-1] + 1 if users else 0
    return Sides(prompt=messages[:start], chosen=messages[start:], rejected=rejected)


def convert_swift_messages(columns: Columns) -> Sides:
    """ms-swift: two whole conversations."""
    if columns.left.get("rejected_response"):
        detail = "rejected_messages is given too; only one of them can be the rejected side"
        raise RowFault("SCHEMA_MISMATCH", "rejected_response", detail)
    return split_shared_prompt(
        take_swift_messages(columns),
        columns.take_messages("rejected_messages"),
        columns.warnings,
    )


def convert_alpaca(columns: Columns) -> Sides:
    """LLaMA-Factory's alpaca layout: instruction, optional input, system and history of turns."""
    return Sides(
        prompt=take_alpaca_prompt(columns),
        chosen=columns.take_answer("chosen"),
        rejected=columns.take_answer("rejected"),
    )


def take_alpaca_prompt(columns: Columns) -> list[Message]:
    """Take the prompt of LLaMA-Factory's alpaca layout."""
    instruction = columns.take_text("instruction")
    context = columns.take_optional_text("input")
    question = f"{instruction}\n{context}" if context else instruction
    return [new_message("user", question)]


def convert_two_outputs(columns: Columns) -> Sides:
    """LLaMA-Factory's older alpaca layout: `output` lists the chosen and the rejected answer."""
    outputs = columns.take_list("output")
    if len(outputs) != 2:
        raise RowFault("SCHEMA_MISMATCH", "output", f"two answers wanted, found {len(outputs)}")
    columns.left["chosen"], columns.left["rejected"] = outputs
    return convert_alpaca(columns)


def convert_sharegpt(columns: Columns) -> Sides:
    """LLaMA-Factory's sharegpt layout: turns, then a message or a text a side."""
    return Sides(
        prompt=columns.take_messages("conversations"),
        chosen=columns.take_answer_or_messages("chosen"),
        rejected=columns.take_answer_or_messages("rejected"),
    )


def convert_message_answers(columns: Columns) -> Sides:
    """axolotl's chat_template: messages, then a message or a text a side."""
    return Sides(
        prompt=columns.take_messages("messages"),
        chosen=columns.take_answer_or_messages("chosen"),
        rejected=columns.take_answer_or_messages("rejected"),
    )


def convert_trajectory(columns: Columns) -> Sides:
    """UltraInteract: turns that lead to a step, then a text a side."""
    return Sides(
        prompt=columns.take_messages("trajectory"),
        chosen=columns.take_answer_or_messages("chosen"),
        rejected=columns.take_answer_or_messages("rejected"),
    )


def convert_two_conversations(columns: Columns) -> Sides:
    """LLaMA-Factory v1: two whole conversations of messages in parts, with loss weights."""
    return split_shared_prompt(
        columns.take_messages("chosen_messages"),
        columns.take_messages("rejected_messages"),
        columns.warnings,
    )


FORMATS: tuple[Format, ...] = (
    Format(
        name="prompt_completion_strings",
        columns={"prompt": is_text, "chosen": is_text, "rejected": is_text},
        convert=convert_strings,
    ),
    Format(
        name="messages",
        columns={
            "prompt": is_messages,
            "chosen": is_message_or_messages,
            "rejected": is_message_or_messages,
        },
        convert=convert_messages,
    ),
    Format(
        name="messages_and_texts",
        columns={"prompt": is_messages, "chosen": is_text, "rejected": is_text},
        convert=convert_messages_and_texts,
    ),
    Format(
        name="rejected_list",
        columns={
            "prompt": is_text_or_messages,
            "chosen": is_text_or_message,
            "rejected": is_list_of_answers,
        },
        convert=convert_rejected_list,
    ),
    Format(
        name="implicit_prompt",
        columns={"chosen": is_messages, "rejected": is_messages},
        without=("prompt",),
        convert=convert_implicit_prompt,
    ),
    Format(
        name="hh_transcripts",
        columns={"chosen": is_transcript, "rejected": is_transcript},
        without=("prompt",),
        convert=convert_transcripts,
    ),
    Format(
        name="ultrafeedback_binarized",
        columns={
            "prompt": is_text,
            "chosen": is_message_or_messages,
            "rejected": is_message_or_messages,
        },
        convert=convert_ultrafeedback,
    ),
    Format(
        name="openai_preferences",
        columns={
            "input": has_messages,
            "preferred_output": is_messages,
            "non_preferred_output": is_messages,
        },
        convert=convert_openai,
    ),
    Format(
        name="openai_completions",
        columns={
            "input": has_messages,
            "preferred_completion": is_messages,
            "non_preferred_completion": is_messages,
        },
        convert=convert_openai_completions,
    ),
    Format(
        name="preferred_dispreferred",
        columns={
            "prompt": is_text_or_messages,
            "preferred": is_text_or_messages,
            "dispreferred": is_text_or_messages,
        },
        convert=convert_preferred,
    ),
    Format(
        name="question_system",
        columns={"question": is_text, "chosen": is_text, "rejected": is_text},
        without=("prompt", "instruction", "input"),
        convert=convert_question,
    ),
    Format(
        name="stack_exchange",
        columns={"question": is_text, "response_j": is_text, "response_k": is_text},
        convert=convert_stack_exchange,
    ),
    Format(
        name="distilabel_orca",
        columns={"input": is_text, "chosen": is_text, "rejected": is_text},
        without=("prompt", "question", "instruction"),
        convert=convert_distilabel,
    ),
    Format(
        name="argilla_responses",
        columns={
            "instruction": is_text,
            "chosen_response": is_text,
            "rejected_response": is_text,
        },
        convert=convert_argilla,
    ),
    Format(
        name="swift_response",
        columns={"messages": is_messages, "rejected_response": is_answers},
        without=("chosen", "chosen_response", "rejected_messages"),
        convert=convert_swift_response,
    ),
    Format(
        name="swift_messages",
        columns={"messages": is_messages, "rejected_messages": is_messages},
        without=("chosen", "chosen_messages"),
        convert=convert_swift_messages,
    ),
    Format(
        name="llama_factory_alpaca",
        columns={"instruction": is_text, "chosen": is_text, "rejected": is_text},
        without=("prompt", "question"),
        convert=convert_alpaca,
    ),
    Format(
        name="llama_factory_outputs",
        columns={"instruction": is_text, "output": is_two_texts},
        without=("chosen", "rejected"),
        convert=convert_two_outputs,
    ),
    Format(
        name="llama_factory_sharegpt",
        columns={
            "conversations": is_messages,
            "chosen": is_text_or_message,
            "rejected": is_text_or_message,
        },
        without=("prompt", "question", "instruction", "input"),
        convert=convert_sharegpt,
    ),
    Format(
        name="llama_factory_v1",
        columns={"chosen_messages": is_messages, "rejected_messages": is_messages},
        convert=convert_two_conversations,
    ),
    Format(
        name="axolotl_chat",
        columns={
            "messages": is_messages,
            "chosen": is_text_or_message,
            "rejected": is_text_or_message,
        },
        without=("conversations", "prompt", "question", "instruction", "input"),
        convert=convert_message_answers,
    ),
    Format(
        name="ultra_interact",
        columns={"trajectory": is_messages, "chosen": is_text, "rejected": is_text},
        without=("prompt", "question", "instruction", "input", "messages", "conversations"),
        convert=convert_trajectory,
    ),
)
