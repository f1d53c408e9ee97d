"""Formats of raw rows: recognise a file's format, convert its rows to drafts of pairs.

A format is one entry of FORMATS: the columns that identify it and the function that converts a row.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from schemas.errors import ConfigError, DataError
from schemas.ids import prompt_id
from stages.validate.findings import RowFault
from stages.validate.formats import labelled, pairs, ranked
from stages.validate.formats.column_map import MAP, ColumnMap, check_columns, convert_mapped
from stages.validate.formats.columns import (
    ID_COLUMNS,
    SOURCE_COLUMNS,
    Columns,
    IsKind,
    has_messages,
    is_list_with,
    is_message,
    is_messages,
    is_text,
    is_text_or_messages,
    is_transcript,
    is_turns,
)
from stages.validate.formats.drafts import Draft, Ranking, Sides
from stages.validate.formats.pair_policy import PairPolicy, choose_pairs, refuse_small_margin
from stages.validate.messages import read_tools

__all__ = [
    "AUTO",
    "FORMATS",
    "MAP",
    "ColumnMap",
    "Draft",
    "PairPolicy",
    "RowReader",
    "check_columns",
    "check_format_name",
    "recognise_format",
]

AUTO = "auto"
"""The format's name that asks for recognition."""
_MAIN_SHARE = 0.5
"""The format of a file must fit more than this share of the sampled rows ..."""
_NOISE_SHARE = 0.1
"""... and no other format more than this one."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """A shape of row that can be recognised and converted."""

    name: str
    columns: Mapping[str, IsKind]
    """The columns that identify it, and the kind of value that each must hold."""
    without: tuple[str, ...] = ()
    """Columns that another format would have."""
    convert: Callable[[Columns], Sides | Ranking]

    def matches(self, row: Mapping[str, Any]) -> bool:
        """Return whether a row has the format's shape."""
        for name, is_kind in self.columns.items():
            if not is_kind(row.get(name)):
                return False
        return not any(row.get(name) is not None for name in self.without)


