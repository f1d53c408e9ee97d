"""Selection of training pairs: SQL expressions over their columns that choose and weight them.

An expression is polars' SQL (https://docs.pola.rs/api/python/stable/reference/sql/), applied to one
row at a time: what is trained on must not depend on where one shard ends and the next begins.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from schemas.errors import DataError
from schemas.rows import ENCODED, PAIR, SCORE, RowSchema

if TYPE_CHECKING:
    # Imported where an expression is given: a training without one needs no polars.
    import polars as pl


class SelectionColumn(NamedTuple):
    """A column that expressions may name, as `pipeline.runs.Run.pairs` has it."""

    stage: str
    """Whose rows have it."""
    stored: str
    """Its name there."""
    minus: str | None = None
    """Another stored column that is subtracted."""

    @property
    def doc(self) -> str:
        """What it means, with its unit."""
        docs = {column.name: column.doc for column in _SCHEMAS[self.stage].columns}
        return f"{self.stored} - {self.minus}, nats." if self.minus else docs[self.stored]


def _columns_of(stage: str, *names: str) -> dict[str, SelectionColumn]:
    return {name: SelectionColumn(stage, name) for name in names}


COLUMNS: Mapping[str, SelectionColumn] = {
    **_columns_of("encode", "pair_id", "prompt_id", "source", "weight"),
    "score_margin": SelectionColumn("encode", "margin"),
    **_columns_of("encode", "num_prompt_tokens", "num_chosen_tokens", "num_rejected_tokens"),
    **_columns_of("encode", "truncated"),
    **_columns_of("score", "ref_chosen_logp", "ref_rejected_logp"),
    "ref_margin": SelectionColumn("score", "ref_chosen_logp", "ref_rejected_logp"),
    **_columns_of("dedupe", "score_chosen", "score_rejected", "source_file", "source_row"),
    **_columns_of("dedupe", "source_id", "warnings", "extra"),
}
_SCHEMAS: Mapping[str, RowSchema] = {"encode": ENCODED, "score": SCORE, "dedupe": PAIR}

_ROW_FUNCTIONS = {
    *("Abs", "Ceil", "Coalesce", "Exp", "Floor", "Log", "MaxHorizontal", "MinHorizontal"),
    *("Pow", "Round", "Sign", "Sql", "StringExpr", "Trigonometry", "Truncate", "Atan2"),
    *("Boolean.IsIn", "Boolean.IsNan", "Boolean.IsNotNull", "Boolean.IsNull", "Boolean.Not"),
    *("Boolean.IsFinite", "Boolean.IsInfinite", "Boolean.IsNotNan"),
    *("ListExpr.Contains", "ListExpr.Get", "ListExpr.Join", "ListExpr.Length"),
}
"""polars' functions, or their families, that compute each row from itself."""


def check_where(text: str) -> str:
    """Return a condition on pairs as it is, if it can be applied.

    Raises:
        ValueError: it cannot.
    """
    kind = _find_kind(text)
    if not kind == _polars().Boolean:
        raise ValueError(f"a condition that is true or false is needed; this is of type {kind}")
    return text


def check_weight(text: str) -> str:
    """Return an expression of the pairs' weights as it is, if it can be applied.

    Raises:
        ValueError: it cannot.
    """
    kind = _find_kind(text)
    if not kind.is_numeric():
        raise ValueError(f"a number is needed; this is of type {kind}")
    return text


