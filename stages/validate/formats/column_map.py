"""Column maps: read prompts, answers and labels from a table of any layout."""

import difflib
import math
import string
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

from pydantic import Field, model_validator

from schemas.config import config_class
from schemas.errors import ConfigError
from stages.validate.findings import RowFault, is_missing
from stages.validate.formats.columns import (
    Columns,
    PromptPart,
    as_number,
    read_number,
    read_text,
    wrong_kind,
)
from stages.validate.formats.labelled import order_answers
from stages.validate.formats.nested import holds_messages, open_list
from stages.validate.formats.pair_drafts import Answer, Ranking, Sides
from stages.validate.messages import Message, find_parts, new_assistant, new_message
from stages.validate.part_names import PartKind

MAP = "column map"
"""Format name of a file that is read by a column map."""

Label = str | int | float | bool

_PLACES = ("margin", "weight", "source", "source_id")
_PARTS: tuple[PartKind, ...] = ("system", "history", "tools")


@config_class
class ColumnMap:
    """Places of a pair's parts in a row of any table.

    Every place is the name of a column, or a dotted path into one (`data.answers.0.text`). Texts
    and lists of messages are both read. The answers are named in one of four ways: `chosen` and
    `rejected`; two responses and a label; two responses with scores; a list of responses.
    """

    prompt: str | None = None
    """The prompt: text, or messages."""
    prompt_template: str | None = None
    """Template of a prompt that joins several places, such as "{instruction}\\n\\n{input}"."""
    system: str | None = None
    """A system text or message before the prompt; ignored if it is blank."""
    history: str | None = None
    """Earlier turns: messages, or pairs of a question and its answer."""
    chosen: str | None = None
    """The chosen answer."""
    rejected: str | None = None
    """The rejected answer."""
    separator: str | None = None
    """Separator of prompt and answer, where chosen and rejected are texts that begin with their
    prompt; its last occurrence counts."""
    response_a: str | None = None
    """The first of two answers."""
    response_b: str | None = None
    """The second of two answers."""
    label: str | None = None
    """The label: which of the two answers is preferred."""
    label_a: list[Label] = Field(default_factory=list)
    """Labels that prefer the first answer; a text and a number with the same spelling are equal."""
    label_b: list[Label] = Field(default_factory=list)
    """Labels that prefer the second answer."""
    label_tie: list[Label] = Field(default_factory=list)
    """Labels that prefer neither."""
    responses: str | None = None
    """A list of answers, from which pair_policy makes pairs."""
    response: str | None = None
    """The answer's place in an item of that list; absent = the item itself."""
    score: str | None = None
    """The score's place in an item of that list, or the column that lists all scores."""
    score_a: str | None = None
    """The first answer's score."""
    score_b: str | None = None
    """The second answer's score."""
    score_chosen: str | None = None
    """The chosen answer's score."""
    score_rejected: str | None = None
    """The rejected answer's score."""
    higher_is_better: bool = True
    """Whether the higher score wins; false for ranks and losses. Stored scores are then negated."""
    margin: str | None = None
    """How much better the chosen answer is."""
    weight: str | None = None
    """The pair's weight in the loss."""
    source: str | None = None
    """The name of the data set that the row came from."""
    source_id: str | None = None
    """The row's own id."""
    tools: str | None = None
    """Tool definitions: a list, or one as JSON text."""

    @model_validator(mode="after")
    def _check(self) -> "ColumnMap":
        """Refuse a map that lacks a place, or names one twice."""
        ways = {
            "chosen and rejected": (self.chosen, self.rejected),
            "response_a and response_b": (self.response_a, self.response_b),
            "responses": (self.responses,),
        }
        used = [way for way, places in ways.items() if any(places)]
        if len(used) != 1 or not all(ways[used[0]]):
            raise ValueError(f"name the answers in one way: {', or '.join(ways)}")
        if self.separator is not None:
            if not self.chosen or self.prompt or self.prompt_template or not self.separator:
                raise ValueError("separator goes with chosen and rejected and without prompt")
        elif (self.prompt is None) == (self.prompt_template is None):
            raise ValueError("name the prompt in one way: prompt, or prompt_template")
        if self.prompt_template is not None:
            list_template_places(self.prompt_template)
        self._check_preference()
        return self

    def _check_preference(self) -> None:
        """Refuse labels and scores that are unused with the answers as they are named."""
        labels = ("label", "label_a", "label_b", "label_tie")
        pair, responses = ("score_a", "score_b"), ("score", "response")
        sides = ("score_chosen", "score_rejected")
        if self.chosen:
            useless = (*labels, *pair, *responses, *(sides if self.separator else ()))
        elif self.responses:
            useless = (*labels, *pair, *sides)
        else:
            useless = (*responses, *sides)
        for name in useless:
            if getattr(self, name):
                raise ValueError(f"{name} has no effect with the other keys; leave it out")
        for one, other in (pair, sides):
            if (getattr(self, one) is None) != (getattr(self, other) is None):
                raise ValueError(f"{one} and {other} go together")
        if self.response_a and self.label is None and self.score_a is None:
            raise ValueError("response_a and response_b need a label, or score_a and score_b")
        if self.label is not None and not (self.label_a and self.label_b):
            raise ValueError("label needs label_a and label_b: its values for each answer")
        if self.label is None and (self.label_a or self.label_b or self.label_tie):
            raise ValueError("label_a, label_b and label_tie need a label")
        if self.responses and self.score is None:
            raise ValueError("responses need a score")
        meanings = (self.label_a, self.label_b, self.label_tie)
        for one_list, other_list in combinations(meanings, 2):
            for value in one_list:
                if any(_is_same(value, other) for other in other_list):
                    raise ValueError(f"the label {value!r} has two meanings")

    @property
    def places(self) -> list[str]:
        """Every column or dotted path that a row is expected to have."""
        in_template = list_template_places(self.prompt_template) if self.prompt_template else []
        names = (
            self.prompt,
            self.chosen,
            self.rejected,
            self.response_a,
            self.response_b,
            self.label,
            self.responses,
            self.score_a,
            self.score_b,
            self.score_chosen,
            self.score_rejected,
            *(getattr(self, name) for name in (*_PARTS, *_PLACES)),
        )
        return [*in_template, *(name for name in names if name is not None)]


