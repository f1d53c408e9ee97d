"""How does a raw row become a draft of a pair, and which format is a file in?

A format is one entry of FORMATS: the columns that tell it, and the function that converts a row.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from schemas.errors import ConfigError, DataError
from stages.validate.findings import Finding, RowFault
from stages.validate.messages import Message, new_message, read_message, read_tools

_SCORE_COLUMNS = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_avg_rating", "rejected_avg_rating"),
)
_SOURCE_COLUMNS = ("source", "dataset")
_ID_COLUMNS = ("source_id", "id", "prompt_id", "question_id", "uuid")
_MAIN_SHARE = 0.5
"""The format of a file must fit more than this share of the sampled rows ..."""
_NOISE_SHARE = 0.1
"""... and no other format more than this one."""
_TURN = re.compile(r"\n\n(Human|Assistant):")
_TURN_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A row as a pair, before the rules have looked at it."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    tools: str | None
    score_chosen: float | None
    score_rejected: float | None
    margin: float | None
    weight: float
    source: str | None
    """What the row says; None means that the file's name stands for it."""
    source_id: str | None
    extra: str | None
    warnings: tuple[Finding, ...]


@dataclass(frozen=True, kw_only=True)
class Sides:
    """What a format's conversion gives."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    tools: object = None
    """Tool definitions as the row holds them, where a format has its own place for them."""


class Columns:
    """What is left of a row while it is converted; the rest ends up in `extra`."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        self.left = dict(row)
        self.warnings: list[Finding] = []

    def take(self, name: str) -> Any:
        """Take a column out; absent and null are both None."""
        return self.left.pop(name, None)

    def require(self, name: str) -> Any:
        """Take a column out that must hold something."""
        if name not in self.left:
            raise RowFault("SCHEMA_MISMATCH", name, f"missing; found {', '.join(self.left)[:300]}")
        value = self.take(name)
        if value is None:
            raise RowFault("FIELD_NULL", name, "null")
        return value

    def take_text(self, name: str) -> str:
        value = self.require(name)
        if not isinstance(value, str):
            raise _wrong_kind(name, "text", value)
        return value

    def take_question(self, name: str) -> list[Message]:
        """Take text as a user's message, after the `system` column's if there is one."""
        system = self.take_text("system") if self.left.get("system") is not None else ""
        opening = [new_message("system", system)] if system.strip() else []
        return [*opening, new_message("user", self.take_text(name))]

    def take_answer(self, name: str) -> list[Message]:
        """Take text as an assistant's message."""
        return [new_message("assistant", self.take_text(name))]

    def take_messages(self, name: str) -> list[Message]:
        return self.read_messages(self.require(name), name)

    def read_messages(self, value: object, path: str) -> list[Message]:
        """Read messages wherever they were."""
        if value is None:
            raise RowFault("FIELD_NULL", path, "null")
        if not isinstance(value, list):
            raise _wrong_kind(path, "messages", value)
        return [read_message(m, f"{path}.{at}", self.warnings) for at, m in enumerate(value)]

    def take_number(self, name: str) -> float | None:
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _wrong_kind(name, "a number", value)
        try:
            return float(value)
        except OverflowError:
            return float("inf")

    def take_first_text(self, names: Iterable[str]) -> str | None:
        """Take the first of some columns that holds text or a whole number, as text."""
        for name in names:
            value = self.left.get(name)
            if isinstance(value, str | int) and not isinstance(value, bool) and value != "":
                return str(self.take(name))
        return None


AUTO = "auto"
"""The format's name that asks for recognition."""


def check_format_name(name: str) -> str:
    """Refuse a format that is not known.

    Raises:
        ValueError: naming those that are.
    """
    if name != AUTO and name not in FORMATS:
        raise ValueError(f"no such format; known are {AUTO}, {', '.join(FORMATS)}")
    return name


