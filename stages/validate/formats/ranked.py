"""Formats whose rows hold a list of answers with scores or ranks."""

from stages.validate.findings import RowFault
from stages.validate.formats.columns import Columns, read_rating, read_text, wrong_kind
from stages.validate.formats.conversations import read_transcript
from stages.validate.formats.format import (
    Format,
    is_list,
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
            for path, completion in columns.take_items("completions")
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
            for path, item in columns.take_items("answers")
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
            for path, item in columns.take_items("completions")
        ],
    )


def convert_distilabel_generations(columns: Columns) -> Ranking:
    """distilabel: an instruction, a list of generations, and their ratings in the same order."""
    return _convert_rated(columns, prompt="instruction", ratings="ratings")


def convert_distilabel_ratings(columns: Columns) -> Ranking:
    """distilabel before 1.0: as above, with the columns `input` and `rating`."""
    return _convert_rated(columns, prompt="input", ratings="rating")


def _convert_rated(columns: Columns, *, prompt: str, ratings: str) -> Ranking:
    answers, scores = columns.take_list("generations"), columns.take_list(ratings)
    if len(answers) != len(scores):
        detail = f"{len(scores)} ratings of {len(answers)} generations"
        raise RowFault("SCHEMA_MISMATCH", ratings, detail)
    for at, answer in enumerate(answers):
        if answer is None:
            raise RowFault("FIELD_NULL", f"generations.{at}", "null")
    return Ranking(
        prompt=columns.take_question(prompt),
        answers=[
            Answer(
                messages=columns.read_answer(answer, f"generations.{at}"),
                score=read_rating(score, f"{ratings}.{at}"),
            )
            for at, (answer, score) in enumerate(zip(answers, scores, strict=True))
        ],
    )


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
    Format(
        name="distilabel_generations",
        columns={"instruction": is_text, "generations": is_list, "ratings": is_list},
        without=("chosen", "rejected"),
        convert=convert_distilabel_generations,
    ),
    Format(
        name="distilabel_ratings",
        columns={"input": is_text, "generations": is_list, "rating": is_list},
        without=("instruction", "chosen", "rejected"),
        convert=convert_distilabel_ratings,
    ),
)
