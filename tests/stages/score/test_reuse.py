"""Reuse of values from earlier scores: what is taken and what is refused."""

import dataclasses
import json
import logging
import shutil
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import stages.score.worker
from schemas.fingerprint import ReferenceIdentity
from schemas.manifest import Manifest, ShardRecord, encode_record
from stages.models.resolve import pin_model
from stages.score import run
from stages.score.config import ScoreConfig, ScoreExecution
from stages.score.reuse import ScoreEntry, ScoreReader, find_earlier_scores
from stages.scorers.opening import open_scorer
from stages.scorers.pairs import SIDES
from stages.scorers.protocol import Scorer, ScorerSettings
from stages.stage import AlignedShards, MakeWorker, Resources, StageResult
from stages.store.filesystems import Folder
from stages.store.shards import StageDir, StageOutput, open_stage_dir
from tests.stages.scorers.encoded import Row, encoded_row, random_rows, write_encoded
from tests.stages_running import QuietProgress, make_context, open_output, read_rows

TOLERANCE_NATS = 1e-5
"""Largest difference of equal sequences computed in different batches, in float32."""


def score(
    store: Path | str,
    fingerprint: str,
    encoded: StageOutput,
    model: Path,
    *,
    attempt: int = 1,
    finishes: bool = True,
    started_at: str = "2026-01-01T00:00:00+00:00",
    reuse_from: Sequence[Path | str] = (),
    config: ScoreConfig | None = None,
    **context: Any,
) -> tuple[StageDir, StageResult]:
    """Run the stage over encoded rows in the given store and fingerprint, and finish it."""
    out = open_stage_dir(Folder(str(store)), "score", fingerprint, attempt)
    made = make_context(
        out,
        {"encode": encoded},
        pins={"model": pin_model(str(model))},
        execution=ScoreExecution(
            max_tokens_per_batch=256, reuse_from=[str(path) for path in reuse_from]
        ),
    )
    config = config or ScoreConfig(model=str(model), backend="transformers", dtype="float32")
    made = dataclasses.replace(made, attempt=attempt, started_at=started_at, **context)
    result = run(config, made)
    if finishes:
        finish(out, result)
    return out, result


def finish(out: StageDir, result: StageResult) -> None:
    output = open_output(out, "score", result.shards, summary=result.summary)
    out.finish(msgspec.structs.replace(output.manifest, files=list(result.files)))


def encode(folder: Path, name: str, shards: Sequence[Sequence[Row]]) -> StageOutput:
    return write_encoded(folder / "encoded" / name, shards)


def spread_rows(seed: int, num_rows: int) -> list[Row]:
    """Random pairs with distinct prompts, sorted by prompt_id."""
    return [
        {**row, "prompt_id": f"{place:032x}"}
        for place, row in enumerate(random_rows(seed, num_rows))
    ]


def list_hashes(out: StageDir) -> list[str]:
    records = out.committed().values()
    return [
        content_hash(out, record.files[role].name) for record in records for role in record.files
    ]


def content_hash(out: StageDir, name: str) -> str:
    """Hash the rows without the footer, which names the stage's own fingerprint."""
    table = pq.read_table(out.folder.file(name)).replace_schema_metadata(None)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return str(hash(sink.getvalue().to_pybytes()))


def num_sequences(result: StageResult) -> tuple[int, int]:
    """Count the distinct sequences that were scored, and those that were reused."""
    return result.summary["num_sequences_scored"], result.summary["num_sequences_reused"]