@dataclass(frozen=True, kw_only=True)
class RowReader:
    """How the rows of one input become pairs."""

    format: str
    """A name of FORMATS."""

    def read(self, row: Mapping[str, Any]) -> list[Draft]:
        """Convert a row into its pairs, at least one.

        Raises:
            RowFault: it cannot become a pair.
        """
        return [convert_row(row, self.format)]


Convert = Callable[[Columns], Sides]


@dataclass(frozen=True, kw_only=True)
class Format:
    """A shape of row that can be recognised and converted."""

    name: str
    columns: Mapping[str, Callable[[object], bool]]
    """The columns that tell it, and what they must hold."""
    without: tuple[str, ...] = ()
    """Columns that another format would have."""
    convert: Convert

    def matches(self, row: Mapping[str, Any]) -> bool:
        """Whether a row has the format's shape."""
        return all(is_kind(row.get(name)) for name, is_kind in self.columns.items()) and all(
            row.get(name) is None for name in self.without
        )


def is_text(value: object) -> bool:
    return isinstance(value, str)


def is_messages(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(m, dict) and "role" in m for m in value)


def is_text_or_messages(value: object) -> bool:
    return is_text(value) or is_messages(value)


def is_transcript(value: object) -> bool:
    return isinstance(value, str) and value.startswith("\n\nHuman:")


def has_messages(value: object) -> bool:
    return isinstance(value, dict) and is_messages(value.get("messages"))


def convert_strings(columns: Columns) -> Sides:
    """Text becomes one user message and one assistant message a side; no character is changed.

    So a leading space, which matters where text is continued without a template, is kept.
    """
    return Sides(
        prompt=columns.take_question("prompt"),
        chosen=columns.take_answer("chosen"),
        rejected=columns.take_answer("rejected"),
    )


def convert_messages(columns: Columns) -> Sides:
    """Prompt and answers are message lists already."""
    return Sides(
        prompt=columns.take_messages("prompt"),
        chosen=columns.take_messages("chosen"),
        rejected=columns.take_messages("rejected"),
    )


def convert_implicit_prompt(columns: Columns) -> Sides:
    """Each side is a whole conversation; the prompt is what they have in common."""
    return split_shared_prompt(
        columns.take_messages("chosen"), columns.take_messages("rejected"), columns.warnings
    )


def convert_transcripts(columns: Columns) -> Sides:
    """Each side is a conversation as text, its turns marked by Human: and Assistant:."""
    chosen, rejected = (
        _parse_transcript(columns.take_text(name), name) for name in ("chosen", "rejected")
    )
    return split_shared_prompt(chosen, rejected, columns.warnings)


