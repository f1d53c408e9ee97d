"""Which log-probabilities were made elsewhere, and are they those of this model and these tokens?

A table is Parquet: a file, or a folder of files. A row holds a pair, with

- `chosen_sequence_id` and `rejected_sequence_id`, which stand for the tokens, or else `pair_id`,
  which stands for the messages;
- `ref_chosen_token_logps` and `ref_rejected_token_logps`: lists of numbers, nats, one a completion
  token.

So what `export-logps` writes is a table, and so are score's own files. Sums alone are refused:
nothing could be checked in them, and length-normalised, LD-DPO and token-clamped losses need more.

A worker reads row group after row group. Where the table has the column `prompt_id`, it passes over
those that hold none of its shard's prompts; so a table in the order of its prompts is read once by
all workers together, and any other once by each shard.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from schemas.errors import ConfigError, DataError
from schemas.ids import digest
from schemas.rows import TOKEN_LOGPS
from stages.score.ranges import find_range, overlap, range_of_group
from stages.scorers.pairs import SIDES, Fault, SequenceLogps, count_tokens, find_fault, list_values
from stages.scorers.protocol import Dtype, FloatArray
from stages.store.caches import digest_file

SEQUENCE_COLUMNS = tuple(f"{side}_sequence_id" for side in SIDES)
VALUE_COLUMNS = tuple(f"ref_{side}_token_logps" for side in SIDES)

MAX_TOKEN_NATS = 1e-3
"""How far a token may be off where table and model are float32; two correct engines differ by less
than 1e-4."""
MAX_MEDIAN_NATS = 0.05
MAX_MEAN_NATS = 0.02
"""How far a table of bfloat16 or float16 may lie from a float32 computation: the median over tokens
of the absolute differences, and the mean of the differences. Beyond that, it is not rounding."""
MAX_REPEAT_NATS = {"float32": 1e-3, "bfloat16": 0.5, "float16": 0.5}
"""How far a token's values may lie apart where a table holds a sequence twice, as when it was
scored in two batches; the first stands."""


class TableFile(msgspec.Struct, frozen=True, kw_only=True):
    path: str
    """Absolute."""
    sha256: str


class TablePin(msgspec.Struct, frozen=True, kw_only=True):
    """A table, fixed to the content of its files."""

    spec: str
    """As given."""
    files: list[TableFile]

    def identity(self) -> str:
        """Give what is hashed: the contents of the files, in any order and under any names."""
        return digest(sorted(file.sha256 for file in self.files))


def pin_table(spec: str) -> TablePin:
    """Fix a table's name to content.

    Raises:
        ConfigError: there is no such table, or it lacks columns.
    """
    place = Path(spec).expanduser().absolute()
    paths = sorted(place.rglob("*.parquet")) if place.is_dir() else [place]
    # A score stage's directory holds rejected rows as well, which have no values.
    paths = [path for path in paths if path.parent.name != "rejected"]
    if not paths or not all(path.is_file() for path in paths):
        raise ConfigError(
            f"stages.score.table: {spec} is neither a Parquet file nor a folder of them."
        )
    for path in paths:
        _check_columns(path)
    files = [TableFile(path=str(path), sha256=digest_file(path)) for path in paths]
    return TablePin(spec=spec, files=files)


def _check_columns(path: Path) -> None:
    try:
        names = pq.read_schema(path).names
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"stages.score.table: {path} is not Parquet ({error}).") from error
    absent = [name for name in VALUE_COLUMNS if name not in names]
    if absent:
        sums = [
            name for name in names if name.startswith("ref_") and name.endswith(("logp", "logps"))
        ]
        found = f"only the sums {', '.join(sums)}" if sums else f"the columns {', '.join(names)}"
        raise ConfigError(
            f"stages.score.table: {path} has {found}. Wanted: {' and '.join(VALUE_COLUMNS)}, lists "
            "with one log-probability in nats for each completion token. A sum cannot be compared "
            "with its tokens and does not serve every loss: export the tokens' values, or let them "
            "be computed here (backend: vllm or transformers)."
        )
    if "pair_id" not in names and not set(SEQUENCE_COLUMNS) <= set(names):
        raise ConfigError(
            f"stages.score.table: {path} has no ids, only the columns {', '.join(names)}. Wanted: "
            f"{' and '.join(SEQUENCE_COLUMNS)}, or pair_id, as encode's rows have them."
        )


@dataclass(frozen=True, kw_only=True)
class TableReader:
    """Looks up the values of sequences in a table."""

    table: TablePin
    dtype: Dtype
    """That the values were computed in."""

    def find(self, encoded: pa.Table) -> SequenceLogps:
        """Look up the sequences of encoded rows.

        Returns:
            For each of them its values, or what is wrong with them.
        Raises:
            DataError: a file is not the one that was planned with, or holds two values of a token.
        """
        wanted = count_tokens(encoded)
        logps: dict[str, FloatArray | Fault] = {}
        for file in self.table.files:
            for name, values in self._read(file, encoded, wanted):
                if name in logps:
                    self._refuse_other(name, logps[name], values)
                else:
                    logps[name] = find_fault(values, wanted[name]) or values
        missing = Fault(kind="MISSING", detail=f"{self.table.spec} holds no values of it")
        return {name: logps.get(name, missing) for name in wanted}

    def _read(
        self, file: TableFile, encoded: pa.Table, wanted: Mapping[str, int]
    ) -> Iterator[tuple[str, FloatArray]]:
        """Give what a file holds of wanted sequences, in order."""
        prompts = find_range(encoded)
        if not os.path.isfile(file.path) or digest_file(file.path) != file.sha256:
            raise DataError(
                f"{file.path} is gone or has other content than when the run was planned. Restore "
                "it, or plan again."
            )
        value_set = pa.array(wanted, pa.string())
        with pq.ParquetFile(file.path) as table:
            for group in range(table.num_row_groups):
                if prompts is None or not overlap(prompts, range_of_group(table.metadata, group)):
                    continue
                names = _read_names(table, group, encoded)
                for side, column in zip(SIDES, VALUE_COLUMNS, strict=True):
                    is_wanted = pc.is_in(names[side], value_set=value_set)
                    if not pc.any(is_wanted).as_py():
                        continue
                    rows = table.read_row_group(group, [column]).filter(is_wanted)
                    rows = rows.set_column(0, column, rows[column].cast(TOKEN_LOGPS, safe=False))
                    ids = names[side].filter(is_wanted).to_pylist()
                    for name, values in zip(ids, list_values(rows, column), strict=True):
                        # A view would keep the whole row group in memory.
                        yield name, np.array(values, dtype=np.float32)

    def _refuse_other(self, name: str, known: FloatArray | Fault, values: FloatArray) -> None:
        if isinstance(known, Fault):
            return
        limit = MAX_REPEAT_NATS[self.dtype]
        if len(known) != len(values) or not np.abs(known - values).max() <= limit:
            raise DataError(
                f"{self.table.spec} holds different values for sequence {name}: more than "
                f"{limit:g} nats a token apart. Keep one of them."
            )


def _read_names(table: pq.ParquetFile, group: int, encoded: pa.Table) -> dict[str, pa.ChunkedArray]:
    """Give the sequence_ids of a row group by side; of pair_ids those of the encoded rows."""
    if set(SEQUENCE_COLUMNS) <= set(table.schema_arrow.names):
        rows = table.read_row_group(group, list(SEQUENCE_COLUMNS))
        return {
            side: rows[column].cast(pa.string())
            for side, column in zip(SIDES, SEQUENCE_COLUMNS, strict=True)
        }
    pair_ids = table.read_row_group(group, ["pair_id"])["pair_id"].cast(pa.string())
    places = pc.index_in(pair_ids, value_set=encoded["pair_id"].combine_chunks())
    return {
        side: encoded[column].take(places)
        for side, column in zip(SIDES, SEQUENCE_COLUMNS, strict=True)
    }


def check_differences(differences: Sequence[FloatArray], dtype: Dtype, table: str) -> None:
    """Compare values of a table with recomputed ones.

    Args:
        differences: by sequence, table minus float32 computation, nats, one value a token.
        dtype: that the table's values were computed in.
        table: its name.
    Raises:
        DataError: they are further apart than rounding to that dtype explains.
    """
    signed = np.concatenate([np.zeros(0), *differences]).astype(np.float64)
    if not len(signed):
        return
    largest, median, mean = np.abs(signed).max(), np.median(np.abs(signed)), signed.mean()
    if dtype == "float32":
        fits, wanted = largest <= MAX_TOKEN_NATS, f"every token within {MAX_TOKEN_NATS:g}"
    else:
        fits = median <= MAX_MEDIAN_NATS and abs(mean) <= MAX_MEAN_NATS
        wanted = f"a median within {MAX_MEDIAN_NATS:g} and a mean within {MAX_MEAN_NATS:g}"
    if not fits:
        raise DataError(
            f"{table} does not hold this model's log-probabilities: {len(differences)} sequences "
            f"recomputed in float32 differ by a median of {median:.3g}, a mean of {mean:.3g} and "
            f"up to {largest:.3g} nats a token; wanted for {dtype}: {wanted}. Another model, "
            "adapter, tokenizer, template or dtype made them, or they are shifted by a token: "
            "value t is log p(completion token t | all before it). Name the model and dtype that "
            "did."
        )
