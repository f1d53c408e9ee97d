"""Convert the rows of one input to drafts of pairs, by format or by column map."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from schemas.ids import prompt_id
from stages.validate.findings import RowFault
from stages.validate.formats import FORMATS
from stages.validate.formats.column_map import ColumnMap, convert_mapped
from stages.validate.formats.columns import ID_COLUMNS, SOURCE_COLUMNS, Columns
from stages.validate.formats.pair_drafts import (
    Converted,
    PairDraft,
    Ranking,
    Sides,
    Unpaired,
    UnpairedDraft,
)
from stages.validate.formats.pair_policy import PairPolicy, choose_pairs, refuse_small_margin
from stages.validate.formats.prompt_context import PromptContext, take_context


@dataclass(frozen=True, kw_only=True)
class RowReader:
    """Converts the rows of one input to drafts of pairs."""

    format: str
    """A name of FORMATS, or MAP."""
    column_map: ColumnMap | None = None
    """For MAP."""
    pair_policy: PairPolicy = "best_vs_worst"
    """Which pairs a ranked list gives."""
    min_margin: float = 0.0
    """Scores that differ by no more are a tie."""

    @property
    def is_unpaired(self) -> bool:
        """Whether a row holds one answer, so that `read_unpaired` reads it."""
        return self.column_map is None and FORMATS[self.format].is_unpaired

    def read(self, row: Mapping[str, Any]) -> list[PairDraft]:
        """Convert a row into its pairs, at least one.

        Raises:
            RowFault: it cannot become a pair.
        """
        columns = Columns(row)
        converted = self._convert(columns, row)
        assert not isinstance(converted, Unpaired)
        if isinstance(converted, Sides):
            converted = [converted]
        context = take_context(columns)
        if isinstance(converted, Ranking):
            sides = self._pair_up(converted, context)
        else:
            sides = [replace(side, prompt=context.complete(side.prompt)) for side in converted]
        context.find_unread(columns, sides[0].prompt)
        of_row = columns.take_scores()
        of_format = (sides[0].score_chosen, sides[0].score_rejected)
        scores = [
            (side.score_chosen, side.score_rejected) if of_format != (None, None) else of_row
            for side in sides
        ]
        margins = _find_margins(columns, sides, scores)
        weight = _take_weight(columns)
        is_shared = isinstance(converted, Ranking) and self.pair_policy == "all"
        source = columns.take_first_text(SOURCE_COLUMNS)
        source_id = columns.take_first_text(ID_COLUMNS)
        extra = columns.write_extra()
        drafts = []
        for side, (chosen, rejected), margin in zip(sides, scores, margins, strict=True):
            draft = PairDraft(
                prompt=side.prompt,
                chosen=side.chosen,
                rejected=side.rejected,
                tools=context.tools,
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

    def read_unpaired(self, row: Mapping[str, Any]) -> UnpairedDraft:
        """Convert a row of a format that is unpaired.

        Raises:
            RowFault: its answer cannot become part of a pair.
        """
        columns = Columns(row)
        converted = self._convert(columns, row)
        assert isinstance(converted, Unpaired)
        context = take_context(columns)
        prompt = context.complete(converted.prompt)
        context.find_unread(columns, prompt)
        return UnpairedDraft(
            prompt=prompt,
            answer=converted.answer,
            is_good=converted.is_good,
            tools=context.tools,
            weight=_take_weight(columns),
            source=columns.take_first_text(SOURCE_COLUMNS),
            source_id=columns.take_first_text(ID_COLUMNS),
            extra=columns.write_extra(),
            warnings=tuple(columns.warnings),
        )

    def _convert(self, columns: Columns, row: Mapping[str, Any]) -> Converted:
        if self.column_map is not None:
            return convert_mapped(columns, self.column_map)
        format_ = FORMATS[self.format]
        if not format_.matches(row):
            others = [other.name for other in FORMATS.values() if other.matches(row)]
            if others:
                detail = f"the file is {self.format}, but this row looks like {' or '.join(others)}"
                raise RowFault("SCHEMA_MISMATCH", None, detail)
        return format_.convert(columns)

    def _pair_up(self, ranking: Ranking, context: PromptContext) -> list[Sides]:
        prompt = context.complete(ranking.prompt)
        chosen_pairs = choose_pairs(
            ranking.answers,
            policy=self.pair_policy,
            min_margin=self.min_margin,
            prompt_id=prompt_id(prompt, context.tools),
        )
        return [
            Sides(
                prompt=prompt,
                chosen=better.messages,
                rejected=worse.messages,
                score_chosen=better.score,
                score_rejected=worse.score,
            )
            for better, worse in chosen_pairs
        ]


def _take_weight(columns: Columns) -> float:
    weight = columns.take_number("weight")
    return 1.0 if weight is None else weight


def _find_margins(
    columns: Columns, sides: Sequence[Sides], scores: Sequence[tuple[float | None, float | None]]
) -> list[float | None]:
    """Return each pair's difference of scores, or the margin that the format or the row states.

    The row's own margin is taken out of its columns, unless it differs.
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