FORMATS = {
    format_.name: format_
    for format_ in (
        # The row says which answer is chosen.
        Format(
            name="prompt_completion_strings",
            columns={"prompt": is_text, "chosen": is_text, "rejected": is_text},
            convert=pairs.convert_strings,
        ),
        Format(
            name="messages",
            columns={"prompt": is_messages, "chosen": is_messages, "rejected": is_messages},
            convert=pairs.convert_messages,
        ),
        Format(
            name="implicit_prompt",
            columns={"chosen": is_messages, "rejected": is_messages},
            without=("prompt",),
            convert=pairs.convert_implicit_prompt,
        ),
        Format(
            name="hh_transcripts",
            columns={"chosen": is_transcript, "rejected": is_transcript},
            without=("prompt",),
            convert=pairs.convert_transcripts,
        ),
        Format(
            name="ultrafeedback_binarized",
            columns={"prompt": is_text, "chosen": is_messages, "rejected": is_messages},
            convert=pairs.convert_ultrafeedback,
        ),
        Format(
            name="openai_preferences",
            columns={
                "input": has_messages,
                "preferred_output": is_messages,
                "non_preferred_output": is_messages,
            },
            convert=pairs.convert_openai,
        ),
        Format(
            name="openai_completions",
            columns={
                "input": has_messages,
                "preferred_completion": is_messages,
                "non_preferred_completion": is_messages,
            },
            convert=pairs.convert_openai_completions,
        ),
        Format(
            name="preferred_dispreferred",
            columns={
                "prompt": is_text_or_messages,
                "preferred": is_text_or_messages,
                "dispreferred": is_text_or_messages,
            },
            convert=pairs.convert_preferred,
        ),
        Format(
            name="question_system",
            columns={"question": is_text, "chosen": is_text, "rejected": is_text},
            without=("prompt", "instruction", "input"),
            convert=pairs.convert_question,
        ),
        Format(
            name="distilabel_orca",
            columns={"input": is_text, "chosen": is_text, "rejected": is_text},
            without=("prompt", "question", "instruction"),
            convert=pairs.convert_distilabel,
        ),
        Format(
            name="argilla_responses",
            columns={
                "instruction": is_text,
                "chosen_response": is_text,
                "rejected_response": is_text,
            },
            convert=pairs.convert_argilla,
        ),
        Format(
            name="swift_response",
            columns={"messages": is_messages, "rejected_response": is_text},
            without=("chosen", "chosen_response", "rejected_messages"),
            convert=pairs.convert_swift_response,
        ),
        Format(
            name="swift_messages",
            columns={"messages": is_messages, "rejected_messages": is_messages},
            without=("chosen", "chosen_messages"),
            convert=pairs.convert_swift_messages,
        ),
        Format(
            name="llama_factory_alpaca",
            columns={"instruction": is_text, "chosen": is_text, "rejected": is_text},
            without=("prompt", "question"),
            convert=pairs.convert_alpaca,
        ),
        Format(
            name="llama_factory_sharegpt",
            columns={"conversations": is_turns, "chosen": is_message, "rejected": is_message},
            convert=pairs.convert_sharegpt,
        ),
        Format(
            name="llama_factory_v1",
            columns={"chosen_messages": is_messages, "rejected_messages": is_messages},
            convert=pairs.convert_two_conversations,
        ),
        Format(
            name="axolotl_chat",
            columns={"messages": is_messages, "chosen": is_message, "rejected": is_message},
            without=("conversations",),
            convert=pairs.convert_message_answers,
        ),
        # Two answers and a label.
        Format(
            name="shp",
            columns={"history": is_text, "human_ref_A": is_text, "human_ref_B": is_text},
            convert=labelled.convert_shp,
        ),
        Format(
            name="helpsteer2",
            columns={"prompt": is_text, "response_1": is_text, "response_2": is_text},
            convert=labelled.convert_helpsteer2,
        ),
        Format(
            name="helpsteer3",
            columns={"context": is_text_or_messages, "response1": is_text, "response2": is_text},
            convert=labelled.convert_helpsteer3,
        ),
        Format(
            name="arena_battles",
            columns={"conversation_a": is_messages, "conversation_b": is_messages},
            convert=labelled.convert_arena,
        ),
        Format(
            name="arena_kaggle",
            columns={"prompt": is_text, "response_a": is_text, "response_b": is_text},
            convert=labelled.convert_arena_kaggle,
        ),
        # One layout with two labels that often disagree: a recipe must say which one counts.
        Format(
            name="pku_safe_rlhf_helpful",
            columns={"prompt": is_text, "response_0": is_text, "response_1": is_text},
            without=("response_2",),
            convert=labelled.convert_pku_helpful,
        ),
        Format(
            name="pku_safe_rlhf_safe",
            columns={"prompt": is_text, "response_0": is_text, "response_1": is_text},
            without=("response_2",),
            convert=labelled.convert_pku_safe,
        ),
        Format(
            name="alpaca_eval",
            columns={"instruction": is_text, "output_1": is_text, "output_2": is_text},
            convert=labelled.convert_alpaca_eval,
        ),
        Format(
            name="halos_feedback",
            columns={"output_A": is_text_or_messages, "output_B": is_text_or_messages},
            convert=labelled.convert_halos,
        ),
        # A list of answers.
        Format(
            name="ultrafeedback_raw",
            columns={"instruction": is_text, "completions": is_list_with("response")},
            convert=ranked.convert_ultrafeedback_raw,
        ),
        Format(
            name="nectar",
            columns={"prompt": is_transcript, "answers": is_list_with("answer", "rank")},
            convert=ranked.convert_nectar,
        ),
        Format(
            name="nemo_completions",
            columns={
                "context": is_text_or_messages,
                "completions": is_list_with("completion", "rank"),
            },
            convert=ranked.convert_nemo,
        ),
    )
}


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
    """Converts the rows of one input to drafts of pairs."""

    format: str
    """A name of FORMATS, or MAP."""
    column_map: ColumnMap | None = None
    """For MAP."""
    pair_policy: PairPolicy = "best_vs_worst"
    """Pairs made from a ranked list."""
    min_margin: float = 0.0
    """Scores that differ by no more are a tie."""

    def read(self, row: Mapping[str, Any]) -> list[Draft]:
        """Convert a row into its pairs, at least one.

        Raises:
            RowFault: it cannot become a pair.
        """
        columns = Columns(row)
        converted = self._convert(columns, row)
        raw_tools = converted.tools if converted.tools is not None else columns.take("tools")
        tools = read_tools(raw_tools, "tools")
        sides = self._pair_up(converted, tools) if isinstance(converted, Ranking) else [converted]
        of_row = columns.take_scores()
        of_format = (sides[0].score_chosen, sides[0].score_rejected)
        scores = [
            (side.score_chosen, side.score_rejected) if of_format != (None, None) else of_row
            for side in sides
        ]
        margins = _find_margins(columns, sides, scores)
        weight = columns.take_number("weight")
        weight = 1.0 if weight is None else weight
        is_shared = isinstance(converted, Ranking) and self.pair_policy == "all"
        source = columns.take_first_text(SOURCE_COLUMNS)
        source_id = columns.take_first_text(ID_COLUMNS)
        extra = columns.write_extra()
        drafts = []
        for side, (chosen, rejected), margin in zip(sides, scores, margins, strict=True):
            draft = Draft(
                prompt=side.prompt,
                chosen=side.chosen,
                rejected=side.rejected,
                tools=tools,
                score_chosen=chosen,
                score_rejected=rejected,
                margin=margin,
                weight=weight / len(sides) if is_shared else weight,
                source=source,
                source_id=source_id,
                extra=extra,
                warnings=tuple(columns.warnings),
            )
            refuse_small_margin(draft.margin, self.min_margin)
            drafts.append(draft)
        return drafts

    def _convert(self, columns: Columns, row: Mapping[str, Any]) -> Sides | Ranking:
        if self.column_map is not None:
            return convert_mapped(columns, self.column_map)
        format_ = FORMATS[self.format]
        if not format_.matches(row):
            others = [other.name for other in FORMATS.values() if other.matches(row)]
            if others:
                detail = f"the file is {self.format}, but this row looks like {' or '.join(others)}"
                raise RowFault("SCHEMA_MISMATCH", None, detail)
        return format_.convert(columns)

    def _pair_up(self, ranking: Ranking, tools: str | None) -> list[Sides]:
        chosen_pairs = choose_pairs(
            ranking.answers,
            policy=self.pair_policy,
            min_margin=self.min_margin,
            prompt_id=prompt_id(ranking.prompt, tools),
        )
        return [
            Sides(
                prompt=ranking.prompt,
                chosen=better.messages,
                rejected=worse.messages,
                score_chosen=better.score,
                score_rejected=worse.score,
            )
            for better, worse in chosen_pairs
        ]


