"""Formats whose rows hold a list of answers with scores or ranks."""

from collections.abc import Iterator, Mapping
from typing import Any

from stages.validate.findings import RowFault
from stages.validate.formats.columns import Columns, read_rating, read_text, wrong_kind
from stages.validate.formats.conversations import read_transcript
from stages.validate.formats.format import (
    Format,
    is_given,
    is_list,
    is_list_with,
    is_object,
    is_text,
    is_text_or_messages,
    is_transcript,
)
from stages.validate.formats.nested import holds_items, open_list, open_object
from stages.validate.formats.pair_drafts import Answer, Ranking
from stages.validate.messages import new_assistant
from stages.validate.part_names import find_kind


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


def convert_argilla_records(columns: Columns) -> Ranking:
    """Argilla's records: fields, and submitted responses to a question that ranks some of them.

    The prompt is the one field that is not ranked; parts of it that have a known name stand beside
    it. With several annotators, the mean rank counts. Suggestions, and questions of other types,
    are not labels.
    """
    fields = columns.take_object("fields")
    ranks = _mean_ranks(_open_responses(columns.require("responses")), fields)
    answers = [(name, fields.pop(name)) for name in ranks]
    others = [name for name, value in fields.items() if is_given(value)]
    prompts = others if len(others) == 1 else [name for name in others if find_kind(name) is None]
    if len(prompts) != 1:
        detail = f"one prompt wanted beside the ranked {', '.join(ranks)}; found {prompts}"
        raise RowFault("SCHEMA_MISMATCH", "fields", detail)
    prompt = columns.read_question(fields.pop(prompts[0]), f"fields.{prompts[0]}")
    if fields:
        columns.left["fields"] = fields
    return Ranking(
        prompt=prompt,
        answers=[
            Answer(
                messages=columns.read_answer(answer, f"fields.{name}"),
                score=0.0 - ranks[name],
            )
            for name, answer in answers
        ],
    )


def _open_responses(raw: object) -> Iterator[tuple[str, object]]:
    """Yield each submitted value with its question."""
    opened = open_object(raw)
    if isinstance(opened, dict):  # By question, in Argilla 2.
        for question, ones in opened.items():
            for one in _list_objects(ones, f"responses.{question}"):
                if _is_submitted(one):
                    yield question, one.get("value")
        return
    for one in _list_objects(opened, "responses"):  # By annotator, in Argilla 1.
        values = one.get("values")
        if _is_submitted(one) and isinstance(values, dict):
            for question, value in values.items():
                yield question, value.get("value") if isinstance(value, dict) else None


def _list_objects(raw: object, path: str) -> list[dict[str, Any]]:
    items = open_list(raw, path)
    return [item for item in items if isinstance(item, dict)] if isinstance(items, list) else []


def _is_submitted(response: Mapping[str, Any]) -> bool:
    return response.get("status") in (None, "submitted")


def _mean_ranks(
    responses: Iterator[tuple[str, object]], fields: Mapping[str, Any]
) -> dict[str, float]:
    """Return the mean rank of each ranked field."""
    rankings: dict[str, list[dict[str, float]]] = {}
    for question, value in responses:
        items = open_list(value, f"responses.{question}")
        if holds_items(items, ("rank", "value")) and isinstance(items, list) and items:
            ranked = {str(item["value"]): item["rank"] for item in items}
            if ranked.keys() <= fields.keys():
                ratings = {name: read_rating(rank, question) for name, rank in ranked.items()}
                rankings.setdefault(question, []).append(ratings)
    if len(rankings) != 1:
        detail = f"one question that ranks fields wanted, found {', '.join(rankings) or 'none'}"
        raise RowFault("LABEL_MISSING" if not rankings else "LABEL_INVALID", "responses", detail)
    (of_question,) = rankings.values()
    if any(ranking.keys() != of_question[0].keys() for ranking in of_question):
        raise RowFault("LABEL_INVALID", "responses", "the annotators ranked different fields")
    return {
        name: sum(ranking[name] for ranking in of_question) / len(of_question)
        for name in of_question[0]
    }


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
        without=("chosen", "rejected", "chosen_response", "rejected_response"),
        convert=convert_distilabel_generations,
    ),
    Format(
        name="argilla_records",
        columns={"fields": is_object, "responses": is_given},
        convert=convert_argilla_records,
    ),
    Format(
        name="distilabel_ratings",
        columns={"input": is_text, "generations": is_list, "rating": is_list},
        without=("instruction", "chosen", "rejected"),
        convert=convert_distilabel_ratings,
    ),
)
