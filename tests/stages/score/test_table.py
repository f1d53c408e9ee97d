"""Values imported from a table: what score accepts and what it refuses."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.config import parse_config
from schemas.errors import ConfigError, DataError, StageFailed
from stages.models.resolve import pin_model
from stages.score import run
from stages.score.config import ScoreConfig, ScoreExecution
from stages.score.table import pin_table
from stages.stage import StageResult
from stages.store.filesystems import Folder
from stages.store.shards import StageDir, StageOutput, open_stage_dir
from tests.stages.score.test_reuse import finish, score, spread_rows
from tests.stages.scorers.encoded import Row, random_rows, write_encoded
from tests.stages_running import make_context, read_rows
from tests.tiny_models import make_tiny_model

Rows = list[dict[str, Any]]
VALUES = ("ref_chosen_token_logps", "ref_rejected_token_logps")


def import_scores(
    store: Path,
    encoded: StageOutput,
    model: Path,
    table: Path,
    *,
    dtype: Any = "float32",
    fingerprint: str = "c" * 12,
) -> tuple[StageDir, StageResult]:
    """Run the stage over encoded rows, importing the values of a table."""
    out = open_stage_dir(Folder(str(store)), "score", fingerprint, 1)
    made = make_context(
        out,
        {"encode": encoded},
        pins={"model": pin_model(str(model)), "table": pin_table(str(table))},
        execution=ScoreExecution(max_tokens_per_batch=256),
    )
    config = ScoreConfig(model=str(model), backend="import", table=str(table), dtype=dtype)
    result = run(config, made)
    finish(out, result)
    return out, result


@dataclasses.dataclass(frozen=True)
class Scored:
    """Score pairs, and return them with their values as rows of a table."""

    encoded: StageOutput
    rows: list[Row]
    values: Rows
    folder: Path


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Scored:
    folder = tmp_path_factory.mktemp("scored")
    rows = spread_rows(3, 9)
    rows[0]["chosen_loss_mask"] = [False, *[True] * (rows[0]["num_chosen_tokens"] - 1)]
    encoded = write_encoded(folder, [rows[:4], [], rows[4:]])
    out, _ = score(folder / "store", "a" * 12, encoded, tiny_model)
    return Scored(encoded=encoded, rows=rows, values=read_rows(out), folder=Path(out.folder.path))


def write(path: Path, rows: Rows, *names: str) -> Path:
    """Write rows of a table, with all columns or the named ones."""
    table = pa.Table.from_pylist(rows)
    pq.write_table(table.select(list(names)) if names else table, path, row_group_size=2)
    return path


def test_scores_files_are_a_table_and_give_the_same_rows(
    tmp_path: Path, scored: Scored, tiny_model: Path
) -> None:
    out, result = import_scores(tmp_path, scored.encoded, tiny_model, scored.folder)
    assert read_rows(out) == scored.values
    assert result.summary["num_sequences_imported"] == 18
    assert (result.summary["num_sequences_scored"], result.summary["reused_from"]) == (0, {})
    assert result.summary["recomputed"]["num_sequences"] > 0
    assert result.summary["recomputed"]["token_max"] < 1e-4


SEQUENCES = ("chosen_sequence_id", "rejected_sequence_id")


def in_any_order(path: Path, rows: Rows) -> None:
    write(path, rows[::-1], *SEQUENCES, *VALUES)


def by_pair(path: Path, rows: Rows) -> None:
    write(path, rows[::-1], "pair_id", *VALUES)


def in_doubles(path: Path, rows: Rows) -> None:
    write(path, rows, *SEQUENCES, *VALUES)  # Lists of Python's floats.


def in_large_lists(path: Path, rows: Rows) -> None:
    table = pa.Table.from_pylist(rows).select(["pair_id", *VALUES])
    for name in VALUES:
        place = table.schema.get_field_index(name)
        table = table.set_column(place, name, table[name].cast(pa.large_list(pa.float32())))
    pq.write_table(table, path)


def in_two_files_with_more(path: Path, rows: Rows) -> None:
    path.mkdir()
    (path / "sub").mkdir()
    others = [{**row, "pair_id": "0" * 32, "chosen_sequence_id": "1" * 32} for row in rows[:2]]
    write(path / "one.parquet", [*rows[5:], *others])
    write(path / "sub" / "two.parquet", rows[:6])  # Row 5 twice.


@pytest.mark.parametrize(
    "make", [in_any_order, by_pair, in_doubles, in_large_lists, in_two_files_with_more]
)
def test_any_table_of_the_same_values_gives_the_same_rows(
    tmp_path: Path, scored: Scored, tiny_model: Path, make: Callable[[Path, Rows], None]
) -> None:
    make(tmp_path / "table", scored.values)
    out, _ = import_scores(tmp_path, scored.encoded, tiny_model, tmp_path / "table")
    assert read_rows(out) == scored.values


def test_pairs_without_sound_values_are_rejected_with_a_code(
    tmp_path: Path, scored: Scored, tiny_model: Path
) -> None:
    rows = [dict(row) for row in scored.values]
    rows[1][VALUES[0]] = rows[1][VALUES[0]][1:]
    rows[2][VALUES[1]] = [float("nan"), *rows[2][VALUES[1]][1:]]
    rows[3][VALUES[1]] = [0.5, *rows[3][VALUES[1]][1:]]
    rows[4][VALUES[0]] = None
    table = write(tmp_path / "table.parquet", [*rows[:7], rows[8]])
    out, result = import_scores(tmp_path, scored.encoded, tiny_model, table)
    rejected = {row["pair_id"]: row["code"] for row in read_rows(out, "rejected")}
    codes = ["REF_LENGTH", "REF_NONFINITE", "REF_POSITIVE", "REF_LENGTH", "REF_MISSING"]
    names = [scored.values[place]["pair_id"] for place in (1, 2, 3, 4, 7)]
    assert rejected == dict(zip(names, codes, strict=True))
    assert [row["pair_id"] for row in read_rows(out)] == [
        row["pair_id"] for row in scored.values if row["pair_id"] not in names
    ]
    assert result.summary["num_sequences_imported"] == 18 - 6


def test_a_table_of_other_data_is_refused(tmp_path: Path, scored: Scored, tiny_model: Path) -> None:
    others = write_encoded(tmp_path / "others", [random_rows(8, 3)])
    with pytest.raises(DataError, match=r"none of the 3 pairs \(REF_MISSING 3\)"):
        import_scores(tmp_path, others, tiny_model, scored.folder)


def shift(rows: Rows) -> Rows:
    """The values of an engine that are shifted by one token."""
    return [{**row, **{name: [row[name][-1], *row[name][:-1]] for name in VALUES}} for row in rows]


def nudge(rows: Rows) -> Rows:
    return [{**row, **{name: [x - 0.01 for x in row[name]] for name in VALUES}} for row in rows]


@pytest.mark.parametrize(
    ("change", "dtype", "fits"),
    [
        (shift, "float32", False),
        (shift, "bfloat16", False),
        (nudge, "float32", False),
        (nudge, "bfloat16", True),
    ],
)
def test_values_further_off_than_rounding_are_refused(
    tmp_path: Path, scored: Scored, tiny_model: Path, change: Any, dtype: str, fits: bool
) -> None:
    """A hundredth of a nat is a lot in float32 and little in bfloat16."""
    table = write(tmp_path / "table.parquet", change(scored.values))
    if fits:
        import_scores(tmp_path, scored.encoded, tiny_model, table, dtype=dtype)
        return
    with pytest.raises(StageFailed, match="does not hold this model's log-probabilities"):
        import_scores(tmp_path, scored.encoded, tiny_model, table, dtype=dtype)
    committed = (tmp_path / "score" / ("c" * 12) / "_commits").iterdir()
    assert [path.name for path in committed] == ["part-00001.json"]  # It holds no rows.


def test_every_shard_is_checked(tmp_path: Path, scored: Scored, tiny_model: Path) -> None:
    """Only the last shard is wrong: the first one is committed, and the run fails."""
    table = write(tmp_path / "table.parquet", [*scored.values[:4], *nudge(scored.values[4:])])
    with pytest.raises(StageFailed, match="1 of 3 shards failed"):
        import_scores(tmp_path, scored.encoded, tiny_model, table)


def test_values_of_another_model_are_refused_in_any_dtype(tmp_path: Path, scored: Scored) -> None:
    other = make_tiny_model(tmp_path / "other", seed=1)
    for dtype in ("float32", "bfloat16", "float16"):
        with pytest.raises(StageFailed, match=f"wanted for {dtype}"):
            import_scores(tmp_path / dtype, scored.encoded, other, scored.folder, dtype=dtype)


def test_values_computed_in_bfloat16_are_taken_as_such(
    tmp_path: Path, scored: Scored, tiny_model: Path
) -> None:
    config = ScoreConfig(model=str(tiny_model), backend="transformers", dtype="bfloat16")
    out, _ = score(tmp_path, "b" * 12, scored.encoded, tiny_model, config=config)
    table = Path(out.folder.path)
    found, _ = import_scores(tmp_path, scored.encoded, tiny_model, table, dtype="bfloat16")
    assert read_rows(found) == read_rows(out) != scored.values
    with pytest.raises(StageFailed, match="wanted for float32"):
        import_scores(tmp_path / "2", scored.encoded, tiny_model, table, dtype="float32")


def test_two_values_of_one_sequence_are_refused(
    tmp_path: Path, scored: Scored, tiny_model: Path
) -> None:
    table = write(tmp_path / "table.parquet", [*scored.values, *nudge(scored.values[:1])])
    with pytest.raises(StageFailed, match=r"different values for sequence \w{32}.*Keep one"):
        import_scores(tmp_path, scored.encoded, tiny_model, table)


def test_a_table_changed_after_the_plan_is_refused(
    tmp_path: Path, scored: Scored, tiny_model: Path
) -> None:
    table = write(tmp_path / "table.parquet", scored.values)
    pin = pin_table(str(table))
    write(table, scored.values[:3])
    out = open_stage_dir(Folder(str(tmp_path)), "score", "c" * 12, 1)
    made = make_context(
        out,
        {"encode": scored.encoded},
        pins={"model": pin_model(str(tiny_model)), "table": pin},
        execution=ScoreExecution(),
    )
    config = ScoreConfig(model=str(tiny_model), backend="import", table=str(table), dtype="float32")
    with pytest.raises(StageFailed, match="has changed since the run was planned"):
        run(config, made)


def test_imported_and_computed_values_are_never_joined(
    tmp_path: Path, scored: Scored, tiny_model: Path
) -> None:
    """Neither imported from computed, nor one table from another."""
    half = write(tmp_path / "half.parquet", scored.values[:4])
    _, imported = import_scores(tmp_path, scored.encoded, tiny_model, scored.folder)
    assert not (tmp_path / "reference").exists()
    _, computed = score(tmp_path, "d" * 12, scored.encoded, tiny_model)
    assert computed.summary["num_sequences_reused"] == 0
    _, other = import_scores(tmp_path, scored.encoded, tiny_model, half, fingerprint="e" * 12)
    assert other.summary["num_sequences_imported"] == 8
    references = {result.summary["reference"] for result in (imported, computed, other)}
    assert len(references) == 3


def test_only_row_groups_with_the_shards_prompts_are_read(
    tmp_path: Path, scored: Scored, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine rows in groups of two; the shards hold rows 0 to 3 and 4 to 8. Without prompt_ids each
    shard reads all groups."""
    read: list[int] = []
    real = pq.ParquetFile.read_row_group

    def count(table: pq.ParquetFile, group: int, columns: list[str]) -> pa.Table:
        if "chosen_sequence_id" in columns:
            read.append(group)
        return real(table, group, columns)

    table = write(tmp_path / "table.parquet", scored.values)
    unordered = write(tmp_path / "unordered.parquet", scored.values, *SEQUENCES, *VALUES)
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", count)
    import_scores(tmp_path / "1", scored.encoded, tiny_model, table)
    assert read == [0, 1, 2, 3, 4]
    read.clear()
    import_scores(tmp_path / "2", scored.encoded, tiny_model, unordered)
    assert read == [0, 1, 2, 3, 4] * 2