def list_stages(*expressions: str | None) -> list[str]:
    """List the stages whose columns the expressions name."""
    names = {name for text in expressions if text for name in _parse(text).meta.root_names()}
    return sorted({COLUMNS[name].stage for name in names})


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What decides which pairs are trained on, and with what weight."""

    where: str | None = None
    weight: str | None = None

    def stored_columns(self, stage: str) -> list[str]:
        """List the columns of a stage that the expressions need, as they are stored."""
        stored: list[str] = []
        for text in filter(None, (self.where, self.weight)):
            for name in _parse(text).meta.root_names():
                column = COLUMNS[name]
                if column.stage == stage:
                    stored += filter(None, (column.stored, column.minus))
        return sorted(set(stored))

    def choose(self, rows: pa.Table) -> NDArray[np.bool_]:
        """Find the rows where the condition is true; null counts as false.

        Args:
            rows: with `pair_id` and all stored columns that the condition needs.
        Raises:
            DataError: the condition cannot be computed.
        """
        if self.where is None:
            return np.ones(rows.num_rows, np.bool_)
        chosen: NDArray[np.bool_] = (
            self._compute("where", self.where, rows).fill_null(False).to_numpy()
        )
        return chosen

    def weigh(self, rows: pa.Table) -> NDArray[np.float32] | None:
        """Compute the factors of the rows' weights; None without an expression.

        Raises:
            DataError: a factor is null, negative, infinite or not a number.
        """
        if self.weight is None:
            return None
        values = self._compute("weight", self.weight, rows).cast(_polars().Float64)
        factors: NDArray[np.float64] = values.fill_null(np.nan).to_numpy()
        bad = np.flatnonzero(~(np.isfinite(factors) & (factors >= 0)))
        if len(bad):
            pair_id, value = rows["pair_id"][int(bad[0])].as_py(), values[int(bad[0])]
            raise DataError(
                f"stages.train.weight: {self.weight!r} is {'null' if value is None else value} for "
                f"pair {pair_id}. A weight is a finite number from 0 on: give rows without a value "
                "one with COALESCE(…, 1), or leave them out with stages.train.where."
            )
        return factors.astype(np.float32)

    def _compute(self, key: str, text: str, rows: pa.Table) -> "pl.Series":
        pl = _polars()
        try:
            return _compute(text, pl.DataFrame(_name_columns(rows)))
        except pl.exceptions.PolarsError as error:
            raise DataError(f"stages.train.{key}: {text!r} fails: {_first_line(error)}") from error


@functools.cache
def _parse(text: str) -> "pl.Expr":
    """Parse an expression over the columns of single rows.

    Raises:
        ValueError: it is no such expression.
    """
    pl = _polars()
    try:
        parsed = pl.sql_expr(text)
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"not an SQL expression: {_first_line(error)}") from error
    _require_rows(json.loads(parsed.meta.serialize(format="json")))
    if unknown := [name for name in parsed.meta.root_names() if name not in COLUMNS]:
        raise ValueError(f"no column {unknown[0]!r}; there are {', '.join(COLUMNS)}")
    return parsed


def _require_rows(node: Any) -> None:
    """Refuse an expression that looks across rows, or at the clock.

    Raises:
        ValueError: it does.
    """
    kind, content = next(iter(node.items())) if isinstance(node, dict) else (node, {})
    if kind == "Column":
        return
    if kind == "Literal":
        if set(_name_parts(content)) & {"Date", "Datetime", "Time", "Duration"}:
            raise ValueError(
                "it has a date or time, but no column does: nothing here depends on one"
            )
        return
    inner: Sequence[Any]
    if kind == "Function":
        _require_row_function(content["function"])
        inner = content["input"]
    elif kind == "BinaryExpr":
        inner = [content["left"], content["right"]]
    elif kind == "Ternary":
        inner = [content[name] for name in ("predicate", "truthy", "falsy")]
    elif kind == "Cast":
        inner = [content["expr"]]
    elif kind == "Alias":
        inner = [content[0]]
    else:
        raise ValueError(
            f"it looks across rows ({kind}), such as an aggregate or a window does, but shards "
            "are read one at a time: compute such a number first, and write it out"
        )
    for each in inner:
        _require_rows(each)


def _require_row_function(function: Any) -> None:
    names = _name_parts(function)
    if not {names[0], ".".join(names[:2])} & _ROW_FUNCTIONS or "ConcatVertical" in names:
        raise ValueError(
            f"it looks across rows, or uses a function that is not known not to ({names[0]})"
        )


def _name_parts(content: Any) -> list[str]:
    """List the names that lead into a nested record, such as Boolean, IsNull."""
    names = []
    while isinstance(content, dict) and content:
        name, content = next(iter(content.items()))
        names.append(name)
    return [*names, content] if isinstance(content, str) else names


def _find_kind(text: str) -> "pl.DataType":
    """Find an expression's type, by computing it over no rows.

    Raises:
        ValueError: it is no expression over the columns, or cannot be computed.
    """
    pl = _polars()
    tables = [
        schema.arrow.empty_table().select(
            sorted({c.stored for c in COLUMNS.values() if c.stage == stage})
        )
        for stage, schema in _SCHEMAS.items()
    ]
    columns = {name: table[name] for table in tables for name in table.column_names}
    try:
        return _compute(text, pl.DataFrame(_name_columns(pa.table(columns)))).dtype
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"it cannot be computed: {_first_line(error)}") from error


def _compute(text: str, frame: "pl.DataFrame") -> "pl.Series":
    return frame.with_columns(_parse(text).alias("computed"))["computed"]


def _name_columns(rows: pa.Table) -> dict[str, Any]:
    """Compute the columns of expressions from the stored ones that are there."""
    pl = _polars()
    columns = {}
    for name, column in COLUMNS.items():
        needed = [stored for stored in (column.stored, column.minus) if stored]
        if all(stored in rows.column_names for stored in needed):
            values = rows[column.stored]
            if column.minus:
                values = pc.subtract(values, rows[column.minus])
            columns[name] = pl.from_arrow(values)
    return columns


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _polars() -> Any:
    import polars as pl

    return pl