class CountedEngines:
    """Opens real scorers and counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_opened = self.num_fetched = 0

        def open_counted(model_path: str, settings: ScorerSettings) -> Scorer:
            self.num_opened += 1
            return open_scorer(model_path, settings)

        def fetch_counted(pin: Any) -> str:
            self.num_fetched += 1
            return str(pin.spec)

        monkeypatch.setattr(stages.score.worker, "open_scorer", open_counted)
        monkeypatch.setattr(stages.score.worker, "fetch_model", fetch_counted)


def test_equal_data_is_not_scored_again_and_gives_the_same_bytes(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every value is known, so no model is fetched and no engine is started."""
    rows = spread_rows(1, 7)
    rows[0]["chosen_loss_mask"] = [False, *[True] * (rows[0]["num_chosen_tokens"] - 1)]
    encoded = encode(tmp_path, "a", [rows[:3], [], rows[3:]])
    first, found = score(tmp_path, "a" * 12, encoded, tiny_model)
    assert num_sequences(found) == (14, 0)
    engines = CountedEngines(monkeypatch)
    progress = QuietProgress()
    second, found = score(tmp_path, "b" * 12, encoded, tiny_model, progress=progress)
    assert num_sequences(found) == (0, 14)
    assert (engines.num_opened, engines.num_fetched) == (0, 0)
    assert list_hashes(second) == list_hashes(first)
    assert found.summary["reused_from"] == {"a" * 12: 14}
    assert found.summary["pairs_per_second"] == 0
    assert found.summary["recomputed"] == {}
    assert [note.partition(" s, ")[2] for note in progress.notes] == [
        "100% reused",
        "100% reused",
        "100% reused",
    ]


def test_an_empty_store_and_a_full_one_give_the_same_files_byte_for_byte(
    tmp_path: Path, tiny_model: Path
) -> None:
    """One fingerprint in two stores; one store has scored the same shards under another name."""
    encoded = encode(tmp_path, "a", [spread_rows(1, 4), spread_rows(2, 3)])
    score(tmp_path / "full", "a" * 12, encoded, tiny_model)
    files = []
    for store in ("empty", "full"):
        out, found = score(tmp_path / store, "b" * 12, encoded, tiny_model)
        files.append([record.files["data"].sha256 for record in out.committed().values()])
    assert num_sequences(found) == (0, 14)
    assert files[0] == files[1]


def test_only_new_sequences_are_scored_in_any_layout_of_shards(
    tmp_path: Path, tiny_model: Path
) -> None:
    """Twelve pairs in shards of four; then two of them are gone, three are new, in shards of five.

    3 x 2 sequences are new and 10 x 2 are known.
    """
    rows = spread_rows(1, 12)
    old = encode(tmp_path, "old", [rows[0:4], rows[4:8], rows[8:12]])
    score(tmp_path, "a" * 12, old, tiny_model)
    added = [{**row, "prompt_id": f"{5:032x}"} for row in random_rows(2, 3)]
    mixed = [*rows[1:6], *added, *rows[6:11]]
    new = encode(tmp_path, "new", [mixed[:5], mixed[5:10], mixed[10:]])
    out, found = score(tmp_path, "b" * 12, new, tiny_model)
    assert num_sequences(found) == (6, 20)
    anew, fresh = score(tmp_path / "elsewhere", "b" * 12, new, tiny_model)
    assert num_sequences(fresh) == (26, 0)
    assert_equal_values(out, anew)


def assert_equal_values(one: StageDir, other: StageDir) -> None:
    ours, theirs = read_rows(one), read_rows(other)
    assert [row["pair_id"] for row in ours] == [row["pair_id"] for row in theirs]
    for a, b in zip(ours, theirs, strict=True):
        for name, value in a.items():
            wanted = b[name]
            if name.startswith("ref_"):
                num_added = 60 if name.endswith("_logp") else 1
                wanted = pytest.approx(wanted, abs=TOLERANCE_NATS * num_added)
            assert value == wanted, name


def test_a_known_side_is_reused_beside_a_new_one(tmp_path: Path, tiny_model: Path) -> None:
    prompt = [5, 6, 7]
    old = encode(tmp_path, "old", [[encoded_row("a", prompt, [8, 9], [10])]])
    new = encode(tmp_path, "new", [[encoded_row("b", prompt, [10], [11, 12, 13])]])
    score(tmp_path, "a" * 12, old, tiny_model)
    out, found = score(tmp_path, "b" * 12, new, tiny_model)
    assert num_sequences(found) == (1, 1)
    anew, _ = score(tmp_path / "elsewhere", "b" * 12, new, tiny_model)
    assert_equal_values(out, anew)