def _find_margins(
    columns: Columns, sides: Sequence[Sides], scores: Sequence[tuple[float | None, float | None]]
) -> list[float | None]:
    """Return each pair's difference of scores, or the margin that the format or the row states.

    The row's own margin is taken out of its columns, unless it says something else.
    """
    as_read = columns.left.get("margin")
    of_row = columns.take_number("margin")
    margins = [
        chosen - rejected
        if chosen is not None and rejected is not None
        else (of_row if side.margin is None else side.margin)
        for side, (chosen, rejected) in zip(sides, scores, strict=True)
    ]
    if of_row is not None and margins != [of_row] * len(margins):
        columns.left["margin"] = as_read
    return margins


def recognise_format(rows: Iterable[Mapping[str, Any]], *, file: str) -> str:
    """Recognise the format of a file from a sample of its rows.

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
        raise DataError(f"{file}: none of its first rows is a JSON object.")
    candidates = [name for name, count in fitting.items() if count > _NOISE_SHARE * num_rows]
    if len(candidates) == 1 and fitting[candidates[0]] > _MAIN_SHARE * num_rows:
        return candidates[0]
    raise ConfigError(_describe_formats(file, num_rows, fitting, columns))


def _describe_formats(
    file: str, num_rows: int, fitting: Counter[str], columns: Counter[str]
) -> str:
    ranked_formats = fitting.most_common()
    shares = ", ".join(f"{name} {count / num_rows:.0%}" for name, count in ranked_formats)
    found = ", ".join(ascii(name).strip("'")[:40] for name, _ in columns.most_common(12))
    needs = "\n".join(f"  {name}: {', '.join(known.columns)}" for name, known in FORMATS.items())
    name = ranked_formats[0][0] if ranked_formats else "NAME"
    return (
        f"{file}: FORMAT_AMBIGUOUS: no single format fits its first {num_rows:,} rows.\n"
        f"Formats that fit some of them: {shares or 'none'}. Columns found: {found}.\n"
        f"Known formats and the columns that tell them:\n{needs}\n"
        "Name one in the recipe, and rows that don't fit it are rejected:\n"
        f"stages: {{validate: {{inputs: [{{path: {file}, format: {name}}}]}}}}\n"
        "Or say where a table of another shape has what a pair needs:\n"
        f"stages: {{validate: {{inputs: [{{path: {file}, map: {{prompt: COLUMN, chosen: COLUMN, "
        "rejected: COLUMN}}]}}"
    )