def convert_ultrafeedback(columns: Columns) -> Sides:
    """Each side is a whole conversation, and the prompt column repeats its question.

    In conversations of several turns some data sets repeat the first question, some the last. Where
    the sides hold only answers, the prompt column is the question.
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
    """OpenAI's preference fine-tuning: the input's messages and tools, two outputs."""
    inner = columns.require("input")
    if not isinstance(inner, dict):
        raise _wrong_kind("input", "an object", inner)
    inner = dict(inner)
    sides = Sides(
        prompt=columns.read_messages(inner.pop("messages", None), "input.messages"),
        chosen=columns.take_messages("preferred_output"),
        rejected=columns.take_messages("non_preferred_output"),
        tools=inner.pop("tools", None),
    )
    if inner:
        columns.left["input"] = inner
    return sides


def convert_preferred(columns: Columns) -> Sides:
    """The answers are called preferred and dispreferred; each of the three is text or messages."""

    def take(name: str, take_text: Callable[[str], list[Message]]) -> list[Message]:
        is_list = isinstance(columns.left.get(name), list)
        return columns.take_messages(name) if is_list else take_text(name)

    return Sides(
        prompt=take("prompt", columns.take_question),
        chosen=take("preferred", columns.take_answer),
        rejected=take("dispreferred", columns.take_answer),
    )


def convert_question(columns: Columns) -> Sides:
    """A question with an optional system text, and two answers, all as text."""
    return Sides(
        prompt=columns.take_question("question"),
        chosen=columns.take_answer("chosen"),
        rejected=columns.take_answer("rejected"),
    )


FORMATS = {
    format_.name: format_
    for format_ in (
        Format(
            name="prompt_completion_strings",
            columns={"prompt": is_text, "chosen": is_text, "rejected": is_text},
            convert=convert_strings,
        ),
        Format(
            name="messages",
            columns={"prompt": is_messages, "chosen": is_messages, "rejected": is_messages},
            convert=convert_messages,
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
            columns={"prompt": is_text, "chosen": is_messages, "rejected": is_messages},
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
            without=("prompt",),
            convert=convert_question,
        ),
    )
}


def recognise_format(rows: Iterable[Mapping[str, Any]], *, file: str) -> str:
    """Tell the format of a file from a sample of its rows.

    It is the one that fits more than half of them, if no other fits more than a tenth.

    Args:
        rows: those rows of the sample that could be read.
        file: the file's name, for messages.
    Raises:
        DataError: there are no rows.
        ConfigError: no format fits, or several do; the message lists them with their shares.
    """
    num_rows = 0
    fitting: Counter[str] = Counter()
    columns: Counter[str] = Counter()
    for row in rows:
        num_rows += 1
        columns.update(row.keys())
        fitting.update(name for name, format_ in FORMATS.items() if format_.matches(row))
    if num_rows == 0:
        raise DataError(
            f"{file}: none of its first rows is a JSON object. JSONL holds one object a line; "
            "a JSON array becomes JSONL with: jq -c '.[]'"
        )
    candidates = [name for name, count in fitting.items() if count > _NOISE_SHARE * num_rows]
    if len(candidates) == 1 and fitting[candidates[0]] > _MAIN_SHARE * num_rows:
        return candidates[0]
    raise ConfigError(_describe_formats(file, num_rows, fitting, columns))


def convert_row(row: Mapping[str, Any], format_name: str) -> Draft:
    """Convert a row of a file in a known format.

    Raises:
        RowFault: it cannot become a pair.
    """
    format_ = FORMATS[format_name]
    if not format_.matches(row):
        others = [other.name for other in FORMATS.values() if other.matches(row)]
        if others:
            detail = f"the file is {format_name}, but this row looks like {' or '.join(others)}"
            raise RowFault("SCHEMA_MISMATCH", None, detail)
    columns = Columns(row)
    sides = format_.convert(columns)
    tools = sides.tools if sides.tools is not None else columns.take("tools")
    score_chosen, score_rejected, margin = _take_scores(columns)
    weight = columns.take_number("weight")
    return Draft(
        prompt=sides.prompt,
        chosen=sides.chosen,
        rejected=sides.rejected,
        tools=read_tools(tools, "tools"),
        score_chosen=score_chosen,
        score_rejected=score_rejected,
        margin=margin,
        weight=1.0 if weight is None else weight,
        source=columns.take_first_text(_SOURCE_COLUMNS),
        source_id=columns.take_first_text(_ID_COLUMNS),
        extra=_write_extra(columns.left),
        warnings=tuple(columns.warnings),
    )


def split_shared_prompt(
    chosen: list[Message], rejected: list[Message], warnings: list[Finding]
) -> Sides:
    """Split two whole conversations into their common prompt and two answers.

    The prompt is the longest common run of messages after which an assistant speaks on both sides.
    Texts may differ in outer white space; then the chosen side's are used, with a warning.

    Raises:
        RowFault: an answer would hold what a user said: the sides answer different questions.
    """
    if not chosen or not rejected:
        return Sides(prompt=(chosen or rejected)[:-1], chosen=chosen[-1:], rejected=rejected[-1:])
    length = _common_length(chosen, rejected)
    sides = Sides(prompt=chosen[:length], chosen=chosen[length:], rejected=rejected[length:])
    are_answers = chosen[-1]["role"] == "assistant" == rejected[-1]["role"]
    answers = [*sides.chosen, *sides.rejected]
    if are_answers and any(message["role"] in ("user", "system") for message in answers):
        at = next(at for at, (c, r) in enumerate(zip(chosen, rejected, strict=False)) if c != r)
        detail = (
            f"{ascii(chosen[at]['content'])[:150]} against {ascii(rejected[at]['content'])[:150]}"
        )
        raise RowFault("PROMPT_MISMATCH", f"chosen.{at}", detail)
    for at in range(length):
        if chosen[at] != rejected[at]:
            warnings.append(Finding("PROMPT_MISMATCH_WS", f"rejected.{at}.content"))
            break
    return sides


def _common_length(chosen: list[Message], rejected: list[Message]) -> int:
    length, most = 0, min(len(chosen), len(rejected)) - 1
    while length < most and _stripped(chosen[length]) == _stripped(rejected[length]):
        length += 1
    while length > 0 and not chosen[length]["role"] == "assistant" == rejected[length]["role"]:
        length -= 1
    return length


def _stripped(message: Message) -> Message:
    return {**message, "content": (message["content"] or "").strip()}


def _parse_transcript(text: str, path: str) -> list[Message]:
    start, *parts = _TURN.split(text)
    if start.strip() or not parts:
        detail = f"wanted \\n\\nHuman: at the start, found {ascii(text)[:80]}"
        raise RowFault("SCHEMA_MISMATCH", path, detail)
    return [
        new_message(_TURN_ROLES[speaker], said.strip())
        for speaker, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def _take_scores(columns: Columns) -> tuple[float | None, float | None, float | None]:
    """Take the scores of both sides, and their difference or else the row's own margin."""
    for of_chosen, of_rejected in _SCORE_COLUMNS:
        chosen, rejected = columns.take_number(of_chosen), columns.take_number(of_rejected)
        if chosen is not None and rejected is not None:
            return chosen, rejected, chosen - rejected
        if chosen is not None or rejected is not None:
            return chosen, rejected, columns.take_number("margin")
    return None, None, columns.take_number("margin")