def list_template_places(template: str) -> list[str]:
    """List the places that a prompt's template names, in order.

    Raises:
        ValueError: a brace is not closed, or holds more than a place.
    """
    places = []
    for _, place, format_spec, conversion in string.Formatter().parse(template):
        if place is None:
            continue
        if not place or format_spec or conversion:
            raise ValueError("prompt_template: braces hold the name of a column and nothing else")
        places.append(place)
    if not places:
        raise ValueError("prompt_template: it contains no {column}")
    return places


def check_columns(column_map: ColumnMap, rows: Sequence[Mapping[str, Any]], *, file: str) -> None:
    """Refuse a map with a place that no row of a sample has.

    Raises:
        ConfigError: COLUMN_MISSING, with the columns that were found.
    """
    missing = [p for p in column_map.places if not any(find(row, p)[0] for row in rows)]
    if not rows or not missing:
        return
    columns = list(dict.fromkeys(name for row in rows for name in row))
    found = ", ".join(ascii(name).strip("'")[:40] for name in columns[:20])
    close = difflib.get_close_matches(missing[0], columns, n=1)
    meant = f" Did you mean {close[0]!r}?" if close else ""
    raise ConfigError(
        f"{file}: COLUMN_MISSING: none of its first {len(rows):,} rows has {missing[0]!r}, which "
        f"the column map names.{meant} Columns found: {found}."
    )


