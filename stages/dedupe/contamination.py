"""Contamination: pairs that contain the prompt or answer of a benchmark.

A benchmark is represented by hashes only, so its text need not be copied: for each prompt, the hash
of all its words and the hashes of its 8-grams. A prompt is found where a turn consists of the same
words, or where matching 8-grams cover half of its words; a prompt of fewer than 8 words is found
only in the first way (the rule of Tülu 3, arXiv:2411.15124, appendix on decontamination).
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from schemas.errors import ConfigError, DataError
from schemas.rows import Column, RowSchema
from stages.dedupe.config import BenchmarkConfig
from stages.dedupe.messages import Messages, cut_batches, part_texts
from stages.dedupe.text import I64, U64, Words, find_words, hash_grams, hash_whole
from stages.store.caches import digest_file

HASH_LIST = RowSchema(
    "benchmark-hashes",
    1,
    (
        Column("benchmark", pa.string(), "Its name.", nullable=False),
        Column("is_answer", pa.bool_(), "Whether it is an answer or a prompt.", nullable=False),
        Column("num_words", pa.int32(), "Words of the text.", nullable=False),
        Column("whole", pa.uint64(), "Hash of all its words.", nullable=False),
        Column(
            "grams",
            pa.list_(pa.field("element", pa.uint64(), nullable=False)),
            "Hashes of its 8-grams, in order; empty if it has fewer than 8 words.",
            nullable=False,
        ),
    ),
)
"""The file that `hash-prompts` writes: one row for each prompt or answer."""

_GRAM = 8
_LEAST_COVERAGE = 0.5
_TEXTS_AT_ONCE = 2000
_TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True, kw_only=True)
class BenchmarkFile:
    """A benchmark's file, as it was when the run was planned."""

    config: BenchmarkConfig
    path: str
    """Absolute, because workers run in another directory."""
    sha256: str

    @property
    def name(self) -> str:
        return self.config.name or Path(self.path).stem


@dataclass(frozen=True, kw_only=True)
class BenchmarkFiles:
    """The benchmarks of a recipe, pinned to their content."""

    files: tuple[BenchmarkFile, ...]

    def identity(self) -> list[dict[str, str | None]]:
        """Return names, columns and digests: they determine rejected rows and their details."""
        return [
            {
                "name": file.name,
                "prompt_column": file.config.prompt_column,
                "answer_column": file.config.answer_column,
                "sha256": file.sha256,
            }
            for file in self.files
        ]


def pin_benchmarks(benchmarks: Sequence[BenchmarkConfig]) -> BenchmarkFiles:
    """Pin benchmark files to their content.

    Raises:
        ConfigError: a file does not exist, or its type is not supported.
    """
    files = []
    for config in benchmarks:
        path = os.path.abspath(os.path.expanduser(config.path))
        if not os.path.isfile(path) or not path.endswith(_TEXT_SUFFIXES):
            raise ConfigError(
                f"stages.dedupe.benchmarks: {config.path} is not a file that ends in "
                f"{', '.join(_TEXT_SUFFIXES)}. Relative paths start at {os.getcwd()}."
            )
        files.append(BenchmarkFile(config=config, path=path, sha256=digest_file(path)))
    return BenchmarkFiles(files=tuple(files))


def hash_benchmark(file: BenchmarkFile) -> pa.Table:
    """Return a benchmark as columns of HASH_LIST, from a file of texts or of hashes.

    Raises:
        DataError: the file changed since it was pinned, or a row has no text in its column.
    """
    try:
        found = digest_file(file.path)
    except OSError as error:
        raise DataError(
            f"{file.path} cannot be read ({error.strerror}). "
            "Every worker must reach the benchmarks under the same path."
        ) from error
    if found != file.sha256:
        raise DataError(f"{file.path} has changed since the run was planned. Run again.")
    if file.path.endswith(".parquet"):
        table = pq.read_table(file.path, partitioning=None)
        if (table.schema.metadata or {}).get(b"dpo.schema") == HASH_LIST.label.encode():
            hashed = table.replace_schema_metadata(None).cast(HASH_LIST.arrow)
            if file.config.name is None:
                return hashed
            names = pa.array([file.config.name] * hashed.num_rows, pa.string())
            return hashed.set_column(0, "benchmark", names)
        rows = table.to_pylist()
    else:
        rows = _read_lines(file)
    prompts, answers = _pick_texts(file, rows)
    return pa.concat_tables(
        [
            _hash_texts(prompts, name=file.name, is_answer=False),
            _hash_texts(answers, name=file.name, is_answer=True),
        ]
    )


