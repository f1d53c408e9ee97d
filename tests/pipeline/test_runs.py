"""Tests of a run's pairs as one LazyFrame."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.runs import Run
from schemas.errors import ConfigError
from schemas.manifest import Counts, FileRecord, Manifest, ShardRecord
from schemas.rows import ENCODED, PAIR, RowSchema
from stages.store.filesystems import Folder
from stages.store.shards import StageOutput
from tests.pipeline.report.made_store import MadeRun

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    store = Folder(str(tmp_path_factory.mktemp("store")))
    return MadeRun(store=store, name="made", num_pairs=41).write()


def read(run: Run, stage: str) -> dict[str, dict[str, object]]:
    """Read a stage's rows from its folder, by pair_id."""
    rows = pl.read_parquet(f"{run.outputs[stage].folder.path}/data/*.parquet").to_dicts()
    return {row["pair_id"]: row for row in rows}


def copy_run(run: Run, folder: Path, *stages: str) -> Run:
    """Copy some of a run's stages, so that their files can be deleted."""
    outputs = {}
    for stage in stages:
        output = run.outputs[stage]
        shutil.copytree(output.folder.path, folder / stage)
        outputs[stage] = StageOutput(folder=Folder(str(folder / stage)), manifest=output.manifest)
    return Run(name=run.name, outputs=outputs)


def test_every_pair_has_the_values_of_every_stage(run: Run) -> None:
    """Compared row by row with the files of the stages."""
    pairs = run.pairs().collect()
    deduped, encoded, scored, evaluated = (
        read(run, stage) for stage in ("dedupe", "encode", "score", "evaluate")
    )
    assert pairs["pair_id"].to_list() == list(deduped)
    assert 0 < len(evaluated) < len(scored) == len(encoded) < len(deduped)
    for row in pairs.to_dicts():
        own = deduped[row["pair_id"]]
        for name in ("prompt_id", "split", "source", "prompt", "chosen", "rejected", "weight"):
            assert row[name] == own[name]
        assert row["score_margin"] == own["margin"]
        tokens = encoded.get(row["pair_id"], {})
        for name in ("num_prompt_tokens", "prompt_ids", "chosen_ids", "rejected_ids", "truncated"):
            assert row[name] == tokens.get(name)
        reference = scored.get(row["pair_id"], {})
        for name in ("ref_chosen_logp", "ref_rejected_logp", "ref_chosen_token_logps"):
            assert row[name] == reference.get(name)
        policy = evaluated.get(row["pair_id"], {})
        for name in ("policy_chosen_logp", "reward_chosen", "reward_rejected", "correct"):
            assert row[name] == policy.get(name)
        assert row["reward_margin"] == policy.get("margin")
        if reference:
            assert row["ref_margin"] == row["ref_chosen_logp"] - row["ref_rejected_logp"]
        if policy:
            assert row["split"] == "eval"
            assert row["policy_margin"] == row["policy_chosen_logp"] - row["policy_rejected_logp"]


def test_a_query_gives_the_rows_of_the_collected_frame(run: Run) -> None:
    """Pushing down filters, projections and limits does not change the result."""
    pairs, whole = run.pairs(), run.pairs().collect()
    wrong = pl.col("correct").not_()
    assert (
        pairs.filter(wrong).select("source").collect().equals(whole.filter(wrong).select("source"))
    )
    assert pairs.select(pl.len()).collect().item() == whole.height
    assert pairs.head(25).collect().equals(whole.head(25))
    assert pairs.slice(23, 7).collect().equals(whole.slice(23, 7))
    assert pairs.tail(3).collect().equals(whole.tail(3))
    by_source = pairs.group_by("source").agg(pl.col("ref_margin").mean()).sort("source").collect()
    expected = whole.group_by("source").agg(pl.col("ref_margin").mean()).sort("source")
    assert by_source["ref_margin"].to_list() == pytest.approx(expected["ref_margin"].to_list())


def test_only_the_needed_stages_and_shards_are_read(run: Run, tmp_path: Path) -> None:
    """The last shard's files are deleted in stages that the query does not need."""
    copied = copy_run(run, tmp_path, "dedupe", "encode", "score", "evaluate")
    expected = run.pairs().collect()
    query = copied.pairs().select("pair_id", "ref_margin")
    assert "2/41 COLUMNS" in query.explain()
    copied.pairs().collect_schema()
    for folder in ("encode", "evaluate"):
        sorted((tmp_path / folder / "data").iterdir())[-1].unlink()
    assert query.collect().equals(expected.select("pair_id", "ref_margin"))
    first_rows = copied.pairs().head(5).collect()
    assert first_rows.equals(expected.head(5))


def test_a_reference_free_run_has_no_reference_columns(run: Run) -> None:
    stages = {name: out for name, out in run.outputs.items() if name != "score"}
    pairs = Run(name="free", outputs=stages).pairs().collect()
    assert not [name for name in pairs.columns if name.startswith("ref_")]
    assert pairs["correct"].count() == len(read(run, "evaluate"))