def convert_mapped(columns: Columns, column_map: ColumnMap) -> Sides | Ranking:
    """Convert a row as a column map says.

    Raises:
        RowFault: it does not fit the map.
    """
    row = _MappedRow(columns)
    for name in _PLACES:
        if (place := getattr(column_map, name)) is not None:
            is_number = name in ("margin", "weight")
            columns.left[name] = row.take_number(place) if is_number else row.take(place)
    for kind in _PARTS:
        if (place := getattr(column_map, kind)) is not None:
            columns.stated.append(PromptPart(kind, place, row.take(place)))
    if column_map.separator is not None:
        assert column_map.chosen is not None
        assert column_map.rejected is not None
        return _split_texts(row, column_map, column_map.separator)
    prompt = _take_prompt(row, column_map)
    sign = 1.0 if column_map.higher_is_better else -1.0
    if column_map.responses is not None:
        return Ranking(prompt=prompt, answers=_take_ranking(row, column_map, sign))
    if column_map.chosen is not None:
        assert column_map.rejected is not None
        scores = _take_scores(row, column_map.score_chosen, column_map.score_rejected, sign)
        return Sides(
            prompt=prompt,
            chosen=row.take_answer(column_map.chosen),
            rejected=row.take_answer(column_map.rejected),
            score_chosen=scores[0],
            score_rejected=scores[1],
        )
    assert column_map.response_a is not None
    assert column_map.response_b is not None
    scores = _take_scores(row, column_map.score_a, column_map.score_b, sign)
    return order_answers(
        row.take_answer(column_map.response_a),
        row.take_answer(column_map.response_b),
        prompt=prompt,
        is_first_better=_read_preference(row, column_map, scores),
        scores=scores,
    )


class _MappedRow:
    """A row whose values are taken by place; the remaining values become `extra`."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self._row = dict(columns.left)

    def take(self, place: str) -> Any:
        """Take a value; None if it is null or NaN.

        Raises:
            RowFault: the row has no such place.
        """
        value = self._take(place)
        return None if is_missing(value) else value

    def take_number(self, place: str) -> Any:
        """Take a number, which may be text; NaN stays, because a rule rejects it."""
        return as_number(self._take(place))

    def _take(self, place: str) -> Any:
        is_there, value = find(self._row, place)
        if not is_there:
            found = ", ".join(self._row)[:300]
            raise RowFault("SCHEMA_MISMATCH", place, f"missing; found {found}")
        self._columns.drop(place)
        return value

    def require(self, place: str) -> Any:
        value = self.take(place)
        if value is None:
            raise RowFault("FIELD_NULL", place, "null")
        return value

    def take_text(self, place: str) -> str:
        return read_text(self.require(place), place)

    def take_prompt(self, place: str) -> list[Message]:
        value = self.require(place)
        if isinstance(value, list) or holds_messages(value):
            return self._columns.read_messages(value, place)
        return [new_message("user", read_text(value, place))]

    def take_answer(self, place: str) -> list[Message]:
        return self._columns.read_answer(self.require(place), place)

    def read_answer(self, value: object, path: str) -> list[Message]:
        return self._columns.read_answer(value, path)


def find(row: Mapping[str, Any], place: str) -> tuple[bool, Any]:
    """Look up a column, or a dotted path: names of objects' keys and positions in lists.

    Returns:
        Whether the place exists, and its value.
    """
    if place in row:
        return True, row[place]
    value: Any = row
    for part in place.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return False, None
    return True, value


def _take_prompt(row: _MappedRow, column_map: ColumnMap) -> list[Message]:
    if column_map.prompt is not None:
        return row.take_prompt(column_map.prompt)
    assert column_map.prompt_template is not None
    texts = []
    for literal, place, _, _ in string.Formatter().parse(column_map.prompt_template):
        texts.append(literal)
        if place is not None:
            texts.append(row.take_text(place))
    return [new_message("user", "".join(texts))]


def _split_texts(row: _MappedRow, column_map: ColumnMap, separator: str) -> Sides:
    """Split each side's text at the last separator; the parts before it must be equal."""
    prompts, answers = [], []
    for place in (column_map.chosen, column_map.rejected):
        assert place is not None
        prompt, found, answer = row.take_text(place).rpartition(separator)
        if not found:
            raise RowFault("SCHEMA_MISMATCH", place, f"the separator {separator!a} is not in it")
        prompts.append(prompt)
        answers.append([new_assistant(answer, place)])
    if prompts[0] != prompts[1]:
        detail = f"{prompts[0][-150:]!a} against {prompts[1][-150:]!a}"
        raise RowFault("PROMPT_MISMATCH", column_map.rejected, detail)
    return Sides(
        prompt=[new_message("user", prompts[0])],
        chosen=answers[0],
        rejected=answers[1],
    )


