"""Cost of the search for reusable values in a store of 10^8 rows, before any value is read.

    python -m benchmarks.reuse_search --scores 10 --shards 4000

Makes a store of manifests (and the commit records of one interrupted score stage) without Parquet
files. The search for files, measured here, grows with the store; what a shard then reads grows only
with the overlapping files.
"""

import argparse
import pickle
import resource
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import msgspec
import pyarrow as pa

from schemas.fingerprint import ReferenceIdentity
from schemas.manifest import Counts, FileRecord, Manifest, ShardRecord, encode_record
from stages.score.reuse import REFERENCES, ScoreEntry, ScoreReader, find_earlier_scores
from stages.store.filesystems import Folder

REFERENCE = ReferenceIdentity(
    weights="0" * 64, config="1" * 64, dtype="float32", engine="vllm", scorers=1, max_length=None
)
ROWS_PER_SHARD = 25_000
COUNTS = dict.fromkeys(
    (
        "num_sequences",
        "num_sequences_scored",
        "num_sequences_reused",
        "num_tokens_submitted",
        "num_tokens_computed",
    ),
    ROWS_PER_SHARD,
)


def make_record(place: int, num_shards: int) -> ShardRecord:
    """Make a shard record for one of equal ranges of prompts."""
    step = 16**8 // num_shards
    names = {role: f"{role}/part-{place:05d}-01234567.parquet" for role in ("data", "rejected")}
    return ShardRecord(
        index=place,
        files={
            role: FileRecord(name=name, num_bytes=1, sha256="a" * 64, num_rows=ROWS_PER_SHARD)
            for role, name in names.items()
        },
        counts=Counts(num_in=ROWS_PER_SHARD, num_out=ROWS_PER_SHARD, more=COUNTS),
        seconds=1.0,
        writer="host:1",
        prompt_range=(
            f"{place * step:08x}".ljust(32, "0"),
            f"{(place + 1) * step - 1:08x}".ljust(32, "f"),
        ),
    )


def make_store(folder: Path, num_scores: int, num_shards: int) -> None:
    """Write the manifests of all scores but the last, and the commit records of the last."""
    store = Folder(str(folder))
    records = [make_record(place, num_shards) for place in range(num_shards)]
    entries = store.child(REFERENCES).child(REFERENCE.fingerprint)
    entries.create()
    for number in range(num_scores):
        name = f"{number:012x}"
        out = store.child("score").child(name)
        out.create()
        if number:
            out.write_bytes("manifest.json", encode_record(make_manifest(name, records)))
        else:
            out.child("_commits").create()
            for record in records:
                path = Path(out.file(f"_commits/part-{record.index:05d}.json"))
                path.write_bytes(encode_record(record, is_indented=False))
        entry = ScoreEntry(
            reference=REFERENCE, versions=[], inherited=[], started_at=f"2026-01-01T{number:06d}"
        )
        entries.write_bytes(f"{name}.json", msgspec.json.encode(entry))


def make_manifest(name: str, records: list[ShardRecord]) -> Manifest:
    return Manifest(
        stage="score",
        version=1,
        fingerprint=name,
        attempt=1,
        inputs={},
        config={},
        settings={},
        shards=records,
        files=[],
        counts=Counts(),
        summary={"reused_versions": []},
        versions={},
        host="",
        started_at="",
        seconds=1.0,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--scores", type=int, default=10)
    parser.add_argument("--shards", type=int, default=4000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # In another process, so that its memory is not counted.
        making = get_context("fork").Process(
            target=make_store, args=(Path(folder), given.scores, given.shards)
        )
        making.start()
        making.join()
        store = Folder(folder)
        before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        earlier = find_earlier_scores(store, REFERENCE, besides=Folder(f"{folder}/elsewhere"))
        seconds = time.process_time() - started
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        num_files = sum(len(score.files) for score in earlier)
        num_rows = given.shards * ROWS_PER_SHARD
        print(f"{given.scores} scores of {num_rows:,} rows: {num_files:,} files with values")
        print(f"driver: {seconds:.2f} s CPU, {grown:.0f} MB more at its peak")
        reader = ScoreReader(scores=earlier, reference=REFERENCE.fingerprint)
        print(f"sent to a worker: {len(pickle.dumps(reader)) / 1e6:.1f} MB")
        # The files do not exist, so the shard lies between two ranges and overlaps none.
        rows = pa.table(
            {
                "prompt_id": ["g" * 32],
                **{f"{side}_sequence_id": ["0" * 32] for side in ("chosen", "rejected")},
                **{f"num_{side}_tokens": [1] for side in ("chosen", "rejected")},
            }
        )
        started = time.process_time()
        for _ in range(10):
            reader.find(rows)
        print(f"a shard's search for its files: {(time.process_time() - started) * 100:.1f} ms CPU")


if __name__ == "__main__":
    main()