def write_hash_list(paths: Sequence[str], out: str) -> int:
    """Hash the prompts of some files into one list, and return its number of rows.

    Raises:
        ConfigError: a file is missing, or the list's name does not end in .parquet.
        DataError: a row has no text in its column.
    """
    if not out.endswith(".parquet"):
        raise ConfigError(f"{out}: the list's name must end in .parquet.")
    files = pin_benchmarks([BenchmarkConfig(path=path) for path in paths]).files
    table = pa.concat_tables(
        [HASH_LIST.arrow.empty_table(), *(hash_benchmark(file) for file in files)]
    )
    footer = {"dpo.schema": HASH_LIST.label}
    pq.write_table(table.replace_schema_metadata(footer), out, compression="zstd")
    return table.num_rows


def _read_lines(file: BenchmarkFile) -> list[Any]:
    with open(file.path, "rb") as stream:
        lines = stream.read().split(b"\n")
    try:
        if file.path.endswith(".txt"):
            return [{"prompt": line.decode()} for line in lines if line.strip()]
        return [msgspec.json.decode(line) for line in lines if line.strip()]
    except (UnicodeDecodeError, msgspec.DecodeError) as error:
        raise DataError(f"{file.path} cannot be read: {error}.") from error


def _pick_texts(file: BenchmarkFile, rows: Sequence[Any]) -> tuple[list[str], list[str]]:
    wanted = file.config.prompt_column
    prompts, answers = [], []
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{file.path}: row {number} is not an object.")
        column = wanted or ("prompt" if "prompt" in row else "text")
        if not isinstance(row.get(column), str):
            raise DataError(
                f"{file.path}: row {number} has no text in {column!r}; it has "
                f"{', '.join(map(str, row)) or 'no columns'}. Name one as prompt_column."
            )
        prompts.append(row[column])
        answer = row.get(file.config.answer_column or "answer")
        if isinstance(answer, str):
            answers.append(answer)
        elif file.config.answer_column is not None:
            raise DataError(
                f"{file.path}: row {number} has no text in {file.config.answer_column!r}."
            )
    return prompts, answers


def _hash_texts(texts: Sequence[str], *, name: str, is_answer: bool) -> pa.Table:
    tables = [HASH_LIST.arrow.empty_table()]
    for first in range(0, len(texts), _TEXTS_AT_ONCE):
        words = find_words(texts[first : first + _TEXTS_AT_ONCE])
        num_texts = len(words.bounds) - 1
        grams, of_text, _ = hash_grams(words, _GRAM)
        offsets = np.searchsorted(of_text, np.arange(num_texts + 1)).astype(np.int32)
        columns = [
            pa.array([name] * num_texts, pa.string()),
            pa.array([is_answer] * num_texts, pa.bool_()),
            pa.array(np.diff(words.bounds).astype(np.int32)),
            pa.array(hash_whole(words)),
            pa.ListArray.from_arrays(
                pa.array(offsets), pa.array(grams), type=HASH_LIST.arrow.field("grams").type
            ),
        ]
        tables.append(pa.table(columns, schema=HASH_LIST.arrow))
    return pa.concat_tables(tables)