def test_twins_under_another_prompt_id_are_found_only_in_the_range_of_the_shard(
    tmp_path: Path, tiny_model: Path
) -> None:
    """The documented miss. Equal tokens, but the prompts as messages differ: what lies between the
    shard's lowest and highest prompt_id is read, and nothing else."""
    rows = spread_rows(1, 6)
    score(tmp_path, "a" * 12, encode(tmp_path, "a", [rows[:3], rows[3:]]), tiny_model)
    twin = {**rows[1], "prompt_id": "f" * 32}
    far = encode(tmp_path, "far", [[twin]])
    near = encode(tmp_path, "near", [[rows[0], twin]])
    assert num_sequences(
        score(tmp_path / "1", "b" * 12, far, tiny_model, reuse_from=[tmp_path])[1]
    ) == (2, 0)
    assert num_sequences(
        score(tmp_path / "2", "b" * 12, near, tiny_model, reuse_from=[tmp_path])[1]
    ) == (0, 4)


def test_the_engine_is_tried_on_a_full_sample_however_little_is_left(
    tmp_path: Path, tiny_model: Path
) -> None:
    """Of 42 sequences 40 are known; 32 are still computed both ways, and 2 count as scored."""
    rows = spread_rows(1, 21)
    score(tmp_path, "a" * 12, encode(tmp_path, "a", [rows[:20]]), tiny_model)
    _, found = score(tmp_path, "b" * 12, encode(tmp_path, "b", [rows]), tiny_model)
    assert num_sequences(found) == (2, 40)
    assert found.summary["recomputed"]["num_sequences"] == 32
    assert found.summary["num_tokens_submitted"] == sum(
        rows[20]["num_prompt_tokens"] + rows[20][f"num_{side}_tokens"] for side in SIDES
    )


def test_again_reuses_nothing(tmp_path: Path, tiny_model: Path) -> None:
    encoded = encode(tmp_path, "a", [spread_rows(1, 2)])
    score(tmp_path, "a" * 12, encoded, tiny_model)
    _, found = score(tmp_path, "a" * 12, encoded, tiny_model, attempt=2)
    assert num_sequences(found) == (4, 0)


def test_of_values_scored_twice_the_later_are_reused(tmp_path: Path, tiny_model: Path) -> None:
    encoded = encode(tmp_path, "a", [spread_rows(1, 2)])
    late = "2026-01-02T00:00:00+00:00"
    score(tmp_path, "f" * 12, encoded, tiny_model)
    score(tmp_path, "a" * 12, encoded, tiny_model, attempt=2, started_at=late)
    _, found = score(tmp_path, "b" * 12, encoded, tiny_model)
    assert found.summary["reused_from"] == {"a" * 12 + ".2": 4}


def test_another_store_is_read_where_it_is_named(tmp_path: Path, tiny_model: Path) -> None:
    encoded = encode(tmp_path, "a", [spread_rows(1, 2)])
    theirs = tmp_path / "theirs"
    score(theirs, "a" * 12, encoded, tiny_model)
    _, found = score(tmp_path / "ours", "b" * 12, encoded, tiny_model)
    assert num_sequences(found) == (4, 0)
    _, found = score(tmp_path / "third", "b" * 12, encoded, tiny_model, reuse_from=[theirs])
    assert found.summary["reused_from"] == {f"{theirs}/score/{'a' * 12}": 4}


def test_the_own_store_named_once_more_adds_nothing(tmp_path: Path, tiny_model: Path) -> None:
    encoded = encode(tmp_path, "a", [spread_rows(1, 2)])
    score(tmp_path, "a" * 12, encoded, tiny_model)
    found = find_earlier_scores(
        Folder(str(tmp_path)),
        read_reference(tmp_path),
        others=[str(tmp_path), f"{tmp_path}/encoded/.."],
        besides=Folder("elsewhere"),
    )
    assert [earlier.name for earlier in found] == ["a" * 12]


