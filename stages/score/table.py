"""Import log-probabilities from a table computed elsewhere, and check them against the model.

A table is a Parquet file or a folder of them. A row holds a pair, with

- `chosen_sequence_id` and `rejected_sequence_id`, which identify the tokens, or else `pair_id`,
  which identifies the messages;
- `ref_chosen_token_logps` and `ref_rejected_token_logps`: lists of numbers, nats, one a completion
  token.

The output of `export-logps` is such a table, and so are score's own files. Sums alone are refused:
they cannot be checked, and length-normalised, LD-DPO and token-clamped losses need the tokens.

A worker reads one row group at a time. If the table has a column `prompt_id`, row groups without a
prompt of the shard are skipped, so that a table sorted by prompt_id is read once by all workers
together, and any other table once for each shard.
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
from stages.score.rows import find_range, overlap, range_of_group
from stages.scorers.pairs import SIDES, Fault, SequenceLogps, count_tokens, find_fault, list_values
from stages.scorers.protocol import Dtype, FloatArray
from stages.store.caches import digest_file

SEQUENCE_COLUMNS = tuple(f"{side}_sequence_id" for side in SIDES)
VALUE_COLUMNS = tuple(f"ref_{side}_token_logps" for side in SIDES)

MAX_TOKEN_NATS = 1e-3
"""Largest accepted difference of a token where table and model are float32; two correct engines
differ by less than 1e-4."""
MAX_MEDIAN_NATS = 0.05
MAX_MEAN_NATS = 0.02
"""Largest accepted differences of a bfloat16 or float16 table from a float32 computation: the
median over tokens of the absolute difference, and the mean difference. Rounding explains no
more."""
MAX_REPEAT_NATS = {"float32": 1e-3, "bfloat16": 0.5, "float16": 0.5}
"""Largest accepted difference of a token between two rows of a table with the same sequence, as
when it was scored in two batches; the first one is used."""


class TableFile(msgspec.Struct, frozen=True, kw_only=True):
    path: str
    """Absolute path."""
    sha256: str


class TablePin(msgspec.Struct, frozen=True, kw_only=True):
    """A table, pinned to the content of its files."""

    spec: str
    """The path as given in the recipe."""
    files: list[TableFile]

    def identity(self) -> str:
        """Return the digest of the files' contents, independent of their order and names."""
        return digest(sorted(file.sha256 for file in self.files))


def pin_table(spec: str) -> TablePin:
    """Pin a table to the content of its files.

    Raises:
        ConfigError: there is no such table, or columns are missing.
    """
    place = Path(spec).expanduser().absolute()
    paths = sorted(place.rglob("*.parquet")) if place.is_dir() else [place]
    # The directory of a score stage also holds rejected rows, which have no values.
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
            "with its tokens and is not enough for every loss: export the values of the tokens, or "
            "have them computed here (backend: vllm or transformers)."
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
    """dtype in which the values were computed."""

    def find(self, encoded: pa.Table) -> SequenceLogps:
        """Look up the sequences of encoded rows.

        Returns:
            The values of each sequence, or their fault.
        Raises:
            DataError: a file has changed since planning, or holds contradicting values.
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
        """Yield the wanted sequences of a file and their values, in order."""
        prompts = find_range(encoded)
        if not os.path.isfile(file.path) or digest_file(file.path) != file.sha256:
            raise DataError(
                f"{file.path} is gone or has changed since the run was planned. Restore it, or "
                "plan again."
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
                        # Copy: a view would keep the whole row group in memory.
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
    """Read the sequence_ids of a row group by side, or look them up by pair_id."""
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
        differences: table minus float32 computation, nats, one array a sequence, one value a token.
        dtype: dtype in which the table's values were computed.
        table: name of the table, for the error.
    Raises:
        DataError: the differences are larger than rounding to that dtype explains.
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