# --- what is refused before anything runs --------------------------------------------------------


def test_the_digest_follows_content_and_not_names(tmp_path: Path, scored: Scored) -> None:
    one = pin_table(str(write(tmp_path / "one.parquet", scored.values))).identity()
    (tmp_path / "folder").mkdir()
    shutil.copy(tmp_path / "one.parquet", tmp_path / "folder" / "two.parquet")
    assert pin_table(str(tmp_path / "folder")).identity() == one
    write(tmp_path / "one.parquet", scored.values[1:])
    assert pin_table(str(tmp_path / "one.parquet")).identity() != one


def test_sums_alone_are_refused(tmp_path: Path, scored: Scored) -> None:
    """The columns that TRL writes."""
    rows = [
        {"pair_id": row["pair_id"], "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}
        for row in scored.values
    ]
    table = write(tmp_path / "table.parquet", rows)
    with pytest.raises(ConfigError, match=r"only the sums ref_chosen_logps, ref_rejected_logps\."):
        pin_table(str(table))


def test_a_table_without_ids_is_refused(tmp_path: Path, scored: Scored) -> None:
    table = write(tmp_path / "table.parquet", scored.values, *VALUES)
    with pytest.raises(ConfigError, match="has no ids"):
        pin_table(str(table))


def test_files_other_than_parquet_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.parquet").write_text("no")
    for name, message in [
        ("empty", "neither a Parquet file nor a folder"),
        ("absent", "neither a Parquet file nor a folder"),
        ("text.parquet", "is not Parquet"),
    ]:
        with pytest.raises(ConfigError, match=message):
            pin_table(str(tmp_path / name))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "import", "dtype": "float32"}, "go together"),
        ({"table": "t.parquet"}, "go together"),
        ({"backend": "import", "table": "t.parquet"}, "needs the dtype"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    settings: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(ScoreConfig, settings, path="stages.score")


def test_rounding_to_bfloat16_is_within_the_tolerances(scored: Scored) -> None:
    """A control: the values in these tests have the size for which the limits were chosen."""
    values = np.concatenate([row[name] for row in scored.values for name in VALUES])
    assert -12 < values.mean() < -3