def _write_extra(left: Mapping[str, Any]) -> str | None:
    """Write the columns that have no place in a pair as JSON text; nulls say nothing."""
    extra = {name: value for name, value in left.items() if value is not None}
    return msgspec.json.encode(extra, order="deterministic").decode() if extra else None


def _wrong_kind(path: str, wanted: str, found: object) -> RowFault:
    """Tell a row of another format (text for messages, or the reverse) from a value of none."""
    is_other_format = (wanted, type(found)) in {("text", list), ("messages", str)}
    code = "SCHEMA_MISMATCH" if is_other_format else "TYPE_WRONG"
    return RowFault(code, path, f"{wanted} wanted, found {ascii(found)[:80]}")


def _describe_formats(
    file: str, num_rows: int, fitting: Counter[str], columns: Counter[str]
) -> str:
    ranked = fitting.most_common()
    shares = ", ".join(f"{name} {count / num_rows:.0%}" for name, count in ranked) or "none"
    found = ", ".join(ascii(name).strip("'")[:40] for name, _ in columns.most_common(12))
    needs = "\n".join(f"  {name}: {', '.join(known.columns)}" for name, known in FORMATS.items())
    return (
        f"{file}: no single format fits its first {num_rows:,} rows.\n"
        f"Formats that fit some of them: {shares}. Columns found: {found}.\n"
        f"Known formats and the columns that tell them:\n{needs}\n"
        "Name one in the recipe, and rows that don't fit it are rejected:\n"
        f"stages: {{validate: {{format: {ranked[0][0] if ranked else 'NAME'}}}}}"
    )
