"""Formats whose rows hold a list of answers with scores or ranks."""

from typing import Any

from stages.validate.findings import RowFault
from stages.validate.formats.columns import Columns, read_rating, read_text, wrong_kind
from stages.validate.formats.conversations import read_transcript
from stages.validate.formats.format import (
    Format,
    is_list_with,
    is_text,
    is_text_or_messages,
    is_transcript,
)
from stages.validate.formats.pair_drafts import Answer, Ranking
from stages.validate.messages import new_assistant


def convert_ultrafeedback_raw(columns: Columns) -> Ranking:
    """UltraFeedback as it was collected: completions, each rated in several aspects.

    The score is the mean of the ratings, which are numbers written as text; `overall_score` has
    known errors, such as 10 for 1. Each completion has its own system prompt; these are left out,
    as in the binarised sets, so that the completions answer one prompt.
    """
    prompt = columns.take_question("instruction")
    return Ranking(
        prompt=prompt,
        answers=[
            Answer(
                messages=[
                    new_assistant(
                        read_text(completion.get("response"), f"{path}.response"),
                        f"{path}.response",
                    )
                ],
                score=_mean_rating(completion.get("annotations"), f"{path}.annotations"),
            )
            for path, completion in take_items(columns, "completions")
        ],
    )


def _mean_rating(annotations: object, path: str) -> float:
    if not isinstance(annotations, dict) or not annotations:
        raise RowFault("LABEL_MISSING", path, f"found {ascii(annotations)[:80]}")
    ratings = []
    for aspect, annotation in annotations.items():
        if not isinstance(annotation, dict):
            raise wrong_kind(f"{path}.{aspect}", "an object", annotation)
        ratings.append(read_rating(annotation.get("Rating"), f"{path}.{aspect}.Rating"))
    return sum(ratings) / len(ratings)


def convert_nectar(columns: Columns) -> Ranking:
    """Nectar: a transcript that ends before the assistant's turn; rank 1 is the best."""
    turns = read_transcript(columns.take_text("prompt"), "prompt")
    if turns[-1]["role"] == "assistant" and not turns[-1]["content"]:
        turns.pop()
    return Ranking(
        prompt=turns,
        answers=[
            Answer(
                messages=[
                    new_assistant(read_text(item.get("answer"), f"{path}.answer"), f"{path}.answer")
                ],
                score=0.0 - read_rating(item.get("rank"), f"{path}.rank"),
            )
            for path, item in take_items(columns, "answers")
        ],
    )


def convert_nemo(columns: Columns) -> Ranking:
    """NeMo RL: messages and completions; the lower rank is the better one."""
    prompt = columns.take_question_or_messages("context")
    return Ranking(
        prompt=prompt,
        answers=[
            Answer(
                messages=columns.read_messages(item.get("completion"), f"{path}.completion"),
                score=0.0 - read_rating(item.get("rank"), f"{path}.rank"),
            )
            for path, item in take_items(columns, "completions")
        ],
    )


def take_items(columns: Columns, name: str) -> list[tuple[str, dict[str, Any]]]:
    """Take a list of objects, each with its path."""
    value = columns.require(name)
    if not isinstance(value, list):
        raise wrong_kind(name, "a list", value)
    for at, item in enumerate(value):
        if not isinstance(item, dict):
            raise wrong_kind(f"{name}.{at}", "an object", item)
    return [(f"{name}.{at}", item) for at, item in enumerate(value)]


FORMATS: tuple[Format, ...] = (
    Format(
        name="ultrafeedback_raw",
        columns={"instruction": is_text, "completions": is_list_with("response")},
        convert=convert_ultrafeedback_raw,
    ),
    Format(
        name="nectar",
        columns={"prompt": is_transcript, "answers": is_list_with("answer", "rank")},
        convert=convert_nectar,
    ),
    Format(
        name="nemo_completions",
        columns={
            "context": is_text_or_messages,
            "completions": is_list_with("completion", "rank"),
        },
        convert=convert_nemo,
    ),
)