class BenchmarkIndex:
    """Finds the prompts, or the answers, of benchmarks in texts."""

    def __init__(self, hashed: pa.Table) -> None:
        items = pl.from_arrow(hashed)
        assert isinstance(items, pl.DataFrame)
        self._items = items.with_row_index("item")
        self._grams = (
            self._items.select(
                "item",
                "num_words",
                gram="grams",
                place=pl.int_ranges(0, pl.col("grams").list.len()),
            )
            .explode("gram", "place")
            .drop_nulls("gram")
        )
        self._known = _KnownHashes(self._grams["gram"].to_numpy())

    @classmethod
    def prompts_of(cls, hashed: pa.Table) -> "BenchmarkIndex":
        return cls(hashed.filter(pc.invert(hashed["is_answer"])))

    @classmethod
    def answers_of(cls, hashed: pa.Table) -> "BenchmarkIndex":
        """Index answers of 8 words or more; short ones, such as "yes", occur everywhere."""
        is_long = pc.greater_equal(hashed["num_words"], _GRAM)
        return cls(hashed.filter(pc.and_(hashed["is_answer"], is_long)))

    def find(self, texts: Sequence[str], groups: I64) -> dict[int, str]:
        """Find benchmark texts in some texts.

        Args:
            texts: turns or answers.
            groups: the row that each text belongs to, ascending.
        Returns:
            For each row that contains a benchmark's text, which benchmark and where, without text.
        """
        if not texts or not self._items.height:
            return {}
        found: dict[int, str] = {}
        words = find_words(texts)
        for row in [*self._find_covered(words, groups), *self._find_whole(words, groups)]:
            found[row["group"]] = row["detail"]
        return found

    def _find_whole(self, words: Words, groups: I64) -> list[dict[str, Any]]:
        turns = pl.DataFrame({"group": groups, "whole": hash_whole(words)})
        hits = (
            turns.join(self._items, on="whole")
            .group_by("group")
            .agg(pl.all().sort_by("item").first())
        )
        hits = hits.with_columns(
            detail=pl.format(
                "{}: all {} words (hash {})", "benchmark", "num_words", _hex(pl.col("whole"))
            )
        )
        return hits.select("group", "detail").to_dicts()

    def _find_covered(self, words: Words, groups: I64) -> list[dict[str, Any]]:
        grams, of_text, _ = hash_grams(words, _GRAM)
        is_known = self._known.contain(grams)
        seen = pl.DataFrame({"group": groups[of_text[is_known]], "gram": grams[is_known]}).unique()
        covered = (
            seen.join(self._grams, on="gram")
            .sort("group", "item", "place")
            .group_by("group", "item", maintain_order=True)
            .agg(
                pl.first("num_words", "gram"),
                num_covered=_GRAM
                + pl.col("place").diff().fill_null(0).clip(upper_bound=_GRAM).sum(),
            )
            .with_columns(coverage=pl.col("num_covered") / pl.col("num_words"))
            .filter(pl.col("coverage") >= _LEAST_COVERAGE)
            .sort("group", pl.col("coverage"), "item", descending=[False, True, False])
            .group_by("group", maintain_order=True)
            .first()
            .join(self._items.select("item", "benchmark"), on="item")
        )
        details = covered.with_columns(
            detail=pl.format(
                "{}: 8-grams that cover {} of {} words (the first has hash {})",
                "benchmark",
                "num_covered",
                "num_words",
                _hex(pl.col("gram")),
            )
        )
        return details.select("group", "detail").to_dicts()


def find_contaminated(
    rows: pa.Table, nodes: pa.Table, *, prompts: BenchmarkIndex, answers: BenchmarkIndex
) -> dict[int, str]:
    """Find rows whose user turns or chosen answer contain a benchmark's, by position.

    Args:
        rows: columns prompt, chosen and rejected.
        nodes: columns of NODES for the same rows; each prompt is searched once.
        prompts: the benchmarks' prompts.
        answers: the benchmarks' answers.
    """
    first = nodes["first"].to_numpy().astype(np.int64)
    of_prompts: dict[int, str] = {}
    found: dict[int, str] = {}
    start = 0
    for batch in cut_batches(rows):
        positions = np.arange(start, start + batch.num_rows)
        is_first = first[positions] == positions
        turns, of_row = _user_turns(batch["prompt"], is_first)
        of_prompts |= prompts.find(turns, positions[of_row])
        chosen = list(part_texts(batch))[1::3]
        found |= answers.find(chosen, positions)
        start += batch.num_rows
    found |= {row: of_prompts[k] for row, k in enumerate(first.tolist()) if k in of_prompts}
    return found


def _user_turns(column: pa.ChunkedArray, wanted: npt.NDArray[np.bool_]) -> tuple[list[str], I64]:
    """Return the user messages of the wanted rows, and the row of each."""
    messages = Messages.of(column)
    texts, roles = messages.texts(), messages.fields["role"]
    turns, of_row = [], []
    for row in np.flatnonzero(wanted).tolist():
        for k in range(messages.bounds[row], messages.bounds[row + 1]):
            if roles[k] == "user":
                turns.append(texts[k])
                of_row.append(row)
    return turns, np.array(of_row, np.int64)


class _KnownHashes:
    """A set of hashes, behind a small table that rules out nearly all others in one look-up."""

    def __init__(self, hashes: U64) -> None:
        self._hashes = np.unique(hashes)
        bits = min(max(len(hashes).bit_length() + 4, 12), 26)
        self._mask = np.uint64((1 << bits) - 1)
        self._may_be = np.zeros(1 << bits, np.bool_)
        self._may_be[self._hashes & self._mask] = True

    def contain(self, hashes: U64) -> I64:
        """Return the indices of the hashes that are in the set."""
        places = np.flatnonzero(self._may_be[hashes & self._mask])
        return places[np.isin(hashes[places], self._hashes)]


def _hex(number: pl.Expr) -> pl.Expr:
    return number.map_elements(lambda value: f"{value:016x}", return_dtype=pl.String)
