"""Progress within shards: workers write notes into the stage's directory, the driver shows them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec

from stages.scorers.protocol import ScoreStatistics
from stages.stage import Progress
from stages.store.filesystems import Folder
from stages.store.shards import WORK, StageDir
from stages.store.worker_logs import polling

PARTS = f"{WORK}/parts"
"""Folder of the notes; deleted with the other temporary files when the stage is finished."""
_POLL_SECONDS = 5.0


class PartDone(msgspec.Struct, frozen=True, kw_only=True):
    """Progress of a worker on one shard."""

    num_pairs: int
    """Pairs of the whole shard."""
    num_pairs_done: int
    num_pairs_scored: int
    """Pairs done, without the reused ones."""
    seconds: float
    """Seconds since the scoring of the shard began."""
    statistics: ScoreStatistics


def report_part(out: StageDir, index: int, part: PartDone) -> None:
    """Write a shard's note, replacing the previous one."""
    out.folder.child(PARTS).create()
    out.folder.write_bytes(f"{PARTS}/{index}.json", msgspec.json.encode(part))


def forget_part(out: StageDir, index: int) -> None:
    """Delete the note of a shard that was committed or has failed."""
    name = f"{PARTS}/{index}.json"
    if out.folder.exists(name):
        out.folder.delete_file(name)


@contextmanager
def shown_parts(out: StageDir, progress: Progress) -> Iterator[None]:
    """Show the progress of unfinished shards while the block runs."""
    out.folder.delete_folder(PARTS)  # Left by a killed run.

    def show() -> None:
        if parts := read_parts(out.folder):
            progress.show_parts(
                sum(part.num_pairs_done / part.num_pairs for part in parts),
                describe_parts(parts),
            )

    with polling(show, every_seconds=_POLL_SECONDS):
        yield


def read_parts(folder: Folder) -> list[PartDone]:
    """Read the workers' notes, skipping those deleted meanwhile."""
    parts = []
    for name in folder.list_files(PARTS):
        if name.startswith("."):  # Not yet renamed to its final name.
            continue
        try:
            parts.append(msgspec.json.decode(folder.read_bytes(f"{PARTS}/{name}"), type=PartDone))
        except FileNotFoundError:
            continue
    return parts


def describe_parts(parts: Sequence[PartDone]) -> str:
    """Describe the progress of the unfinished shards, and the rate of all workers together."""
    num_done, num_pairs = (
        sum(getattr(part, name) for part in parts) for name in ("num_pairs_done", "num_pairs")
    )
    speed = sum(part.num_pairs_scored / max(part.seconds, 1e-3) for part in parts)
    computed = sum(part.statistics.num_tokens_computed for part in parts)
    submitted = sum(part.statistics.num_tokens_submitted for part in parts)
    share = max(0.0, 1 - computed / max(submitted, 1))
    return (
        f"{num_done:,} of {num_pairs:,} pairs of unfinished shards, {speed:.1f} pairs/s, "
        f"{share:.0%} of tokens from shared prompts"
    )