def test_a_store_behind_a_uri_is_read_like_a_local_one(tmp_path: Path, tiny_model: Path) -> None:
    encoded = encode(tmp_path, "a", [spread_rows(1, 2)])
    theirs = f"memory://{tmp_path.name}"
    score(theirs, "a" * 12, encoded, tiny_model)
    out, found = score(tmp_path, "b" * 12, encoded, tiny_model, reuse_from=[theirs])
    assert found.summary["reused_from"] == {f"{theirs}/score/{'a' * 12}": 4}
    anew, _ = score(tmp_path / "elsewhere", "b" * 12, encoded, tiny_model)
    assert read_rows(out) == read_rows(anew)


@pytest.mark.parametrize("other", ["absent", "empty"])
def test_a_store_without_values_costs_a_warning(
    tmp_path: Path, tiny_model: Path, caplog: pytest.LogCaptureFixture, other: str
) -> None:
    (tmp_path / "empty").mkdir()
    encoded = encode(tmp_path, "a", [spread_rows(1, 1)])
    place = tmp_path / other
    _, found = score(tmp_path, "a" * 12, encoded, tiny_model, reuse_from=[place])
    assert num_sequences(found) == (2, 0)
    assert f"{place} holds no values of reference" in caplog.text


class StopsAfter:
    """A mapper that loses its process after some shards."""

    def __init__(self, num_shards: int) -> None:
        self._num_shards = num_shards

    def map(
        self,
        make_worker: MakeWorker[AlignedShards],
        tasks: Sequence[AlignedShards],
        resources: Resources,
        on_done: Callable[[ShardRecord], None],
    ) -> None:
        worker = make_worker()
        for task in tasks[: self._num_shards]:
            on_done(worker(task))
        raise KeyboardInterrupt


def test_shards_of_a_score_that_never_finished_are_reused(tmp_path: Path, tiny_model: Path) -> None:
    """A score stopped after two of three shards serves one of other data."""
    rows = spread_rows(1, 6)
    encoded = encode(tmp_path, "a", [rows[:2], rows[2:4], rows[4:]])
    with pytest.raises(KeyboardInterrupt):
        score(tmp_path, "a" * 12, encoded, tiny_model, mapper=StopsAfter(2))
    other = encode(tmp_path, "b", [rows])
    _, found = score(tmp_path, "b" * 12, other, tiny_model)
    assert num_sequences(found) == (4, 8)


def test_a_resumed_stage_goes_on_and_reuses(tmp_path: Path, tiny_model: Path) -> None:
    """Its own shard is kept; of the other two, one is known from another score."""
    rows = spread_rows(1, 6)
    encoded = encode(tmp_path, "a", [rows[:2], rows[2:4], rows[4:]])
    with pytest.raises(KeyboardInterrupt):
        score(tmp_path, "a" * 12, encoded, tiny_model, mapper=StopsAfter(1))
    score(tmp_path, "b" * 12, encode(tmp_path, "b", [rows[2:4]]), tiny_model)
    out, found = score(tmp_path, "a" * 12, encoded, tiny_model)
    assert num_sequences(found) == (4 + 4, 4)
    assert found.summary["reused_from"] == {"b" * 12: 4}
    assert [row["pair_id"] for row in read_rows(out)] == [row["pair_id"] for row in rows]


# --- what must never be read ---------------------------------------------------------------------


def first_file(out: StageDir) -> Path:
    return Path(out.folder.file(out.committed()[0].files["data"].name))


def truncate(out: StageDir) -> None:
    path = first_file(out)
    path.write_bytes(path.read_bytes()[:-20])


def flip_one_bit(out: StageDir) -> None:
    path = first_file(out)
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(bytes(content))


def remove(out: StageDir) -> None:
    first_file(out).unlink()