def test_an_unfinished_run_has_the_stages_that_are_there(run: Run) -> None:
    def list_columns(*stages: str) -> list[str]:
        outputs = {stage: run.outputs[stage] for stage in stages}
        return Run(name="part", outputs=outputs).pairs().collect().columns

    text = list_columns("validate", "dedupe")
    assert {"prompt", "chosen", "rejected", "split", "source"} <= set(text)
    assert "num_prompt_tokens" not in text
    assert list_columns("validate") == text
    tokens = list_columns("validate", "dedupe", "encode")
    assert tokens[: len(text)] == text
    assert "num_prompt_tokens" in tokens
    assert "ref_margin" not in tokens
    assert {"split", "source", "ref_margin"} <= set(list_columns("encode", "score"))
    with pytest.raises(ConfigError, match="There are no pairs"):
        Run(name="none", outputs={}).pairs()


def test_rows_of_validate_stand_alone_before_dedupe_is_complete(run: Run) -> None:
    pairs = Run(name="part", outputs={"validate": run.outputs["validate"]}).pairs()
    assert pairs.select(pl.len()).collect().item() == run.manifest("validate").counts.num_out


def test_a_run_without_rows_has_columns(tmp_path: Path) -> None:
    run = MadeRun(store=Folder(str(tmp_path)), name="empty", num_pairs=0, num_steps=1).write()
    pairs = run.pairs().filter(pl.col("correct")).select("prompt", "ref_margin").collect()
    assert pairs.shape == (0, 2)


NUM_ROWS, NUM_TOKENS = 10_000, 300
"""Size of the shards in the memory test."""


def make_shards(folder: str, num_shards: int) -> dict[str, StageOutput]:
    """Describe the first shards written by `write_shards` as outputs of dedupe and encode."""

    def describe(index: int) -> ShardRecord:
        file = FileRecord(name=f"part-{index}.parquet", num_bytes=0, sha256="")
        return ShardRecord(index=index, files={"data": file}, counts=Counts(), seconds=0, writer="")

    outputs = {}
    for stage in ("dedupe", "encode"):
        manifest = Manifest(
            stage=stage,
            version=1,
            fingerprint="",
            attempt=1,
            inputs={},
            config={},
            settings={},
            shards=[describe(index) for index in range(num_shards)],
            files=[],
            counts=Counts(),
            summary={},
            versions={},
            host="",
            started_at="",
            seconds=0,
        )
        outputs[stage] = StageOutput(folder=Folder(f"{folder}/{stage}"), manifest=manifest)
    return outputs


def write_shards(folder: Path, num_shards: int) -> None:
    def fill(schema: RowSchema, given: dict[str, pa.Array]) -> pa.Table:
        empty = {c.name: pa.nulls(NUM_ROWS, c.type) for c in schema.columns}
        return pa.table({**empty, **given})

    ids = np.random.default_rng(0).integers(0, 50_000, NUM_ROWS * NUM_TOKENS, dtype=np.int32)
    offsets = pa.array(np.arange(NUM_ROWS + 1) * NUM_TOKENS, pa.int32())
    prompt_ids = pa.ListArray.from_arrays(offsets, pa.array(ids))
    for stage in ("dedupe", "encode"):
        (folder / stage).mkdir()
    for index in range(num_shards):
        pair_ids = pa.array([f"{index:04d}{row:028x}" for row in range(NUM_ROWS)])
        text = fill(PAIR, {"pair_id": pair_ids, "source": pair_ids})
        tokens = fill(ENCODED, {"pair_id": pair_ids, "prompt_ids": prompt_ids})
        pq.write_table(text, folder / f"dedupe/part-{index}.parquet")
        pq.write_table(tokens, folder / f"encode/part-{index}.parquet")


@pytest.mark.slow
def test_memory_is_bounded_by_a_shard(tmp_path: Path) -> None:
    """Twelve more shards with 12 MB of token ids each raise the peak by less than three of them."""
    script = (
        "import resource, sys\n"
        "import polars as pl\n"
        "from pipeline.pairs import scan_pairs\n"
        "from tests.pipeline.test_runs import make_shards\n"
        "pairs = scan_pairs(make_shards(sys.argv[1], int(sys.argv[2])))\n"
        "pairs.select(pl.col('prompt_ids').list.sum().sum(), pl.col('source').max())"
        ".collect(engine='streaming')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)\n"
    )
    write_shards(tmp_path, 16)
    peaks = [
        int(
            subprocess.run(
                [sys.executable, "-c", script, str(tmp_path), str(num_shards)],
                cwd=CHECKOUT,
                env={"PYTHONPATH": str(CHECKOUT), "HOME": str(tmp_path), "POLARS_MAX_THREADS": "2"},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for num_shards in (4, 16)
    ]
    assert peaks[1] - peaks[0] < 36, peaks