def _take_ranking(row: _MappedRow, column_map: ColumnMap, sign: float) -> list[Answer]:
    assert column_map.responses is not None
    assert column_map.score is not None
    items = open_list(row.require(column_map.responses), column_map.responses)
    if not isinstance(items, list):
        raise wrong_kind(column_map.responses, "a list", items)
    scores = _list_scores(row, items, column_map.responses, column_map.score)
    answers = []
    for at, (item, score) in enumerate(zip(items, scores, strict=True)):
        path = f"{column_map.responses}.{at}"
        if column_map.response is not None:
            if not isinstance(item, Mapping):
                raise wrong_kind(path, "an object", item)
            find_parts(item, path)
            path = f"{path}.{column_map.response}"
            item = find(item, column_map.response)[1]
        if item is None:
            raise RowFault("FIELD_NULL", path, "null")
        answers.append(Answer(messages=row.read_answer(item, path), score=sign * score))
    return answers


def _list_scores(row: _MappedRow, items: list[Any], place: str, score: str) -> Iterable[float]:
    """Read the items' own scores, or else a column that lists them."""
    if all(isinstance(item, Mapping) and find(item, score)[0] for item in items):
        values = [find(item, score)[1] for item in items]
        paths = [f"{place}.{at}.{score}" for at in range(len(items))]
    else:
        listed = open_list(row.require(score), score)
        if not isinstance(listed, list) or len(listed) != len(items):
            detail = f"{len(items)} scores wanted, found {ascii(listed)[:80]}"
            raise RowFault("SCHEMA_MISMATCH", score, detail)
        values = listed
        paths = [f"{score}.{at}" for at in range(len(values))]
    return [_read_score(value, path) for value, path in zip(values, paths, strict=True)]


def _take_scores(
    row: _MappedRow, first: str | None, second: str | None, sign: float
) -> tuple[float | None, float | None]:
    scores = []
    for place in (first, second):
        value = row.take_number(place) if place is not None else None
        scores.append(None if value is None else sign * read_number(value, place or ""))
    return scores[0], scores[1]


def _read_preference(
    row: _MappedRow, column_map: ColumnMap, scores: tuple[float | None, float | None]
) -> bool:
    """Return whether the first of two answers is preferred."""
    if column_map.label is None:
        first, second = scores
        if first is None or second is None:
            raise RowFault("LABEL_MISSING", column_map.score_a, "a score is null")
        if first == second:
            raise RowFault("TIE", column_map.score_a, f"both are {first:g}")
        return first > second
    label = row.take(column_map.label)
    if label is None:
        raise RowFault("LABEL_MISSING", column_map.label, "null")
    meanings = {
        "first": column_map.label_a,
        "second": column_map.label_b,
        "tie": column_map.label_tie,
    }
    for meaning, labels in meanings.items():
        if any(_is_same(label, known) for known in labels):
            if meaning == "tie":
                raise RowFault("TIE", column_map.label, ascii(label)[:80])
            return meaning == "first"
    known = [*column_map.label_a, *column_map.label_b, *column_map.label_tie]
    raise RowFault(
        "LABEL_INVALID", column_map.label, f"found {ascii(label)[:80]}; known are {known}"
    )


def _is_same(one: object, other: object) -> bool:
    """Compare labels: numbers by value, all others as text."""
    are_numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (one, other))
    return one == other if are_numbers else str(one) == str(other)


def _read_score(value: object, path: str) -> float:
    number = as_number(value)
    if number is None:
        raise RowFault("LABEL_MISSING", path, "null")
    score = read_number(number, path)
    if not math.isfinite(score):
        raise RowFault("SCORE_NONFINITE", path, f"{score}")
    return score