DAMAGES = {"truncated": truncate, "one bit": flip_one_bit, "gone": remove}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_noticed_and_its_sequences_are_scored(
    tmp_path: Path, tiny_model: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    """The other file of the same score still serves its four sequences."""
    rows = spread_rows(1, 5)
    encoded = encode(tmp_path, "a", [rows[:3], rows[3:]])
    out, _ = score(tmp_path, "a" * 12, encoded, tiny_model)
    DAMAGES[damage](out)
    caplog.clear()
    new, found = score(tmp_path, "b" * 12, encoded, tiny_model)
    assert num_sequences(found) == (6, 4)
    assert found.summary["refused_in"] == {"a" * 12: 1}
    assert "part-00000" in caplog.text
    assert "are damaged or gone; their sequences were scored" in caplog.text
    anew, _ = score(tmp_path / "elsewhere", "b" * 12, encoded, tiny_model)
    assert_equal_values(new, anew)


def rewrite(out: StageDir, change: Callable[[pa.Table], pa.Table], **footer: str) -> None:
    """Change a committed file and its record alike, so that the hashes agree."""
    manifest = out.manifest()
    assert manifest is not None
    [record] = manifest.shards
    path = first_file(out)
    table = pq.read_table(path)
    kept = {**table.schema.metadata, **{k.encode(): v.encode() for k, v in footer.items()}}
    pq.write_table(change(table).replace_schema_metadata(kept), path)
    file = msgspec.structs.replace(
        record.files["data"], sha256=out.folder.sha256(record.files["data"].name)
    )
    changed = msgspec.structs.replace(record, files={**record.files, "data": file})
    content = encode_record(msgspec.structs.replace(manifest, shards=[changed]))
    out.folder.write_bytes("manifest.json", content)


def set_values(table: pa.Table, values: Callable[[list[float]], list[float]]) -> pa.Table:
    column = "ref_chosen_token_logps"
    changed = [values(row) for row in table[column].to_pylist()]
    place = table.schema.get_field_index(column)
    return table.set_column(place, table.schema.field(place), pa.array(changed, table[column].type))


FORGERIES: dict[str, tuple[Callable[[pa.Table], pa.Table], dict[str, str], str]] = {
    "a value too few": (lambda t: set_values(t, lambda v: v[1:]), {}, "values for"),
    "not finite": (lambda t: set_values(t, lambda v: [float("nan")] * len(v)), {}, "token 0: nan"),
    "above 0": (lambda t: set_values(t, lambda v: [0.5] * len(v)), {}, "0.5 nats"),
    "a row less": (lambda t: t.slice(1), {}, "its record says 2"),
    "another reference": (lambda t: t, {"dpo.reference": "0" * 12}, "values of reference 000"),
    "other columns": (lambda t: t, {"dpo.schema": "scores/1"}, "columns are those of scores/1"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_file_that_holds_something_else_than_values_is_left_alone(
    tmp_path: Path, tiny_model: Path, caplog: pytest.LogCaptureFixture, forgery: str
) -> None:
    encoded = encode(tmp_path, "a", [spread_rows(1, 2)])
    out, _ = score(tmp_path, "a" * 12, encoded, tiny_model)
    change, footer, message = FORGERIES[forgery]
    rewrite(out, change, **footer)
    _, found = score(tmp_path, "b" * 12, encoded, tiny_model)
    assert num_sequences(found) == (4, 0)
    assert message in caplog.text


def test_an_untouched_rewrite_is_reused(tmp_path: Path, tiny_model: Path) -> None:
    """The control for the forgeries above."""
    encoded = encode(tmp_path, "a", [spread_rows(1, 2)])
    out, _ = score(tmp_path, "a" * 12, encoded, tiny_model)
    rewrite(out, lambda table: table)
    _, found = score(tmp_path, "b" * 12, encoded, tiny_model)
    assert num_sequences(found) == (0, 4)


def entry_path(store: Path, fingerprint: str) -> Path:
    [path] = store.glob(f"reference/*/{fingerprint}.json")
    return path


def break_entry(store: Path) -> None:
    entry_path(store, "a" * 12).write_text("{")


def forge_entry(store: Path) -> None:
    """Twelve digits could collide; the whole identity is compared."""
    path = entry_path(store, "a" * 12)
    entry = json.loads(path.read_text())
    entry["reference"]["weights"] = "0" * 64
    path.write_text(json.dumps(entry))


def remove_entry(store: Path) -> None:
    entry_path(store, "a" * 12).unlink()


def remove_score(store: Path) -> None:
    shutil.rmtree(store / "score" / ("a" * 12))


def break_manifest(store: Path) -> None:
    (store / "score" / ("a" * 12) / "manifest.json").write_text("{")


@pytest.mark.parametrize(
    "fault", [break_entry, forge_entry, remove_entry, remove_score, break_manifest]
)
def test_an_index_that_is_wrong_costs_time_and_nothing_else(
    tmp_path: Path, tiny_model: Path, fault: Callable[[Path], None]
) -> None:
    encoded = encode(tmp_path, "a", [spread_rows(1, 2)])
    first, _ = score(tmp_path, "a" * 12, encoded, tiny_model)
    wanted = read_rows(first)
    fault(tmp_path)
    second, found = score(tmp_path, "b" * 12, encoded, tiny_model)
    assert num_sequences(found) == (4, 0)
    assert read_rows(second) == wanted


class RemovesBeforeTheSecond:
    """A mapper that deletes another store after the first shard."""

    def __init__(self, store: Path) -> None:
        self._store = store

    def map(
        self,
        make_worker: MakeWorker[AlignedShards],
        tasks: Sequence[AlignedShards],
        resources: Resources,
        on_done: Callable[[ShardRecord], None],
    ) -> None:
        worker = make_worker()
        for task in tasks:
            on_done(worker(task))
            shutil.rmtree(self._store, ignore_errors=True)


def test_a_store_that_vanishes_on_the_way_ends_the_reuse_and_not_the_stage(
    tmp_path: Path, tiny_model: Path
) -> None:
    rows = spread_rows(1, 6)
    encoded = encode(tmp_path, "a", [rows[:2], rows[2:4], rows[4:]])
    theirs = tmp_path / "theirs"
    score(theirs, "a" * 12, encoded, tiny_model)
    out, found = score(
        tmp_path / "ours",
        "b" * 12,
        encoded,
        tiny_model,
        reuse_from=[theirs],
        mapper=RemovesBeforeTheSecond(theirs),
    )
    assert num_sequences(found) == (8, 4)
    assert found.summary["refused_in"] == {f"{theirs}/score/{'a' * 12}": 2}
    anew, _ = score(tmp_path / "elsewhere", "b" * 12, encoded, tiny_model)
    assert_equal_values(out, anew)


# --- how much is read ----------------------------------------------------------------------------


class CountedReads:
    """Records the row groups and columns that are read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.values: list[int] = []
        self.ids: list[int] = []
        real = pq.ParquetFile.read_row_group

        def read(table: pq.ParquetFile, group: int, columns: list[str]) -> pa.Table:
            is_values = any("logps" in name for name in columns)
            (self.values if is_values else self.ids).append(group)
            return real(table, group, columns)

        monkeypatch.setattr(pq.ParquetFile, "read_row_group", read)


def test_only_row_groups_with_the_shards_prompts_are_read(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two files of four rows in row groups of two; rows 2 and 3 are the first file's second
    group."""
    monkeypatch.setattr("stages.store.shards._ROW_GROUP_ROWS", 2)
    rows = spread_rows(1, 8)
    score(tmp_path, "a" * 12, encode(tmp_path, "a", [rows[:4], rows[4:]]), tiny_model)
    reads = CountedReads(monkeypatch)
    part = encode(tmp_path, "b", [rows[2:4]])
    _, found = score(tmp_path, "b" * 12, part, tiny_model)
    assert num_sequences(found) == (0, 4)
    assert (reads.ids, sorted(reads.values)) == ([1], [1, 1])


def test_values_are_not_read_where_nothing_is_wanted(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score(tmp_path, "a" * 12, encode(tmp_path, "a", [spread_rows(1, 3)]), tiny_model)
    reads, hashed = CountedReads(monkeypatch), count_hashes(monkeypatch)
    others = encode(tmp_path, "b", [spread_rows(2, 3)])
    _, found = score(tmp_path, "b" * 12, others, tiny_model)
    assert num_sequences(found) == (6, 0)
    assert (reads.ids, reads.values) == ([0], [])
    assert f"{tmp_path}/score/{'a' * 12}" not in hashed


def count_hashes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note the folder of every file that is hashed."""
    hashed: list[str] = []
    real = Folder.sha256

    def hash_counted(folder: Folder, name: str) -> str:
        hashed.append(folder.uri)
        return real(folder, name)

    monkeypatch.setattr(Folder, "sha256", hash_counted)
    return hashed


def test_a_file_is_hashed_once_a_worker(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = spread_rows(1, 6)
    score(tmp_path, "a" * 12, encode(tmp_path, "a", [rows]), tiny_model)
    hashed = count_hashes(monkeypatch)
    small = encode(tmp_path, "b", [[row] for row in rows])
    _, found = score(tmp_path, "b" * 12, small, tiny_model)
    assert num_sequences(found) == (0, 12)
    assert hashed.count(f"{tmp_path}/score/{'a' * 12}") == 1


def test_found_values_hold_no_other_memory(tmp_path: Path, tiny_model: Path) -> None:
    """A view into a row group would keep all of it in memory."""
    rows = spread_rows(1, 3)
    _, found = score(tmp_path, "a" * 12, encode(tmp_path, "a", [rows]), tiny_model)
    earlier = find_earlier_scores(
        Folder(str(tmp_path)), read_reference(tmp_path), besides=Folder("elsewhere")
    )
    reader = ScoreReader(scores=earlier, reference=found.summary["reference"])
    taken = reader.find(pa.Table.from_pylist(rows[:1])).logps
    assert len(taken) == 2
    assert all(values.base is None for values in taken.values())


NUM_LARGE_SHARDS = 4000
"""With 25,000 pairs each, 10^8 rows."""


def enlarge(out: StageDir) -> None:
    """Extend a manifest of two shards to NUM_LARGE_SHARDS, although only the original two exist.

    The prompt ranges of the added shards are consecutive; the original shards come last.
    """
    manifest = out.manifest()
    assert manifest is not None
    num_others = NUM_LARGE_SHARDS - len(manifest.shards)
    others = [
        msgspec.structs.replace(
            manifest.shards[0],
            index=place,
            files={
                role: msgspec.structs.replace(file, name=f"{role}/part-{place:05d}-0.parquet")
                for role, file in manifest.shards[0].files.items()
            },
            prompt_range=(f"f{place:031x}", f"f{place + 1:031x}"[:31] + "0"),
        )
        for place in range(num_others)
    ]
    real = [
        msgspec.structs.replace(record, index=num_others + place)
        for place, record in enumerate(manifest.shards)
    ]
    content = encode_record(msgspec.structs.replace(manifest, shards=others + real))
    out.folder.write_bytes("manifest.json", content)


def test_three_stores_of_a_hundred_million_rows_take_little_memory_and_two_reads(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver reads one manifest at a time and keeps the name and range of each of 12,000 files;
    a worker opens only the files that overlap its shard, and the newest score has all values of it.

    The limit of 1 KB a file is twelve times the text of name, sha256 and two ids, so that it holds
    on any Python; keeping the records and counts of the manifests would take several times more.
    Decoding a manifest for its checksum takes 3.4 KB a shard here.
    """
    rows = spread_rows(1, 6)
    encoded = encode(tmp_path, "a", [rows[:3], rows[3:]])
    for place in range(3):
        out, _ = score(
            tmp_path,
            f"{place}" * 12,
            encoded,
            tiny_model,
            attempt=place + 1,  # Nothing is reused.
            started_at=f"2026-01-0{place + 1}T00:00:00+00:00",
        )
        enlarge(out)
    reference = msgspec.json.decode(
        entry_path(tmp_path, "0" * 12).read_bytes(), type=ScoreEntry
    ).reference
    tracemalloc.start()
    earlier = find_earlier_scores(Folder(str(tmp_path)), reference, besides=Folder("elsewhere"))
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    num_files = sum(len(score.files) for score in earlier)
    assert num_files == 3 * NUM_LARGE_SHARDS
    assert kept < 1000 * num_files
    assert peak < kept + NUM_LARGE_SHARDS * 5000

    opened: list[str] = []
    real = pq.ParquetFile.__init__

    def note(table: pq.ParquetFile, source: Any, **settings: Any) -> None:
        opened.append(str(source))
        real(table, source, **settings)

    monkeypatch.setattr(pq.ParquetFile, "__init__", note)
    reader = ScoreReader(scores=earlier, reference=reference.fingerprint)
    found = reader.find(pa.Table.from_pylist(rows[1:5]))
    assert len(found.logps) == 8
    assert dict(found.num_by_score) == {"2" * 12 + ".3": 8}
    assert len(opened) == 2


def read_reference(store: Path) -> ReferenceIdentity:
    return msgspec.json.decode(entry_path(store, "a" * 12).read_bytes(), type=ScoreEntry).reference


# --- who computed it -----------------------------------------------------------------------------


def test_versions_travel_with_the_values_that_they_computed(
    tmp_path: Path, tiny_model: Path
) -> None:
    """torch 1 computes a, torch 2 reuses it in b, and c, which reuses b, still lists torch 1."""
    rows = spread_rows(1, 3)
    summaries = []
    for place, (version, num_rows) in enumerate([("1", 2), ("2", 2), ("3", 3)]):
        encoded = encode(tmp_path, str(place), [rows[:num_rows]])
        _, found = score(
            tmp_path,
            f"{place}" * 12,
            encoded,
            tiny_model,
            versions={"torch": version, "transformers": "5", "vllm": "9", "python": "3"},
            started_at=f"2026-01-0{place + 1}T00:00:00+00:00",
        )
        summaries.append(found.summary)
    one, two = ({"torch": version, "transformers": "5"} for version in "12")
    assert [summary["reused_versions"] for summary in summaries] == [[], [one], [one, two]]
    assert summaries[2]["reused_from"] == {"1" * 12: 4}


def test_a_stage_resumed_by_other_software_names_both(tmp_path: Path, tiny_model: Path) -> None:
    rows = spread_rows(1, 4)
    encoded = encode(tmp_path, "a", [rows[:2], rows[2:]])
    with pytest.raises(KeyboardInterrupt):
        score(
            tmp_path,
            "a" * 12,
            encoded,
            tiny_model,
            mapper=StopsAfter(1),
            versions={"torch": "1"},
        )
    score(tmp_path, "a" * 12, encoded, tiny_model, versions={"torch": "2"})
    _, found = score(tmp_path, "b" * 12, encoded, tiny_model, versions={"torch": "2"})
    assert found.summary["reused_versions"] == [{"torch": "1"}, {"torch": "2"}]


def test_manifests_can_be_read_back(tmp_path: Path, tiny_model: Path) -> None:
    out, _ = score(tmp_path, "a" * 12, encode(tmp_path, "a", [spread_rows(1, 2), []]), tiny_model)
    content = out.folder.read_bytes("manifest.json")
    first, second = msgspec.json.decode(content, type=Manifest).shards
    assert first.prompt_range == (f"{0:032x}", f"{1:032x}")
    assert second.prompt_range is None


def test_nothing_is_logged_when_all_is_well(
    tmp_path: Path, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoded = encode(tmp_path, "a", [spread_rows(1, 2)])
    with caplog.at_level(logging.WARNING):
        score(tmp_path, "a" * 12, encoded, tiny_model)
        score(tmp_path, "b" * 12, encoded, tiny_model)
    assert caplog.text == ""
